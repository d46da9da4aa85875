// The token plan on a device: counts, sources and facts of the output rows, and what is wrong with the batch.
#pragma once

#include <cstdint>

#include "../cpu/batch.h"
#include "../cpu/plan.h"
#include "device.h"

namespace vlm_fuse::cuda {

constexpr int kMostKinds = 32;  // a lane of a warp counts each

// What a call is to make; null: not wanted.
struct PlanOutputs {
  int64_t width = 0;
  int32_t* source_index = nullptr;
  Facts facts;
  int64_t* status = nullptr;  // the record of the first error
  bool fresh = false;         // the status holds nothing yet, and is written also where nothing is wrong
};

// Numbers of eight bytes that the calls below need for themselves, of a device that is current.
// All pointers of the batch are of the device; counts may be below 0, which stands for a kind without counts.
int64_t plan_scratch(const Batch& batch, bool check);

// Kept rows of the longest sample, of all, documents, and the placeholders of each kind.
void count(const Batch& batch, int64_t* totals, int64_t* scratch, Stream stream);

void plan(const Batch& batch, const PlanOutputs& out, int64_t* scratch, Stream stream);

}  // namespace vlm_fuse::cuda
