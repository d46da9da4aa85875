// Random batches, tables of rows and masks for the programs that run the kernels under sanitizers, most of them broken in
// some way. Every tensor ends where its block of memory does.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "cpu/masks.h"
#include "cpu/merge.h"
#include "cpu/plan.h"

using namespace vlm_fuse;

namespace {

std::mt19937 generator(0);

int64_t any(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }
bool chance(int percent) { return any(0, 99) < percent; }

template <class Value>
std::vector<Value> many(int64_t count, int64_t low, int64_t high) {
  std::vector<Value> values(static_cast<size_t>(count));
  for (Value& value : values) value = static_cast<Value>(any(low, high));
  values.shrink_to_fit();
  return values;
}

template <class Value>
Integers integers(const std::vector<Value>& values) {
  static const int64_t nothing = 0;
  return {values.empty() ? static_cast<const void*>(&nothing) : values.data(), sizeof(Value)};
}

struct Rows {
  std::unique_ptr<char[]> memory;
  size_t bytes = 0;
  RowTable table;
};

// A table of rows with random strides, all zeros, in a block that ends where its last element does.
Rows rows_of(int64_t outer, int64_t inner, int64_t dim, DType dtype, bool dense) {
  Rows rows;
  RowTable& table = rows.table;
  table.dtype = dtype;
  table.step = size_of(dtype) * (dense ? 1 : any(1, 2));
  table.row_stride = dim * table.step + (dense ? 0 : any(0, 1) * size_of(dtype));
  table.outer_stride = inner * table.row_stride + (dense ? 0 : any(0, 3) * size_of(dtype));
  table.inner = inner;
  table.rows = outer * inner;
  if (table.outer_stride == inner * table.row_stride) table.inner = table.rows;
  int64_t bytes = 0;
  if (table.rows > 0 && dim > 0) {
    bytes = (outer - 1) * table.outer_stride + (inner - 1) * table.row_stride + (dim - 1) * table.step + size_of(dtype);
  }
  const int64_t begin = dense ? 0 : any(0, 8) * size_of(dtype);
  rows.bytes = static_cast<size_t>(begin + bytes);
  rows.memory.reset(new char[rows.bytes]());
  table.data = rows.memory.get() + begin;
  return rows;
}

DType any_dtype() { return static_cast<DType>(any(0, 3)); }

void must(bool fact, const char* words) {
  if (fact) return;
  std::fprintf(stderr, "%s\n", words);
  std::abort();
}

// A batch and the memory that it points to.
struct RandomBatch {
  std::vector<uint8_t> mask_tokens;
  std::vector<int32_t> short_tokens, documents;
  std::vector<int64_t> long_tokens, labels;
  std::vector<int16_t> attention;
  std::vector<std::vector<int64_t>> kept;
  Batch batch;

  RandomBatch() {
    const int64_t samples = any(0, 4), length = chance(5) ? any(1000, 1100) : any(0, 9), count = samples * length;
    batch.samples = samples;
    batch.length = length;
    const int64_t number = any(0, 3);
    mask_tokens = many<uint8_t>(count, 0, 1);
    short_tokens = many<int32_t>(count, -2, 5);
    long_tokens = many<int64_t>(count, -2, 5);
    const int64_t form = number > 1 ? any(1, 2) : any(0, 2);
    batch.tokens = form == 0 ? integers(mask_tokens) : (form == 1 ? integers(short_tokens) : integers(long_tokens));
    attention = many<int16_t>(count, 0, 3);
    documents = many<int32_t>(count, -1, 3);
    labels = many<int64_t>(count, -100, 9);
    if (chance(50)) batch.attention_mask = integers(attention);
    if (chance(40)) batch.document_ids = integers(documents);
    batch.labels = integers(labels);
    batch.scheme = static_cast<Scheme>(any(0, 2));
    batch.layout = static_cast<Layout>(any(batch.scheme == Scheme::kPlaceholders ? 0 : 1, 2));
    batch.left = chance(50);
    batch.unused = chance(50);
    kept.reserve(6);
    int64_t first = 0;
    for (int64_t c = 0; c < number; ++c) {
      Kind kind{};
      kind.token = chance(10) ? int64_t{1} << 40 : c + 1;
      kind.first_row = first;
      const bool sizes = batch.scheme != Scheme::kPlaceholders || chance(50);
      kind.images = sizes ? any(0, 4) : -1;
      kind.rows_each = chance(50) ? any(0, 4) : -1;
      kind.rows = any(0, 20);
      if (sizes && kind.rows_each < 0) {
        kept.push_back(many<int64_t>(kind.images, -1, 5));
        kind.sizes = kept.back().data();
      }
      if (sizes && chance(60)) {
        kind.rows = 0;
        for (int64_t i = 0; i < kind.images; ++i) kind.rows += kind.size(i);
      }
      if (samples > 0 && chance(40)) {
        kept.push_back(many<int64_t>(samples, chance(5) ? -(int64_t{1} << 62) : 0, chance(5) ? int64_t{1} << 62 : 6));
        kind.counts = kept.back().data();
      }
      first += chance(3) ? INT32_MAX : kind.rows;
      batch.kinds.push_back(kind);
    }
  }
  RandomBatch(const RandomBatch&) = delete;
  RandomBatch& operator=(const RandomBatch&) = delete;

  // A width of the output rows, now and then another one than the layout asks for.
  int64_t width(const Counts& counts) const {
    int64_t width = batch.length;
    if (batch.layout == Layout::kPadded) width = counts.widest;
    if (batch.layout == Layout::kPacked) width = counts.rows;
    if (batch.layout != Layout::kKeep && chance(30)) width = any(0, width + 3);
    return width;
  }
};

// What a mask is made of.
struct RandomMask {
  std::vector<int64_t> prefixes;
  std::vector<int32_t> parents;
  MaskRows rows;

  RandomMask(const std::vector<int32_t>& documents, const std::vector<int32_t>& images, int64_t groups, int64_t width) {
    rows.rows = groups;
    rows.width = width;
    rows.document_ids = documents.data();
    rows.image_ids = chance(70) ? images.data() : nullptr;
    rows.attend.full = chance(30);
    rows.attend.window = chance(50) ? static_cast<int32_t>(chance(10) ? INT32_MAX : any(1, 5)) : 0;
    rows.attend.sinks = chance(30) ? static_cast<int32_t>(chance(10) ? INT32_MAX : any(1, 5)) : 0;
    rows.attend.chunk_size = rows.attend.window == 0 && chance(30) ? static_cast<int32_t>(any(1, 5)) : 0;
    rows.attend.images = static_cast<ImageAttention>(any(0, 2));
    rows.prefix = chance(20) ? static_cast<int32_t>(any(0, INT32_MAX)) : 0;
    prefixes = many<int64_t>(any(0, 4), -3, 6);
    if (chance(20)) rows.prefix_lengths = prefixes.data();
    rows.prefix_count = static_cast<int64_t>(prefixes.size());
    rows.one_prefix = rows.prefix_lengths != nullptr && rows.prefix_count == 1;
    parents = many<int32_t>(any(0, 6), -2, 8);
    if (!chance(30)) return;
    rows.parent_ids = integers(parents);
    rows.parent_count = static_cast<int64_t>(parents.size());
  }
  RandomMask(const RandomMask&) = delete;
  RandomMask& operator=(const RandomMask&) = delete;
};

}  // namespace
