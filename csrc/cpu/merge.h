// The row ops on the host: every output row from its sources, and the same rows read the other way.
#pragma once

#include <vector>

#include "batch.h"
#include "table.h"

namespace vlm_fuse {

struct Merge {
  RowTable out;
  int64_t dim = 0;
  const int32_t* source_index = nullptr;
  const int32_t* text_index = nullptr;  // null: row r itself
  bool add = false;
  bool only_features = false;           // other rows are left as they are
  RowTable text;                        // or, with `tokens`, the embedding weight
  Integers tokens;                      // flattened ids: text row j is weight row tokens[j]
  int64_t token_count = 0;
  bool scaled = false;
  double scale = 1.0;
  FeatureTables features;

  // Sums are then in fp64, all of them.
  bool has_doubles() const {
    bool any = text.dtype == DType::kF64;
    for (const FeatureTable& feature : features.all()) any |= feature.table.dtype == DType::kF64;
    return any;
  }
};

// The first text row whose id is not in the embedding table, before anything is written.
Record check_tokens(const Merge& merge);

// Writes the rows; text rows whose id is not in the table are zeros.
void merge_rows(const Merge& merge);

struct Gradient {
  char* data = nullptr;  // dense rows
  int64_t rows = 0;
  DType dtype = DType::kF32;
};

struct FeatureGradient {
  Gradient out;
  int64_t first = 0;  // number of its first feature row
  int64_t owned = 0;  // rows that have numbers of their own; those behind get zeros
};

struct MergeBackward {
  RowTable grad;
  int64_t dim = 0;
  const int32_t* source_index = nullptr;
  const int32_t* text_index = nullptr;
  bool add = false;
  bool wants_text = false;
  Gradient text;
  bool wants_weight = false;
  bool accumulate = false;  // the weight's gradient is added to what is there
  Gradient weight;
  Integers tokens;
  int64_t token_count = 0;
  bool scaled = false;
  double scale = 1.0;
  std::vector<FeatureGradient> features;
};

// Writes every row of the wanted gradients exactly once.
void merge_rows_backward(const MergeBackward& backward);

}  // namespace vlm_fuse
