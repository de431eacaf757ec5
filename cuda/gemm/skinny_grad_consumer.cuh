// A warp's part of skinny_grad_sm90.cu's products, and the sums of the warps and blocks that share columns.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/device/barrier.cuh"
#include "cuda/device/cluster.cuh"
#include "cuda/device/mma.cuh"
#include "cuda/device/numeric.cuh"
#include "cuda/device/pair_table.cuh"
#include "cuda/device/shared.cuh"
#include "cuda/gemm/skinny_grad_segment.cuh"
#include "cuda/gemm/wgmma_kernels.h"

namespace qlora::skinny_grad {

constexpr int kMaxCluster = 8;  // blocks in a portable cluster

#if __CUDA_ARCH__ >= 900

// A block's part of the product.
struct Item {
  int first_col;
  int part;
  int step_begin;
  int step_end;

  __device__ __forceinline__ explicit Item(const Arguments& arguments) {
    const int num_steps = (arguments.rows + kStep - 1) / kStep;
    part = static_cast<int>(blockIdx.x) % arguments.num_parts;
    first_col = static_cast<int>(blockIdx.x) / arguments.num_parts * kTileCols;
    step_begin = static_cast<int>(int64_t{num_steps} * part / arguments.num_parts);
    step_end = static_cast<int>(int64_t{num_steps} * (part + 1) / arguments.num_parts);
  }
};

template <int kTokens, bool kIsNested>
class Consumer {
 public:
  __device__ __forceinline__ Consumer(const Arguments& arguments, const Item& item, Shared<kTokens>& shared)
      : arguments_(arguments), item_(item), shared_(shared), table_(shared.table) {
    const int piece = block() * 2 + group() / 4;
    const int first = row_group() * kGroupDepths * kDepth + 2 * quad();
    const uint32_t weight = shared_address(shared.weight[0]) + group() % 4 * 4;
    even_rows_ = keep(weight + first * kTileBytes + (piece ^ first % 8) * 16);
    odd_rows_ = keep(weight + (first + 1) * kTileBytes + (piece ^ (first + 1) % 8) * 16);
    frees_stages_ = lane() == 0 || !arguments.is_weight_aligned;
    const int depth = row_group() * kGroupDepths;
    scales_ = keep(shared_address(&shared.scales[block()][depth * kDepth + quad() * 4]));
#pragma unroll
    for (int d = 0; d < kGroupDepths; ++d) {
      dy_[d] = keep(shared_address(&shared.dy[depth + d][0][dy_place(depth + d, group(), quad())]));
    }
  }

  __device__ __forceinline__ void run() {
    SegmentOperands<kTokens, kIsNested> operands(arguments_, shared_, item_.first_col);
    const int end = min(item_.step_end * kStep, arguments_.rows);
    operands.template prepare<true>(item_.step_begin * kStep, end, turn_);
    multiply_segment(item_.step_begin);
    for (int step = item_.step_begin + kSegmentSteps; step < item_.step_end; step += kSegmentSteps) {
      turn_ ^= 1;
      operands.template prepare<false>(step * kStep, end, turn_);
      follow_powers();
      multiply_segment(step);
    }
    add_and_store();
  }

 private:
  static constexpr int kTokenTiles = kTokens / 8;
  static constexpr int kVectors = kTokenTiles * 4;        // of 4 sums a lane, that are exchanged
  static constexpr int kPieces = kVectors * kTileBlocks;  // of 4 sums a lane, of a block of threads
  static constexpr int kPieceBytes = 32 * sizeof(float4);
  static constexpr int kExchangeBytes = kRowGroups * kPieces * kPieceBytes;
  static constexpr int kReceiveBytes = (kPieces + kMaxCluster - 1) * kPieceBytes;

  static __device__ __forceinline__ int lane() { return threadIdx.x % 32; }
  static __device__ __forceinline__ int group() { return lane() / 4; }
  static __device__ __forceinline__ int quad() { return lane() % 4; }
  static __device__ __forceinline__ int block() { return threadIdx.x / 32 % kTileBlocks; }
  static __device__ __forceinline__ int row_group() { return threadIdx.x / 32 / kTileBlocks; }

  // That the sums of token 2i + p of tile t are multiplied with in a segment, as a biased exponent twice over.
  __device__ __forceinline__ int power(int turn, int t, int p) const {
    return shared_.dy_power[turn][t * 8 + 2 * quad() + p] + shared_.scale_power[turn][block()];
  }

