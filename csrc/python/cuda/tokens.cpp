#include <memory>
#include <utility>

#include "../../cuda/merge_tokens.h"
#include "../arguments.h"
#include "../batch_arguments.h"
#include "../row_arguments.h"
#include "../usual_call.h"
#include "../versions.h"
#include "call.h"
#include "functions.h"
#include "torch_tensors.h"

namespace vlm_fuse {
namespace {

// What one launch can serve. The long way serves the rest.
bool in_one_launch(const Batch& batch, int64_t width) {
  const Kind& kind = batch.kinds.front();
  const bool whole_images = kind.images <= 0 || (kind.rows_each > 0 && !batch.unused);
  return batch.samples > 0 && batch.length > 0 && batch.samples <= cuda::kMostSamples && !batch.document_ids &&
         batch.layout != Layout::kPadded && width >= 0 && width < INT32_MAX && kind.rows < INT32_MAX && whole_images;
}

// Between the kv_lo of so many rows and their kv_hi: both are aligned as tensors are.
int64_t apart(int64_t rows) { return (rows + 31) / 32 * 32; }

// The tensors that the launch writes, (source_index, text_index, position_ids, document_ids, attention_mask, labels,
// cu_seqlens, intervals), None where not wanted. `intervals`: kv_lo, then kv_hi, as one tensor, which costs the host
// less.
py::tuple new_facts(PyObject* like, const Batch& batch, int64_t groups, int64_t width, bool text_index,
                    bool intervals) {
  auto rows = [&](PyObject* dtype, bool wanted = true) {
    return wanted ? new_tensor(like, {groups, width}, dtype) : py::none();
  };
  PyObject *const narrow = allocation.int32(), *const wide = allocation.int64();
  return py::make_tuple(rows(narrow), rows(narrow, text_index), rows(wide), rows(narrow), rows(allocation.boolean()),
                        rows(batch.labels.bytes == 8 ? wide : narrow, static_cast<bool>(batch.labels)),
                        new_tensor(like, {batch.samples + 1}, narrow),
                        intervals ? new_tensor(like, {2, apart(groups * width)}, narrow) : py::none());
}

cuda::TokenFacts read_facts(const py::tuple& made, const Batch& batch, int64_t rows) {
  PyObject* const* const facts = &PyTuple_GET_ITEM(made.ptr(), 0);
  cuda::TokenFacts found;
  found.source_index = flat<int32_t>(facts[0], rows, "source_index");
  found.text_index = flat_or_null<int32_t>(facts[1], rows, "text_index");
  found.position_ids = flat<int64_t>(facts[2], rows, "position_ids");
  found.document_ids = flat<int32_t>(facts[3], rows, "document_ids");
  found.attention_mask = flat<uint8_t>(facts[4], rows, "attention_mask");
  if (batch.labels) found.labels = tensor(facts[5], "labels").data;
  found.cu_seqlens = flat<int32_t>(facts[6], batch.samples + 1, "cu_seqlens");
  found.kv_lo = flat_or_null<int32_t>(facts[7], 2 * apart(rows), "intervals");
  if (found.kv_lo != nullptr) found.kv_hi = found.kv_lo + apart(rows);
  return found;
}

// A call that was recognised, with everything read that the one launch needs.
struct TokensCall {
  Batch batch;
  Merge merge;  // the output and the scale are those of the last launch
  int64_t groups;
  int64_t width;
  cuda::TokenFacts facts;
  void* workspace;
  py::object tensors;  // those that are pointed into; null once it was launched
};

constexpr char kTokensCall[] = "vlm_fuse.tokens_call";

void forget(PyObject* capsule) { delete static_cast<TokensCall*>(PyCapsule_GetPointer(capsule, kTokensCall)); }

Merge merge_of(const Sources& sources, bool add) {
  Merge merge;
  merge.dim = last_size(sources.table, "table");
  merge.text = row_table(sources.table, merge.dim, "table");
  if (sources.table.ndim == 2) {
    merge.tokens = sources.batch.tokens;
    merge.token_count = sources.batch.samples * sources.batch.length;
  }
  if (sources.features.ndim > 0)
    merge.features.append(row_table(sources.features, merge.dim, "features"), 0, merge.dim);
  merge.add = add;
  return merge;
}

}  // namespace

// usual_tokens(input_ids, inputs_embeds, weight, image_embeds, attention_mask, labels, document_ids, token, layout,
// left, unused, width, out, add, window) -> (call, kinds, versions, the tensors that it writes) where one launch can
// serve the call; None where anything is out of the ordinary. `window`: of a causal mask whose intervals are wanted, 0
// without one, None: no intervals.
PyObject* py_cuda_usual_tokens(PyObject* const* args) {
  Sources sources;
  if (!at_device_of(args[0]) || !usual_sources(args, &sources) || !usual_batch(args + 4, &sources)) Py_RETURN_NONE;
  const Batch& batch = sources.batch;
  if (args[11] == Py_None && batch.layout == Layout::kPacked) Py_RETURN_NONE;
  const int64_t width = args[11] == Py_None ? batch.length : whole(args[11]);
  const int64_t groups = output_rows(batch);
  if (!in_one_launch(batch, width) || !usual_output(args[12], sources, groups, width)) Py_RETURN_NONE;
  const Call call(args[0], "input_ids");
  const bool add = truth(args[13]), intervals = args[14] != Py_None;
  const py::tuple made = new_facts(args[0], batch, groups, width, add, intervals);
  const int64_t needed = cuda::merge_tokens_workspace(batch);
  const py::object workspace = needed > 0 ? new_tensor(args[0], {needed}, allocation.uint8()) : py::none();
  auto found = std::make_unique<TokensCall>();
  found->facts = read_facts(made, batch, groups * width);
  if (intervals) found->facts.window = static_cast<int32_t>(whole(args[14]));
  found->workspace = needed > 0 ? flat<uint8_t>(workspace.ptr(), needed, "workspace") : nullptr;
  found->merge = merge_of(sources, add);
  found->groups = groups;
  found->width = width;
  found->tensors = py::make_tuple(py::handle(args[0]), py::handle(sources.table_object), py::handle(args[3]),
                                  py::handle(args[4]), py::handle(args[5]), made, workspace);
  const py::object capsule = py::reinterpret_steal<py::object>(PyCapsule_New(found.get(), kTokensCall, forget));
  if (!capsule) throw py::error_already_set();
  const Kind& kind = sources.kind;
  const py::tuple kinds = py::make_tuple(py::handle(args[7]), 0, kind.rows, kind.images, kind.rows_each);
  found.release()->batch = std::move(sources.batch);
  PyObject* const written[] = {args[0], args[4], args[6], args[5]};
  return py::make_tuple(capsule, kinds, versions(written), made).release().ptr();
}

// rows_of(input_ids, inputs_embeds, weight, image_embeds, out, source_index): as usual_call.h says
PyObject* py_cuda_rows_of(PyObject* const* args) {
  if (!at_device_of(args[5])) Py_RETURN_NONE;
  return rows_of(args);
}

// merge_tokens(call, out, scale, only_features, status) -> out. `call`: of usual_tokens. `out`: a tensor, or the dtype
// of new rows. `status`: None, or the record that is kept on the device.
PyObject* py_cuda_merge_tokens(PyObject* const* args) {
  auto* const found = static_cast<TokensCall*>(PyCapsule_GetPointer(args[0], kTokensCall));
  if (found == nullptr) throw py::error_already_set();
  const py::object tensors = std::move(found->tensors);  // the backward keeps the call, but must not keep the rows
  if (!tensors) refuse(PyExc_RuntimeError, "call: launched before");
  PyObject* const input_ids = PyTuple_GET_ITEM(tensors.ptr(), 0);
  const Call call(input_ids, "input_ids");
  Merge& merge = found->merge;
  const py::object out = given_or_new_rows(input_ids, args[1], {found->groups, found->width, merge.dim});
  read_output(out.ptr(), &merge);
  if (merge.out.rows != found->groups * found->width) refuse(PyExc_ValueError, "out: not of the rows of this call");
  merge.scaled = read_scale(args[2], &merge.scale);
  merge.only_features = truth(args[3]);
  cuda::merge_tokens(found->batch, merge, found->width, found->facts, found->workspace, status_record(args[4]),
                     call.stream());
  return py::object(out).release().ptr();
}

}  // namespace vlm_fuse
