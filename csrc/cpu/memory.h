// How an output is written: through the caches or past them, on small or on huge pages.
#pragma once

#include <cstddef>
#include <cstdint>

namespace vlm_fuse {

enum class Store { kOrdinary, kStreaming };

// Streaming pays where the output is about as large as the last-level cache, and its pages are mapped already.
// `fresh`: the op has allocated it itself; above 32 MiB malloc maps such a block anew each time, then huge pages are
// asked for instead (VLM_FUSE_HUGE_PAGES=0: not), and ordinary stores are the faster ones on pages that fault.
Store prepare(void* data, int64_t bytes, int64_t all_bytes, bool fresh);

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
