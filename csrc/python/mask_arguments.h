// The arguments of the functions of masks, which both modules share.
#pragma once

#include <algorithm>

#include "../cpu/block_map.h"
#include "../cpu/masks.h"
#include "arguments.h"
#include "tensors.h"

namespace vlm_fuse {

inline int32_t capped(int64_t value) { return static_cast<int32_t>(std::clamp<int64_t>(value, 0, kNoLimit)); }

// A host int, or int64 by document id (a single one without dimensions).
inline void read_prefix(MaskRows* rows, PyObject* object) {
  if (object == Py_None) return;
  if (PyLong_Check(object)) {
    rows->prefix = capped(whole(object));
    return;
  }
  const dlpack::Tensor found = tensor(object, "prefix_lengths");
  rows->prefix_count = elements(found);
  rows->prefix_lengths = flat<int64_t>(found, rows->prefix_count, "prefix_lengths");
  rows->one_prefix = found.ndim == 0;
}

// document_ids, image_ids, (kind, window, sinks, chunk_size, images), prefix_lengths, parent_ids
inline MaskRows read_mask_rows(PyObject* const* args) {
  MaskRows rows;
  const dlpack::Tensor ids = tensor(args[0], "document_ids");
  if (ids.ndim != 2) refuse(PyExc_ValueError, "document_ids: expected (G, W)");
  rows.rows = ids.shape[0];
  rows.width = ids.shape[1];
  const int64_t count = rows.rows * rows.width;
  if (rows.width >= INT32_MAX) refuse(PyExc_ValueError, "document_ids: rows too long for int32 intervals");
  rows.document_ids = flat<int32_t>(ids, count, "document_ids");
  rows.image_ids = flat_or_null<int32_t>(args[1], count, "image_ids");
  const Items attend(args[2], "attend: expected a tuple of ints");
  if (attend.size() != 5) refuse(PyExc_ValueError, "attend: expected five ints");
  rows.attend.full = whole(attend[0]) == 1;
  rows.attend.window = capped(whole(attend[1]));
  rows.attend.sinks = capped(whole(attend[2]));
  rows.attend.chunk_size = capped(whole(attend[3]));
  rows.attend.images = static_cast<ImageAttention>(capped(whole(attend[4])));
  read_prefix(&rows, args[3]);
  if (args[4] != Py_None) {
    const dlpack::Tensor parents = tensor(args[4], "parent_ids");
    rows.parent_count = elements(parents);
    rows.parent_ids = integers(parents, 32, "parent_ids");
  }
  return rows;
}

// kv_lo, kv_hi, kv_lo2, kv_hi2: all of them written, or the last two null
inline MaskOut read_mask_out(PyObject* const* args, int64_t count) {
  MaskOut out;
  out.lo = flat<int32_t>(args[0], count, "kv_lo");
  out.hi = flat<int32_t>(args[1], count, "kv_hi");
  out.lo2 = flat_or_null<int32_t>(args[2], count, "kv_lo2");
  out.hi2 = flat_or_null<int32_t>(args[3], count, "kv_hi2");
  if ((out.lo2 == nullptr) != (out.hi2 == nullptr) && count > 0) {
    refuse(PyExc_ValueError, "kv_lo2, kv_hi2: one without the other");
  }
  return out;
}

// kv_lo, kv_hi, kv_lo2, kv_hi2, kv_length
inline MaskIntervals read_mask(PyObject* const* args) {
  const dlpack::Tensor lo = tensor(args[0], "kv_lo");
  if (lo.ndim != 2) refuse(PyExc_ValueError, "kv_lo: expected (B, Q)");
  MaskIntervals mask;
  mask.samples = lo.shape[0];
  mask.rows = lo.shape[1];
  const int64_t count = mask.samples * mask.rows;
  mask.lo = flat<int32_t>(lo, count, "kv_lo");
  mask.hi = flat<int32_t>(args[1], count, "kv_hi");
  mask.lo2 = flat_or_null<int32_t>(args[2], count, "kv_lo2");
  mask.hi2 = flat_or_null<int32_t>(args[3], count, "kv_hi2");
  if ((mask.lo2 == nullptr) != (mask.hi2 == nullptr) && count > 0) {
    refuse(PyExc_ValueError, "kv_lo2, kv_hi2: one without the other");
  }
  mask.keys = whole(args[4]);
  if (mask.keys < 0 || mask.keys > INT32_MAX) refuse(PyExc_ValueError, "kv_length: not a number of keys");
  return mask;
}

inline Blocks read_blocks(PyObject* const* args) {
  const Blocks blocks = {whole(args[0]), whole(args[1])};
  for (const int64_t size : {blocks.q_size, blocks.kv_size}) {
    if (size < 1 || size > INT32_MAX) refuse(PyExc_ValueError, "BLOCK_SIZE: not a size of blocks");
  }
  return blocks;
}

}  // namespace vlm_fuse
