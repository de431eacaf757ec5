// The memory layout of DLPack 1.x and of its older form without a version: how array libraries lend memory to each
// other. Declared here, since a few structs are all that is needed; https://dmlc.github.io/dlpack describes them.
#pragma once

#include <cstdint>

namespace qlora::dlpack {

inline constexpr std::uint32_t kMajor = 1;
inline constexpr std::uint32_t kMinor = 1;

enum DeviceType : std::int32_t { kCPU = 1, kCUDA = 2, kPinned = 3 };
enum TypeCode : std::uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4 };

struct Device {
  std::int32_t type;
  std::int32_t index;
};

struct Type {
  std::uint8_t code;
  std::uint8_t bits;
  std::uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  std::int32_t num_dims;
  Type type;
  std::int64_t* shape;
  std::int64_t* strides;  // In values; null: contiguous.
  std::uint64_t byte_offset;
};

struct Managed {  // Capsule "dltensor"; "used_dltensor" once taken.
  Tensor tensor;
  void* context;
  void (*deleter)(Managed* self);
};

inline constexpr std::uint64_t kReadOnly = 1;
inline constexpr std::uint64_t kIsCopied = 2;

struct ManagedVersioned {  // Capsule "dltensor_versioned"; "used_dltensor_versioned" once taken.
  std::uint32_t major;
  std::uint32_t minor;
  void* context;
  void (*deleter)(ManagedVersioned* self);
  std::uint64_t flags;
  Tensor tensor;
};

static_assert(sizeof(void*) != 8 || (sizeof(Tensor) == 48 && sizeof(Managed) == 64 && sizeof(ManagedVersioned) == 80));

}  // namespace qlora::dlpack
