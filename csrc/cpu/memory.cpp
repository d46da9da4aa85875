#include "memory.h"

#include <algorithm>
#include <cstring>

#include "blocks.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <emmintrin.h>
#define VLM_FUSE_STREAMING 1
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

namespace vlm_fuse {
namespace {

constexpr int64_t kMiB = 1024 * 1024;

#ifdef VLM_FUSE_STREAMING
// Virtual machines report the cache of the whole socket, or several: more than a guest's share is not believed.
int64_t cache_bytes() {
  static const int64_t bytes = [] {
    int64_t found = 0;
#ifdef _SC_LEVEL3_CACHE_SIZE
    found = sysconf(_SC_LEVEL3_CACHE_SIZE);
#endif
    return found <= 0 ? 32 * kMiB : std::clamp<int64_t>(found, 4 * kMiB, 32 * kMiB);
  }();
  return bytes;
}
#endif

}  // namespace

Store prepare(const void* data, int64_t all_bytes) {
  if (first_touch(data)) return Store::kOrdinary;
#ifdef VLM_FUSE_STREAMING
  if (all_bytes >= cache_bytes() / 4 * 3) return Store::kStreaming;
#endif
  (void)all_bytes;
  return Store::kOrdinary;
}

#ifdef VLM_FUSE_STREAMING

void finish_stores(Store store) {
  if (store == Store::kStreaming) _mm_sfence();
}

// A line that is written only in part goes through the cache.
void copy_bytes(char* to, const char* from, int64_t bytes, Store store, const char* ahead) {
  if (store == Store::kOrdinary || bytes < 256) {
    if (ahead != nullptr) prefetch(ahead, bytes);
    std::memcpy(to, from, static_cast<size_t>(bytes));
    return;
  }
  const int64_t head = static_cast<int64_t>(-reinterpret_cast<uintptr_t>(to) & 63);
  std::memcpy(to, from, static_cast<size_t>(head));
  int64_t i = head;
  for (; i + 64 <= bytes; i += 64) {
    if (ahead != nullptr) prefetch(ahead + i, 64);
    const __m128i* source = reinterpret_cast<const __m128i*>(from + i);
    __m128i* target = reinterpret_cast<__m128i*>(to + i);
    const __m128i a = _mm_loadu_si128(source), b = _mm_loadu_si128(source + 1);
    const __m128i c = _mm_loadu_si128(source + 2), d = _mm_loadu_si128(source + 3);
    _mm_stream_si128(target, a);
    _mm_stream_si128(target + 1, b);
    _mm_stream_si128(target + 2, c);
    _mm_stream_si128(target + 3, d);
  }
  std::memcpy(to + i, from + i, static_cast<size_t>(bytes - i));
}

void zero_bytes(char* to, int64_t bytes, Store store) {
  if (store == Store::kOrdinary || bytes < 256) {
    std::memset(to, 0, static_cast<size_t>(bytes));
    return;
  }
  const int64_t head = static_cast<int64_t>(-reinterpret_cast<uintptr_t>(to) & 63);
  std::memset(to, 0, static_cast<size_t>(head));
  const __m128i zero = _mm_setzero_si128();
  int64_t i = head;
  for (; i + 64 <= bytes; i += 64) {
    __m128i* target = reinterpret_cast<__m128i*>(to + i);
    _mm_stream_si128(target, zero);
    _mm_stream_si128(target + 1, zero);
    _mm_stream_si128(target + 2, zero);
    _mm_stream_si128(target + 3, zero);
  }
  std::memset(to + i, 0, static_cast<size_t>(bytes - i));
}

#else

void finish_stores(Store) {}

void copy_bytes(char* to, const char* from, int64_t bytes, Store, const char* ahead) {
  if (ahead != nullptr) prefetch(ahead, bytes);
  std::memcpy(to, from, static_cast<size_t>(bytes));
}

void zero_bytes(char* to, int64_t bytes, Store) { std::memset(to, 0, static_cast<size_t>(bytes)); }

#endif

}  // namespace vlm_fuse
