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
constexpr int kChains = 4;        // sums that do not wait for each other

inline float sum_lanes(Floats x) {
  float lanes[kWidth], sum = 0.0f;
  store(lanes, x);
  for (float lane : lanes) sum += lane;
  return sum;
}

// Values of an adapter, rounded to the dtype of the activations; the first `count` of a vector.
template <qlora_dtype kType, qlora_dtype kRight>
inline Floats load_right(const AdapterProduct& product, int64_t i, int64_t count = kWidth) {
  const Floats right =
      count < kWidth ? load_partial_as<kRight>(product.right, i, count) : load_as<kRight>(product.right, i);
  return kRight == kType ? right : round_to<kType>(right);
}

// sums [kCount] = row [depth] times columns c.. of R, whose values lie in rows of R^T.
template <qlora_dtype kType, qlora_dtype kRight, int kCount>
inline void multiply_columns(const AdapterProduct& product, const float* row, int64_t c, float* sums) {
  Floats sum[kCount];
  for (Floats& one : sum) one = broadcast(0.0f);
  int64_t d = 0;
  for (; d + kWidth <= product.depth; d += kWidth) {
    const Floats x = load(row + d);
    for (int i = 0; i < kCount; ++i) {
      sum[i] = multiply_add(x, load_right<kType, kRight>(product, (c + i) * product.depth + d), sum[i]);
    }
  }
  if (d < product.depth) {
    const Floats x = load(row + d);
    for (int i = 0; i < kCount; ++i) {
      const int64_t from = (c + i) * product.depth + d;
      sum[i] = multiply_add(x, load_right<kType, kRight>(product, from, product.depth - d), sum[i]);
    }
  }
  for (int i = 0; i < kCount; ++i) sums[i] = sum_lanes(sum[i]);
}

// sums [cols] = row [depth] times R, whose transpose is stored.
template <qlora_dtype kType, qlora_dtype kRight>
inline void multiply_row_transposed(const AdapterProduct& product, const float* row, float* sums) {
  int64_t c = 0;
  for (; c + kChains <= product.cols; c += kChains) multiply_columns<kType, kRight, kChains>(product, row, c, sums + c);
  for (; c < product.cols; ++c) multiply_columns<kType, kRight, 1>(product, row, c, sums + c);
}

// sums [kVectors * kWidth] = row [depth] times columns c.. of R; of one vector `count` columns.
template <qlora_dtype kType, qlora_dtype kRight, int kVectors>
inline void multiply_vectors(const AdapterProduct& product, const float* row, int64_t c, int64_t count, float* sums) {
  Floats sum[kVectors];
  for (Floats& one : sum) one = broadcast(0.0f);
  for (int64_t d = 0; d < product.depth; ++d) {
    const Floats x = broadcast(row[d]);
    const int64_t from = d * product.cols + c;
    for (int v = 0; v < kVectors; ++v) {
      const Floats right = load_right<kType, kRight>(product, from + v * kWidth, count);
      sum[v] = multiply_add(x, right, sum[v]);
    }
  }
  for (int v = 0; v < kVectors; ++v) store(sums + v * kWidth, sum[v]);
}

// sums [cols] = row [depth] times R.
template <qlora_dtype kType, qlora_dtype kRight>
inline void multiply_row(const AdapterProduct& product, const float* row, float* sums) {
  constexpr int kCols = kChains * kWidth;
  int64_t c = 0;
  for (; c + kCols <= product.cols; c += kCols)
    multiply_vectors<kType, kRight, kChains>(product, row, c, kCols, sums + c);
  for (; c < product.cols; c += kWidth) {
    multiply_vectors<kType, kRight, 1>(product, row, c, smaller(kWidth, product.cols - c), sums + c);
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
        if (product.is_right_transposed) return multiply_row_transposed<kType, kRight>(product, row, sums);
        multiply_row<kType, kRight>(product, row, sums);
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

// Rows [row, row + rows) of left^T, as fp32 in lefts [m, kGradientRows], times columns [col, col + count) of x:
// kVectors whole vectors, or part of one.
template <qlora_dtype kType, int kVectors>
inline void gradient_tile(const AdapterGradient& gradient, const float* lefts, int64_t row, int64_t rows, int64_t col,
                          int64_t count) {
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
    for (int j = 0; j < kGradientRows; ++j) {
      const Floats left = broadcast(lefts[i * kGradientRows + j]);
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
  float* lefts = scratch(static_cast<size_t>(gradient.m * kGradientRows));
  with_dtype(gradient.dtype, [&](auto type) {
    constexpr qlora_dtype kType = decltype(type)::value;
    for (int64_t row = 0; row < gradient.rank; row += kGradientRows) {
      const int64_t rows = smaller(kGradientRows, gradient.rank - row);
      for (int64_t i = 0; i < gradient.m; ++i) {
        for (int64_t j = 0; j < kGradientRows; ++j) {
          const int64_t from = i * gradient.left_stride + row + j;
          lefts[i * kGradientRows + j] = j < rows ? load_one<kType>(gradient.left, from) : 0.0f;
        }
      }
      int64_t col = col_begin;
      for (; col + kCols <= col_end; col += kCols)
        gradient_tile<kType, kVectors>(gradient, lefts, row, rows, col, kCols);
      for (; col < col_end; col += kWidth) {
        gradient_tile<kType, 1>(gradient, lefts, row, rows, col, smaller(kWidth, col_end - col));
      }
    }
  });
}

}  // namespace
}  // namespace qlora::cpu::QLORA_LEVEL