  // Sums of the segments before, in the powers of two of this one, which are no larger.
  __device__ __forceinline__ void follow_powers() {
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) {
#pragma unroll
      for (int p = 0; p < 2; ++p) {
        const float factor = power_value(max(127 + power(turn_, t, p) - power(turn_ ^ 1, t, p), 1));
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          sums_[t][j][p] *= factor;
          sums_[t][j][2 + p] *= factor;
        }
      }
    }
  }

  __device__ __forceinline__ void multiply_segment(int first_step) {
    const int num_steps = min(kSegmentSteps, item_.step_end - first_step);
#pragma unroll 1
    for (int step = 0; step < num_steps; ++step) multiply_step(step);
  }

  // Step `step` of the segment.
  __device__ __forceinline__ void multiply_step(int step) {
    const uint32_t stage = place_.stage() * static_cast<uint32_t>(sizeof(shared_.weight[0]));
    wait(shared_.full[place_.stage()], place_.parity());
    uint32_t words[kGroupDepths][4];  // of rows 2i, 2i+1, 2i+8, 2i+9
#pragma unroll
    for (int d = 0; d < kGroupDepths; ++d) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint32_t offset = stage + d * kDepth * kTileBytes + h * 8 * kTileBytes;
        words[d][2 * h] = load_shared_word(even_rows_ + offset);
        words[d][2 * h + 1] = load_shared_word(odd_rows_ + offset);
      }
    }
    __syncwarp();
    if (frees_stages_) arrive(shared_.empty[place_.stage()]);
    place_.advance();
#pragma unroll
    for (int d = 0; d < kGroupDepths; ++d) {
      const int depth = step * kStepDepths + d;
      const uint2 scales = load_shared_8_bytes(scales_ + depth * kDepth * sizeof(__half));
      uint32_t b[kTokenTiles][2];
#pragma unroll
      for (int t = 0; t < kTokenTiles; ++t) {
        const uint2 dy =
            load_shared_8_bytes(dy_[d] + (step * kStepDepths * kTokenTiles + t) * sizeof(shared_.dy[0][0]));
        b[t][0] = scale(dy.x, scales.x);
        b[t][1] = scale(dy.y, scales.y);
      }
      const uint32_t (&w)[4] = words[d];
      const uint32_t even[2] = {merge(w[0], w[1] >> 4), merge(w[2], w[3] >> 4)};
      const uint32_t odd[2] = {merge(w[0] << 4, w[1]), merge(w[2] << 4, w[3])};
      multiply_columns<0>(even, odd, b);
      multiply_columns<1>(even, odd, b);
      multiply_columns<2>(even, odd, b);
      multiply_columns<3>(even, odd, b);
    }
  }

  __device__ __forceinline__ uint32_t merge(uint32_t high, uint32_t low) const {
    return (high & high_nibbles_) | (low & ~high_nibbles_);
  }

  static __device__ __forceinline__ uint32_t scale(uint32_t dy, uint32_t scales) {
    const __half2 product = __hmul2(reinterpret_cast<const __half2&>(dy), reinterpret_cast<const __half2&>(scales));
    return reinterpret_cast<const uint32_t&>(product);
  }

  // Columns 2 kByte of each 8 as rows 0 to 7 of the product, 2 kByte + 1 as rows 8 to 15.
  template <int kByte>
  __device__ __forceinline__ void multiply_columns(const uint32_t (&even)[2], const uint32_t (&odd)[2],
                                                   const uint32_t (&b)[kTokenTiles][2]) {
    const uint32_t a[4] = {table_.template pair<kByte>(even[0]), table_.template pair<kByte>(odd[0]),
                           table_.template pair<kByte>(even[1]), table_.template pair<kByte>(odd[1])};
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) multiply_add<__half>(sums_[t][kByte], a, b[t][0], b[t][1]);
  }

  // Adds the sums of the warps that share columns, and of the blocks of a cluster, by way of the ring and of dy, which
  // all have read. Warps share powers of two, blocks do not: the sum of a part is the first that may overflow.
  __device__ __forceinline__ void add_and_store() {
    static_assert(kExchangeBytes + kReceiveBytes <= sizeof(shared_.weight) + sizeof(shared_.dy));
    if (arguments_.is_cluster) {
      __syncwarp();
      arrive_at_cluster();
    }
    float4* const exchange = reinterpret_cast<float4*>(shared_.weight) + block() * 32 + lane();
    const auto place = [&](int row_group, int vector) -> float4& {
      return exchange[(row_group * kVectors + vector) * kTileBlocks * 32];
    };
    synchronize<kConsumers>(kAllConsumers);
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) {
#pragma unroll
      for (int p = 0; p < 2; ++p) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          place(row_group(), (t * 2 + p) * 2 + c) = make_float4(sums_[t][2 * c][p], sums_[t][2 * c][2 + p],
                                                                sums_[t][2 * c + 1][p], sums_[t][2 * c + 1][2 + p]);
        }
      }
    }
    synchronize<kConsumers>(kAllConsumers);
    if (arguments_.is_cluster) {
      __syncwarp();
      wait_for_cluster();
    }
