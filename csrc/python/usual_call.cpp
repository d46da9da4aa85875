#include "usual_call.h"

namespace vlm_fuse {
namespace {

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

}  // namespace

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

namespace {

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

}  // namespace

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

bool usual_batch(PyObject* const* args, Sources* sources) {
  Batch& batch = sources->batch;
  if (!usual_like(args[0], batch, 8, &batch.attention_mask, "attention_mask")) return false;
  if (!usual_like(args[1], batch, 32, &batch.labels, "labels")) return false;
  if (!usual_like(args[2], batch, 32, &batch.document_ids, "document_ids")) return false;
  int overflow = 0;
  sources->kind.token = PyLong_AsLongLongAndOverflow(args[3], &overflow);
  if (overflow != 0) return false;
  batch.scheme = Scheme::kPlaceholders;
  batch.layout = static_cast<Layout>(PyLong_AsLong(args[4]));
  batch.left = args[5] == Py_True;
  batch.unused = args[6] == Py_True;
  batch.kinds.push_back(sources->kind);
  return true;
}

PyObject* rows_of(PyObject* const* args) {
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
