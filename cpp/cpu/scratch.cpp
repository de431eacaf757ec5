#include "cpu/scratch.h"

#include <new>

namespace qlora::cpu {
namespace {

constexpr std::align_val_t kAlignment{64};

class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { ::operator delete(data_, kAlignment); }

  float* reserve(std::size_t num_floats) {
    if (num_floats > size_) {
      ::operator delete(data_, kAlignment);
      data_ = nullptr;
      size_ = 0;
      data_ = static_cast<float*>(::operator new(num_floats * sizeof(float), kAlignment));
      size_ = num_floats;
    }
    return data_;
  }

 private:
  float* data_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace

float* scratch(std::size_t num_floats) {
  thread_local Buffer buffer;
  return buffer.reserve(num_floats);
}

}  // namespace qlora::cpu
