#include "cuda/gemm/select.h"

#include <cstdlib>
#include <cstring>

#include "core/status.h"
#include "cuda/gemm/gemm.h"

namespace qlora {
namespace {

struct Kernel {
  const char* name;
  std::string (*supports)(const Gemm& problem, const Device& device);
  int64_t (*workspace_size)(const Gemm& problem, const Device& device);  // null: none
  void (*run)(const Gemm& problem, const Device& device, cudaStream_t stream);
};

// The first that supports the problem serves it.
constexpr Kernel kKernels[] = {
    {"skinny_sm90", supports_skinny_sm90, nullptr, skinny_sm90},
    {"wide_sm90", supports_wide_sm90, wide_sm90_workspace_size, wide_sm90},
    {"wide_grad_sm90", supports_wide_grad_sm90, wide_grad_sm90_workspace_size, wide_grad_sm90},
    {"dense", supports_dense, dense_workspace_size, dense},
    {"naive", supports_naive, nullptr, naive},
};

// QLORA_LINEAR_KERNEL=<name> leaves only that kernel, to measure or to test it. Null where it is not set.
const char* forced_kernel() {
  const char* const name = std::getenv("QLORA_LINEAR_KERNEL");
  if (name == nullptr || *name == '\0') return nullptr;
  std::string names;
  for (const Kernel& kernel : kKernels) {
    if (std::strcmp(kernel.name, name) == 0) return name;
    names += names.empty() ? kernel.name : concat(", ", kernel.name);
  }
  fail(QLORA_INVALID_ARGUMENT, "QLORA_LINEAR_KERNEL: expected one of ", names, ", got ", name);
}

// The kernel for the problem, or null; appends "\n<kernel>: <reason>" to `reasons` for each passed over.
const Kernel* find_kernel(const Gemm& problem, const Device& device, std::string& reasons) {
  const char* const forced = forced_kernel();
  for (const Kernel& kernel : kKernels) {
    const std::string reason = forced != nullptr && std::strcmp(kernel.name, forced) != 0
                                   ? concat("QLORA_LINEAR_KERNEL asks for ", forced)
                                   : kernel.supports(problem, device);
    if (reason.empty()) return &kernel;
    reasons += concat("\n", kernel.name, ": ", reason);
  }
  return nullptr;
}

const Kernel& select_kernel(const Gemm& problem, const Device& device) {
  std::string reasons;
  const Kernel* const kernel = find_kernel(problem, device, reasons);
  if (kernel == nullptr) {
    fail(QLORA_UNSUPPORTED, to_string(problem), ": expected a kernel for device ", device.index, " (sm_", device.major,
         device.minor, "), got none:", reasons);
  }
  return *kernel;
}

}  // namespace

void run_gemm(const Gemm& problem, const Device& device, cudaStream_t stream) {
  select_kernel(problem, device).run(problem, device, stream);
}

int64_t gemm_workspace_size(const Gemm& problem, const Device& device) {
  const Kernel& kernel = select_kernel(problem, device);
  return kernel.workspace_size == nullptr ? 0 : kernel.workspace_size(problem, device);
}

std::string explain_gemm(const Gemm& problem, const Device& device) {
  std::string reasons;
  const Kernel* const kernel = find_kernel(problem, device, reasons);
  return concat(to_string(problem), " on device ", device.index, " (sm_", device.major, device.minor,
                "): ", kernel == nullptr ? "no kernel" : kernel->name, reasons);
}

}  // namespace qlora
