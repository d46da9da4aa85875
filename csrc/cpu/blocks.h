// Memory of large outputs, kept from one call to the next.
//
// malloc maps a block of more than 32 MiB anew each time, and the page faults of a fresh one cost two to four times the
// copy into it; on a virtual machine that reports free memory to its host, huge pages cost more still. A block that was
// given back is kept here for the next call and marked MADV_FREE: the kernel takes its pages when it needs memory, and
// until then they are there without a fault.
#pragma once

#include <cstdint>

namespace vlm_fuse {

constexpr int64_t kLargeBytes = int64_t{2} << 20;  // a huge page; smaller outputs malloc reuses by itself

struct Block {
  char* data = nullptr;
  int64_t bytes = 0;  // at least what was asked for
};

// A block of at least `bytes`, aligned to a huge page; without data where the system has none to give.
Block take_block(int64_t bytes);

// Keeps the block for later, within VLM_FUSE_KEEP_MIB (an eighth of the machine's memory by default; 0: nothing).
void give_back(const Block& block);

// Whether the block that begins at `data` is new, its pages not mapped yet. Asked once: who asks is about to write it.
bool first_touch(const void* data);

// Bytes kept for later.
int64_t kept_bytes();

}  // namespace vlm_fuse
