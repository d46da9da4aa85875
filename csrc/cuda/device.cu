#include <mutex>
#include <vector>

#include "device.h"
#include "launch.cuh"

namespace vlm_fuse::cuda {
namespace {

int current() {
  int device = 0;
  check(cudaGetDevice(&device), "device");
  return device;
}

int attribute(cudaDeviceAttr asked, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, asked, device), "device attribute");
  return value;
}

std::once_flag asked[kMostDevices];
Device known[kMostDevices];

}  // namespace

int current_device_number() {
  const int device = current();
  if (device < 0 || device >= kMostDevices) throw std::runtime_error("CUDA: more devices than this build knows");
  return device;
}

const Device& current_device() {
  const int device = current_device_number();
  std::call_once(asked[device], [&] {
    known[device].processors = attribute(cudaDevAttrMultiProcessorCount, device);
    known[device].clusters = attribute(cudaDevAttrComputeCapabilityMajor, device) >= 9;
  });
  return known[device];
}

OnDevice::OnDevice(int device) : before_(-1) {
  const int now = current();
  if (now == device) return;
  check(cudaSetDevice(device), "device");
  before_ = now;
}

OnDevice::~OnDevice() {
  if (before_ >= 0) cudaSetDevice(before_);
}

int device_count(std::string* reason) {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess) return count;
  cudaGetLastError();
  *reason = cudaGetErrorString(error);
  return 0;
}

bool emulated() {
#if defined(__CUDACC__)
  return false;
#else
  return true;
#endif
}

}  // namespace vlm_fuse::cuda
