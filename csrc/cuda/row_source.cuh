// Output rows as a warp writes them: its first lanes find out where one row each comes from, then the whole warp moves
// row after row.
#pragma once

#include <type_traits>

#include "../cpu/batch.h"
#include "elements.cuh"
#include "tables.cuh"

namespace vlm_fuse::cuda {

constexpr unsigned kMostRows = 4;  // that a warp takes at a time

struct RowArguments {
  RowTable out;
  RowTable text;            // or, with `tokens`, the embedding weight
  Integers tokens;
  int64_t token_count;
  const int32_t* source_index;
  const int32_t* text_index;
  int64_t* status;          // null: ids are not looked at
  double scale;             // rounded to the weight's type
  unsigned rows;
  unsigned dim;
  unsigned rows_each;       // neighbouring rows a warp, up to kMostRows
  bool scaled;
  bool add;
  bool only_features;       // other rows are left as they are
  bool others;              // this launch also writes the rows that no table of its own holds
};

// Where one output row comes from. Addresses, because lanes hand them to one another; 0: nothing there.
struct RowSource {
  uint64_t text;
  uint64_t feature;
  int32_t table;  // of the feature, -1: none
  bool skipped;
};

// The token id that a text row stands for, or -1. Within `token_count` whatever the plan says.
__device__ inline int64_t token_id(const RowArguments& rows, int64_t token) {
  return token >= 0 && token < rows.token_count ? rows.tokens[token] : -1;
}

__device__ inline uint64_t text_address(const RowArguments& rows, int64_t token) {
  const int64_t row = rows.tokens ? token_id(rows, token) : token;
  return row >= 0 && row < rows.text.rows ? reinterpret_cast<uint64_t>(rows.text.row(row)) : 0;
}

template <int Capacity>
__device__ RowSource row_source(const RowArguments& rows, const TableList<Capacity>& features,
                                const RowSources& sources) {
  RowSource found = {0, 0, -1, false};
  if (sources.feature < 0) {
    found.skipped = rows.only_features || !rows.others;
  } else {
    const FeatureTable* table = find_table(features, sources.feature);
    if (table != nullptr) {
      found.table = static_cast<int32_t>(table - features.tables);
      found.feature = reinterpret_cast<uint64_t>(table->table.row(sources.feature - table->first));
    }
    found.skipped = table == nullptr && !rows.others;
  }
  if (!found.skipped) found.text = text_address(rows, sources.text);
  return found;
}

__device__ inline RowSource of_lane(const RowSource& source, int lane) {
  return {__shfl_sync(kAllLanes, source.text, lane), __shfl_sync(kAllLanes, source.feature, lane),
          __shfl_sync(kAllLanes, source.table, lane), false};
}

// What the rows of a launch need: bytes moved as they are, or numbers computed in fp32 or fp64.
struct AsBytes {};

// One row of numbers that are converted, scaled or added.
template <class Wide, int Capacity>
__device__ void write_row(const RowArguments& rows, const TableList<Capacity>& features, char* to,
                          const RowSource& source) {
  const RowReader text = {rows.text.dtype, rows.text.step, rows.scaled, rows.scale};
  RowReader feature = {DType::kF32, 0, false, 1.0};
  if (source.table >= 0) {
    feature.dtype = features.tables[source.table].table.dtype;
    feature.step = features.tables[source.table].table.step;
  }
#pragma unroll 1
  for (unsigned first = lane() * kPack; first < rows.dim; first += kLanes * kPack) {
    const unsigned count = pack_size(first, rows.dim);
    Wide values[kPack] = {}, more[kPack];
    if (source.text != 0) {
      load_pack(reinterpret_cast<const char*>(source.text), text, first, count, values);
      if (text.scaled) scale_pack(text, values);
    }
    if (source.feature != 0) {
      load_pack(reinterpret_cast<const char*>(source.feature), feature, first, count, more);
#pragma unroll
      for (unsigned e = 0; e < kPack; ++e) values[e] = source.text != 0 ? values[e] + more[e] : more[e];
    }
    store_pack(to, rows.out.dtype, first, count, values);
  }
}

// Rows that the warp's first `count` lanes know the sources of, each its own. `row`: where each goes.
template <class Numbers, int Capacity>
__device__ void write_rows_of_lanes(const RowArguments& rows, const TableList<Capacity>& features, const RowSource& own,
                                    unsigned row, unsigned count) {
  const uint64_t own_to = own.skipped ? 0 : reinterpret_cast<uint64_t>(rows.out.row(row));
  const uint64_t own_from = own.feature != 0 ? own.feature : own.text;
#pragma unroll 1
  for (unsigned r = 0; r < count; ++r) {
    char* to = reinterpret_cast<char*>(__shfl_sync(kAllLanes, own_to, static_cast<int>(r)));
    if constexpr (std::is_same_v<Numbers, AsBytes>) {
      const uint64_t from = __shfl_sync(kAllLanes, own_from, static_cast<int>(r));
      const unsigned bytes = rows.dim * static_cast<unsigned>(size_of(rows.out.dtype));
      if (to != nullptr) copy_bytes(to, reinterpret_cast<const char*>(from), bytes);
    } else {
      const RowSource source = of_lane(own, static_cast<int>(r));
      if (to != nullptr) write_row<Numbers>(rows, features, to, source);
    }
  }
}

}  // namespace vlm_fuse::cuda
