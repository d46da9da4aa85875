#include "../../cuda/merge_tokens.h"
#include "../batch_arguments.h"
#include "../row_arguments.h"
#include "../usual_call.h"
#include "../versions.h"
#include "call.h"
#include "functions.h"

namespace vlm_fuse {
namespace {

// What one launch can serve. The long way serves the rest.
bool in_one_launch(const Batch& batch, int64_t width) {
  const Kind& kind = batch.kinds.front();
  const bool whole_images = kind.images <= 0 || (kind.rows_each > 0 && !batch.unused);
  return batch.samples > 0 && batch.length > 0 && batch.samples <= cuda::kMostSamples && !batch.document_ids &&
         batch.layout != Layout::kPadded && width >= 0 && width < INT32_MAX && kind.rows < INT32_MAX && whole_images;
}

}  // namespace

// usual_tokens(input_ids, inputs_embeds, weight, image_embeds, attention_mask, labels, document_ids, token, layout,
// left, unused, width, out) -> (kinds, versions, shape of source_index, bytes of workspace) where merge_tokens can
// serve the call; None where anything is out of the ordinary.
PyObject* py_cuda_usual_tokens(PyObject* const* args) {
  Sources sources;
  if (!at_device_of(args[0]) || !usual_sources(args, &sources) || !usual_batch(args + 4, &sources)) Py_RETURN_NONE;
  const Batch& batch = sources.batch;
  if (args[11] == Py_None && batch.layout == Layout::kPacked) Py_RETURN_NONE;
  const int64_t width = args[11] == Py_None ? batch.length : whole(args[11]);
  const int64_t groups = output_rows(batch);
  if (!in_one_launch(batch, width) || !usual_output(args[12], sources, groups, width)) Py_RETURN_NONE;
  const Call call(args[0], "input_ids");
  const Kind& kind = batch.kinds.front();
  const py::tuple kinds = py::make_tuple(py::handle(args[7]), 0, kind.rows, kind.images, kind.rows_each);
  PyObject* const written[] = {args[0], args[4], args[6], args[5]};
  return py::make_tuple(kinds, versions(written), py::make_tuple(groups, width), cuda::merge_tokens_workspace(batch))
      .release()
      .ptr();
}

// rows_of(input_ids, inputs_embeds, weight, image_embeds, out, source_index): as usual_call.h says
PyObject* py_cuda_rows_of(PyObject* const* args) {
  if (!at_device_of(args[5])) Py_RETURN_NONE;
  return rows_of(args);
}

// merge_tokens(as rows, 12 arguments, *batch, (source_index, text_index, position_ids, document_ids, attention_mask,
// labels, cu_seqlens, kv_lo, kv_hi), window, workspace) -> None. The facts are written too; None: not wanted.
PyObject* py_cuda_merge_tokens(PyObject* const* args) {
  const Call call(args[0], "out");
  Merge merge = read_sources(args);
  read_output(args, &merge);
  const Batch batch = read_batch(args + 12, false);
  PyObject* const* const rest = args + 12 + kBatchFields;
  const Items wanted(rest[0], "facts: expected nine tensors");
  if (wanted.size() != 9) refuse(PyExc_ValueError, "facts: expected nine tensors");
  const int64_t rows = merge.out.rows, groups = output_rows(batch);
  const int64_t width = groups > 0 ? rows / groups : 0;
  if (batch.kinds.size() != 1 || merge.features.all().size() > 1 || !in_one_launch(batch, width) ||
      (batch.layout == Layout::kKeep && rows != batch.samples * batch.length)) {
    refuse(PyExc_ValueError, "merge_tokens: a batch that one launch does not serve");
  }
  cuda::TokenFacts facts;
  facts.source_index = flat_or_null<int32_t>(wanted[0], rows, "source_index");
  facts.text_index = flat_or_null<int32_t>(wanted[1], rows, "text_index");
  facts.position_ids = flat_or_null<int64_t>(wanted[2], rows, "position_ids");
  facts.document_ids = flat_or_null<int32_t>(wanted[3], rows, "document_ids");
  facts.attention_mask = flat_or_null<uint8_t>(wanted[4], rows, "attention_mask");
  if (wanted[5] != Py_None && batch.labels) {
    facts.labels = batch.labels.bytes == 4 ? static_cast<void*>(flat<int32_t>(wanted[5], rows, "labels"))
                                           : flat<int64_t>(wanted[5], rows, "labels");
  }
  facts.cu_seqlens = flat_or_null<int32_t>(wanted[6], batch.samples + 1, "cu_seqlens");
  facts.kv_lo = flat_or_null<int32_t>(wanted[7], rows, "kv_lo");
  facts.kv_hi = flat_or_null<int32_t>(wanted[8], rows, "kv_hi");
  facts.window = static_cast<int32_t>(whole(rest[1]));
  void* workspace = nullptr;
  const int64_t needed = cuda::merge_tokens_workspace(batch);
  if (needed > 0) workspace = flat<uint8_t>(rest[2], needed, "workspace");
  cuda::merge_tokens(batch, merge, width, facts, workspace, status_record(args[11]), call.stream());
  Py_RETURN_NONE;
}

}  // namespace vlm_fuse
