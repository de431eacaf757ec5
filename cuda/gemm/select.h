// Which linear kernel serves a problem.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>

#include "core/gemm.h"
#include "cuda/device_guard.h"

namespace qlora {

// Each throws Error(QLORA_UNSUPPORTED) where no kernel fits; the text has the problem and each kernel's first reason.
void run_gemm(const Gemm& problem, const Device& device, cudaStream_t stream);
int64_t gemm_workspace_size(const Gemm& problem, const Device& device);

// Forward problems that share their input: in one launch where a kernel can, else one after the other, with the same
// workspace, which is the largest that any of them needs.
void run_gemm_group(const Gemm* problems, int count, const Device& device, cudaStream_t stream);
int64_t gemm_group_workspace_size(const Gemm* problems, int count, const Device& device);

// "one launch by <kernel>" or "one after the other: <reason>", then what explain_gemm says of each.
std::string explain_gemm_group(const Gemm* problems, int count, const Device& device);

// The problem and the kernel that serves it, then a line "<kernel>: <reason>" for each before it in the table.
std::string explain_gemm(const Gemm& problem, const Device& device);

}  // namespace qlora
