#include "../cpu/plan.h"
#include "arguments.h"
#include "batch_arguments.h"
#include "functions.h"
#include "plan.h"
#include "usual_call.h"
#include "versions.h"

namespace vlm_fuse {
namespace {

int64_t needed_width(const Batch& batch) {
  if (batch.layout == Layout::kKeep) return batch.length;
  int64_t placeholders = 0;
  const Counts counts = without_gil(batch.samples * batch.length, [&] { return count(batch, &placeholders); });
  return batch.layout == Layout::kPadded ? counts.widest : counts.rows;
}

}  // namespace

// usual_plan(input_ids, inputs_embeds, weight, image_embeds, attention_mask, labels, document_ids, token, layout, left,
// unused, width, status, out) -> (source_index, kinds, versions, step facts), or None where anything is out of the
// ordinary: then the Python checks find out whether that is legal, and say so if not. The step facts are made where
// labels are given, since who gives them reads them; else None.
PyObject* py_usual_plan(PyObject* const* args) {
  Sources sources;
  if (!usual_sources(args, &sources)) Py_RETURN_NONE;
  Batch& batch = sources.batch;
  const Kind& kind = sources.kind;
  if (!usual_batch(args + 4, &sources)) Py_RETURN_NONE;
  const int64_t width = args[11] == Py_None ? needed_width(batch) : whole(args[11]);
  if (!usual_output(args[13], sources, output_rows(batch), width)) Py_RETURN_NONE;
  const py::object source_index = new_source_index(batch, width, args[12]);
  const bool step = batch.labels && !batch.document_ids;
  const py::object facts = step ? py::object(make_step_facts(batch, width)) : py::none();
  const py::tuple kinds = py::make_tuple(py::handle(args[7]), 0, kind.rows, kind.images, kind.rows_each);
  PyObject* const written[] = {args[0], args[4], args[6], args[5]};
  return py::make_tuple(source_index, kinds, versions(written), facts).release().ptr();
}

PyObject* py_rows_of(PyObject* const* args) { return rows_of(args); }

}  // namespace vlm_fuse
