// For each block of rows two difference arrays over the blocks of keys, how many rows touch one and how many cover it
// whole: O(rows + blocks of rows * blocks of keys). The lowest and highest key of a block's rows would not do, since
// rows between may see less.
#include "block_map.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "threads.h"

namespace vlm_fuse {
namespace {

enum Class : uint8_t { kNone = 0, kPartial = 1, kFull = 2 };

// One row of block numbers while it is written: runs of numbers come in order.
class OrderedRow {
 public:
  OrderedRow() = default;
  OrderedRow(const BlockLists& lists, int64_t row, int64_t length, int32_t chosen)
      : chosen_(lists.indices + row * length), others_(chosen_ + chosen) {
    lists.counts[row] = chosen;
  }

  void append(int32_t begin, int32_t end, bool chosen) {
    int32_t*& at = chosen ? chosen_ : others_;
    int32_t* to = at;
    at += end - begin;
    for (int32_t i = begin; i < end; ++i) *to++ = i;
  }

 private:
  int32_t* chosen_ = nullptr;
  int32_t* others_ = nullptr;
};

// Partial and full blocks of one row (or column).
struct OrderedPair {
  OrderedRow partial, full;

  void append(int32_t begin, int32_t end, uint8_t kind) {
    partial.append(begin, end, kind == kPartial);
    full.append(begin, end, kind == kFull);
  }
};

struct Shape {
  int64_t rows, columns;  // blocks of query rows, of keys
};

// Keys to blocks. Nearly all sizes are powers of two, for which a division is a shift.
class BlockSize {
 public:
  explicit BlockSize(int64_t size) : size_(static_cast<uint32_t>(size)) {
    if ((size_ & (size_ - 1)) != 0) return;
    for (shift_ = 0; (uint32_t{1} << shift_) != size_;) ++shift_;
  }

  int32_t down(int32_t key) const { return divide(static_cast<uint32_t>(key)); }
  int32_t up(int32_t key) const { return divide(static_cast<uint32_t>(key) + size_ - 1); }

 private:
  int32_t divide(uint32_t key) const { return static_cast<int32_t>(shift_ >= 0 ? key >> shift_ : key / size_); }

  uint32_t size_;
  int shift_ = -1;
};

class RowClasses {
 public:
  RowClasses(const MaskIntervals& mask, const Blocks& blocks, Shape shape)
      : mask_(mask),
        blocks_(blocks),
        shape_(shape),
        size_(blocks.kv_size),
        touching_(static_cast<size_t>(shape.columns + 1)),
        covering_(static_cast<size_t>(shape.columns + 1)) {}

  // The class of every block of keys for the block of rows `block` of a sample, and its lists.
  void write(int64_t sample, int64_t block, uint8_t* classes, const BlockMapOut& out) {
    std::fill(touching_.begin(), touching_.end(), 0);
    std::fill(covering_.begin(), covering_.end(), 0);
    const int64_t first = block * blocks_.q_size, last = std::min(first + blocks_.q_size, mask_.rows);
    for (int64_t row = first; row < last; ++row) add(sample * mask_.rows + row);
    const int32_t whole = last - first == blocks_.q_size ? static_cast<int32_t>(blocks_.q_size) : INT32_MAX;
    int32_t touching = 0, covering = 0, partial = 0, full = 0;
    for (int64_t c = 0; c < shape_.columns; ++c) {
      touching += touching_[static_cast<size_t>(c)];
      covering += covering_[static_cast<size_t>(c)];
      const uint8_t kind = covering == whole ? kFull : touching > 0 ? kPartial : kNone;
      classes[c] = kind;
      partial += kind == kPartial;
      full += kind == kFull;
    }
    const int64_t row = sample * shape_.rows + block;
    OrderedPair lists{{out.kv, row, shape_.columns, partial}, {out.full_kv, row, shape_.columns, full}};
    int64_t begin = 0;
    for (int64_t c = 1; c <= shape_.columns; ++c) {
      if (c < shape_.columns && classes[c] == classes[begin]) continue;
      lists.append(static_cast<int32_t>(begin), static_cast<int32_t>(c), classes[begin]);
      begin = c;
    }
  }

