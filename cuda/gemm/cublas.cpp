#include "cuda/gemm/cublas.h"

#include <dlfcn.h>

#include <map>
#include <mutex>
#include <vector>

#include "core/status.h"

namespace qlora {
namespace {

// The part of cuBLAS' C interface that is used, as its header has it; the values are the same in cuBLAS 12 and 13.
using Handle = struct CublasContext*;
using Status = int;
constexpr Status kSuccess = 0;
constexpr int kOpN = 0;
constexpr int kOpT = 1;
constexpr int kReal32F = 0;
constexpr int kReal16F = 2;
constexpr int kReal16BF = 14;
constexpr int kCompute32F = 68;
constexpr int kDefaultMath = 0;
constexpr int kMathDisallowReducedPrecisionReduction = 16;
constexpr int kGemmDefault = -1;

struct Library {
  Status (*create)(Handle*) = nullptr;
  Status (*set_stream)(Handle, cudaStream_t) = nullptr;
  Status (*set_workspace)(Handle, void*, size_t) = nullptr;
  Status (*set_math_mode)(Handle, int) = nullptr;
  Status (*set_multiprocessors)(Handle, int) = nullptr;  // null: a cuBLAS without it
  Status (*gemm)(Handle, int trans_a, int trans_b, int64_t m, int64_t n, int64_t k, const void* alpha, const void* a,
                 int type_a, int64_t lda, const void* b, int type_b, int64_t ldb, const void* beta, void* c, int type_c,
                 int64_t ldc, int compute_type, int algorithm) = nullptr;
  std::string missing;  // why it cannot be used
};

void* open_cublas(std::string& missing) {
  constexpr const char* kNames[] = {"libcublas.so.13", "libcublas.so.12"};
  for (const char* name : kNames) {  // One that is loaded already comes before one that could be.
    if (void* const library = dlopen(name, RTLD_NOW | RTLD_LOCAL | RTLD_NOLOAD)) return library;
  }
  std::string errors;
  for (const char* name : kNames) {
    if (void* const library = dlopen(name, RTLD_NOW | RTLD_LOCAL)) return library;
    const char* const error = dlerror();
    errors += concat(errors.empty() ? "" : "; ", error == nullptr ? name : error);
  }
  missing = concat("cuBLAS 12 or 13 was not found (", errors,
                   "): load torch first, or put the directory of libcublas.so on LD_LIBRARY_PATH");
  return nullptr;
}

template <typename Function>
void find_symbol(void* library, const char* name, Function*& function, std::string& missing) {
  function = reinterpret_cast<Function*>(dlsym(library, name));
  if (function == nullptr && missing.empty())
    missing = concat("cuBLAS has no ", name, ": expected version 12 or newer");
}

Library open_library() {
  Library library;
  void* const file = open_cublas(library.missing);
  if (file == nullptr) return library;
  find_symbol(file, "cublasCreate_v2", library.create, library.missing);
  find_symbol(file, "cublasSetStream_v2", library.set_stream, library.missing);
  find_symbol(file, "cublasSetWorkspace_v2", library.set_workspace, library.missing);
  find_symbol(file, "cublasSetMathMode", library.set_math_mode, library.missing);
  find_symbol(file, "cublasGemmEx_64", library.gemm, library.missing);
  std::string ignored;
  find_symbol(file, "cublasSetSmCountTarget", library.set_multiprocessors, ignored);
  return library;
}

const Library& library() {
  static const Library opened = open_library();
  return opened;
}

void check_cublas(Status status, const char* call) {
  if (status != kSuccess) fail(QLORA_CUDA_ERROR, call, ": expected success, got cuBLAS status ", status);
}

// Handles that no call is using. They are never destroyed: at process exit CUDA may be gone before them.
struct HandlePool {
  std::mutex mutex;
  std::map<int, std::vector<Handle>> free;  // by device
};

HandlePool& handle_pool() {
  static HandlePool* const pool = new HandlePool;
  return *pool;
}

// A handle for the length of a call: a handle serves one thread at a time, so a device has as many as threads ever
// called at once.
class BorrowedHandle {
 public:
  explicit BorrowedHandle(int device) : device_(device) {
    {
      HandlePool& pool = handle_pool();
      const std::lock_guard<std::mutex> lock(pool.mutex);
      std::vector<Handle>& free = pool.free[device_];
      if (!free.empty()) {
        handle_ = free.back();
        free.pop_back();
        return;
      }
    }
    check_cublas(library().create(&handle_), "cublasCreate");
    check_cublas(library().set_math_mode(handle_, kDefaultMath | kMathDisallowReducedPrecisionReduction),
                 "cublasSetMathMode");
  }
  ~BorrowedHandle() {
    try {
      HandlePool& pool = handle_pool();
      const std::lock_guard<std::mutex> lock(pool.mutex);
      pool.free[device_].push_back(handle_);
    } catch (...) {  // Out of memory: the handle is lost, the call was not.
    }
  }
  BorrowedHandle(const BorrowedHandle&) = delete;
  BorrowedHandle& operator=(const BorrowedHandle&) = delete;
  Handle get() const { return handle_; }

 private:
  int device_;
  Handle handle_ = nullptr;
};

int data_type(qlora_dtype dtype) {
  switch (dtype) {
    case QLORA_FLOAT32:
      return kReal32F;
    case QLORA_FLOAT16:
      return kReal16F;
    case QLORA_BFLOAT16:
      return kReal16BF;
  }
  fail(QLORA_INTERNAL_ERROR, "cublas_gemm: expected a checked dtype, got ", static_cast<int>(dtype));
}

}  // namespace

const std::string& cublas_missing() { return library().missing; }
bool cublas_shares_device() { return library().missing.empty() && library().set_multiprocessors != nullptr; }

void cublas_gemm(const CublasGemm& gemm, int device, void* workspace, cudaStream_t stream) {
  if (!library().missing.empty()) fail(QLORA_UNSUPPORTED, "cublas_gemm: ", library().missing);
  const BorrowedHandle handle(device);
  check_cublas(library().set_stream(handle.get(), stream),
               "cublasSetStream");  // Resets the workspace: that comes next.
  check_cublas(library().set_workspace(handle.get(), workspace, static_cast<size_t>(kCublasWorkspaceBytes)),
               "cublasSetWorkspace");
  if (library().set_multiprocessors != nullptr) {
    check_cublas(library().set_multiprocessors(handle.get(), gemm.multiprocessors), "cublasSetSmCountTarget");
  }
  const float alpha = 1.0f;
  const float beta = 0.0f;
  const int type = data_type(gemm.dtype);
  // cuBLAS is column-major: it is asked for c^T [n, m] = op(b)^T a^T, and each row-major matrix is its own transpose.
  check_cublas(library().gemm(handle.get(), gemm.is_b_transposed ? kOpT : kOpN, kOpN, gemm.n, gemm.m, gemm.k, &alpha,
                              gemm.b, type, gemm.ldb, gemm.a, type, gemm.lda, &beta, gemm.c, data_type(gemm.c_dtype),
                              gemm.ldc, kCompute32F, kGemmDefault),
               "cublasGemmEx");
}

}  // namespace qlora
