// What csrc/cuda uses of CUDA, on the host: the kernel sources compile as plain C++ against this header, and a launch runs
// every thread of every block, so that sanitizers see each access. Threads are fibers that change over at barriers alone
// (emulator.cpp), or, with VLM_FUSE_EMULATE_WITH_THREADS, threads of the system for ThreadSanitizer.
//
// Stricter than a GPU where a GPU leaves things open: warp operations and barriers must be reached by every thread of the
// warp, block or cluster; a block's shared memory is poisoned before it begins and after it ends; the order of warps is
// shuffled, one warp of a launch always comes last, and lanes take turns in either direction.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }

namespace emulator {

struct Thread {
  dim3 thread, block, block_size, grid_size;
};

#if defined(VLM_FUSE_EMULATE_WITH_THREADS)
extern thread_local Thread* current;
#else
extern Thread* current;
#endif

void* shared_memory(size_t bytes);  // of the running block; ends the process where the launch gave less
int cluster_size();
int cluster_rank();
void* in_block(void* shared, int rank);

void warp_barrier();
void block_barrier();
void cluster_barrier(const char* file = __builtin_FILE(), int line = __builtin_LINE());

// Whether this barrier of the sources is the one that a test leaves out, named FILE:LINE by VLM_FUSE_EMULATOR_SKIPS.
bool left_out(const char* file, int line);

// Every lane hands in eight bytes; returns those of all 32 lanes. Valid until this lane's next call.
const uint64_t* exchange(uint64_t value);

struct Shape {
  dim3 grid, block;
  size_t shared;
  int cluster;
};
void run(const Shape& shape, const std::function<void()>& kernel);

template <class T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8, "shuffles take up to eight bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}

template <class T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

[[noreturn]] void fail(const char* why);

inline void all_lanes(unsigned mask) {
  if (mask != 0xffffffffu) fail("a warp operation for some lanes only");
}

}  // namespace emulator

// Coordinates of the running thread; grids and blocks have one dimension.
struct ThreadNumber {
  struct {
    operator unsigned() const { return emulator::current->thread.x; }
  } x;
};
struct BlockNumber {
  struct {
    operator unsigned() const { return emulator::current->block.x; }
  } x;
};
struct BlockSize {
  struct {
    operator unsigned() const { return emulator::current->block_size.x; }
  } x;
};
struct GridSize {
  struct {
    operator unsigned() const { return emulator::current->grid_size.x; }
  } x;
};
inline constexpr ThreadNumber threadIdx{};
inline constexpr BlockNumber blockIdx{};
inline constexpr BlockSize blockDim{};
inline constexpr GridSize gridDim{};

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  if (!emulator::left_out(file, line)) emulator::block_barrier();
}
inline void __syncwarp(unsigned mask = 0xffffffffu, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulator::all_lanes(mask);
  if (!emulator::left_out(file, line)) emulator::warp_barrier();
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
  emulator::all_lanes(mask);
  return emulator::from_bits<T>(emulator::exchange(emulator::to_bits(value))[source & 31]);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return __shfl_sync(mask, value, static_cast<int>(threadIdx.x % 32) ^ bits);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned offset) {
  const unsigned lane = threadIdx.x % 32;
  return __shfl_sync(mask, value, static_cast<int>(lane >= offset ? lane - offset : lane));
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned offset) {
  const unsigned lane = threadIdx.x % 32;
  return __shfl_sync(mask, value, static_cast<int>(lane + offset < 32 ? lane + offset : lane));
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  emulator::all_lanes(mask);
  const uint64_t* lanes = emulator::exchange(predicate != 0);
  unsigned bits = 0;
  for (int i = 0; i < 32; ++i) bits |= static_cast<unsigned>(lanes[i]) << i;
  return bits;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == 0xffffffffu; }

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __popcll(unsigned long long bits) { return __builtin_popcountll(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(static_cast<unsigned>(bits)); }

template <class T>
T __ldg(const T* from) {
  return *from;
}

template <class T>
T atomicAdd(T* to, T value) {
  return __atomic_fetch_add(to, value, __ATOMIC_RELAXED);
}
template <class T>
T atomicOr(T* to, T value) {
  return __atomic_fetch_or(to, value, __ATOMIC_RELAXED);
}
template <class T>
T atomicMin(T* to, T value) {
  T seen = __atomic_load_n(to, __ATOMIC_RELAXED);
  while (value < seen && !__atomic_compare_exchange_n(to, &seen, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return seen;
}
template <class T>
T atomicMax(T* to, T value) {
  T seen = __atomic_load_n(to, __ATOMIC_RELAXED);
  while (value > seen && !__atomic_compare_exchange_n(to, &seen, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return seen;
}
template <class T>
T atomicCAS(T* to, T expected, T value) {
  __atomic_compare_exchange_n(to, &expected, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return expected;
}
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

// --- the host's side -------------------------------------------------------------------------------------------------

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrComputeCapabilityMajor };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    dim3 clusterDim;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr asked, int device);
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "emulated"; }
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }

// Two blocks a processor, whatever the kernel.
template <class... Parameters>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*)(Parameters...), int, size_t) {
  *blocks = 2;
  return cudaSuccess;
}
template <class... Parameters>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, void (*)(Parameters...), const cudaLaunchConfig_t* config) {
  int processors = 0;
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, 0);
  *clusters = 2 * processors / static_cast<int>(config->attrs[0].val.clusterDim.x);
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments... arguments) {
  const int cluster = config->numAttrs != 0 ? static_cast<int>(config->attrs[0].val.clusterDim.x) : 1;
  if (config->gridDim.x == 0 || config->blockDim.x % 32 != 0 || config->blockDim.x > 1024) return cudaErrorInvalidValue;
  if (config->gridDim.x % static_cast<unsigned>(cluster) != 0 || cluster > 8) return cudaErrorInvalidValue;
  // every thread gets copies of the arguments, as on a GPU
  emulator::run({config->gridDim, config->blockDim, config->dynamicSmemBytes, cluster}, [=] { kernel(arguments...); });
  return cudaSuccess;
}
