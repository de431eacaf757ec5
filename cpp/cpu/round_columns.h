// Columns of a transposed weight rounded to NF4 in turn (see qlora.h). A tile of kWidth rows keeps its open values
// while the columns pass; products and sums are rounded separately, as on the GPU.
#pragma once

#include "cpu/quantize.h"

namespace qlora::cpu::QLORA_LEVEL {
namespace {

inline Floats subtract(Floats a, Floats b) { return add(a, as_floats(bit_xor(as_ints(b), broadcast_int(0x80000000)))); }

inline Floats load_row_tile(const float* x, int64_t i, int64_t count) {
  return count >= kWidth ? load(x + i) : load_partial_as<QLORA_FLOAT32>(x, i, count);
}

inline void store_row_tile(float* y, int64_t i, int64_t count, Floats values) {
  if (count >= kWidth) return store(y + i, values);
  store_partial_as<QLORA_FLOAT32>(y, i, values, count);
}

inline void round_columns(const ColumnRounding& problem, int64_t row_begin, int64_t row_end) {
  const NearestCode<Format::kNF4> nearest_code;
  const Table code_values = load_table(kNF4Codes);
  const int64_t num_columns = problem.num_columns;
  for (int64_t row = row_begin; row < row_end; row += kWidth) {
    const int64_t count = row_end - row;
    Floats open[QLORA_MAX_ROUND_COLUMNS];
    for (int64_t j = 0; j < num_columns; ++j) open[j] = load_row_tile(problem.values, j * problem.rows + row, count);
    for (int64_t j = 0; j < num_columns; ++j) {
      const int64_t at = j * problem.rows + row;
      const Ints codes = nearest_code(multiply(open[j], load_row_tile(problem.inverse, at, count)));
      const Floats rounded = multiply(look_up(code_values, codes), load_row_tile(problem.scales, at, count));
      const Floats before = problem.previous == nullptr ? open[j] : load_row_tile(problem.previous, at, count);
      const Floats change = subtract(before, rounded);
      store_row_tile(problem.rounded, at, count, rounded);
      store_row_tile(problem.change, at, count, change);
      const float* const coupling = problem.coupling + j * num_columns;
      for (int64_t l = j + 1; l < num_columns; ++l) open[l] = add(open[l], multiply(broadcast(coupling[l]), change));
    }
  }
}

}  // namespace
}  // namespace qlora::cpu::QLORA_LEVEL
