#include <algorithm>

#include "../cpu/dense.h"
#include "../cpu/segments.h"
#include "functions.h"
#include "mask_arguments.h"
#include "new_tensors.h"

namespace vlm_fuse {
// dense(kv_lo, kv_hi, kv_lo2, kv_hi2, kv_length, dtype or None for bool) -> (B, 1, Q, kv_length)
PyObject* py_dense(PyObject* const* args) {
  const MaskIntervals mask = read_mask(args);
  NewTensor wanted{dlpack::kBool, 8, 4, {}};
  DenseElement element{1, 0x0101010101010101u, 0};
  if (args[5] != Py_None) {
    wanted = new_rows(args[5]);
    wanted.ndim = 4;
    element = {wanted.bits / 8, 0, lowest(new_dtype(wanted))};
  }
  const int64_t shape[] = {mask.samples, 1, mask.rows, mask.keys};
  std::copy(shape, shape + 4, wanted.shape);
  PyObject* made = nullptr;
  new_tensors(&wanted, 1, &made);
  const int64_t bytes = mask.samples * mask.rows * mask.keys * element.size;
  without_gil(bytes, [&] { dense(mask, element, static_cast<char*>(wanted.data)); });
  return made;
}

// bits(kv_lo, kv_hi, kv_lo2, kv_hi2, kv_length) -> (B, ceil(Q * kv_length / 8)) uint8
PyObject* py_bits(PyObject* const* args) {
  const MaskIntervals mask = read_mask(args);
  NewTensor wanted{dlpack::kUInt, 8, 2, {mask.samples, (mask.rows * mask.keys + 7) / 8}};
  PyObject* made = nullptr;
  new_tensors(&wanted, 1, &made);
  without_gil(wanted.shape[0] * wanted.shape[1], [&] { bits(mask, static_cast<uint8_t*>(wanted.data)); });
  return made;
}

// block_map(kv_lo, kv_hi, kv_lo2, kv_hi2, kv_length, q_block, kv_block) -> the eight tensors of a BlockMask
PyObject* py_block_map(PyObject* const* args) {
  const MaskIntervals mask = read_mask(args);
  const Blocks blocks = read_blocks(args + 5);
  const int64_t lines = block_count(mask.rows, blocks.q_size), columns = block_count(mask.keys, blocks.kv_size);
  NewTensor wanted[8];
  for (int i = 0; i < 8; i += 2) {
    const int64_t outer = i < 4 ? lines : columns, inner = i < 4 ? columns : lines;
    wanted[i] = {dlpack::kInt, 32, 3, {mask.samples, 1, outer}};
    wanted[i + 1] = {dlpack::kInt, 32, 4, {mask.samples, 1, outer, inner}};
  }
  py::tuple made(8);
  new_tensors(wanted, 8, &PyTuple_GET_ITEM(made.ptr(), 0));
  auto lists = [&](int i) {
    return BlockLists{static_cast<int32_t*>(wanted[i].data), static_cast<int32_t*>(wanted[i + 1].data)};
  };
  const BlockMapOut out = {lists(0), lists(2), lists(4), lists(6)};
  without_gil(mask.samples * (mask.rows * 8 + lines * columns * 16), [&] { block_map(mask, blocks, out); });
  return made.release().ptr();
}

// segments(kv_lo, kv_hi, kv_lo2, kv_hi2, kv_length) -> (n, 7) int64
PyObject* py_segments(PyObject* const* args) {
  const MaskIntervals mask = read_mask(args);
  const std::vector<Segment> found = without_gil(mask.samples * mask.rows * 8, [&] { return segments(mask); });
  NewTensor wanted{dlpack::kInt, 64, 2, {static_cast<int64_t>(found.size()), 7}};
  PyObject* made = nullptr;
  new_tensors(&wanted, 1, &made);
  int64_t* to = static_cast<int64_t*>(wanted.data);
  for (const Segment& segment : found) {
    const int64_t fields[] = {segment.sample,    segment.row_begin, segment.row_end,
                              segment.key_begin, segment.key_end,   static_cast<int64_t>(segment.kind),
                              segment.window};
    to = std::copy(fields, fields + 7, to);
  }
  return made;
}

}  // namespace vlm_fuse
