// What kernels use of the machine, beyond plain C++: warps, blocks, clusters, and loads and stores of 16 bytes.
// Every block has a whole number of warps, and every thread of a block reaches every barrier.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace vlm_fuse::cuda {

constexpr int kLanes = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ inline int lane() { return static_cast<int>(threadIdx.x % kLanes); }
__device__ inline int warp() { return static_cast<int>(threadIdx.x / kLanes); }

// Sets of lanes, a bit each.
__device__ inline unsigned lanes_below(int lane) { return (1u << lane) - 1; }  // lane < 32
__device__ inline unsigned lanes_before() { return lanes_below(lane()); }
__device__ inline unsigned lanes_upto() { return (2u << lane()) - 1; }
__device__ inline int last_lane(unsigned lanes) { return 31 - __clz(static_cast<int>(lanes)); }  // -1: none

// The block's shared memory, as the launch gave it. It holds anything at first.
template <class Shared>
__device__ Shared& shared_memory() {
#if defined(__CUDACC__)
  extern __shared__ __align__(16) unsigned char bytes[];
  return *reinterpret_cast<Shared*>(bytes);
#else
  return *static_cast<Shared*>(emulator::shared_memory(sizeof(Shared)));
#endif
}

// --- clusters: blocks of one launch that run at the same time and read each other's shared memory (sm_90 on) ---------

#if defined(__CUDACC__)
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define VLM_FUSE_CLUSTERS 1
#endif

__device__ inline int cluster_size() {
#if defined(VLM_FUSE_CLUSTERS)
  unsigned size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return static_cast<int>(size);
#else
  return 1;
#endif
}

__device__ inline int cluster_rank() {
#if defined(VLM_FUSE_CLUSTERS)
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
#else
  return 0;
#endif
}

// Every thread of every block of the cluster; what was written to shared memory before is seen after.
__device__ inline void cluster_barrier() {
#if defined(VLM_FUSE_CLUSTERS)
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
#else
  __syncthreads();
#endif
}

// The same object in the shared memory of another block of the cluster, which must not have ended.
template <class T>
__device__ T* in_block(T* shared, int rank) {
#if defined(VLM_FUSE_CLUSTERS)
  uint64_t mapped;
  asm("mapa.u64 %0, %1, %2;" : "=l"(mapped) : "l"(reinterpret_cast<uint64_t>(shared)), "r"(rank));
  return reinterpret_cast<T*>(mapped);
#else
  return shared;
#endif
}
#else
__device__ inline int cluster_size() { return emulator::cluster_size(); }
__device__ inline int cluster_rank() { return emulator::cluster_rank(); }
__device__ inline void cluster_barrier(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulator::cluster_barrier(file, line);
}
template <class T>
__device__ T* in_block(T* shared, int rank) {
  return static_cast<T*>(emulator::in_block(shared, rank));
}
#endif

// --- warps -----------------------------------------------------------------------------------------------------------

template <class T>
__device__ T warp_sum(T value) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
  return value;
}

template <class T>
__device__ T warp_max(T value) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    const T other = __shfl_xor_sync(kAllLanes, value, offset);
    value = other > value ? other : value;
  }
  return value;
}

// The sum over this lane and those before it.
template <class T>
__device__ T warp_scan(T value) {
#pragma unroll
  for (int offset = 1; offset < kLanes; offset *= 2) {
    const T before = __shfl_up_sync(kAllLanes, value, offset);
    if (lane() >= offset) value += before;
  }
  return value;
}

// --- memory ----------------------------------------------------------------------------------------------------------

// 16 bytes that nobody reads again: they need no place in the first-level cache. (Not .nc: a row may be added to in
// place.)
__device__ inline uint4 load_once(const uint4* from) {
#if defined(__CUDACC__)
  uint4 value;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(from));
  return value;
#else
  return *from;
#endif
}

}  // namespace vlm_fuse::cuda
