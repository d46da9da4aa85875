// Feature tables as arguments of a kernel. A launch takes so many; where there are more, launches follow one another,
// so that nothing is copied to the device and a graph keeps what it captured.
#pragma once

#include "../cpu/table.h"
#include "device.cuh"

namespace vlm_fuse::cuda {

constexpr int kOneTable = 1;
constexpr int kManyTables = 48;  // with the rest of the arguments within the 4 KiB that every device takes

template <int Capacity>
struct TableList {
  int count;
  FeatureTable tables[Capacity];  // `first` ascends
};

// The table that holds feature row k, or null.
template <int Capacity>
__device__ const FeatureTable* find_table(const TableList<Capacity>& list, int64_t k) {
  int low = 0, high = list.count;  // tables before `low` begin at or before k
  while (Capacity > 1 && high - low > 1) {
    const int middle = (low + high) / 2;
    if (list.tables[middle].first <= k)
      low = middle;
    else
      high = middle;
  }
  return low < list.count && list.tables[low].holds(k) ? &list.tables[low] : nullptr;
}

}  // namespace vlm_fuse::cuda
