// The devices, for code that knows no CUDA.
#pragma once

#include <string>

namespace vlm_fuse::cuda {

using Stream = void*;  // cudaStream_t

struct Device {
  int processors = 1;
  bool clusters = false;  // sm_90 on
};

constexpr int kMostDevices = 64;

// The number of the current device, below kMostDevices.
int current_device_number();

// Of the current device; asked once for each.
const Device& current_device();

// Makes a device the current one, and the one before again.
class OnDevice {
 public:
  explicit OnDevice(int device);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_;
};

// How many devices there are, and in `reason` why there is none (no driver, ...).
int device_count(std::string* reason);

// Kernels run on the host, on its memory: a build of the tests.
bool emulated();

}  // namespace vlm_fuse::cuda
