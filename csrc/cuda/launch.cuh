// How a kernel is launched: on the caller's stream, with shared memory, and as clusters where the machine has them.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "device.h"

namespace vlm_fuse::cuda {

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // an error of the launch itself is not sticky: take it back
  throw std::runtime_error(std::string("CUDA: ") + what + ": " + cudaGetErrorString(error));
}

struct Grid {
  int64_t blocks;
  int threads;
  size_t shared = 0;  // bytes a block
  int cluster = 1;    // blocks; more than one only where has_clusters
};

// A grid as the runtime takes it; it holds the attribute that the configuration points to.
struct Configuration {
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute cluster = {};

  Configuration(const Grid& grid, Stream stream) {
    config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
    config.blockDim = dim3(static_cast<unsigned>(grid.threads));
    config.dynamicSmemBytes = grid.shared;
    config.stream = static_cast<cudaStream_t>(stream);
    if (grid.cluster == 1) return;
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = static_cast<unsigned>(grid.cluster);
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    config.attrs = &cluster;
    config.numAttrs = 1;
  }
  Configuration(const Configuration&) = delete;
  Configuration& operator=(const Configuration&) = delete;
};

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const Grid& grid, Stream stream, Arguments... arguments) {
  if (grid.blocks == 0) return;
  if (grid.blocks > INT32_MAX) throw std::runtime_error("CUDA: more blocks than a grid can have");
  const Configuration configuration(grid, stream);
  check(cudaLaunchKernelEx(&configuration.config, kernel, static_cast<Parameters>(arguments)...), "launch");
}

// Blocks of the kernel that the current device runs at the same time, whole clusters; asked once for each device. Fewer
// than its processors have room for: a cluster keeps to one group of processors, and their number need not divide.
template <auto Kernel>
int64_t blocks_at_once(int threads, size_t shared, int cluster) {
  static std::atomic<int64_t> known[kMostDevices];
  std::atomic<int64_t>& found = known[current_device_number()];
  if (found > 0) return found;
  int count = 0;
  if (cluster > 1) {
    const Configuration configuration({cluster, threads, shared, cluster}, nullptr);
    check(cudaOccupancyMaxActiveClusters(&count, Kernel, &configuration.config), "occupancy");
    count *= cluster;
  } else {
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, Kernel, threads, shared), "occupancy");
    count *= current_device().processors;
  }
  return found = count > cluster ? count : cluster;
}

}  // namespace vlm_fuse::cuda
