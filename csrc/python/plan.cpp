#include "../cpu/plan.h"

#include <array>

#include "arguments.h"
#include "batch_arguments.h"
#include "errors.h"
#include "functions.h"
#include "new_tensors.h"
#include "plan.h"
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

}  // namespace

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

py::tuple make_step_facts(const Batch& batch, int64_t width) {
  constexpr int64_t wanted[] = {kLabels, kPositionIds, kDocumentIds, kAttentionMask, kCuSeqlens};
  const int64_t without = batch.labels ? 0 : 1;
  return make_facts(batch, width, wanted + without, 5 - without, batch.samples);
}

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
