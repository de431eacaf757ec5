// Operands of multiply_add (mma.cuh) from shared memory: 4 matrices of 8 rows of 8 values of 16 bits at once. Lane
// 8 j + r gives the address of row r of matrix j, 16 bytes, aligned.
#pragma once

#include <cstdint>

namespace qlora {

// Word j: columns 2i, 2i+1 of row g of matrix j, with g = lane / 4 and i = lane % 4.
__device__ __forceinline__ void load_matrices(uint32_t (&words)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address)
               : "memory");
}

// Word j: rows 2i, 2i+1 of column g of matrix j.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&words)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address)
               : "memory");
}

}  // namespace qlora
