// New tensors on memory of our own, handed to torch through its exchange table: a third of the cost of new_empty, and
// large ones lie in blocks that are kept for the next call. Their storage cannot be resized.
#pragma once

#include "../cpu/dtype.h"
#include "attached.h"

namespace vlm_fuse {

constexpr int32_t kMostDims = 4;

struct NewTensor {
  uint8_t code;  // of DLPack
  uint8_t bits;
  int32_t ndim;
  int64_t shape[kMostDims];
  void* data = nullptr;  // set by new_tensors
};

// Makes contiguous tensors in one piece of memory, which lives as long as any of them does. New references go to
// `made`.
void new_tensors(NewTensor* wanted, int64_t count, PyObject** made);

// Rows of torch's `dtype`, to be given a shape.
NewTensor new_rows(PyObject* dtype);
DType new_dtype(const NewTensor& rows);

struct MemoryUse {
  int64_t held;  // bytes of tensors made here that are alive
  int64_t peak;  // the most there were since the last reset
};

MemoryUse memory_use();
void reset_peak();

}  // namespace vlm_fuse
