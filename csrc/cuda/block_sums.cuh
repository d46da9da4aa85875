// Sums and the maximum over the threads of a block.
#pragma once

#include "device.cuh"

namespace vlm_fuse::cuda {

constexpr int kPlanWarps = 8;
constexpr int kPlanThreads = kPlanWarps * kLanes;
constexpr int kPlanBlocks = 3;  // that a processor runs at once
constexpr int kMostChunks = 1024;

struct Scanned {
  int64_t before;  // over the threads before this one
  int64_t total;
};

__device__ inline Scanned block_scan(int64_t value, int64_t (&of_warps)[kPlanWarps]) {
  const int64_t upto = warp_scan(value);
  if (lane() == kLanes - 1) of_warps[warp()] = upto;
  __syncthreads();
  int64_t before = 0, total = 0;
  for (int w = 0; w < kPlanWarps; ++w) {
    before += w < warp() ? of_warps[w] : 0;
    total += of_warps[w];
  }
  __syncthreads();
  return {before + upto - value, total};
}

// table[i]: the sum of the values before i, for i = 0 .. count <= kMostChunks.
template <class Value, class Sum>
__device__ void sums_before(const Value* values, int count, Sum* table, int64_t (&of_warps)[kPlanWarps]) {
  constexpr int kEach = kMostChunks / kPlanThreads;
  const int first = static_cast<int>(threadIdx.x) * kEach;
  int64_t mine[kEach], sum = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    mine[i] = first + i < count ? values[first + i] : 0;
    sum += mine[i];
  }
  const Scanned scanned = block_scan(sum, of_warps);
  sum = scanned.before;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    if (first + i < count) table[first + i] = static_cast<Sum>(sum);
    sum += mine[i];
  }
  if (threadIdx.x == 0) table[count] = static_cast<Sum>(scanned.total);
  __syncthreads();
}

__device__ inline int64_t block_max(int64_t value, int64_t (&of_warps)[kPlanWarps]) {
  value = warp_max(value);
  if (lane() == 0) of_warps[warp()] = value;
  __syncthreads();
  for (int w = 0; w < kPlanWarps; ++w) value = of_warps[w] > value ? of_warps[w] : value;
  __syncthreads();
  return value;
}

}  // namespace vlm_fuse::cuda
