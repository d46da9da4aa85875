// The usual call of merge, recognised at one go: what costs Python twenty looks at tensors.
#include "../cpu/plan.h"
#include "arguments.h"
#include "batch_arguments.h"
#include "functions.h"
#include "plan.h"
#include "tensors.h"
#include "versions.h"

namespace vlm_fuse {
namespace {

// Where the rows come from.
struct Sources {
  Batch batch;  // its tokens, samples and length
  Kind kind;
  PyObject* table_object = nullptr;  // inputs_embeds or weight
  dlpack::Tensor table{};
  dlpack::Tensor features{};  // without data: none
};

// First byte and the byte after the last.
struct Extent {
  const char* begin;
  const char* end;
};

Extent extent(const dlpack::Tensor& found) {
  const char* data = static_cast<const char*>(found.data);
  int64_t last = 0;
  for (int32_t i = 0; i < found.ndim; ++i) {
    if (found.shape[i] == 0) return {data, data};
    last += (found.shape[i] - 1) * found.strides[i];
  }
  return {data, data + (last + 1) * found.dtype.bits / 8};
}

// Memory of rows that is contiguous and of its own. The table may be the output itself.
bool usual_output(PyObject* object, const Sources& sources, int64_t groups, int64_t width) {
  if (object == Py_None) return true;
  const dlpack::Tensor &table = sources.table, &features = sources.features;
  dlpack::Tensor out;
  if (!usual(object, &out) || !is_row_type(out) || !contiguous(out) || out.ndim != 3) return false;
  if (out.shape[0] != groups || out.shape[1] != width || out.shape[2] != table.shape[table.ndim - 1]) return false;
  const Extent target = extent(out);
  auto apart = [&](const dlpack::Tensor& read) {
    const Extent other = extent(read);
    return other.end <= target.begin || target.end <= other.begin;
  };
  return (object == sources.table_object || apart(table)) && (features.data == nullptr || apart(features));
}

// What image_embeds of the usual kind say: rows, images and rows of each, as in Batch.kinds. False: out of the
// ordinary.
bool read_features(PyObject* object, Sources* sources) {
  Kind& kind = sources->kind;
  kind.first_row = kind.rows = kind.images = kind.rows_each = 0;
  kind.sizes = kind.counts = nullptr;
  if (object == Py_None) return true;
  dlpack::Tensor& found = sources->features;
  if (!usual(object, &found) || !is_row_type(found) || found.ndim < 2 || found.ndim > 3) return false;
  if (found.shape[found.ndim - 1] != sources->table.shape[sources->table.ndim - 1]) return false;
  kind.images = found.ndim == 3 ? found.shape[0] : -1;
  kind.rows_each = found.ndim == 3 ? found.shape[1] : -1;
  kind.rows = found.ndim == 3 ? kind.images * kind.rows_each : found.shape[0];
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
bool usual_sources(PyObject* const* args, Sources* sources) {
  dlpack::Tensor ids;
  if (!called_plainly() || !usual(args[0], &ids) || ids.ndim != 2 || !is_whole(ids, 32) || !contiguous(ids))
    return false;
  Batch& batch = sources->batch;
  batch.samples = ids.shape[0];
  batch.length = ids.shape[1];
  if (batch.samples * batch.length >= INT32_MAX) return false;
  batch.tokens = integers(ids, 32, "input_ids");
  const bool from_weight = args[1] == Py_None;
  if (from_weight == (args[2] == Py_None)) return false;
  sources->table_object = args[from_weight ? 2 : 1];
  dlpack::Tensor& table = sources->table;
  if (!usual(sources->table_object, &table) || !is_row_type(table)) return false;
  const bool fits = from_weight ? table.ndim == 2
                                : table.ndim == 3 && table.shape[0] == batch.samples && table.shape[1] == batch.length;
  return fits && read_features(args[3], sources);
}

int64_t needed_width(const Batch& batch) {
  if (batch.layout == Layout::kKeep) return batch.length;
  int64_t placeholders = 0;
  const Counts counts = without_gil(batch.samples * batch.length, [&] { return count(batch, &placeholders); });
  return batch.layout == Layout::kPadded ? counts.widest : counts.rows;
}

}  // namespace

// usual_plan(input_ids, inputs_embeds, weight, image_embeds, attention_mask, labels, document_ids, token, layout, left,
// unused, width, status, out) -> (source_index, kinds, versions, step facts), or None where anything is out of the
// ordinary: then the Python checks find out whether that is legal, and say so if not. Nothing is accepted here that
// they would refuse. The step facts are made where labels are given, since who gives them reads them; else None.
PyObject* py_usual_plan(PyObject* const* args) {
  Sources sources;
  if (!usual_sources(args, &sources)) Py_RETURN_NONE;
  Batch& batch = sources.batch;
  Kind& kind = sources.kind;
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
  if (!usual_output(args[13], sources, output_rows(batch), width)) Py_RETURN_NONE;
  const py::object source_index = new_source_index(batch, width, args[12]);
  const bool step = batch.labels && !batch.document_ids;
  const py::object facts = step ? py::object(make_step_facts(batch, width)) : py::none();
  const py::tuple kinds = py::make_tuple(py::handle(args[7]), 0, kind.rows, kind.images, kind.rows_each);
  PyObject* const written[] = {args[0], args[4], args[6], args[5]};
  return py::make_tuple(source_index, kinds, versions(written), facts).release().ptr();
}

// rows_of(input_ids, inputs_embeds, weight, image_embeds, out, source_index) -> rows of image_embeds where all is of
// the usual kind, and `out`, if given, can hold the rows of the plan; or None
PyObject* py_rows_of(PyObject* const* args) {
  Sources sources;
  dlpack::Tensor index;
  if (!usual_sources(args, &sources)) Py_RETURN_NONE;
  if (args[4] != Py_None) {
    if (!usual(args[5], &index) || index.ndim != 2) Py_RETURN_NONE;
    if (!usual_output(args[4], sources, index.shape[0], index.shape[1])) Py_RETURN_NONE;
  }
  return PyLong_FromLongLong(sources.kind.rows);
}

}  // namespace vlm_fuse
