// y = x W^T + b and dx = dy W: how each sees W [n, k] as the matrix B of gemm.h.
#pragma once

#include "cpu/dequantize.h"
#include "cpu/gemm.h"

namespace qlora::cpu::QLORA_LEVEL {
namespace {

// Lane r holds 8 codes of row r, least significant byte first: to(i, code i of each row) in ascending order.
template <class To>
inline void for_each_code(Ints words, To to) {
  to(0, shift_right<4>(words));
  to(1, words);
  to(2, shift_right<12>(words));
  to(3, shift_right<8>(words));
  to(4, shift_right<20>(words));
  to(5, shift_right<16>(words));
  to(6, shift_right<28>(words));
  to(7, shift_right<24>(words));
}

// words[i], lane r: the i-th 4 bytes of row r from rows[r] on, for i < count <= kWidth.
inline void load_words_of_rows(const uint8_t* const (&rows)[kWidth], int64_t offset, int64_t count,
                               Floats (&words)[kWidth]) {
  if (count == kWidth) {
    for (int r = 0; r < kWidth; ++r) words[r] = as_floats(load_ints(rows[r] + offset));
  } else {
    for (int r = 0; r < kWidth; ++r) {
      words[r] = as_floats(load_ints_partial(rows[r] + offset, static_cast<int>(count)));
    }
  }
  transpose(words);
}

// How many consecutive values of a row, from a multiple of it on, share one scale: a power of two that divides a block
// and the row, at most kDepth; 0 if that is less than a group, where rows are decoded one by one.
inline int64_t values_per_scale(const qlora_weight_4bit& weight) {
  if (weight.cols % kGroup != 0) return 0;
  return smaller(smaller(weight.cols & -weight.cols, weight.block_size), kDepth);
}

// B = W^T: a panel is kTileCols rows of W, transposed.
struct TransposedPanel {
  const qlora_weight_4bit& weight;
  Table code_values;
  int64_t per_scale;

  explicit TransposedPanel(const qlora_weight_4bit& w)
      : weight(w), code_values(load_table(code_book(w.format))), per_scale(values_per_scale(w)) {}

  int64_t row_of(int64_t col) const { return smaller(col, weight.rows - 1); }  // The last row fills a tile up.

  void operator()(int64_t col, int64_t begin, int64_t depth, float* rows, float* panel) const {
    if (per_scale != 0) return decode_groups(col, begin, depth, rows, panel);
    for (int c = 0; c < kTileCols; ++c) {
      const int64_t first = row_of(col + c) * weight.cols + begin;
      dequantize_values<QLORA_FLOAT32>(weight, first, first + depth, rows + c * kDepth);
    }
    for (int c = 0; c < kTileCols; c += kWidth) {
      for (int64_t d = 0; d < depth; d += kWidth) {
        Floats block[kWidth];
        for (int i = 0; i < kWidth; ++i) block[i] = load(rows + (c + i) * kDepth + d);
        transpose(block);
        for (int64_t i = 0; i < smaller(kWidth, depth - d); ++i) store(panel + (d + i) * kTileCols + c, block[i]);
      }
    }
  }

  // The codes are transposed before they are decoded, 8 in a word, and the scales beside them.
  void decode_groups(int64_t col, int64_t begin, int64_t depth, float* scales, float* panel) const {
    const int shift = __builtin_ctzll(static_cast<unsigned long long>(weight.block_size));
    const uint8_t* packed[kTileCols];
    for (int c = 0; c < kTileCols; ++c) {
      const int64_t first = row_of(col + c) * weight.cols + begin;
      packed[c] = weight.packed + first / 2;
      for (int64_t d = 0; d < depth; d += per_scale) {
        scales[d / per_scale * kTileCols + c] = block_scale(weight, (first + d) >> shift);
      }
    }
    const int words_per_scale = __builtin_ctzll(static_cast<unsigned long long>(per_scale / 8));
    for (int c = 0; c < kTileCols; c += kWidth) {
      const uint8_t* packed_rows[kWidth];
      for (int i = 0; i < kWidth; ++i) packed_rows[i] = packed[c + i];
      for (int64_t word = 0; word < depth / 8; word += kWidth) {
        const int64_t count = smaller(kWidth, depth / 8 - word);
        Floats words[kWidth];
        load_words_of_rows(packed_rows, word * 4, count, words);
        for (int64_t i = 0; i < count; ++i) {
          const Floats scale = load(scales + ((word + i) >> words_per_scale) * kTileCols + c);
          float* to = panel + (word + i) * 8 * kTileCols + c;
          for_each_code(as_ints(words[i]), [&](int d, Ints code) {
            store(to + d * kTileCols, multiply(look_up(code_values, code), scale));
          });
        }
      }
    }
  }
};

// B = W: a panel is kTileCols columns of W.
struct Panel {
  const qlora_weight_4bit& weight;
  Table code_values;

  explicit Panel(const qlora_weight_4bit& w) : weight(w), code_values(load_table(code_book(w.format))) {}

  void operator()(int64_t col, int64_t begin, int64_t depth, float*, float* panel) const {
    if (weight.cols % kGroup == 0) return decode_groups(col, begin, depth, panel);
    const int64_t count = smaller(kTileCols, weight.cols - col);
    for (int64_t d = 0; d < depth; ++d) {
      const int64_t first = (begin + d) * weight.cols + col;
      dequantize_values<QLORA_FLOAT32>(weight, first, first + count, panel + d * kTileCols);
      for (int64_t c = count; c < kTileCols; ++c) panel[d * kTileCols + c] = 0.0f;
    }
  }

  // A panel's row lies in one group, hence in one block.
  void decode_groups(int64_t col, int64_t begin, int64_t depth, float* panel) const {
    static_assert(kGroup % kTileCols == 0);
    const int shift = __builtin_ctzll(static_cast<unsigned long long>(weight.block_size));
    int64_t first = begin * weight.cols + col;
    for (int64_t d = 0; d < depth; ++d, first += weight.cols) {
      const Table table = scale_table(code_values, block_scale(weight, first >> shift));
      for (int c = 0; c < kTileCols; c += kWidth) {
        store(panel + d * kTileCols + c, look_up(table, load_codes(weight.packed + (first + c) / 2)));
      }
    }
  }
};

inline void linear(const void* x, int64_t m, qlora_dtype dtype, const qlora_weight_4bit& weight, const void* bias,
                   void* y, int64_t row_begin, int64_t row_end) {
  const Product product = {x, m, weight.cols, y, weight.rows, bias, row_begin, row_end};
  with_dtype(dtype, [&](auto type) { multiply_all<decltype(type)::value>(product, TransposedPanel(weight)); });
}

inline void linear_grad_input(const void* dy, int64_t m, qlora_dtype dtype, const qlora_weight_4bit& weight, void* dx,
                              int64_t col_begin, int64_t col_end) {
  const Product product = {dy, m, weight.rows, dx, weight.cols, nullptr, col_begin, col_end};
  with_dtype(dtype, [&](auto type) { multiply_all<decltype(type)::value>(product, Panel(weight)); });
}

}  // namespace
}  // namespace qlora::cpu::QLORA_LEVEL
