// The arguments of kernels that write rows, from the plain description of the op.
#pragma once

#include "merge.h"
#include "row_source.cuh"

namespace vlm_fuse::cuda {

inline RowArguments arguments_of(const Merge& merge, int64_t* status) {
  RowArguments rows = {};
  rows.out = merge.out;
  rows.text = merge.text;
  rows.tokens = merge.tokens;
  rows.token_count = merge.token_count;
  rows.source_index = merge.source_index;
  rows.text_index = merge.text_index;
  rows.status = merge.tokens ? status : nullptr;
  rows.scaled = merge.scaled;
  rows.scale = round_to(merge.text.dtype, merge.scale);
  rows.rows = static_cast<unsigned>(merge.out.rows);
  rows.dim = static_cast<unsigned>(merge.dim);
  rows.add = merge.add;
  rows.only_features = merge.only_features;
  return rows;
}

// Nothing to compute: all rows are of the output's type, side by side element for element, and only copied.
inline bool as_bytes(const Merge& merge) {
  auto alike = [&](const RowTable& table) {
    return table.dtype == merge.out.dtype && table.step == size_of(table.dtype);
  };
  bool all = !merge.add && !merge.scaled && alike(merge.text);
  for (const FeatureTable& feature : merge.features.all()) all &= alike(feature.table);
  return all;
}

// Calls `each` with a value of the type that the kernel is to compute in.
template <class Each>
void with_numbers(const Merge& merge, Each&& each) {
  if (as_bytes(merge)) return each(AsBytes{});
  if (merge.has_doubles()) return each(double{});
  each(float{});
}

}  // namespace vlm_fuse::cuda