 private:
  void add(int64_t row) {
    Interval keys[2];
    const int found = mask_.at(row, keys);
    for (int i = 0; i < found; ++i) {
      // rows of one document often begin, or end, at the same key
      if (keys[i].begin != begin_) {
        begin_ = keys[i].begin;
        touched_.begin = size_.down(begin_);
        covered_.begin = size_.up(begin_);
      }
      if (keys[i].end != end_) {
        end_ = keys[i].end;
        touched_.end = size_.up(end_);
        covered_.end = size_.down(end_);
      }
      ++touching_[static_cast<size_t>(touched_.begin)];
      --touching_[static_cast<size_t>(touched_.end)];
      if (covered_.begin >= covered_.end) continue;
      ++covering_[static_cast<size_t>(covered_.begin)];
      --covering_[static_cast<size_t>(covered_.end)];
    }
  }

  const MaskIntervals& mask_;
  const Blocks blocks_;
  const Shape shape_;
  const BlockSize size_;
  std::vector<int32_t> touching_, covering_;
  int32_t begin_ = -1, end_ = -1;       // the last interval, in keys
  Interval touched_{}, covered_{};      // and in blocks
};

constexpr int64_t kTile = 64;  // columns: a cache line of classes

// The lists of up to kTile blocks of keys of one sample, from the classes (rows, columns).
void write_columns(const uint8_t* classes, Shape shape, int64_t sample, int64_t first, const BlockMapOut& out) {
  const int64_t width = std::min(kTile, shape.columns - first);
  int32_t partial[kTile] = {}, full[kTile] = {};
  const uint8_t* line = classes + first;
  for (int64_t r = 0; r < shape.rows; ++r, line += shape.columns) {
    for (int64_t c = 0; c < width; ++c) {
      partial[c] += line[c] == kPartial;
      full[c] += line[c] == kFull;
    }
  }
  OrderedPair lists[kTile];
  int32_t begin[kTile] = {};
  for (int64_t c = 0; c < width; ++c) {
    const int64_t column = sample * shape.columns + first + c;
    lists[c] = {{out.q, column, shape.rows, partial[c]}, {out.full_q, column, shape.rows, full[c]}};
  }
  const uint8_t* before = classes + first;
  for (int64_t r = 1; r < shape.rows; ++r, before += shape.columns) {
    line = before + shape.columns;
    if (std::memcmp(line, before, static_cast<size_t>(width)) == 0) continue;
    for (int64_t c = 0; c < width; ++c) {
      if (line[c] == before[c]) continue;
      lists[c].append(begin[c], static_cast<int32_t>(r), before[c]);
      begin[c] = static_cast<int32_t>(r);
    }
  }
  if (shape.rows == 0) return;
  for (int64_t c = 0; c < width; ++c) lists[c].append(begin[c], static_cast<int32_t>(shape.rows), before[c]);
}

}  // namespace

void block_map(const MaskIntervals& mask, const Blocks& blocks, const BlockMapOut& out) {
  const Shape shape = {block_count(mask.rows, blocks.q_size), block_count(mask.keys, blocks.kv_size)};
  std::vector<uint8_t> classes(static_cast<size_t>(mask.samples * shape.rows * shape.columns));
  parallel_parts(mask.samples * shape.rows, blocks.q_size * 16 + shape.columns * 8, [&](int64_t begin, int64_t end) {
    RowClasses rows(mask, blocks, shape);
    for (int64_t block = begin; block < end; ++block) {
      rows.write(block / shape.rows, block % shape.rows, classes.data() + block * shape.columns, out);
    }
  });
  const int64_t tiles = block_count(shape.columns, kTile);
  parallel_parts(mask.samples * tiles, kTile * shape.rows * 8, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t sample = tile / tiles;
      write_columns(classes.data() + sample * shape.rows * shape.columns, shape, sample, tile % tiles * kTile, out);
    }
  });
}

}  // namespace vlm_fuse
