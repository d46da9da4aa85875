// Small kernels for tests/test_emulator.py: what csrc/cuda uses of a GPU, right and wrong. The argument names the case; the
// exit status is 0 where every value came out as it should, 1 where one did not.
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "cuda/device.cuh"
#include "cuda/launch.cuh"

using namespace vlm_fuse::cuda;

namespace {

constexpr int kThreads = 128;
constexpr unsigned kThousand = 1000;

struct Shared {
  unsigned values[kThreads];
};

// --- barriers --------------------------------------------------------------------------------------------------------

// Every thread reads what another warp wrote.
template <bool Waits>
__global__ void block_kernel(unsigned* out) {
  Shared& shared = shared_memory<Shared>();
  shared.values[threadIdx.x] = kThousand + threadIdx.x;
  if (Waits) __syncthreads();
  out[blockIdx.x * kThreads + threadIdx.x] = shared.values[kThreads - 1 - threadIdx.x];
}

// Every thread reads what another lane of its warp wrote.
template <bool Waits>
__global__ void warp_kernel(unsigned* out) {
  Shared& shared = shared_memory<Shared>();
  shared.values[threadIdx.x] = kThousand + threadIdx.x;
  if (Waits) __syncwarp();
  out[blockIdx.x * kThreads + threadIdx.x] = shared.values[threadIdx.x ^ 31];
}

// Every thread reads what the next block of its cluster wrote.
template <bool WaitsBefore, bool WaitsAfter>
__global__ void cluster_kernel(unsigned* out) {
  Shared& shared = shared_memory<Shared>();
  shared.values[threadIdx.x] = kThousand * static_cast<unsigned>(cluster_rank()) + threadIdx.x;
  if (WaitsBefore) cluster_barrier();
  const int next = (cluster_rank() + 1) % cluster_size();
  out[blockIdx.x * kThreads + threadIdx.x] = in_block(&shared, next)->values[threadIdx.x];
  if (WaitsAfter) cluster_barrier();
}

// Half of the block waits for the other half, which goes on.
__global__ void deserted_kernel(unsigned*) {
  if (threadIdx.x < kThreads / 2) __syncthreads();
}

// --- warps -----------------------------------------------------------------------------------------------------------

__global__ void warps_kernel(unsigned* wrong) {
  const unsigned own = static_cast<unsigned>(lane());
  unsigned failed = 0;
  auto expect = [&](bool fact) { failed += fact ? 0 : 1; };
  expect(__shfl_sync(kAllLanes, own * 3, 5) == 15);
  expect(__shfl_sync(kAllLanes, static_cast<int>(own), static_cast<int>(own) + 1) == static_cast<int>((own + 1) % 32));
  expect(__shfl_xor_sync(kAllLanes, uint64_t{own} << 40, 16) == uint64_t{own ^ 16} << 40);
  expect(__shfl_up_sync(kAllLanes, own, 3) == (own >= 3 ? own - 3 : own));
  expect(__shfl_down_sync(kAllLanes, 0.5 * own, 3) == 0.5 * (own < 29 ? own + 3 : own));
  expect(__ballot_sync(kAllLanes, own % 3 == 0) == 0x49249249u);
  expect(__any_sync(kAllLanes, own == 31) && !__any_sync(kAllLanes, own == 32));
  expect(__all_sync(kAllLanes, own < 32) && !__all_sync(kAllLanes, own < 31));
  expect(warp_sum(own) == 496 && warp_sum(-1.0f) == -32.0f);
  expect(warp_max(static_cast<int>(own ^ 9) - 40) == -9);
  expect(warp_scan(int64_t{own} << 33) == int64_t{own * (own + 1) / 2} << 33);
  if (failed != 0) atomicAdd(wrong, failed);
}

__global__ void some_lanes_kernel(unsigned* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_sync(0xffffu, threadIdx.x, 0u);
}

__global__ void atomics_kernel(unsigned* out) {
  atomicAdd(out, 1u);
  atomicMax(out + 1, static_cast<unsigned>(threadIdx.x));
  atomicMin(out + 2, static_cast<unsigned>(threadIdx.x));
  atomicOr(out + 3, 1u << threadIdx.x % 32);
  atomicCAS(out + 4, 0u, kThousand);
}

// --- memory ----------------------------------------------------------------------------------------------------------

__global__ void unwritten_kernel(unsigned* out) { out[threadIdx.x] = shared_memory<Shared>().values[threadIdx.x]; }

__global__ void write_kernel(unsigned* out, unsigned offset) { out[threadIdx.x + offset] = 1; }

__global__ void shared_write_kernel(unsigned* out, unsigned offset) {
  Shared& shared = shared_memory<Shared>();
  shared.values[threadIdx.x + offset] = 1;
  out[threadIdx.x] = shared.values[threadIdx.x + offset];
}

// The order in which threads come.
__global__ void order_kernel(unsigned* out) { out[1 + atomicAdd(out, 1u)] = threadIdx.x; }

// --- cases -----------------------------------------------------------------------------------------------------------

// A block of memory that ends with its last element.
struct Values {
  explicit Values(int64_t count, unsigned fill = 0) : count(count), data(new unsigned[static_cast<size_t>(count)]) {
    for (int64_t i = 0; i < count; ++i) data[static_cast<size_t>(i)] = fill;
  }
  int64_t count;
  std::unique_ptr<unsigned[]> data;
};

template <class Expected>
int compare(const Values& values, Expected expected) {
  for (int64_t i = 0; i < values.count; ++i) {
    const unsigned found = values.data[static_cast<size_t>(i)], wanted = expected(static_cast<unsigned>(i));
    if (found == wanted) continue;
    std::printf("at %lld: %u, not %u\n", static_cast<long long>(i), found, wanted);
    return 1;
  }
  return 0;
}

// Several times, because the order of warps and lanes changes; threads of the system take theirs at random.
#if defined(VLM_FUSE_EMULATE_WITH_THREADS)
constexpr int kLaunches = 1;
#else
constexpr int kLaunches = 8;
#endif

int block_case(void (*kernel)(unsigned*), int flipped) {
  int wrong = 0;
  for (int i = 0; i < kLaunches; ++i) {
    Values out(3 * kThreads);
    launch(kernel, {3, kThreads, sizeof(Shared)}, nullptr, out.data.get());
    wrong |= compare(out, [=](unsigned n) { return kThousand + (n % kThreads ^ static_cast<unsigned>(flipped)); });
  }
  return wrong;
}

int cluster_case(void (*kernel)(unsigned*), int size) {
  int wrong = 0;
  for (int i = 0; i < kLaunches; ++i) {
    Values out(2 * size * kThreads);
    launch(kernel, {2 * size, kThreads, sizeof(Shared), size}, nullptr, out.data.get());
    wrong |= compare(out, [=](unsigned n) { return kThousand * ((n / kThreads + 1) % static_cast<unsigned>(size)) + n % kThreads; });
  }
  return wrong;
}

int run(const std::string& name) {
  const Grid one = {1, kThreads, sizeof(Shared)};
  Values out(kThreads);
  if (name == "block") return block_case(block_kernel<true>, kThreads - 1);
  if (name == "block_without_barrier") return block_case(block_kernel<false>, kThreads - 1);
  if (name == "warp") return block_case(warp_kernel<true>, 31);
  if (name == "warp_without_barrier") return block_case(warp_kernel<false>, 31);
  if (name == "cluster") return cluster_case(cluster_kernel<true, true>, 2) | cluster_case(cluster_kernel<true, true>, 8);
  if (name == "cluster_without_first_barrier") return cluster_case(cluster_kernel<false, true>, 4);
  if (name == "cluster_without_last_barrier") return cluster_case(cluster_kernel<true, false>, 4);
  if (name == "deserted") return launch(deserted_kernel, one, nullptr, out.data.get()), 0;
  if (name == "warps") {
    Values wrong(1);
    launch(warps_kernel, {2, kThreads}, nullptr, wrong.data.get());
    return compare(wrong, [](unsigned) { return 0u; });
  }
  if (name == "some_lanes") return launch(some_lanes_kernel, one, nullptr, out.data.get()), 0;
  if (name == "atomics") {
    Values found(5);
    found.data[2] = kThousand;
    launch(atomics_kernel, {3, kThreads}, nullptr, found.data.get());
    const unsigned expected[] = {3 * kThreads, kThreads - 1, 0, 0xffffffffu, kThousand};
    return compare(found, [&](unsigned i) { return expected[i]; });
  }
  if (name == "unwritten") {
    launch(unwritten_kernel, one, nullptr, out.data.get());
    return compare(out, [](unsigned) { return 0xcdcdcdcdu; });
  }
  if (name == "less_shared_memory_than_used") {
    return launch(unwritten_kernel, {1, kThreads, sizeof(Shared) - 1}, nullptr, out.data.get()), 0;
  }
  if (name == "inside") return launch(write_kernel, one, nullptr, out.data.get(), 0u), compare(out, [](unsigned) { return 1u; });
  if (name == "outside") return launch(write_kernel, one, nullptr, out.data.get(), 1u), 0;
  if (name == "shared_inside") {
    return launch(shared_write_kernel, one, nullptr, out.data.get(), 0u), compare(out, [](unsigned) { return 1u; });
  }
  if (name == "shared_outside") return launch(shared_write_kernel, one, nullptr, out.data.get(), 1u), 0;
  if (name == "order") {
    Values order(1 + kThreads);
    launch(order_kernel, one, nullptr, order.data.get());
    for (int64_t i = 1; i < order.count; ++i) std::printf("%u ", order.data[static_cast<size_t>(i)]);
    return 0;
  }
  if (name == "device") {
    std::printf("%d processors, %s\n", current_device().processors, current_device().clusters ? "clusters" : "no clusters");
    return 0;
  }
  if (name == "no_blocks") return launch(deserted_kernel, {0, kThreads}, nullptr, out.data.get()), 0;
  if (name == "part_of_a_warp") return launch(order_kernel, {1, 33}, nullptr, out.data.get()), 0;
  std::fprintf(stderr, "no case %s\n", name.c_str());
  return 2;
}

}  // namespace

int main(int, char** arguments) try {
  return run(arguments[1]);
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 3;
}
