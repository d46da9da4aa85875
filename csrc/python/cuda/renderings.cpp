#include "../../cuda/block_map.h"
#include "../../cuda/dense.h"
#include "../mask_arguments.h"
#include "call.h"
#include "functions.h"

namespace vlm_fuse {
// dense(kv_lo, kv_hi, kv_lo2, kv_hi2, kv_length, out) -> None; `out` is bool or of a floating type
PyObject* py_cuda_dense(PyObject* const* args) {
  const Call call(args[0], "kv_lo");
  const MaskIntervals mask = read_mask(args);
  const dlpack::Tensor out = tensor(args[5], "out");
  DenseElement element{1, 0x0101010101010101u, 0};
  if (out.dtype.code != dlpack::kBool) {
    const DType dtype = row_dtype(out, "out");
    element = {size_of(dtype), 0, lowest(dtype)};
  }
  if (elements(out) != mask.samples * mask.rows * mask.keys || !contiguous(out)) {
    refuse(PyExc_ValueError, "out: expected (B, 1, Q, kv_length), contiguous");
  }
  cuda::dense(mask, element, static_cast<char*>(out.data), call.stream());
  Py_RETURN_NONE;
}

// bits(kv_lo, kv_hi, kv_lo2, kv_hi2, kv_length, out) -> None
PyObject* py_cuda_bits(PyObject* const* args) {
  const Call call(args[0], "kv_lo");
  const MaskIntervals mask = read_mask(args);
  uint8_t* const out = flat<uint8_t>(args[5], mask.samples * ((mask.rows * mask.keys + 7) / 8), "out");
  cuda::bits(mask, out, call.stream());
  Py_RETURN_NONE;
}

// block_map(kv_lo, kv_hi, kv_lo2, kv_hi2, kv_length, q_block, kv_block, *the eight tensors of a BlockMask, workspace)
// -> None
PyObject* py_cuda_block_map(PyObject* const* args) {
  const Call call(args[0], "kv_lo");
  const MaskIntervals mask = read_mask(args);
  const Blocks blocks = read_blocks(args + 5);
  const int64_t lines = block_count(mask.rows, blocks.q_size), columns = block_count(mask.keys, blocks.kv_size);
  if (lines > INT32_MAX) refuse(PyExc_ValueError, "BLOCK_SIZE: too many blocks for int32 lists");
  auto lists = [&](int at, int64_t outer) {
    return BlockLists{flat<int32_t>(args[at], mask.samples * outer, "counts"),
                      flat<int32_t>(args[at + 1], mask.samples * lines * columns, "indices")};
  };
  const BlockMapOut out = {lists(7, lines), lists(9, lines), lists(11, columns), lists(13, columns)};
  const dlpack::Tensor workspace = tensor(args[15], "workspace");
  const int64_t bytes = elements(workspace);
  if (bytes < cuda::block_map_workspace(mask, blocks)) refuse(PyExc_ValueError, "workspace: too small");
  cuda::block_map(mask, blocks, out, flat<uint8_t>(workspace, bytes, "workspace"), call.stream());
  Py_RETURN_NONE;
}

}  // namespace vlm_fuse
