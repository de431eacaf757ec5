// Descriptions of matrices for copy_box (device/tensor_copy.cuh).
#pragma once

#include <cuda.h>

#include <cstdint>

namespace qlora {

// A matrix [rows, cols] of values of 1, 2 or 4 bytes at a 16-byte aligned address, a row a multiple of 16 bytes, in
// boxes of box_rows rows of box_bytes, 64, 128 or, for prefetch_box_to_l2, up to 256 values. In shared memory a box's
// rows follow each other, with the 16-byte piece p of row r at place p ^ r % 8, or of 64 bytes p ^ r / 2 % 4; what lies
// outside of the matrix is zero.
CUtensorMap describe_matrix(const void* matrix, int value_bytes, int box_bytes, int64_t rows, int64_t cols,
                            int box_rows);

}  // namespace qlora
