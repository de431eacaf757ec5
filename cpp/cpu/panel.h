// W [n, k] as the matrix B of gemm.h: transposed for y = x W^T, as it is for dx = dy W.
//
// Both have a way for rows that are a whole number of groups (k % 32 == 0), where every group lies in one block, and a
// slower one for any other k.
#pragma once

#include "cpu/dequantize.h"
#include "cpu/gemm.h"

namespace qlora::cpu::QLORA_LEVEL {
namespace {

// visit(i, code_of) for the codes i = 0 to 7 of a word in their order; code_of(words) has code i in the low 4 bits.
template <class Visit>
inline void for_each_code(Visit visit) {
  visit(0, [](Ints words) { return shift_right<4>(words); });
  visit(1, [](Ints words) { return words; });
  visit(2, [](Ints words) { return shift_right<12>(words); });
  visit(3, [](Ints words) { return shift_right<8>(words); });
  visit(4, [](Ints words) { return shift_right<20>(words); });
  visit(5, [](Ints words) { return shift_right<16>(words); });
  visit(6, [](Ints words) { return shift_right<28>(words); });
  visit(7, [](Ints words) { return shift_right<24>(words); });
}

inline int log2_of(int64_t power) { return __builtin_ctzll(static_cast<unsigned long long>(power)); }

// How many consecutive values of a row, from a multiple of it on, share one scale: a power of two that divides a block
// and the row, at most kDepth; 0 where rows are not whole groups.
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

  bool is_grouped() const { return per_scale != 0; }
  int words_per_scale() const { return log2_of(per_scale / 8); }  // as a shift
  // First value of a column of B; past the end, that of the last column.
  int64_t first_of(int64_t col, int64_t begin) const { return smaller(col, weight.rows - 1) * weight.cols + begin; }

  void operator()(int64_t col, int64_t begin, int64_t depth, float* space, float* panel) const {
    if (!is_grouped()) return decode_rows(col, begin, depth, space, panel);
    // The codes are transposed before they are decoded, 8 in a word.
    float* scales = space;
    float* words = space + kDepth / kGroup * kTileCols;
    load_scales<kTileCols>(col, begin, depth, scales);
    for (int c = 0; c < kTileCols; c += kWidth) load_words(col + c, begin, depth, kTileCols, words + c);
    const int shift = words_per_scale();
    for (int64_t word = 0; word < depth / 8; ++word) {
      for (int c = 0; c < kTileCols; c += kWidth) {
        const Ints codes = as_ints(load(words + word * kTileCols + c));
        const Floats scale = load(scales + (word >> shift) * kTileCols + c);
        float* to = panel + word * 8 * kTileCols + c;
        for_each_code([&](int d, auto code_of) {
          store(to + d * kTileCols, multiply(look_up(code_values, code_of(codes)), scale));
        });
      }
    }
  }

  // scales [depth / per_scale, kCols] of columns [col, col + kCols).
  template <int kCols>
  __attribute__((noinline)) void load_scales(int64_t col, int64_t begin, int64_t depth, float* scales) const {
    // Locals, since the compiler must expect its stores to change anything else.
    const int shift = log2_of(weight.block_size), step_shift = log2_of(per_scale);
    const int count = static_cast<int>(depth >> step_shift);
    const uint8_t* const codes = weight.absmax_codes;
    const float* const nested_code = weight.nested_code;
    const float* const nested_absmax = weight.nested_absmax;
    const float* const absmax = weight.absmax;
    const float offset = codes != nullptr ? *weight.nested_offset : 0.0f;
    for (int c = 0; c < kCols; ++c) {
      const int64_t first = first_of(col + c, begin);
      float* to = scales + c;
      if (codes == nullptr) {
        for (int i = 0; i < count; ++i) to[i * kCols] = absmax[(first + (int64_t{i} << step_shift)) >> shift];
      } else {
        for (int i = 0; i < count; ++i) {
          const uint64_t block = static_cast<uint64_t>((first + (int64_t{i} << step_shift)) >> shift);
          to[i * kCols] = nested_scale(nested_code[codes[block]], nested_absmax[block / kNestedBlockSize], offset);
        }
      }
    }
  }

  // words [depth / 8, stride]: the codes of columns [col, col + kWidth), 8 to a lane.
  void load_words(int64_t col, int64_t begin, int64_t depth, int stride, float* words) const {
    const uint8_t* packed[kWidth];
    for (int c = 0; c < kWidth; ++c) packed[c] = weight.packed + first_of(col + c, begin) / 2;
    for (int64_t word = 0; word < depth / 8; word += kWidth) {
      const int64_t count = smaller(kWidth, depth / 8 - word);
      Floats block[kWidth];
      if (count == kWidth) {
        for (int c = 0; c < kWidth; ++c) block[c] = as_floats(load_ints(packed[c] + word * 4));
        transpose(block);
        for (int i = 0; i < kWidth; ++i) store(words + (word + i) * stride, block[i]);
      } else {
        for (int c = 0; c < kWidth; ++c) {
          block[c] = as_floats(load_ints_partial(packed[c] + word * 4, static_cast<int>(count)));
        }
        transpose(block);
        for (int i = 0; i < count; ++i) store(words + (word + i) * stride, block[i]);
      }
    }
  }

  // Any k: fp32 rows first, then their transpose.
  void decode_rows(int64_t col, int64_t begin, int64_t depth, float* rows, float* panel) const {
    for (int c = 0; c < kTileCols; ++c) {
      const int64_t first = first_of(col + c, begin);
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
};

// B = W: a panel is kTileCols columns of W.
struct Panel {
  const qlora_weight_4bit& weight;
  Table code_values;

  explicit Panel(const qlora_weight_4bit& w) : weight(w), code_values(load_table(code_book(w.format))) {}

  bool is_grouped() const { return weight.cols % kGroup == 0; }
  int block_shift() const { return log2_of(weight.block_size); }

  void operator()(int64_t col, int64_t begin, int64_t depth, float*, float* panel) const {
    static_assert(kGroup % kTileCols == 0);  // so that a panel's row of a grouped weight lies in one block
    if (!is_grouped()) return decode_rows(col, begin, depth, panel);
    const int shift = block_shift();
    int64_t first = begin * weight.cols + col;
    for (int64_t d = 0; d < depth; ++d, first += weight.cols) {
      const Table table = scale_table(code_values, block_scale(weight, first >> shift));
      for (int c = 0; c < kTileCols; c += kWidth) {
        store(panel + d * kTileCols + c, look_up(table, load_codes(weight.packed + (first + c) / 2)));
      }
    }
  }

  void decode_rows(int64_t col, int64_t begin, int64_t depth, float* panel) const {
    const int64_t count = smaller(kTileCols, weight.cols - col);
    for (int64_t d = 0; d < depth; ++d) {
      const int64_t first = (begin + d) * weight.cols + col;
      dequantize_values<QLORA_FLOAT32>(weight, first, first + count, panel + d * kTileCols);
      for (int64_t c = count; c < kTileCols; ++c) panel[d * kTileCols + c] = 0.0f;
    }
  }
};

}  // namespace
}  // namespace qlora::cpu::QLORA_LEVEL
