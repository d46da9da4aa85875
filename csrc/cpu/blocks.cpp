#include "blocks.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif
#if defined(__linux__) && defined(MADV_FREE)
#define VLM_FUSE_BLOCKS 1
#endif

namespace vlm_fuse {

#ifdef VLM_FUSE_BLOCKS
namespace {

constexpr int64_t kHugePage = int64_t{2} << 20;
constexpr int64_t kMostWaste = 2;  // a block may be that many times as large as what it is taken for

int64_t keep_limit() {
  static const int64_t limit = [] {
    if (const char* set = std::getenv("VLM_FUSE_KEEP_MIB")) {
      return std::clamp<int64_t>(std::strtoll(set, nullptr, 10), 0, int64_t{1} << 40) << 20;
    }
    return static_cast<int64_t>(sysconf(_SC_PHYS_PAGES)) / 8 * static_cast<int64_t>(sysconf(_SC_PAGESIZE));
  }();
  return limit;
}

bool huge_pages() {
  static const bool on = [] {
    const char* set = std::getenv("VLM_FUSE_HUGE_PAGES");
    return set == nullptr || std::strcmp(set, "0") != 0;
  }();
  return on;
}

void unmap(const Block& block) { munmap(block.data, static_cast<size_t>(block.bytes)); }

Block map(int64_t bytes) {
  const int64_t rounded = (bytes + kHugePage - 1) / kHugePage * kHugePage, mapped = rounded + kHugePage;
  void* found = mmap(nullptr, static_cast<size_t>(mapped), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (found == MAP_FAILED) return {};
  char* const begin = static_cast<char*>(found);
  const int64_t ahead = static_cast<int64_t>(-reinterpret_cast<uintptr_t>(begin) & (kHugePage - 1));
  if (ahead > 0) munmap(begin, static_cast<size_t>(ahead));
  if (ahead < kHugePage) munmap(begin + ahead + rounded, static_cast<size_t>(kHugePage - ahead));
#ifdef MADV_HUGEPAGE
  if (huge_pages()) madvise(begin + ahead, static_cast<size_t>(rounded), MADV_HUGEPAGE);  // advice: may fail
#endif
  return {begin + ahead, rounded};
}

// Never destroyed: tensors may outlive the end of the program's main().
struct Kept {
  std::mutex mutex;
  std::vector<Block> free;           // the one given back last at the end
  std::vector<const void*> unmapped;  // begin of the blocks that are in use and were never written
  int64_t bytes = 0;
};

Kept& kept() {
  static Kept* const blocks = new Kept;
  return *blocks;
}

// Does not wait: whoever finds the list busy (or locked for ever, in a forked child) does without it.
using Lock = std::unique_lock<std::mutex>;

}  // namespace

Block take_block(int64_t bytes) {
  Kept& blocks = kept();
  {
    const Lock lock(blocks.mutex, std::try_to_lock);
    if (lock) {
      auto best = blocks.free.end();
      for (auto block = blocks.free.begin(); block != blocks.free.end(); ++block) {
        if (block->bytes < bytes || block->bytes / kMostWaste > bytes) continue;
        if (best == blocks.free.end() || block->bytes <= best->bytes) best = block;
      }
      if (best != blocks.free.end()) {
        const Block found = *best;
        blocks.free.erase(best);
        blocks.bytes -= found.bytes;
        return found;
      }
    }
  }
  const Block made = map(bytes);
  const Lock lock(blocks.mutex, std::try_to_lock);
  if (lock && made.data != nullptr) blocks.unmapped.push_back(made.data);
  return made;
}

void give_back(const Block& block) {
  Kept& blocks = kept();
  const Lock lock(blocks.mutex, std::try_to_lock);
  if (lock) {
    const auto unwritten = std::find(blocks.unmapped.begin(), blocks.unmapped.end(), block.data);
    if (unwritten != blocks.unmapped.end()) blocks.unmapped.erase(unwritten);
  }
  if (!lock || block.bytes > keep_limit() || madvise(block.data, static_cast<size_t>(block.bytes), MADV_FREE) != 0) {
    return unmap(block);
  }
  blocks.free.push_back(block);
  blocks.bytes += block.bytes;
  while (blocks.bytes > keep_limit()) {
    unmap(blocks.free.front());
    blocks.bytes -= blocks.free.front().bytes;
    blocks.free.erase(blocks.free.begin());
  }
}

bool first_touch(const void* data) {
  Kept& blocks = kept();
  const Lock lock(blocks.mutex, std::try_to_lock);
  if (!lock) return false;
  const auto found = std::find(blocks.unmapped.begin(), blocks.unmapped.end(), data);
  if (found == blocks.unmapped.end()) return false;
  blocks.unmapped.erase(found);
  return true;
}

int64_t kept_bytes() {
  Kept& blocks = kept();
  const Lock lock(blocks.mutex);
  return blocks.bytes;
}

#else

Block take_block(int64_t) { return {}; }
void give_back(const Block&) {}
bool first_touch(const void*) { return false; }
int64_t kept_bytes() { return 0; }

#endif

}  // namespace vlm_fuse
