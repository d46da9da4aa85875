#include "threads.h"

namespace vlm_fuse {
namespace {
std::atomic<ParallelFor> installed{nullptr};
}

void use_parallel_for(ParallelFor parallel_for) { installed.store(parallel_for, std::memory_order_relaxed); }

ParallelFor current_parallel_for() { return installed.load(std::memory_order_relaxed); }

}  // namespace vlm_fuse
