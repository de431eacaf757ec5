// linear.h for inputs of few rows: weights are decoded in registers, right where they are multiplied, and nothing is
// packed.
//
// The sums are those of gemm.h, step by step, so that a row's result does not depend on how many rows come with it.
#pragma once

#include "cpu/panel.h"

namespace qlora::cpu::QLORA_LEVEL {
namespace {

// kRows x this many vectors of sums fit the registers.
template <int kRows>
constexpr int kFewVectors = 4 * kRows <= kMaxFewSums   ? 4
                            : 2 * kRows <= kMaxFewSums ? 2
                                                       : 1;

struct FewRowsSpace {
  float* input;   // [kRows, kDepth]
  float* words;   // [kDepth / 8, columns], 8 codes each
  float* scales;  // [kDepth / kGroup, columns]
  float* sums;    // [kRows, columns]
  float* right;   // [rank, columns], of the update
};
inline FewRowsSpace few_rows_space() {
  constexpr size_t kMaxCols = 4 * kWidth;
  constexpr size_t kInput = kMaxFewRows * kDepth, kWords = kDepth / 8 * kMaxCols, kScales = kDepth / kGroup * kMaxCols;
  constexpr size_t kSums = kMaxFewRows * kMaxCols, kRight = kMaxRank * kMaxCols;
  float* base = scratch(kInput + kWords + kScales + kSums + kRight);
  float* sums = base + kInput + kWords + kScales;
  return {base, base + kInput, base + kInput + kWords, sums, sums + kSums};
}

template <int kRows, int kVectors>
struct Sums {
  Floats sum[kRows][kVectors];

  void clear() {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[r][v] = broadcast(0.0f);
    }
  }
  void add_to(float* sums, bool is_first) const {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        float* to = sums + (r * kVectors + v) * kWidth;
        store(to, is_first ? sum[r][v] : add(load(to), sum[r][v]));
      }
    }
  }
};

// packed [kRows, kDepth] = columns [begin, begin + depth) of `input` as fp32.
template <qlora_dtype kType, int kRows>
inline void load_few_rows(const void* input, int64_t row_length, int64_t begin, int64_t depth, float* packed) {
  for (int r = 0; r < kRows; ++r) {
    const int64_t from = r * row_length + begin;
    for (int64_t d = 0; d < depth; d += kWidth) {
      load_to<kType>(input, from + d, smaller(kWidth, depth - d), packed + r * kDepth + d);
    }
  }
}

// Adds the update of columns [col, col + kVectors * kWidth) to the sums.
template <qlora_dtype kType, int kRows, int kVectors>
inline void add_update(const Product& product, const FewRowsSpace& space, int64_t col) {
  constexpr int kCols = kVectors * kWidth;
  const LowRank& term = product.update.low_rank;
  load_few_rows<kType, kRows>(term.left, term.left_stride, 0, term.rank, space.input);
  load_right<kType, kCols>(product, col, space.right);
  Sums<kRows, kVectors> sums;
  sums.clear();
  for (int64_t d = 0; d < term.rank; ++d) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const Floats value = load(space.right + d * kCols + v * kWidth);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        sums.sum[r][v] = multiply_add(broadcast(space.input[r * kDepth + d]), value, sums.sum[r][v]);
      }
    }
  }
  sums.add_to(space.sums, false);
}

// Adds rows of W to the sums: lane c of vector v is column v * kWidth + c.
template <int kRows>
__attribute__((noinline)) void add_few_rows(const FewRowsSpace& space, const TransposedPanel& weight, int64_t depth,
                                            bool is_first) {
  constexpr int kVectors = kFewVectors<kRows>, kCols = kVectors * kWidth;
  const Table code_values = weight.code_values;
  const int words_per_scale = weight.words_per_scale();
  Sums<kRows, kVectors> sums;
  sums.clear();
  for (int64_t word = 0; word < depth / 8; ++word) {
    const float* words = space.words + word * kCols;
    const float* scales = space.scales + (word >> words_per_scale) * kCols;
    const float* input = space.input + word * 8;
    for_each_code([&](int d, auto code_of) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const Ints code = code_of(as_ints(load(words + v * kWidth)));
        const Floats value = multiply(look_up(code_values, code), load(scales + v * kWidth));
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          sums.sum[r][v] = multiply_add(broadcast(input[r * kDepth + d]), value, sums.sum[r][v]);
        }
      }
    });
  }
  sums.add_to(space.sums, is_first);
}

