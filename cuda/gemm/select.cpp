#include "cuda/gemm/select.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "core/status.h"
#include "cuda/gemm/gemm.h"
#include "cuda/lora/lora.h"

namespace qlora {
namespace {

struct Kernel {
  const char* name;
  bool (*supports)(const Gemm& problem, const Device& device, std::string* why_not);
  int64_t (*workspace_size)(const Gemm& problem, const Device& device);  // null: none
  void (*run)(const Gemm& problem, const Device& device, cudaStream_t stream);
  bool (*yields)(const Gemm& problem, const Device& device);  // null, or whether one further down is faster
  bool fuses_low_rank = false;                                // adds the problem's low-rank term itself
};

// On an H100 24.2 µs beside 20.9 at 16 rows of 4096 x 14336, where skinny_sm90 needs clusters of four blocks; 18.0
// beside 18.0 of 14336 x 4096, where it needs none, and 8.2 beside 9.2 of 4096 x 4096.
bool skinny_sm90_yields(const Gemm& problem, const Device& device) {
  return problem.m > 8 && problem.weight.cols > 4096 && supports_narrow_sm90(problem, device, nullptr);
}

// On an H100 in µs, wide_sm90 and dense: 14336 x 4096 102 and 139 at 512 rows, 214 and 224 at 1024, 395 and 395 at
// 2048, 788 and 758 at 4096; 4096 x 14336 103 and 140, 181 and 218, 366 and 398, 733 and 717; 4096 x 4096 37 and 40, 52
// and 63, 108 and 109, 218 and 217. Of 1024 x 4096, which has 4 tiles for 512 rows, 23 and 16, 23 and 19.
bool wide_sm90_yields(const Gemm& problem, const Device& device) {
  if (problem.m <= 256) return false;
  return (problem.m > 2048 || problem.weight.rows < 4096) && supports_dense(problem, device, nullptr);
}

// On an H100 in µs, skinny_grad_sm90 and wide_grad_sm90 at 1, 8 and 16 rows: 14336 x 4096 18.8 and 23.8, 20.5 and 24.1,
// 22.7 and 24.2; 4096 x 14336 21.4 and 25.5, 22.0 and 25.1, 25.1 and 25.7; 4096 x 4096 8.4 and 10.7, 9.5 and 11.2, 11.9
// and 11.2; 1024 x 4096 5.9 and 5.7, 7.2 and 6.5, 9.1 and 6.8. Between these sizes the bounds are a guess, and so is
// that a low-rank term, which wide_grad_sm90 adds itself, is better left to it.
bool skinny_grad_sm90_yields(const Gemm& problem, const Device& device) {
  const int64_t smallest = problem.m <= 8 ? int64_t{8} << 20 : int64_t{32} << 20;
  const bool is_slower = problem.low_rank.rank > 0 || num_values(problem.weight) < smallest;
  return is_slower && supports_wide_grad_sm90(problem, device, nullptr);
}

// On an H100 in µs, wide_grad_sm90 and dense: 14336 x 4096 105 and 133 at 512 rows, 198 and 212 at 1024, 396 and 373 at
// 2048; 4096 x 14336 120 and 153, 237 and 222, 420 and 392; 4096 x 4096 39 and 39, 57 and 60, 123 and 106.
bool wide_grad_sm90_yields(const Gemm& problem, const Device& device) {
  return problem.m > 1024 && supports_dense(problem, device, nullptr);
}

// The first that supports the problem serves it.
constexpr Kernel kKernels[] = {
    {"skinny_sm90", supports_skinny_sm90, nullptr, skinny_sm90, skinny_sm90_yields},
    {"narrow_sm90", supports_narrow_sm90, narrow_sm90_workspace_size, narrow_sm90, nullptr},
    {"wide_sm90", supports_wide_sm90, wide_sm90_workspace_size, wide_sm90, wide_sm90_yields, true},
    {"skinny_grad_sm90", supports_skinny_grad_sm90, skinny_grad_sm90_workspace_size, skinny_grad_sm90,
     skinny_grad_sm90_yields},
    {"wide_grad_sm90", supports_wide_grad_sm90, wide_grad_sm90_workspace_size, wide_grad_sm90, wide_grad_sm90_yields,
     true},
    {"skinny_sm80", supports_skinny_sm80, skinny_sm80_workspace_size, skinny_sm80, nullptr},
    {"dense", supports_dense, dense_workspace_size, dense, nullptr, true},
    {"naive", supports_naive, nullptr, naive, nullptr},
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

// The kernel for the problem, or null; appends "\n<kernel>: <reason>" for each passed over to `reasons`, if not null.
const Kernel* find_kernel(const Gemm& problem, const Device& device, std::string* reasons) {
  const char* const forced = forced_kernel();
  for (const Kernel& kernel : kKernels) {
    std::string reason;
    std::string* const why_not = reasons == nullptr ? nullptr : &reason;
    const bool is_allowed = forced == nullptr || std::strcmp(kernel.name, forced) == 0 ||
                            refuse(why_not, "QLORA_LINEAR_KERNEL asks for ", forced);
    if (is_allowed && kernel.supports(problem, device, why_not)) {
      const bool yields = forced == nullptr && kernel.yields != nullptr && kernel.yields(problem, device);
      if (!yields) return &kernel;
      refuse(why_not, "yields to one further down");
    }
    if (reasons != nullptr) *reasons += concat("\n", kernel.name, ": ", reason);
  }
  return nullptr;
}

const Kernel& select_kernel(const Gemm& problem, const Device& device) {
  const Kernel* const kernel = find_kernel(problem, device, nullptr);
  if (kernel == nullptr) {
    std::string reasons;
    find_kernel(problem, device, &reasons);
    fail(QLORA_UNSUPPORTED, to_string(problem), ": expected a kernel for device ", device.index, " (sm_", device.major,
         device.minor, "), got none:", reasons);
  }
  return *kernel;
}

// Whether the kernel that serves each of the problems serves all of them in one launch.
bool takes_group(const Gemm* problems, int count, const Device& device, std::string* why_not) {
  if (count < 2) return refuse(why_not, "expected 2 weights or more, got ", count);
  for (int i = 0; i < count; ++i) {
    const Kernel* const kernel = find_kernel(problems[i], device, nullptr);
    if (kernel == nullptr || kernel->run != skinny_sm90) {
      return refuse(why_not, "weight ", i, " is served by ", kernel == nullptr ? "no kernel" : kernel->name);
    }
  }
  return supports_skinny_sm90_group(problems, count, device, why_not);
}

}  // namespace

void run_gemm(const Gemm& problem, const Device& device, cudaStream_t stream) {
  const Kernel& kernel = select_kernel(problem, device);
  kernel.run(problem, device, stream);
  if (problem.low_rank.rank > 0 && !kernel.fuses_low_rank) add_update(problem, device, stream);
}

int64_t gemm_workspace_size(const Gemm& problem, const Device& device) {
  const Kernel& kernel = select_kernel(problem, device);
  return kernel.workspace_size == nullptr ? 0 : kernel.workspace_size(problem, device);
}

void run_gemm_group(const Gemm* problems, int count, const Device& device, cudaStream_t stream) {
  if (takes_group(problems, count, device, nullptr)) return skinny_sm90_group(problems, count, device, stream);
  for (int i = 0; i < count; ++i) run_gemm(problems[i], device, stream);
}

int64_t gemm_group_workspace_size(const Gemm* problems, int count, const Device& device) {
  if (takes_group(problems, count, device, nullptr)) return 0;
  int64_t largest = 0;
  for (int i = 0; i < count; ++i) largest = std::max(largest, gemm_workspace_size(problems[i], device));
  return largest;
}

std::string explain_gemm_group(const Gemm* problems, int count, const Device& device) {
  std::string reason;
  std::string text = takes_group(problems, count, device, &reason) ? "one launch by skinny_sm90"
                                                                   : concat("one after the other: ", reason);
  for (int i = 0; i < count; ++i) text += concat("\n", explain_gemm(problems[i], device));
  return text;
}

std::string explain_gemm(const Gemm& problem, const Device& device) {
  std::string reasons;
  const Kernel* const kernel = find_kernel(problem, device, &reasons);
  return concat(to_string(problem), " on device ", device.index, " (sm_", device.major, device.minor,
                "): ", kernel == nullptr ? "no kernel" : kernel->name, reasons);
}

}  // namespace qlora
