// The narrow products of a LoRA adapter: x A^T, dy B and dleft A by rows of the input; dA and dB by columns of x or dy.
//
// Sums run in ascending order, in fp32, an output at a time: neither ranges nor instruction sets' tiles change it, but
// for the lanes of a dot product, whose sums are added up at its end.
#pragma once

#include "cpu/scratch.h"
#include "cpu/values.h"

namespace qlora::cpu::QLORA_LEVEL {
namespace {

constexpr int kGradientRows = 4;  // rows of left^T whose sums are in registers at once

inline float sum_lanes(Floats x) {
  float lanes[kWidth], sum = 0.0f;
  store(lanes, x);
  for (float lane : lanes) sum += lane;
  return sum;
}

// sums [cols] = row [depth] times R^T's rows.
template <qlora_dtype kType>
inline void multiply_row_transposed(const AdapterProduct& product, const float* row, float* sums) {
  for (int64_t c = 0; c < product.cols; ++c) {
    Floats sum = broadcast(0.0f);
    int64_t d = 0;
    for (; d + kWidth <= product.depth; d += kWidth) {
      sum = multiply_add(load(row + d), load_as<kType>(product.right, c * product.depth + d), sum);
    }
    if (d < product.depth) {
      const Floats rest = load_partial_as<kType>(product.right, c * product.depth + d, product.depth - d);
      sum = multiply_add(load(row + d), rest, sum);
    }
    sums[c] = sum_lanes(sum);
  }
}

// The same with the rows of R.
template <qlora_dtype kType>
inline void multiply_row(const AdapterProduct& product, const float* row, float* sums) {
  for (int64_t c = 0; c < product.cols; c += kWidth) {
    const int64_t count = smaller(kWidth, product.cols - c);
    Floats sum = broadcast(0.0f);
    for (int64_t d = 0; d < product.depth; ++d) {
      const int64_t from = d * product.cols + c;
      const Floats right =
          count == kWidth ? load_as<kType>(product.right, from) : load_partial_as<kType>(product.right, from, count);
      sum = multiply_add(broadcast(row[d]), right, sum);
    }
    store(sums + c, sum);
  }
}

inline void adapter_product(const AdapterProduct& product, int64_t row_begin, int64_t row_end) {
  const int64_t row_floats = round_up(product.depth, kWidth);
  float* row = scratch(static_cast<size_t>(row_floats + round_up(product.cols, kWidth)));
  float* sums = row + row_floats;
  with_dtype(product.dtype, [&](auto type) {
    constexpr qlora_dtype kType = decltype(type)::value;
    for (int64_t i = row_begin; i < row_end; ++i) {
      for (int64_t d = 0; d < product.depth; d += kWidth) {
        load_to<kType>(product.input, i * product.input_stride + d, smaller(kWidth, product.depth - d), row + d);
      }
      with_dtype(product.right_dtype, [&](auto right_type) {
        constexpr qlora_dtype kRight = decltype(right_type)::value;
        if (product.is_right_transposed) return multiply_row_transposed<kRight>(product, row, sums);
        multiply_row<kRight>(product, row, sums);
      });
      const int64_t to = i * product.output_stride;
      for (int64_t c = 0; c < product.cols; c += kWidth) {
        const Floats value = multiply(load(sums + c), broadcast(product.scaling));
        const int64_t count = smaller(kWidth, product.cols - c);
        if (count == kWidth) {
          store_as<kType>(product.output, to + c, value);
        } else {
          store_partial_as<kType>(product.output, to + c, value, count);
        }
      }
      for (int64_t c = product.cols; c < product.output_stride; ++c) {
        store_partial_as<kType>(product.output, to + c, broadcast(0.0f), 1);
      }
    }
  });
}

// Rows [row, row + rows) of left^T times columns [col, col + count) of x: kVectors whole vectors, or part of one.
template <qlora_dtype kType, int kVectors>
inline void gradient_tile(const AdapterGradient& gradient, int64_t row, int64_t rows, int64_t col, int64_t count) {
  Floats sums[kGradientRows][kVectors];
  for (auto& of_row : sums) {
    for (Floats& sum : of_row) sum = broadcast(0.0f);
  }
  for (int64_t i = 0; i < gradient.m; ++i) {
    const int64_t from = i * gradient.cols + col;
    Floats x[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      x[v] = count < kWidth ? load_partial_as<kType>(gradient.x, from, count)
                            : load_as<kType>(gradient.x, from + v * kWidth);
    }
    for (int64_t j = 0; j < rows; ++j) {
      const Floats left = broadcast(load_one<kType>(gradient.left, i * gradient.left_stride + row + j));
      for (int v = 0; v < kVectors; ++v) sums[j][v] = multiply_add(left, x[v], sums[j][v]);
    }
  }
  with_dtype(gradient.output_dtype, [&](auto type) {
    constexpr qlora_dtype kOutput = decltype(type)::value;
    for (int64_t j = 0; j < rows; ++j) {
      float lanes[kVectors * kWidth];
      for (int v = 0; v < kVectors; ++v) store(lanes + v * kWidth, sums[j][v]);
      for (int64_t c = 0; c < count; ++c) {
        const int64_t to =
            gradient.is_output_transposed ? (col + c) * gradient.rank + row + j : (row + j) * gradient.cols + col + c;
        store_partial_as<kOutput>(gradient.output, to, broadcast(lanes[c]), 1);
      }
    }
  });
}

inline void adapter_gradient(const AdapterGradient& gradient, int64_t col_begin, int64_t col_end) {
  constexpr int kVectors = 2, kCols = kVectors * kWidth;
  with_dtype(gradient.dtype, [&](auto type) {
    constexpr qlora_dtype kType = decltype(type)::value;
    for (int64_t row = 0; row < gradient.rank; row += kGradientRows) {
      const int64_t rows = smaller(kGradientRows, gradient.rank - row);
      int64_t col = col_begin;
      for (; col + kCols <= col_end; col += kCols) gradient_tile<kType, kVectors>(gradient, row, rows, col, kCols);
      for (; col < col_end; col += kWidth) {
        gradient_tile<kType, 1>(gradient, row, rows, col, smaller(kWidth, col_end - col));
      }
    }
  });
}

}  // namespace
}  // namespace qlora::cpu::QLORA_LEVEL
