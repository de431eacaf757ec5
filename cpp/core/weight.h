// Arguments that every entry point shares: names for messages, sizes, checks.
#pragma once

#include <cstdint>
#include <string>

#include "core/format.h"
#include "qlora/qlora.h"

namespace qlora {

const char* to_string(qlora_dtype dtype);    // "float32", "float16", "bfloat16"
const char* to_string(qlora_format format);  // "nf4", "fp4"
int64_t size_of(qlora_dtype dtype);          // bytes of one value

inline bool is_nested(const qlora_weight_4bit& weight) { return weight.absmax_codes != nullptr; }
inline int64_t num_values(const qlora_weight_4bit& weight) { return weight.rows * weight.cols; }
inline int64_t num_blocks(const qlora_weight_4bit& weight) { return num_blocks(num_values(weight), weight.block_size); }

// Each throws Error(QLORA_INVALID_ARGUMENT) with "<op>: <argument>: expected ..., got ...".
void check_dtype(const char* op, qlora_dtype dtype);
void check_format(const char* op, qlora_format format);
void check_block_size(const char* op, int64_t block_size);
void check_weight(const char* op, const qlora_weight_4bit* weight);
void check_range(const char* op, const char* unit, int64_t begin, int64_t end, int64_t limit);
void check_rank(const char* op, int64_t rank);
void check_round_columns(const char* op, int64_t num_columns);
void check_pointer(const char* op, const char* argument, const void* pointer);

}  // namespace qlora