template <qlora_dtype kType, int kRows>
inline void multiply_few_rows(const Product& product, const TransposedPanel& weight) {
  constexpr int kVectors = kFewVectors<kRows>, kCols = kVectors * kWidth;
  const FewRowsSpace space = few_rows_space();
  for (int64_t col = product.begin / kCols * kCols; col < product.end; col += kCols) {
    int64_t begin = 0;
    do {
      const int64_t depth = smaller(kDepth, product.depth - begin);
      load_few_rows<kType, kRows>(product.input, product.depth, begin, depth, space.input);
      weight.load_scales<kCols>(col, begin, depth, space.scales);
      for (int v = 0; v < kVectors; ++v) {
        weight.load_words(col + v * kWidth, begin, depth, kCols, space.words + v * kWidth);
      }
      add_few_rows<kRows>(space, weight, depth, begin == 0);
      begin += depth;
    } while (begin < product.depth);
    if (has_update(product)) add_update<kType, kRows, kVectors>(product, space, col);
    write_tile<kType>(product, space.sums, 0, kRows, col, kCols);
  }
}

// The same for columns of W, whose rows hold the lanes next to each other.
template <int kRows, bool kHasOneScale>
__attribute__((noinline)) void add_few_rows(const FewRowsSpace& space, const Panel& panel, int64_t col, int64_t begin,
                                            int64_t depth, bool is_first) {
  constexpr int kVectors = kFewVectors<kRows>;
  constexpr int kAhead = 8;  // Rows to prefetch; 8, 24 and 48 measured alike (EPYC Zen 4, 4096 x 4096).
  const qlora_weight_4bit& weight = panel.weight;
  const int shift = panel.block_shift();
  int64_t offset[kVectors];  // Vectors past the last column repeat it; they are not written.
  for (int v = 0; v < kVectors; ++v) offset[v] = smaller(col + v * kWidth, weight.cols - kWidth);
  Sums<kRows, kVectors> sums;
  sums.clear();
  int64_t first = begin * weight.cols;
  for (int64_t d = 0; d < depth; ++d, first += weight.cols) {
    Table table = panel.code_values;
    if constexpr (kHasOneScale) table = scale_table(table, block_scale(weight, (first + offset[0]) >> shift));
    __builtin_prefetch(weight.packed + (first + offset[0] + kAhead * weight.cols) / 2);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const int64_t i = first + offset[v];
      if constexpr (!kHasOneScale) table = scale_table(panel.code_values, block_scale(weight, i >> shift));
      const Floats value = look_up(table, load_codes(weight.packed + i / 2));
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        sums.sum[r][v] = multiply_add(broadcast(space.input[r * kDepth + d]), value, sums.sum[r][v]);
      }
    }
  }
  sums.add_to(space.sums, is_first);
}

template <qlora_dtype kType, int kRows>
inline void multiply_few_rows(const Product& product, const Panel& panel) {
  constexpr int kVectors = kFewVectors<kRows>, kCols = kVectors * kWidth;
  const FewRowsSpace space = few_rows_space();
  const bool has_one_scale = values_per_scale(panel.weight) >= kCols;
  for (int64_t col = product.begin / kCols * kCols; col < product.end; col += kCols) {
    int64_t begin = 0;
    do {
      const int64_t depth = smaller(kDepth, product.depth - begin);
      load_few_rows<kType, kRows>(product.input, product.depth, begin, depth, space.input);
      if (has_one_scale) {
        add_few_rows<kRows, true>(space, panel, col, begin, depth, begin == 0);
      } else {
        add_few_rows<kRows, false>(space, panel, col, begin, depth, begin == 0);
      }
      begin += depth;
    } while (begin < product.depth);
    if (has_update(product)) add_update<kType, kRows, kVectors>(product, space, col);
    write_tile<kType>(product, space.sums, 0, kRows, col, kCols);
  }
}

// For at most kMaxFewRows rows and a grouped weight.
template <qlora_dtype kType, int kRows = kMaxFewRows, class B>
inline void multiply_few(const Product& product, const B& b) {
  if (product.m == kRows) return multiply_few_rows<kType, kRows>(product, b);
  if constexpr (kRows > 1) multiply_few<kType, kRows - 1>(product, b);
}

}  // namespace
}  // namespace qlora::cpu::QLORA_LEVEL
