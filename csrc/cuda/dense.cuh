// A mask written out in units of 16 bytes at multiples of 16, wherever rows begin and end: a unit may hold the end of a
// row and the begin of the next, or several rows. A block owns some units of one sample, a thread every 256th of them.
// What fills no unit, before the first one and behind the last, is the sample's first block's.
#pragma once

#include "dense.h"
#include "device.cuh"

namespace vlm_fuse::cuda {

constexpr int kEntryThreads = 256;
constexpr int kUnitBytes = 16;

// An item is what is written where no unit fits: an element, or a byte of bits.
struct Entries {
  MaskIntervals mask;
  char* out;  // at or before the first item, at a multiple of 16
  int64_t sample_bytes;
  uint32_t blocks;  // of a sample
  uint32_t steps;  // units of a thread
  uint32_t shift;  // bytes from `out` to the first item
  uint64_t unseen;  // an element repeated to eight bytes
  uint64_t change;  // the bits in which one that is seen differs
};

// What a row sees; both may be empty.
struct RowKeys {
  Interval first, second;

  __device__ RowKeys(const MaskIntervals& mask, int64_t row) {
    Interval keys[2];
    const int count = mask.at(row, keys);
    first = count > 0 ? keys[0] : Interval{0, 0};
    second = count > 1 ? keys[1] : Interval{0, 0};
  }

  // The `count` keys from `column` on, up to 32, the first one lowest.
  __device__ uint32_t seen(uint32_t column, int32_t count) const {
    const int32_t at = static_cast<int32_t>(column);
    return inside(first, at, count) | inside(second, at, count);
  }

 private:
  __device__ static uint32_t lowest(int32_t count) { return count >= 32 ? ~0u : (1u << count) - 1; }
  __device__ static uint32_t inside(Interval keys, int32_t at, int32_t count) {
    const int32_t begin = smaller(larger(keys.begin - at, 0), count), end = smaller(larger(keys.end - at, 0), count);
    return lowest(end) & ~lowest(begin);
  }
};

// Where an entry stands, row by row.
struct Place {
  int64_t row;  // counted over the samples
  uint32_t column;

  // Returns whether this is another row.
  __device__ bool advance(uint32_t entries, uint32_t width) {
    column += entries;
    if (column < width) return false;
    const uint32_t rows = column / width;
    row += rows;
    column -= rows * width;
    return true;
  }
};

__device__ inline Place place_of(int64_t first_row, int64_t entry, uint32_t width) {
  // a 64-bit division is a call
  const bool small = entry <= UINT32_MAX;
  const int64_t row = small ? static_cast<uint32_t>(entry) / width : entry / width;
  return {first_row + row, static_cast<uint32_t>(entry - row * width)};
}

// `count` entries from a place on, up to 32, the first one lowest. `keys`: of the row of that place. Entries behind the
// last row are not seen.
__device__ inline uint32_t seen_from(const MaskIntervals& mask, const RowKeys& keys, Place place, int32_t count,
                                     int64_t last_row) {
  const uint32_t width = static_cast<uint32_t>(mask.keys);
  uint32_t seen = keys.seen(place.column, count);
  if (width - place.column >= static_cast<uint32_t>(count)) return seen;
  for (uint32_t at = width - place.column; at < static_cast<uint32_t>(count) && ++place.row < last_row; at += width) {
    seen |= RowKeys(mask, place.row).seen(0, count - static_cast<int32_t>(at)) << at;
  }
  return seen;
}

// All bits of an element set where its entry is seen: the four words of a unit whose entries are `seen`.
template <int kEntryBits>
__device__ uint4 spread(uint32_t seen) {
  auto all = [&](int entry) { return 0u - (seen >> entry & 1u); };
  auto word = [&](int number) -> uint32_t {
    if constexpr (kEntryBits == 8) return ((seen >> (4 * number) & 0xfu) * 0x00204081u & 0x01010101u) * 0xffu;
    if constexpr (kEntryBits == 16) return (all(2 * number) & 0xffffu) | (all(2 * number + 1) & 0xffff0000u);
    if constexpr (kEntryBits == 32) return all(number);
    return all(number / 2);
  };
  return make_uint4(word(0), word(1), word(2), word(3));
}

template <int kEntryBits>
struct UnitOf {
  static constexpr int kEntries = 8 * kUnitBytes / kEntryBits;

