// output [m, cols] = input [m, depth] B [depth, cols] + left [m, rank] R [rank, cols] + bias, where B is decoded from 4
// bits panel by panel, and left R is the update of a LoRA adapter, if there is one.
//
//   for each strip of kMaxCols columns, and of at most kMaxRows rows:
//     for each kDepth of the depth:
//       pack the input: panels of kTileRows rows, [depth, kTileRows]            } these stay in the L2 cache
//       for each kTileCols columns:
//         decode B into one panel [depth, kTileCols]                            } L1 and L2
//         for each panel of the input: the register tile [kTileRows, kTileCols] } registers
//
// So a weight is decoded once for kMaxRows rows of the input, and the sums of a strip wait in scratch between depths.
// An output is the sum, over chunks of kDepth in ascending order, of each chunk's sum in ascending order; the update is
// one more chunk, the last. Neither the
// range of columns nor the other rows of the input change it.
#pragma once

#include "core/low_rank.h"
#include "cpu/scratch.h"
#include "cpu/values.h"

namespace qlora::cpu::QLORA_LEVEL {
namespace {

constexpr int kTileCols = kTileVectors * kWidth;
constexpr int kDepth = 256;
constexpr int kMaxRows = 240;
constexpr int kMaxCols = 256;
static_assert(kMaxRows % kTileRows == 0 && kMaxCols % kTileCols == 0 && kTileRows <= kWidth);
static_assert(kMaxRank <= kDepth);

struct Update {
  LowRank low_rank;
  bool is_transposed;  // right is [cols, rank], else [rank, cols]
};

struct Product {
  const void* input;  // [m, depth]
  int64_t m;
  int64_t depth;
  void* output;  // [m, cols]
  int64_t cols;
  const void* bias;  // [cols] or null
  int64_t begin;     // Only columns [begin, end) of the output are written.
  int64_t end;
  Update update;
};

inline bool has_update(const Product& product) { return product.update.low_rank.rank > 0; }

// panel [rank, kCols] = R[:, col:col + kCols] rounded to kType, zeros past the last column.
template <qlora_dtype kType, int kCols>
inline void load_right(const Product& product, int64_t col, float* panel) {
  const LowRank& term = product.update.low_rank;
  const int64_t count = smaller(kCols, product.cols - col);
  with_dtype(term.right_dtype, [&](auto type) {
    constexpr qlora_dtype kRight = decltype(type)::value;
    for (int64_t d = 0; d < term.rank; ++d) {
      float* row = panel + d * kCols;
      for (int64_t c = count; c < kCols; ++c) row[c] = 0.0f;
      for (int64_t c = 0; c < count; c += product.update.is_transposed ? 1 : kWidth) {
        if (product.update.is_transposed) {
          row[c] = load_one<kRight>(term.right, (col + c) * term.rank + d);
        } else {
          load_to<kRight>(term.right, d * product.cols + col + c, smaller(kWidth, count - c), row + c);
        }
      }
      for (int c = 0; c < kCols; c += kWidth) store(row + c, round_to<kType>(load(row + c)));
    }
  });
}

// Where each piece of a thread's scratch lies.
struct Workspace {
  float* input;  // [kMaxRows / kTileRows, kDepth, kTileRows], and a vector that the last store may overrun
  float* panel;  // [kDepth, kTileCols]
  float* rows;   // [kTileCols, kDepth], for the decoder
  float* sums;   // [kMaxCols / kTileCols, kMaxRows, kTileCols]
};
inline Workspace workspace() {
  constexpr size_t kInput = kMaxRows * kDepth + 64, kPanel = kDepth * kTileCols, kSums = kMaxRows * kMaxCols;
  float* base = scratch(kInput + 2 * kPanel + kSums);
  return {base, base + kInput, base + kInput + kPanel, base + kInput + 2 * kPanel};
}

// sums [kRows, kTileCols] = (is_first ? 0 : sums) + input [depth, kTileRows]^T panel [depth, kTileCols].
template <int kRows>
__attribute__((noinline)) void multiply_tile(const float* input, const float* panel, int64_t depth, bool is_first,
                                             float* sums) {
  Floats sum[kRows][kTileVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) sum[r][v] = broadcast(0.0f);
  }
  for (int64_t d = 0; d < depth; ++d) {
    Floats column[kTileVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) column[v] = load(panel + d * kTileCols + v * kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Floats x = broadcast(input[d * kTileRows + r]);
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) sum[r][v] = multiply_add(x, column[v], sum[r][v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) {
      float* to = sums + r * kTileCols + v * kWidth;
      store(to, is_first ? sum[r][v] : add(load(to), sum[r][v]));
    }
  }
}

template <int kRows = kTileRows>
inline void multiply_tile_of(int64_t rows, const float* input, const float* panel, int64_t depth, bool is_first,
                             float* sums) {
  if (rows == kRows) return multiply_tile<kRows>(input, panel, depth, is_first, sums);
  if constexpr (kRows > 1) multiply_tile_of<kRows - 1>(rows, input, panel, depth, is_first, sums);
}

// packed [ceil(rows / kTileRows), depth, kTileRows] = input rows [row, row + rows), columns [begin, begin + depth) as
// fp32. Full vectors are stored where kTileRows lanes are meant: the next store overwrites the rest.
template <qlora_dtype kType>
inline void pack_input(const void* input, int64_t row_length, int64_t row, int64_t rows, int64_t begin, int64_t depth,
                       float* packed) {
  for (int64_t first = 0; first < rows; first += kTileRows) {
    const int64_t valid = smaller(kTileRows, rows - first);
    const int64_t start = (row + first) * row_length + begin;
    for (int64_t d = 0; d < depth; d += kWidth) {
      const int64_t count = smaller(kWidth, depth - d);
      Floats block[kWidth];
      for (int r = 0; r < kWidth; ++r) {
        const int64_t from = start + r * row_length + d;
        block[r] = r >= valid        ? broadcast(0.0f)
                   : count == kWidth ? load_as<kType>(input, from)
                                     : load_partial_as<kType>(input, from, count);
      }
      transpose(block);
      float* to = packed + first * depth + d * kTileRows;
      if (count == kWidth) {
        for (int i = 0; i < kWidth; ++i) store(to + i * kTileRows, block[i]);
      } else {
        for (int i = 0; i < count; ++i) store(to + i * kTileRows, block[i]);
      }
    }
  }
}

// output[row + r, col + c] = sums [rows, cols][r][c] + bias[col + c] for the columns of the range.
template <qlora_dtype kType>
inline void write_tile(const Product& product, const float* sums, int64_t row, int64_t rows, int64_t col,
                       int64_t cols) {
  const int64_t begin = larger(col, product.begin), end = smaller(col + cols, product.end);
  for (int64_t c = begin; c < end; c += kWidth) {
    const int64_t count = smaller(kWidth, end - c);
    const bool is_full = count == kWidth;
    const bool has_bias = product.bias != nullptr;
    Floats bias = broadcast(0.0f);
    if (has_bias) bias = is_full ? load_as<kType>(product.bias, c) : load_partial_as<kType>(product.bias, c, count);
    for (int64_t r = 0; r < rows; ++r) {
      const float* from = sums + r * cols + (c - col);
      Floats value = is_full ? load(from) : load_partial_as<QLORA_FLOAT32>(from, 0, count);
      if (has_bias) value = add(value, bias);
      const int64_t to = (row + r) * product.cols + c;
      if (is_full) {
        store_as<kType>(product.output, to, value);
      } else {
        store_partial_as<kType>(product.output, to, value, count);
      }
    }
  }
}

// sums [kMaxCols / kTileCols, rows, kTileCols] of a strip (+)= packed input times the panels that decode(col) makes.
template <class Decode>
inline void multiply_strip(const Workspace& space, int64_t rows, int64_t rows_each, int64_t col, int64_t col_end,
                           int64_t depth, bool is_first, Decode decode) {
  for (int64_t c = col; c < col_end; c += kTileCols) {
    decode(c);
    float* sums = space.sums + (c - col) * rows_each;
    for (int64_t r = 0; r < rows; r += kTileRows) {
      multiply_tile_of<>(smaller(kTileRows, rows - r), space.input + r * depth, space.panel, depth, is_first,
                         sums + r * kTileCols);
    }
  }
}

// decode(col, begin, depth, rows, panel): panel [depth, kTileCols] = B[begin:begin + depth, col:col + kTileCols], where
// col is a multiple of kTileCols; columns past the end of B may hold anything finite or not. `rows` is scratch.
template <qlora_dtype kType, class Decode>
inline void multiply_all(const Product& product, Decode decode) {
  const Workspace space = workspace();
  const int64_t strips = larger(1, (product.m + kMaxRows - 1) / kMaxRows);
  const int64_t rows_each = ((product.m + strips - 1) / strips + kTileRows - 1) / kTileRows * kTileRows;
  for (int64_t col = product.begin / kTileCols * kTileCols; col < product.end; col += kMaxCols) {
    const int64_t col_end = smaller(col + kMaxCols, product.end);
    for (int64_t row = 0; row < product.m; row += rows_each) {
      const int64_t rows = smaller(rows_each, product.m - row);
      int64_t begin = 0;
      do {
        const int64_t depth = smaller(kDepth, product.depth - begin);
        pack_input<kType>(product.input, product.depth, row, rows, begin, depth, space.input);
        multiply_strip(space, rows, rows_each, col, col_end, depth, begin == 0,
                       [&](int64_t c) { decode(c, begin, depth, space.rows, space.panel); });
        begin += depth;
      } while (begin < product.depth);
      if (has_update(product)) {
        const LowRank& term = product.update.low_rank;
        pack_input<kType>(term.left, term.left_stride, row, rows, 0, term.rank, space.input);
        multiply_strip(space, rows, rows_each, col, col_end, term.rank, false,
                       [&](int64_t c) { load_right<kType, kTileCols>(product, c, space.panel); });
      }
      for (int64_t c = col; c < col_end; c += kTileCols) {
        write_tile<kType>(product, space.sums + (c - col) * rows_each, row, rows, c, kTileCols);
      }
    }
  }
}

}  // namespace
}  // namespace qlora::cpu::QLORA_LEVEL
