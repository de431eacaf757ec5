#include "core/weight.h"

#include <limits>

#include "core/status.h"

namespace qlora {

const char* to_string(qlora_dtype dtype) {
  switch (dtype) {
    case QLORA_FLOAT32:
      return "float32";
    case QLORA_FLOAT16:
      return "float16";
    case QLORA_BFLOAT16:
      return "bfloat16";
  }
  return "unknown dtype";
}

const char* to_string(qlora_format format) {
  switch (format) {
    case QLORA_NF4:
      return "nf4";
    case QLORA_FP4:
      return "fp4";
  }
  return "unknown format";
}

int64_t size_of(qlora_dtype dtype) { return dtype == QLORA_FLOAT32 ? 4 : 2; }

void check_dtype(const char* op, qlora_dtype dtype) {
  expect(dtype == QLORA_FLOAT32 || dtype == QLORA_FLOAT16 || dtype == QLORA_BFLOAT16, op,
         ": dtype: expected QLORA_FLOAT32 (0), QLORA_FLOAT16 (1) or QLORA_BFLOAT16 (2), got ", static_cast<int>(dtype));
}

void check_format(const char* op, qlora_format format) {
  expect(format == QLORA_NF4 || format == QLORA_FP4, op, ": format: expected QLORA_NF4 (0) or QLORA_FP4 (1), got ",
         static_cast<int>(format));
}

void check_block_size(const char* op, int64_t block_size) {
  expect(is_valid_block_size(block_size), op, ": block_size: expected a power of two from 32 to 4096, got ",
         block_size);
}

void check_rank(const char* op, int64_t rank) {
  expect(rank >= 1 && rank <= QLORA_MAX_RANK, op, ": rank: expected 1 to ", QLORA_MAX_RANK, ", got ", rank);
}

void check_round_columns(const char* op, int64_t num_columns) {
  expect(num_columns >= 0 && num_columns <= QLORA_MAX_ROUND_COLUMNS, op, ": num_columns: expected 0 to ",
         QLORA_MAX_ROUND_COLUMNS, ", got ", num_columns);
}

void check_pointer(const char* op, const char* argument, const void* pointer) {
  expect(pointer != nullptr, op, ": ", argument, ": expected a pointer, got null");
}

void check_range(const char* op, const char* unit, int64_t begin, int64_t end, int64_t limit) {
  expect(begin >= 0 && begin <= end && end <= limit, op, ": range of ", unit, ": expected 0 <= begin <= end <= ", limit,
         ", got [", begin, ", ", end, ")");
}

void check_weight(const char* op, const qlora_weight_4bit* weight) {
  check_pointer(op, "weight", weight);
  check_format(op, weight->format);
  check_block_size(op, weight->block_size);
  expect(weight->rows >= 0 && weight->cols >= 0, op, ": weight: expected rows and cols of at least 0, got ",
         weight->rows, " x ", weight->cols);
  expect(weight->cols == 0 || weight->rows <= std::numeric_limits<int64_t>::max() / 8 / weight->cols, op,
         ": weight: rows x cols overflows 64 bits, got ", weight->rows, " x ", weight->cols);
  if (num_values(*weight) == 0) return;
  check_pointer(op, "weight.packed", weight->packed);
  if (!is_nested(*weight)) {
    check_pointer(op, "weight.absmax (no absmax_codes given)", weight->absmax);
    return;
  }
  expect(weight->absmax == nullptr, op, ": weight: expected absmax or absmax_codes, got both");
  check_pointer(op, "weight.nested_absmax", weight->nested_absmax);
  check_pointer(op, "weight.nested_code", weight->nested_code);
  check_pointer(op, "weight.nested_offset", weight->nested_offset);
}

}  // namespace qlora
