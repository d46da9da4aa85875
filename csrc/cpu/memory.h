// How an output is written: through the caches or past them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace vlm_fuse {

enum class Store { kOrdinary, kStreaming };

// Streaming pays where all that is written (`all_bytes`) is about as large as the last-level cache; on pages that
// fault, those of a new block, ordinary stores are the faster ones.
Store prepare(const void* data, int64_t all_bytes);

// After the streaming stores of a thread, before others may read.
void finish_stores(Store store);

// Asks for bytes that are read soon. Into the second-level cache: a fifth faster for whole rows than into the first.
inline void prefetch(const char* from, int64_t bytes) {
#if defined(__GNUC__)
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i, 0, 1);
#else
  (void)from, (void)bytes;
#endif
}

// `ahead`: as many bytes that are read soon after, asked for bit by bit while this copy runs; may be null.
void copy_bytes(char* to, const char* from, int64_t bytes, Store store, const char* ahead = nullptr);
void zero_bytes(char* to, int64_t bytes, Store store);

}  // namespace vlm_fuse
