// Threads of the pool that the host program already has: torch's, handed in as a pointer.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <type_traits>

namespace vlm_fuse {

// torch_parallel_for of libtorch_cpu (stable C ABI since 2.10): calls body on parts of [begin, end), in parallel.
using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*),
                                void* context);

void use_parallel_for(ParallelFor parallel_for);
ParallelFor current_parallel_for();

constexpr int64_t kGrainBytes = 128 * 1024;  // of output: less is not worth waking a thread

// body(begin, end) on one part of [0, count) a thread; items write `item_bytes` each.
template <class Body>
void parallel_parts(int64_t count, int64_t item_bytes, Body&& body) {
  const int64_t grain = std::max<int64_t>(1, kGrainBytes / std::max<int64_t>(item_bytes, 1));
  const ParallelFor parallel_for = current_parallel_for();
  if (parallel_for == nullptr || count <= grain) return body(0, count);
  using Plain = std::remove_reference_t<Body>;
  parallel_for(
      0, count, grain, [](int64_t begin, int64_t end, void* context) { (*static_cast<Plain*>(context))(begin, end); },
      &body);
}

// body(block) for every block < count, handed to threads as they come free: for work of uneven size.
template <class Body>
void parallel_blocks(int64_t count, Body&& body) {
  std::atomic<int64_t> next{0};
  auto take = [&](int64_t, int64_t) {
    for (int64_t block = next.fetch_add(1); block < count; block = next.fetch_add(1)) body(block);
  };
  const ParallelFor parallel_for = current_parallel_for();
  if (parallel_for == nullptr || count <= 1) return take(0, count);
  parallel_for(
      0, count, 1,
      [](int64_t begin, int64_t end, void* context) { (*static_cast<decltype(take)*>(context))(begin, end); }, &take);
}

}  // namespace vlm_fuse
