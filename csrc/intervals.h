// What one row of a mask is: the at most two runs of keys that a query row sees.
// Shared by host and device code: no torch, no Python, no allocation.
#pragma once

#include <cstdint>

#include "rows.h"

namespace vlm_fuse {

constexpr int32_t kNoLimit = INT32_MAX;

enum class ImageAttention : int32_t { kCausal = 0, kBidirectional = 1, kBidirectionalWindowed = 2 };

// The constants of one `Attend`.
struct Attend {
  bool full = false;            // kind: "full", else "causal"
  int32_t window = 0;           // 0: none
  int32_t sinks = 0;            // leading rows of the document, 0: none
  int32_t chunk_size = 0;       // 0: none
  ImageAttention images = ImageAttention::kCausal;
};

// Rows begin <= k < end of one output row; empty where begin >= end.
struct Interval {
  int32_t begin;
  int32_t end;
};

// Where one query row stands. Rows are counted within the output row.
struct QueryRow {
  int32_t row;
  Interval document;  // first row .. last kept row of its document
  Interval image;     // the unbroken run of rows with its image id; empty at text
  int32_t prefix;     // leading rows of the document that all of it sees
  Interval parent;    // the document it also sees; empty without one
};

VLM_FUSE_HD int32_t smaller(int32_t a, int32_t b) { return a < b ? a : b; }
VLM_FUSE_HD int32_t larger(int32_t a, int32_t b) { return a > b ? a : b; }

// a + b without overflow, for a >= 0 and b >= 0.
VLM_FUSE_HD int32_t add_capped(int32_t a, int32_t b) { return b > kNoLimit - a ? kNoLimit : a + b; }

// A few disjoint intervals in ascending order, none touching another.
struct IntervalUnion {
  static constexpr int kCapacity = 4;
  Interval parts[kCapacity];
  int count = 0;

  VLM_FUSE_HD void add(Interval next) {
    if (next.begin >= next.end) return;
    int at = 0;
    while (at < count && parts[at].end < next.begin) ++at;
    int behind = at;  // parts at .. behind touch `next`
    while (behind < count && parts[behind].begin <= next.end) {
      next.begin = smaller(next.begin, parts[behind].begin);
      next.end = larger(next.end, parts[behind].end);
      ++behind;
    }
    if (behind == at) {
      for (int i = count; i > at; --i) parts[i] = parts[i - 1];
      ++count;
    } else {
      for (int i = behind; i < count; ++i) parts[i - (behind - at - 1)] = parts[i];
      count -= behind - at - 1;
    }
    parts[at] = next;
  }
};

// First row inside the window (and the document).
VLM_FUSE_HD int32_t window_begin(const Attend& attend, const QueryRow& query) {
  if (attend.window == 0 || query.row - query.document.begin < attend.window) return query.document.begin;
  return query.row - attend.window + 1;
}

// What kind, window and chunk let the row see of its document.
VLM_FUSE_HD Interval own_document(const Attend& attend, const QueryRow& query) {
  const int32_t row = query.row;
  const Interval document = query.document;
  Interval keys = {window_begin(attend, query), row + 1};
  if (attend.full) keys.end = attend.window == 0 ? document.end : smaller(document.end, add_capped(row, attend.window));
  if (attend.chunk_size != 0) {
    keys.begin = larger(keys.begin, row - (row - document.begin) % attend.chunk_size);
    keys.end = smaller(keys.end, add_capped(keys.begin, attend.chunk_size));
  }
  return keys;
}

// Everything the row sees, padding inside its document included.
VLM_FUSE_HD IntervalUnion visible(const Attend& attend, const QueryRow& query) {
  const int32_t row = query.row;
  const Interval document = query.document;
  const bool in_image = query.image.begin < query.image.end;
  Interval base = own_document(attend, query);
  if (in_image && attend.images == ImageAttention::kBidirectionalWindowed) base.end = larger(base.end, query.image.end);
  IntervalUnion keys;
  keys.add(base);
  if (in_image && attend.images == ImageAttention::kBidirectional) keys.add(query.image);
  if (attend.sinks > 0) keys.add({document.begin, smaller(add_capped(document.begin, attend.sinks), row + 1)});
  if (query.prefix > 0) keys.add({document.begin, smaller(add_capped(document.begin, query.prefix), document.end)});
  keys.add(query.parent);
  return keys;
}

// Cuts `holes` (disjoint, ascending) out of `keys` and keeps the first two parts. Returns false where there are more.
VLM_FUSE_HD bool cut_holes(const IntervalUnion& keys, const Interval* holes, int64_t hole_count, Interval out[2]) {
  out[0] = out[1] = {0, 0};
  int parts = 0;
  for (int i = 0; i < keys.count; ++i) {
    int32_t begin = keys.parts[i].begin;
    const int32_t end = keys.parts[i].end;
    int64_t low = 0, high = hole_count;  // first hole that ends behind `begin`
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (holes[middle].end <= begin)
        low = middle + 1;
      else
        high = middle;
    }
    for (; begin < end; ++low) {
      const bool cut = low < hole_count && holes[low].begin < end;
      const int32_t stop = cut ? holes[low].begin : end;
      if (begin < stop) {
        if (parts == 2) return false;
        out[parts++] = {begin, stop};
      }
      if (!cut) break;
      begin = holes[low].end;
    }
  }
  return true;
}

}  // namespace vlm_fuse