  __device__ static uint4 of(const Entries& task, const RowKeys& keys, Place place, int64_t last_row) {
    const uint4 seen = spread<kEntryBits>(seen_from(task.mask, keys, place, kEntries, last_row));
    const uint32_t unseen[] = {static_cast<uint32_t>(task.unseen), static_cast<uint32_t>(task.unseen >> 32)};
    const uint32_t change[] = {static_cast<uint32_t>(task.change), static_cast<uint32_t>(task.change >> 32)};
    return make_uint4(unseen[0] ^ (change[0] & seen.x), unseen[1] ^ (change[1] & seen.y),
                      unseen[0] ^ (change[0] & seen.z), unseen[1] ^ (change[1] & seen.w));
  }
};

template <>
struct UnitOf<1> {
  static constexpr int kEntries = 8 * kUnitBytes;

  __device__ static uint4 of(const Entries& task, RowKeys keys, Place place, int64_t last_row) {
    const uint32_t width = static_cast<uint32_t>(task.mask.keys);
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      words[i] = place.row < last_row ? seen_from(task.mask, keys, place, 32, last_row) : 0;
      if (i < 3 && place.advance(32, width) && place.row < last_row) keys = RowKeys(task.mask, place.row);
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
  }
};

template <int kEntryBits>
struct ItemOf {
  static constexpr int kBytes = kEntryBits < 8 ? 1 : kEntryBits / 8;
  static constexpr int kEntries = kEntryBits < 8 ? 8 / kEntryBits : 1;

  __device__ static void write(const Entries& task, char* to, uint32_t seen) {
    if constexpr (kEntryBits < 8) {
      *reinterpret_cast<uint8_t*>(to) = static_cast<uint8_t>(seen);
    } else {
      const uint64_t value = task.unseen ^ (seen != 0 ? task.change : 0);
#pragma unroll
      for (int i = 0; i < kBytes; ++i) to[i] = static_cast<char>(value >> (8 * i));
    }
  }
};

template <int kEntryBits>
__global__ void __launch_bounds__(kEntryThreads, 4) entries_kernel(const Entries task) {
  using Unit = UnitOf<kEntryBits>;
  using Item = ItemOf<kEntryBits>;
  const uint32_t width = static_cast<uint32_t>(task.mask.keys);
  const uint32_t sample = blockIdx.x / task.blocks, block = blockIdx.x - sample * task.blocks;
  const int64_t begin = sample * task.sample_bytes + task.shift, end = begin + task.sample_bytes;
  const int64_t first_row = sample * task.mask.rows, last_row = first_row + task.mask.rows;
  // units that the sample has for itself
  const int64_t low = (begin + kUnitBytes - 1) / kUnitBytes, high = end / kUnitBytes;
  int64_t unit = low + static_cast<int64_t>(block) * task.steps * kEntryThreads + threadIdx.x;
  if (unit < high) {
    Place place = place_of(first_row, (unit * kUnitBytes - begin) * 8 / kEntryBits, width);
    RowKeys keys(task.mask, place.row);
    for (uint32_t step = 0;;) {
      reinterpret_cast<uint4*>(task.out)[unit] = Unit::of(task, keys, place, last_row);
      unit += kEntryThreads;
      if (++step == task.steps || unit >= high) break;
      if (place.advance(kEntryThreads * Unit::kEntries, width)) keys = RowKeys(task.mask, place.row);
    }
  }
  if (block != 0 || threadIdx.x >= 2 * kUnitBytes) return;
  const int64_t head = low * kUnitBytes < end ? low * kUnitBytes : end,
                tail = high * kUnitBytes < head ? head : high * kUnitBytes;
  const bool behind = threadIdx.x >= kUnitBytes;
  const int64_t at = (behind ? tail : begin) + threadIdx.x % kUnitBytes * Item::kBytes;
  if (at >= (behind ? end : head)) return;
  const Place place = place_of(first_row, (at - begin) * 8 / kEntryBits, width);
  Item::write(task, task.out + at,
              seen_from(task.mask, RowKeys(task.mask, place.row), place, Item::kEntries, last_row));
}

}  // namespace vlm_fuse::cuda