#pragma unroll
    for (int i = 0; i < kTokenTiles; ++i) {
      const int vector = row_group() * kTokenTiles + i;
      float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
      for (int r = 0; r < kRowGroups; ++r) add(sum, place(r, vector));
      restore(sum, power(turn_, vector / 4, vector / 2 % 2));
      if (arguments_.is_cluster) {
        send(vector * kTileBlocks + block(), sum);
      } else {
        store(vector * kTileBlocks + block(), sum);
      }
    }
    if (arguments_.is_cluster) {
      hand_over_to_cluster();
      take_over_from_cluster();
      for (int piece = item_.part + threadIdx.x / 32 * arguments_.num_parts; piece < kPieces;
           piece += kWarps * arguments_.num_parts) {
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        for (int part = 0; part < arguments_.num_parts; ++part) add(sum, *received(piece, part));
        store(piece, sum);
      }
    }
  }

  static __device__ __forceinline__ void add(float4& sum, const float4& v) {
    sum = make_float4(sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w);
  }

  // Takes out of a sum what a segment's powers brought into it.
  __device__ __forceinline__ void restore(float4& sum, int power) const {
    const int inverse = 254 - power;  // in two halves: its range is twice a float's
    const float first = power_value(127 + (inverse >> 1)) * arguments_.table_scale_inverse;
    const float second = power_value(127 + inverse - (inverse >> 1));
    sum = make_float4(sum.x * first * second, sum.y * first * second, sum.z * first * second, sum.w * first * second);
  }

  // A cluster's blocks take turns at the pieces: where the sums of a part lie for the one that adds them up.
  __device__ __forceinline__ float4* received(int piece, int part) const {
    unsigned char* const first = &shared_.weight[0][0] + kExchangeBytes;
    return reinterpret_cast<float4*>(first) +
           ((piece / arguments_.num_parts * arguments_.num_parts + part) * 32 + lane());
  }
  __device__ __forceinline__ void send(int piece, const float4& sum) const {
    const uint32_t target = address_in_block(shared_address(received(piece, item_.part)), piece % arguments_.num_parts);
    store_two_floats_in_block(target, sum.x, sum.y);
    store_two_floats_in_block(target + 8, sum.z, sum.w);
  }

  // By a warp: a piece of the sums, vector piece / kTileBlocks of block piece % kTileBlocks.
  __device__ __forceinline__ void store(int piece, const float4& sum) const {
    const int vector = piece / kTileBlocks;
    const int token = vector / 4 * 8 + 2 * quad() + vector / 2 % 2;
    const int col = item_.first_col + piece % kTileBlocks * kBlockCols + group() * 8 + vector % 2 * 4;
    if (token < arguments_.m && col < arguments_.cols) store(token, col, sum);
  }

  __device__ __forceinline__ void store(int token, int col, const float4& sum) const {
    const int64_t index = int64_t{token} * arguments_.cols + col;
    if (arguments_.parts != nullptr) {
      const int64_t part = int64_t{item_.part} * arguments_.m * arguments_.cols;
      *reinterpret_cast<float4*>(arguments_.parts + part + index) = sum;
      return;
    }
    const float four[4] = {sum.x, sum.y, sum.z, sum.w};
    if (arguments_.is_dx_aligned) {
      *reinterpret_cast<uint2*>(arguments_.dx + index) =
          make_uint2(Word<__nv_bfloat16>::pack(four), Word<__nv_bfloat16>::pack(four + 2));
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) arguments_.dx[index + i] = from_float<__nv_bfloat16>(four[i]);
    }
  }

  const Arguments& arguments_;
  const Item& item_;
  Shared<kTokens>& shared_;
  FixedPairTable<__half, kReservedBytes> table_;
  uint32_t even_rows_;  // shared addresses in the first stage and step: of the lane's word in row 2i, in row 2i+1
  uint32_t odd_rows_;
  uint32_t scales_;
  uint32_t high_nibbles_ = keep(0xF0F0F0F0);
  uint32_t dy_[kGroupDepths];
  bool frees_stages_;  // see count_readers
  RingPlace<kStages<kTokens>> place_;
  float sums_[kTokenTiles][4][4] = {};
  int turn_ = 0;  // of segments
};

#endif

}  // namespace qlora::skinny_grad
