#include <algorithm>

#include "dense.cuh"
#include "dense.h"
#include "launch.cuh"

namespace vlm_fuse::cuda {
namespace {

constexpr int64_t kMostSteps = 8;
constexpr int64_t kBlocksEach = 8;  // of a processor, before a thread gets more than one unit

template <int kEntryBits>
void write(Entries entries, Stream stream) {
  const int64_t samples = entries.mask.samples;
  if (samples * entries.sample_bytes == 0) return;
  const int64_t units = entries.sample_bytes / kUnitBytes;
  const int64_t at_once = current_device().processors * kBlocksEach * kEntryThreads;
  const int64_t steps = std::clamp<int64_t>(samples * units / at_once, 1, kMostSteps);
  const int64_t blocks = std::max<int64_t>(1, (units + steps * kEntryThreads - 1) / (steps * kEntryThreads));
  entries.shift = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(entries.out) % kUnitBytes);
  entries.out -= entries.shift;
  entries.steps = static_cast<uint32_t>(steps);
  entries.blocks = static_cast<uint32_t>(blocks);
  launch(entries_kernel<kEntryBits>, {samples * blocks, kEntryThreads}, stream, entries);
}

}  // namespace

void dense(const MaskIntervals& mask, const DenseElement& element, char* out, Stream stream) {
  Entries entries = {mask, out, 0, 0, 0, 0, element.unseen, element.seen ^ element.unseen};
  // samples follow each other without a gap: one with all rows
  entries.mask.rows *= entries.mask.samples;
  entries.mask.samples = 1;
  entries.sample_bytes = entries.mask.rows * mask.keys * element.size;
  if (element.size == 1) return write<8>(entries, stream);
  if (element.size == 2) return write<16>(entries, stream);
  if (element.size == 4) return write<32>(entries, stream);
  write<64>(entries, stream);
}

void bits(const MaskIntervals& mask, uint8_t* out, Stream stream) {
  write<1>({mask, reinterpret_cast<char*>(out), (mask.rows * mask.keys + 7) / 8, 0, 0, 0, 0, 0}, stream);
}

}  // namespace vlm_fuse::cuda
