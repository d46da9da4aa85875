#include "batch_arguments.h"

#include "arguments.h"
#include "tensors.h"

namespace vlm_fuse {
namespace {

constexpr int kKindFields = 5;
constexpr int64_t kMostKinds = 126;  // kind_ids is int8

void read_kinds(Batch& batch, PyObject* kinds_object, PyObject* sizes_object, PyObject* counts_object, bool on_host) {
  const Items fields(kinds_object, "kinds: expected a tuple of ints");
  const int64_t kinds = fields.size() / kKindFields;
  if (kinds > kMostKinds) refuse(PyExc_ValueError, "kinds: more than " + std::to_string(kMostKinds));
  const int64_t* sizes = nullptr;
  int64_t sizes_left = 0;
  if (sizes_object != Py_None) {
    const dlpack::Tensor found = tensor(sizes_object, "image_rows");
    sizes_left = elements(found);
    sizes = flat<int64_t>(sizes_object, sizes_left, "image_rows");
  }
  const int64_t* counts = flat_or_null<int64_t>(counts_object, kinds * batch.samples, "feature_counts");
  batch.kinds.resize(static_cast<size_t>(kinds));
  for (int64_t c = 0; c < kinds; ++c) {
    Kind& kind = batch.kinds[static_cast<size_t>(c)];
    kind.token = whole(fields[c * kKindFields]);
    kind.first_row = whole(fields[c * kKindFields + 1]);
    kind.rows = whole(fields[c * kKindFields + 2]);
    kind.images = whole(fields[c * kKindFields + 3]);
    kind.rows_each = whole(fields[c * kKindFields + 4]);
    kind.sizes = nullptr;
    if (kind.images > 0 && kind.rows_each < 0) {
      if (kind.images > sizes_left) refuse(PyExc_ValueError, "image_rows: fewer sizes than images");
      kind.sizes = sizes;
      sizes += kind.images;
      sizes_left -= kind.images;
    }
    const int64_t* own = counts == nullptr ? nullptr : counts + c * batch.samples;
    kind.counts = own != nullptr && batch.samples > 0 && (!on_host || own[0] >= 0) ? own : nullptr;
  }
}

}  // namespace

Batch read_batch(PyObject* const* args, bool on_host) {
  Batch batch;
  const dlpack::Tensor tokens = tensor(args[0], "tokens");
  if (tokens.ndim != 2) refuse(PyExc_ValueError, "tokens: expected (B, T)");
  batch.samples = tokens.shape[0];
  batch.length = tokens.shape[1];
  const int64_t count = batch.samples * batch.length;
  if (count >= INT32_MAX) refuse(PyExc_ValueError, "tokens: more than source_index can number");
  batch.tokens = integers(tokens, tokens.dtype.code == dlpack::kBool ? 8 : 32, "tokens");
  batch.attention_mask = integers_or_none(args[1], 8, count, "attention_mask");
  batch.document_ids = integers_or_none(args[2], 32, count, "document_ids");
  batch.labels = integers_or_none(args[3], 32, count, "labels");
  batch.scheme = static_cast<Scheme>(whole(args[7]));
  batch.layout = static_cast<Layout>(whole(args[8]));
  batch.left = truth(args[9]);
  batch.unused = truth(args[10]);
  read_kinds(batch, args[4], args[5], args[6], on_host);
  const bool needs_sizes = batch.scheme != Scheme::kPlaceholders;
  for (Kind& kind : batch.kinds) {
    if (needs_sizes && kind.images < 0) kind.images = 0;
  }
  return batch;
}

}  // namespace vlm_fuse
