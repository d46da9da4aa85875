#include "../cpu/plan.h"

#include <array>

#include "arguments.h"
#include "batch_arguments.h"
#include "errors.h"
#include "functions.h"
#include "new_tensors.h"
#include "tensors.h"
#include "versions.h"

namespace vlm_fuse {
namespace {

// The facts, by the number that Python names them with.
enum Fact { kTextIndex, kPositionIds, kDocumentIds, kImageIds, kKindIds, kAttentionMask, kLabels, kCuSeqlens, kFacts };

NewTensor described(int64_t fact, const Batch& batch, int64_t width, int64_t sequences) {
  NewTensor made{dlpack::kInt, 32, 2, {output_rows(batch), width}};
  switch (fact) {
    case kTextIndex:
    case kDocumentIds:
    case kImageIds:
      break;
    case kPositionIds:
      made.bits = 64;
      break;
    case kKindIds:
      made.bits = 8;
      break;
    case kAttentionMask:
      made.code = dlpack::kBool;
      made.bits = 8;
      break;
    case kLabels:
      if (!batch.labels) refuse(PyExc_ValueError, "labels: none were given");
      made.bits = static_cast<uint8_t>(8 * batch.labels.bytes);
      break;
    case kCuSeqlens:
      made.ndim = 1;
      made.shape[0] = sequences + 1;
      break;
    default:
      refuse(PyExc_ValueError, "facts: unknown number");
  }
  return made;
}

// Where the kernel writes the fact.
void place(int64_t fact, void* data, Facts& out) {
  switch (fact) {
    case kTextIndex:
      out.text_index = static_cast<int32_t*>(data);
      break;
    case kPositionIds:
      out.position_ids = static_cast<int64_t*>(data);
      break;
    case kDocumentIds:
      out.document_ids = static_cast<int32_t*>(data);
      break;
    case kImageIds:
      out.image_ids = static_cast<int32_t*>(data);
      break;
    case kKindIds:
      out.kind_ids = static_cast<int8_t*>(data);
      break;
    case kAttentionMask:
      out.attention_mask = static_cast<uint8_t*>(data);
      break;
    case kLabels:
      out.labels = data;
      break;
    default:
      out.cu_seqlens = static_cast<int32_t*>(data);
  }
}

py::object new_source_index(const Batch& batch, int64_t width, PyObject* status) {
  NewTensor field{dlpack::kInt, 32, 2, {output_rows(batch), width}};
  PyObject* made = nullptr;
  new_tensors(&field, 1, &made);
  py::object source_index = py::reinterpret_steal<py::object>(made);
  const bool check = status != Py_None;
  report(without_gil(field.shape[0] * width * 4,
                     [&] { return plan(batch, width, check, static_cast<int32_t*>(field.data)); }),
         status);
  return source_index;
}

// The facts with these numbers, made in one pass over the tokens.
py::tuple make_facts(const Batch& batch, int64_t width, const int64_t* wanted, int64_t count, int64_t sequences) {
  std::array<NewTensor, kFacts> tensors;
  for (int64_t i = 0; i < count; ++i) tensors[static_cast<size_t>(i)] = described(wanted[i], batch, width, sequences);
  py::tuple made(count);
  new_tensors(tensors.data(), count, &PyTuple_GET_ITEM(made.ptr(), 0));
  Facts out;
  out.sequences = sequences;
  for (int64_t i = 0; i < count; ++i) place(wanted[i], tensors[static_cast<size_t>(i)].data, out);
  without_gil(output_rows(batch) * width * 8, [&] { facts(batch, width, out); });
  return made;
}

// What a training step reads: labels (where there are any), position_ids, document_ids, attention_mask, cu_seqlens.
py::tuple make_step_facts(const Batch& batch, int64_t width) {
  constexpr int64_t wanted[] = {kLabels, kPositionIds, kDocumentIds, kAttentionMask, kCuSeqlens};
  const int64_t without = batch.labels ? 0 : 1;
  return make_facts(batch, width, wanted + without, 5 - without, batch.samples);
}

// What image_embeds of the usual kind say: rows, images and rows of each, as in Batch.kinds. False: out of the
// ordinary.
bool read_features(PyObject* object, int64_t dim, Kind* kind) {
  kind->first_row = kind->rows = kind->images = kind->rows_each = 0;
  kind->sizes = kind->counts = nullptr;
  if (object == Py_None) return true;
  dlpack::Tensor found;
  if (!usual(object, &found) || !is_row_type(found) || found.ndim < 2 || found.ndim > 3) return false;
  if (found.shape[found.ndim - 1] != dim) return false;
  kind->images = found.ndim == 3 ? found.shape[0] : -1;
  kind->rows_each = found.ndim == 3 ? found.shape[1] : -1;
  kind->rows = found.ndim == 3 ? kind->images * kind->rows_each : found.shape[0];
  return true;
}

// (B, T) as the tokens.
bool usual_like(PyObject* object, const Batch& batch, int least, Integers* read, const char* name) {
  if (object == Py_None) return true;
  dlpack::Tensor found;
  if (!usual(object, &found) || found.ndim != 2 || !is_whole(found, least) || !contiguous(found)) return false;
  if (found.shape[0] != batch.samples || found.shape[1] != batch.length) return false;
  *read = integers(found, least, name);
  return true;
}

// input_ids, inputs_embeds, weight and image_embeds of the usual kind, fitting one another.
bool usual_sources(PyObject* const* args, Batch* batch, Kind* kind) {
  dlpack::Tensor ids, text;
  if (!usual(args[0], &ids) || ids.ndim != 2 || !is_whole(ids, 32) || !contiguous(ids)) return false;
  batch->samples = ids.shape[0];
  batch->length = ids.shape[1];
  if (batch->samples * batch->length >= INT32_MAX) return false;
  batch->tokens = integers(ids, 32, "input_ids");
  const bool from_weight = args[1] == Py_None;
  if (from_weight == (args[2] == Py_None) || !usual(args[from_weight ? 2 : 1], &text) || !is_row_type(text))
    return false;
  const bool fits = from_weight ? text.ndim == 2
                                : text.ndim == 3 && text.shape[0] == batch->samples && text.shape[1] == batch->length;
  return fits && read_features(args[3], text.shape[text.ndim - 1], kind);
}

int64_t needed_width(const Batch& batch) {
  if (batch.layout == Layout::kKeep) return batch.length;
  int64_t placeholders = 0;
  const Counts counts = without_gil(batch.samples * batch.length, [&] { return count(batch, &placeholders); });
  return batch.layout == Layout::kPadded ? counts.widest : counts.rows;
}

}  // namespace

// count(*batch) -> (widest, rows, documents, (placeholders of each kind))
PyObject* py_count(PyObject* const* args) {
  const Batch batch = read_batch(args);
  std::vector<int64_t> placeholders(batch.kinds.size());
  const Counts counts = without_gil(batch.samples * batch.length, [&] { return count(batch, placeholders.data()); });
  py::tuple by_kind(placeholders.size());
  for (size_t c = 0; c < placeholders.size(); ++c) by_kind[c] = placeholders[c];
  return py::make_tuple(counts.widest, counts.rows, counts.documents, by_kind).release().ptr();
}

// plan(*batch, width, status) -> source_index
PyObject* py_plan(PyObject* const* args) {
  const Batch batch = read_batch(args);
  args += kBatchFields;
  return new_source_index(batch, whole(args[0]), args[1]).release().ptr();
}

// usual_plan(input_ids, inputs_embeds, weight, image_embeds, attention_mask, labels, document_ids, token, layout, left,
// unused, width, status) -> (source_index, kinds, versions, step facts), or None where anything is out of the ordinary:
// then the Python checks find out whether that is legal, and say so if not. Nothing is accepted here that they would
// refuse. The step facts are made where labels are given, since who gives them reads them; else None.
PyObject* py_usual_plan(PyObject* const* args) {
  Batch batch;
  Kind kind;
  if (!called_plainly() || !usual_sources(args, &batch, &kind)) Py_RETURN_NONE;
  if (!usual_like(args[4], batch, 8, &batch.attention_mask, "attention_mask")) Py_RETURN_NONE;
  if (!usual_like(args[5], batch, 32, &batch.labels, "labels")) Py_RETURN_NONE;
  if (!usual_like(args[6], batch, 32, &batch.document_ids, "document_ids")) Py_RETURN_NONE;
  int overflow = 0;
  kind.token = PyLong_AsLongLongAndOverflow(args[7], &overflow);
  if (overflow != 0) Py_RETURN_NONE;
  batch.scheme = Scheme::kPlaceholders;
  batch.layout = static_cast<Layout>(whole(args[8]));
  batch.left = truth(args[9]);
  batch.unused = truth(args[10]);
  batch.kinds.push_back(kind);
  const int64_t width = args[11] == Py_None ? needed_width(batch) : whole(args[11]);
  const py::object source_index = new_source_index(batch, width, args[12]);
  const bool step = batch.labels && !batch.document_ids;
  const py::object facts = step ? py::object(make_step_facts(batch, width)) : py::none();
  const py::tuple kinds = py::make_tuple(py::handle(args[7]), 0, kind.rows, kind.images, kind.rows_each);
  PyObject* const written[] = {args[0], args[4], args[6], args[5]};
  return py::make_tuple(source_index, kinds, versions(written), facts).release().ptr();
}

// rows_of(input_ids, inputs_embeds, weight, image_embeds) -> rows of image_embeds where all is of the usual kind, or
// None
PyObject* py_rows_of(PyObject* const* args) {
  Batch batch;
  Kind kind;
  if (!called_plainly() || !usual_sources(args, &batch, &kind)) Py_RETURN_NONE;
  return PyLong_FromLongLong(kind.rows);
}

// facts(*batch, width, numbers of the facts wanted, sequences) -> tuple of them
PyObject* py_facts(PyObject* const* args) {
  const Batch batch = read_batch(args);
  args += kBatchFields;
  const Items numbers(args[1], "facts: expected a tuple of numbers");
  const int64_t sequences = whole(args[2]), count = numbers.size();
  if (sequences < 0) refuse(PyExc_ValueError, "facts: fewer than no sequences");
  if (count > kFacts) refuse(PyExc_ValueError, "facts: more than there are");
  std::array<int64_t, kFacts> wanted;
  for (int64_t i = 0; i < count; ++i) wanted[static_cast<size_t>(i)] = whole(numbers[i]);
  return make_facts(batch, whole(args[0]), wanted.data(), count, sequences).release().ptr();
}

// step_facts(batch, versions, source_index) -> the facts of a training step: labels (where there are any),
// position_ids, document_ids, attention_mask, cu_seqlens. None where the batch, which has no document_ids, was written
// in place since `versions`.
PyObject* py_step_facts(PyObject* const* args) {
  const Items fields(args[0], "batch: expected a tuple");
  if (fields.size() != kBatchFields) refuse(PyExc_ValueError, "batch: not of as many fields as Batch has");
  PyObject* const* const values = fields.begin();
  const py::tuple now = versions(values);
  if (now.size() > 0 && PyObject_Size(args[1]) > 0 && !now.equal(py::handle(args[1]))) Py_RETURN_NONE;
  const Batch batch = read_batch(values);
  if (batch.document_ids) refuse(PyExc_ValueError, "step_facts: how many documents there are is not known");
  const dlpack::Tensor index = tensor(args[2], "source_index");
  const int64_t width = last_size(index, "source_index");
  return make_step_facts(batch, width).release().ptr();
}

}  // namespace vlm_fuse
