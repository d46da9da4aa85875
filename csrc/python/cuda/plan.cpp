#include "../../cuda/plan.h"

#include "../arguments.h"
#include "../batch_arguments.h"
#include "call.h"
#include "functions.h"

namespace vlm_fuse {
namespace {

void* facts_of(dlpack::Tensor found, int64_t bytes, int64_t count, const char* name) {
  if (found.dtype.bits != 8 * bytes || elements(found) != count || !contiguous(found)) {
    refuse(PyExc_ValueError, std::string(name) + ": not as the plan is");
  }
  return found.data;
}

template <class Value>
void read_fact(PyObject* object, int64_t count, const char* name, Value*& to) {
  if (object != Py_None) to = static_cast<Value*>(facts_of(tensor(object, name), sizeof(Value), count, name));
}

Facts read_facts(PyObject* object, const Batch& batch, int64_t rows) {
  const Items given(object, "facts: expected a tuple");
  if (given.size() != 8) refuse(PyExc_ValueError, "facts: expected eight");
  Facts facts;
  read_fact(given[0], rows, "text_index", facts.text_index);
  read_fact(given[1], rows, "position_ids", facts.position_ids);
  read_fact(given[2], rows, "document_ids", facts.document_ids);
  read_fact(given[3], rows, "image_ids", facts.image_ids);
  read_fact(given[4], rows, "kind_ids", facts.kind_ids);
  read_fact(given[5], rows, "attention_mask", facts.attention_mask);
  if (given[6] != Py_None) {
    if (!batch.labels) refuse(PyExc_ValueError, "labels: none were given");
    facts.labels = facts_of(tensor(given[6], "labels"), batch.labels.bytes, rows, "labels");
  }
  if (given[7] != Py_None) {
    facts.sequences = elements(tensor(given[7], "cu_seqlens")) - 1;
    const bool enough = batch.document_ids ? facts.sequences >= 0 : facts.sequences == batch.samples;
    if (!enough) refuse(PyExc_ValueError, "cu_seqlens: not as many as there are samples");
    read_fact(given[7], facts.sequences + 1, "cu_seqlens", facts.cu_seqlens);
  }
  return facts;
}

// Memory that a call needs beside its outputs.
int64_t* scratch_of(PyObject* object, int64_t needed) {
  const dlpack::Tensor found = tensor(object, "scratch");
  if (elements(found) < needed) refuse(PyExc_ValueError, "scratch: too small");
  return flat<int64_t>(found, -1, "scratch");
}

}  // namespace

// plan_scratch(*batch, whether it is checked) -> elements of the int64 tensor that the functions below take
PyObject* py_cuda_plan_scratch(PyObject* const* args) {
  const Call call(args[0], "tokens");
  return PyLong_FromLongLong(cuda::plan_scratch(read_batch(args, false), truth(args[kBatchFields])));
}

// count(*batch, totals, scratch): rows of the longest sample, of all, documents, placeholders of each kind
PyObject* py_cuda_count(PyObject* const* args) {
  const Call call(args[0], "tokens");
  const Batch batch = read_batch(args, false);
  args += kBatchFields;
  auto* totals = flat<int64_t>(args[0], 3 + static_cast<int64_t>(batch.kinds.size()), "totals");
  cuda::count(batch, totals, scratch_of(args[1], cuda::plan_scratch(batch, false)), call.stream());
  Py_RETURN_NONE;
}

// plan(*batch, width, source_index or None, facts or None each, status or None, whether that holds nothing yet,
// scratch)
PyObject* py_cuda_plan(PyObject* const* args) {
  const Call call(args[0], "tokens");
  const Batch batch = read_batch(args, false);
  args += kBatchFields;
  cuda::PlanOutputs out;
  out.width = whole(args[0]);
  if (out.width < 0) refuse(PyExc_ValueError, "width: below 0");
  const int64_t rows = output_rows(batch) * out.width;
  out.source_index = flat_or_null<int32_t>(args[1], rows, "source_index");
  out.facts = read_facts(args[2], batch, rows);
  out.status = status_record(args[3]);
  out.fresh = truth(args[4]);
  cuda::plan(batch, out, scratch_of(args[5], cuda::plan_scratch(batch, out.status != nullptr)), call.stream());
  Py_RETURN_NONE;
}

}  // namespace vlm_fuse
