#include "dense.h"

#include <algorithm>
#include <cstring>

#include "threads.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

namespace vlm_fuse {
namespace {

constexpr int64_t kWide = 64;           // bytes of a wide store, a line of the cache
constexpr int64_t kMemset = 16 * 1024;  // from which on memset, where it serves, is faster than a loop

// At least kWide bytes by the wide stores that not every machine has; the first and the last overlap with others, as
// the pattern is the same at every element.
#if defined(__x86_64__) && defined(__GNUC__)
__attribute__((target("avx512f"))) void fill_wide(char* to, int64_t bytes, uint64_t pattern) {
  const __m512i value = _mm512_set1_epi64(static_cast<int64_t>(pattern));
  char* const last = to + bytes - kWide;
  _mm512_storeu_si512(to, value);
  _mm512_storeu_si512(last, value);
  for (to += -reinterpret_cast<uintptr_t>(to) & (kWide - 1); to < last; to += kWide) _mm512_store_si512(to, value);
}

bool has_wide_stores() { return __builtin_cpu_supports("avx512f"); }
#else
void fill_wide(char*, int64_t, uint64_t) {}
bool has_wide_stores() { return false; }
#endif

// The eight bytes of `pattern` over and over: whole elements, so that each begins with the pattern's first byte.
// Through the caches: streaming stores took up to twice as long here, at all sizes.
void fill_bytes(char* to, int64_t bytes, uint64_t pattern) {
  static const bool wide = has_wide_stores();
  if (bytes <= 0) return;
  const uint8_t first = static_cast<uint8_t>(pattern);
  if (pattern == first * 0x0101010101010101u && (bytes >= kMemset || !wide)) {
    std::memset(to, first, static_cast<size_t>(bytes));
    return;
  }
  if (wide && bytes >= kWide) return fill_wide(to, bytes, pattern);
  int64_t i = 0;
  const uint64_t four[] = {pattern, pattern, pattern, pattern};
  for (; i + 32 <= bytes; i += 32) std::memcpy(to + i, four, 32);
  for (; i + 8 <= bytes; i += 8) std::memcpy(to + i, &pattern, 8);
  std::memcpy(to + i, &pattern, static_cast<size_t>(bytes - i));
}

// Sets the bits begin .. end - 1 of bytes that are zero, or shared with others who set theirs before.
void set_bits(uint8_t* bytes, int64_t begin, int64_t end) {
  if (begin >= end) return;
  const int64_t first = begin / 8, last = (end - 1) / 8;
  const uint8_t from = static_cast<uint8_t>(0xff << (begin % 8));
  const uint8_t upto = static_cast<uint8_t>(0xff >> (7 - (end - 1) % 8));
  if (first == last) {
    bytes[first] |= from & upto;
    return;
  }
  bytes[first] |= from;
  std::memset(bytes + first + 1, 0xff, static_cast<size_t>(last - first - 1));
  bytes[last] |= upto;
}

}  // namespace

void dense(const MaskIntervals& mask, const DenseElement& element, char* out) {
  const int64_t size = element.size, row_bytes = mask.keys * size, count = mask.samples * mask.rows;
  parallel_parts(count, row_bytes, [&](int64_t begin, int64_t end) {
    // what is unseen at the end of a row and at the begin of the next is one run
    char* done = out + begin * row_bytes;
    for (int64_t row = begin; row < end; ++row) {
      char* to = out + row * row_bytes;
      Interval keys[2];
      const int found = mask.at(row, keys);
      for (int i = 0; i < found; ++i) {
        char* const from = to + keys[i].begin * size;
        char* const upto = to + keys[i].end * size;
        fill_bytes(done, from - done, element.unseen);
        fill_bytes(from, upto - from, element.seen);
        done = upto;
      }
    }
    fill_bytes(done, out + end * row_bytes - done, element.unseen);
  });
}

void bits(const MaskIntervals& mask, uint8_t* out) {
  const int64_t sample_bytes = (mask.rows * mask.keys + 7) / 8;
  // eight rows begin and end at a byte: no two threads share one
  const int64_t groups = (mask.rows + 7) / 8;
  parallel_parts(mask.samples * groups, mask.keys, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      const int64_t sample = group / groups, first = group % groups * 8, last = std::min(first + 8, mask.rows);
      uint8_t* to = out + sample * sample_bytes;
      const int64_t from = first * mask.keys / 8, upto = (last * mask.keys + 7) / 8;
      if (from < upto) std::memset(to + from, 0, static_cast<size_t>(upto - from));
      for (int64_t row = first; row < last; ++row) {
        Interval keys[2];
        const int found = mask.at(sample * mask.rows + row, keys);
        for (int i = 0; i < found; ++i) set_bits(to, row * mask.keys + keys[i].begin, row * mask.keys + keys[i].end);
      }
    }
  });
}

}  // namespace vlm_fuse
