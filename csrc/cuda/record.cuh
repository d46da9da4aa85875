// The record that an error is flagged in, on the device.
#pragma once

#include "../cpu/batch.h"
#include "device.cuh"

namespace vlm_fuse::cuda {

// The fields behind the code.
__device__ inline void write_fields(int64_t* status, const Record& record) {
  status[1] = record.sample;
  status[2] = record.kind;
  status[3] = record.placeholders;
  status[4] = record.rows;
  status[5] = record.total_placeholders;
  status[6] = record.total_rows;
  status[7] = record.extra;
}

// By one thread. The first error stays: calls on other streams may have the same record, and whoever puts its code
// there writes the rest. Nobody reads it before the device is idle.
__device__ inline void flag(int64_t* status, const Record& record) {
  static_assert(kFine == 0);
  if (record.code == kFine) return;
  auto* const code = reinterpret_cast<unsigned long long*>(status);
  if (atomicCAS(code, 0ull, static_cast<unsigned long long>(record.code)) == 0) write_fields(status, record);
}

}  // namespace vlm_fuse::cuda
