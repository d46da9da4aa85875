// The part of the DLPack 1.x C ABI (https://dmlc.github.io/dlpack) that the bindings use: plain tensors and the
// exchange table that a framework hangs on its tensor type. Layouts are fixed by the major version.
#pragma once

#include <cstdint>

namespace dlpack {

constexpr uint32_t kMajorVersion = 1;

constexpr int32_t kCPU = 1, kCUDA = 2;  // DLDeviceType

enum DataTypeCode : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kBool = 6 };

struct Version {
  uint32_t major;
  uint32_t minor;
};

struct Device {
  int32_t device_type;
  int32_t device_id;
};

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements
  uint64_t byte_offset;
};

struct ExchangeHeader {
  Version version;
  ExchangeHeader* prev_api;  // an older table, for consumers that do not know this one
};

struct ManagedTensorVersioned {
  Version version;
  void* manager_ctx;
  void (*deleter)(ManagedTensorVersioned*);
  uint64_t flags;
  Tensor tensor;
};

// Functions return 0, or another number with a Python error set. Members that are not used here keep their place.
struct ExchangeTable {
  ExchangeHeader header;
  int (*managed_tensor_allocator)(Tensor*, ManagedTensorVersioned**, void*, void (*)(void*, const char*, const char*));
  int (*managed_tensor_from_py_object_no_sync)(void*, ManagedTensorVersioned**);
  int (*managed_tensor_to_py_object_no_sync)(ManagedTensorVersioned*, void**);
  int (*tensor_from_py_object_no_sync)(void* object, Tensor* out);  // borrows; may be null
  int (*current_work_stream)(int32_t, int32_t, void**);
};

}  // namespace dlpack
