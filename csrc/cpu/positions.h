// M-RoPE positions on the host (vlm_fuse/reference_positions.py).
#pragma once

#include <cstdint>

#include "batch.h"
#include "dtype.h"

namespace vlm_fuse {

// Positions between the frames of each video, multiplied in the arithmetic of their type.
struct Intervals {
  enum class Type { kWhole, kF32, kBF16, kF16, kF64 };
  const void* data = nullptr;  // one for each video; null: `each`
  Type type = Type::kWhole;
  int64_t each = 1;
};

struct MropeTask {
  int64_t samples = 0;
  int64_t length = 0;
  Integers types;
  Integers attention_mask;
  Integers document_ids;
  const int64_t* grids[2] = {};  // (counts, 3) t, h, w of images and of videos
  int64_t counts[2] = {};
  int64_t merge = 1;
  bool split = false;  // the frames of videos stand apart
  Intervals intervals;

  int64_t rows() const { return document_ids ? 4 : 3; }
};

// Writes positions (rows, samples, length) and deltas (samples). Returns the first error; all is written all the same.
Record mrope_position_ids(const MropeTask& task, int64_t* positions, int64_t* deltas);

}  // namespace vlm_fuse
