// Best fit: every sample into the row in which the fewest tokens stay free (vlm_fuse/packing/best_fit.py).
#pragma once

#include <cstdint>

namespace vlm_fuse {

constexpr int kMostBudgets = 4;

struct BestFit {
  int64_t samples = 0;
  int budgets = 1;
  const int64_t* needs = nullptr;  // (samples, budgets), none above `capacity`
  const int64_t* order = nullptr;  // the samples as they are placed
  int64_t capacity[kMostBudgets] = {};
};

// Writes the row of each sample; false, with nothing to be read, where `order` or a need is out of range.
bool best_fit(const BestFit& asked, int64_t* rows);

}  // namespace vlm_fuse
