// The Python module vlm_fuse._native: tensors in through torch's DLPack exchange table, pointers out to csrc/cpu.
// Knows Python, but no torch headers: one build serves every torch that has the table.
#include <pybind11/pybind11.h>

#include <optional>
#include <string>

#include "cpu/masks.h"
#include "cpu/merge.h"
#include "cpu/plan.h"
#include "cpu/threads.h"
#include "dlpack.h"

namespace py = pybind11;

namespace vlm_fuse {
namespace {

constexpr int64_t kHoldGil = 64 * 1024;  // bytes of output up to which giving the GIL away costs more than it frees

// What Python hands over once.
struct Attached {
  const dlpack::ExchangeTable* table = nullptr;
  PyObject* raise = nullptr;           // the status RAISE
  PyObject* recorded_error = nullptr;  // the exception type that carries a record
  PyTypeObject* tensor_type = nullptr;
  PyTypeObject* parameter_type = nullptr;
};
Attached attached;

[[noreturn]] void refuse(PyObject* type, const std::string& message) {
  PyErr_SetString(type, message.c_str());
  throw py::error_already_set();
}

// --- tensors ---------------------------------------------------------------------------------------------------------

dlpack::Tensor tensor(PyObject* object, const char* name) {
  if (attached.table == nullptr) refuse(PyExc_RuntimeError, "vlm_fuse._native: attach() has not been called");
  dlpack::Tensor found;
  if (attached.table->tensor_from_py_object_no_sync(object, &found) != 0) throw py::error_already_set();
  if (found.device.device_type != dlpack::kCPU) refuse(PyExc_ValueError, std::string(name) + ": not on the CPU");
  found.data = static_cast<char*>(found.data) + found.byte_offset;
  return found;
}

void allocation_failed(void*, const char*, const char* message) { PyErr_SetString(PyExc_MemoryError, message); }

// A new tensor of integers, 0.3 us where new_empty takes 0.8. Its storage cannot be resized, so it is for index
// tensors.
struct NewTensor {
  py::object object;
  void* data;
};

NewTensor new_integers(uint8_t code, uint8_t bits, int32_t dimensions, int64_t* shape) {
  dlpack::Tensor like{nullptr, {dlpack::kCPU, 0}, dimensions, {code, bits, 1}, shape, nullptr, 0};
  dlpack::ManagedTensorVersioned* managed = nullptr;
  if (attached.table->managed_tensor_allocator(&like, &managed, nullptr, allocation_failed) != 0)
    throw py::error_already_set();
  void* data = static_cast<char*>(managed->tensor.data) + managed->tensor.byte_offset;
  void* object = nullptr;
  if (attached.table->managed_tensor_to_py_object_no_sync(managed, &object) != 0) throw py::error_already_set();
  return {py::reinterpret_steal<py::object>(static_cast<PyObject*>(object)), data};
}

int64_t elements(const dlpack::Tensor& found) {
  int64_t count = 1;
  for (int32_t i = 0; i < found.ndim; ++i) count *= found.shape[i];
  return count;
}

bool contiguous(const dlpack::Tensor& found) {
  int64_t expected = 1;
  for (int32_t i = found.ndim - 1; i >= 0; --i) {
    if (found.shape[i] == 0) return true;
    if (found.shape[i] != 1 && found.strides[i] != expected) return false;
    expected *= found.shape[i];
  }
  return true;
}

int64_t last_size(const dlpack::Tensor& found, const char* name) {
  if (found.ndim < 1) refuse(PyExc_ValueError, std::string(name) + ": has no dimensions");
  return found.shape[found.ndim - 1];
}

DType row_dtype(const dlpack::Tensor& found, const char* name) {
  if (found.dtype.lanes == 1 && found.dtype.code == dlpack::kFloat) {
    if (found.dtype.bits == 32) return DType::kF32;
    if (found.dtype.bits == 16) return DType::kF16;
    if (found.dtype.bits == 64) return DType::kF64;
  }
  if (found.dtype.lanes == 1 && found.dtype.code == dlpack::kBfloat && found.dtype.bits == 16) return DType::kBF16;
  refuse(PyExc_TypeError, std::string(name) + ": expected float32, bfloat16, float16 or float64");
}

// (n, D) or (i, P, D) of any strides.
RowTable row_table(const dlpack::Tensor& found, int64_t dim, const char* name) {
  if (found.ndim < 2 || found.ndim > 3 || last_size(found, name) != dim) {
    refuse(PyExc_ValueError, std::string(name) + ": expected two or three dimensions, the last of the hidden size");
  }
  RowTable table;
  table.data = static_cast<char*>(found.data);
  table.dtype = row_dtype(found, name);
  const int64_t size = size_of(table.dtype);
  table.step = dim > 1 ? found.strides[found.ndim - 1] * size : size;
  table.inner = found.shape[found.ndim - 2];
  table.row_stride = found.strides[found.ndim - 2] * size;
  table.rows = table.inner;
  if (found.ndim == 2) return table;
  const int64_t outer = found.shape[0];
  table.rows *= outer;
  table.outer_stride = found.strides[0] * size;
  if (table.inner == 1) table.row_stride = table.outer_stride;
  if (outer <= 1 || table.outer_stride == table.inner * table.row_stride) table.inner = table.rows;
  return table;
}

bool is_integer(const dlpack::Tensor& found, int bits) {
  return found.dtype.lanes == 1 && found.dtype.code == dlpack::kInt && found.dtype.bits == bits;
}

template <class Value>
Value* flat(PyObject* object, int64_t count, const char* name) {
  const dlpack::Tensor found = tensor(object, name);
  const bool is_bool = sizeof(Value) == 1 && found.dtype.code == dlpack::kBool && found.dtype.bits == 8;
  if (!is_bool && !is_integer(found, 8 * sizeof(Value))) {
    refuse(PyExc_TypeError, std::string(name) + ": expected int" + std::to_string(8 * sizeof(Value)));
  }
  if ((count >= 0 && elements(found) != count) || !contiguous(found)) {
    refuse(PyExc_ValueError, std::string(name) + ": expected " + std::to_string(count) + " contiguous elements");
  }
  return static_cast<Value*>(found.data);
}

template <class Value>
Value* flat_or_null(PyObject* object, int64_t count, const char* name) {
  return object == Py_None ? nullptr : flat<Value>(object, count, name);
}

// Contiguous integers (or bools) of one of several widths. `least`: the narrowest one that is taken.
Integers integers(const dlpack::Tensor& found, int least, const char* name) {
  const uint8_t code = found.dtype.code, bits = found.dtype.bits;
  const bool byte = bits == 8 && (code == dlpack::kBool || code == dlpack::kUInt);
  const bool whole = code == dlpack::kInt && (bits == 8 || bits == 16 || bits == 32 || bits == 64);
  if (!(byte || whole) || found.dtype.lanes != 1 || bits < least) {
    refuse(PyExc_TypeError, std::string(name) + ": of a type that is not taken here");
  }
  if (!contiguous(found)) refuse(PyExc_ValueError, std::string(name) + ": not contiguous");
  static const int64_t nothing = 0;  // an empty tensor has no memory, but is not absent
  return {found.data == nullptr ? &nothing : found.data, bits / 8};
}

Integers integers_or_none(PyObject* object, int least, int64_t count, const char* name) {
  if (object == Py_None) return {};
  const dlpack::Tensor found = tensor(object, name);
  if (elements(found) != count) refuse(PyExc_ValueError, std::string(name) + ": not of the size of the tokens");
  return integers(found, least, name);
}

// --- plain arguments -------------------------------------------------------------------------------------------------

int64_t whole(PyObject* object) {
  const int64_t value = PyLong_AsLongLong(object);
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

bool truth(PyObject* object) {
  const int value = PyObject_IsTrue(object);
  if (value < 0) throw py::error_already_set();
  return value != 0;
}

// A tuple or list, read in place.
class Items {
 public:
  Items(PyObject* object, const char* name) : owned_(PySequence_Fast(object, name)) {
    if (owned_ == nullptr) throw py::error_already_set();
  }
  Items(const Items&) = delete;
  Items& operator=(const Items&) = delete;
  ~Items() { Py_DECREF(owned_); }

  int64_t size() const { return PySequence_Fast_GET_SIZE(owned_); }
  PyObject* operator[](int64_t index) const { return PySequence_Fast_GET_ITEM(owned_, index); }

 private:
  PyObject* owned_;
};

// --- errors ----------------------------------------------------------------------------------------------------------

py::object as_tuple(const Record& record) {
  return py::make_tuple(record.code, record.sample, record.kind, record.placeholders, record.rows,
                        record.total_placeholders, record.total_rows, record.extra);
}

// `status`: None; RAISE: an exception at once; or the tensor that keeps the first record.
void report(const Record& record, PyObject* status) {
  if (record.code == kFine || status == Py_None) return;
  if (status == attached.raise) {
    py::object error = py::reinterpret_steal<py::object>(
        PyObject_CallFunctionObjArgs(attached.recorded_error, as_tuple(record).ptr(), nullptr));
    if (error) PyErr_SetObject(attached.recorded_error, error.ptr());
    throw py::error_already_set();
  }
  int64_t* kept = flat<int64_t>(status, 8, "status");
  if (kept[0] != kFine) return;
  const int64_t fields[] = {record.code,         record.sample, record.kind,
                            record.placeholders, record.rows,   record.total_placeholders,
                            record.total_rows,   record.extra};
  std::memcpy(kept, fields, sizeof fields);
}

template <class Work>
auto without_gil(int64_t bytes, Work&& work) {
  std::optional<py::gil_scoped_release> released;
  if (bytes > kHoldGil) released.emplace();
  return work();
}

// --- the batch -------------------------------------------------------------------------------------------------------

constexpr int kBatchFields = 11;  // of Batch in vlm_fuse/batch.py, by position
constexpr int kKindFields = 5;
constexpr int64_t kMostKinds = 126;  // kind_ids is int8

void read_kinds(Batch& batch, PyObject* kinds_object, PyObject* sizes_object, PyObject* counts_object) {
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
    kind.counts = own != nullptr && batch.samples > 0 && own[0] >= 0 ? own : nullptr;
  }
}

Batch read_batch(PyObject* const* args) {
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
  read_kinds(batch, args[4], args[5], args[6]);
  const bool needs_sizes = batch.scheme != Scheme::kPlaceholders;
  for (Kind& kind : batch.kinds) {
    if (needs_sizes && kind.images < 0) kind.images = 0;
  }
  return batch;
}

int64_t output_rows(const Batch& batch) { return batch.layout == Layout::kPacked ? 1 : batch.samples; }

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
  int64_t shape[] = {output_rows(batch), whole(args[0])};
  NewTensor source_index = new_integers(dlpack::kInt, 32, 2, shape);
  const bool check = args[1] != Py_None;
  report(without_gil(shape[0] * shape[1] * 4,
                     [&] { return plan(batch, shape[1], check, static_cast<int32_t*>(source_index.data)); }),
         args[1]);
  return source_index.object.release().ptr();
}

// The facts, by the number that Python names them with.
enum Fact { kTextIndex, kPositionIds, kDocumentIds, kImageIds, kKindIds, kAttentionMask, kLabels, kCuSeqlens };

void new_fact(int64_t fact, const Batch& batch, int64_t* shape, int64_t sequences, Facts& out, py::object& made) {
  int64_t bounds[] = {sequences + 1};
  auto allocate = [&](uint8_t code, int bits) {
    const bool flat = fact == kCuSeqlens;
    NewTensor found = new_integers(code, static_cast<uint8_t>(bits), flat ? 1 : 2, flat ? bounds : shape);
    made = std::move(found.object);
    return found.data;
  };
  switch (fact) {
    case kTextIndex:
      out.text_index = static_cast<int32_t*>(allocate(dlpack::kInt, 32));
      break;
    case kPositionIds:
      out.position_ids = static_cast<int64_t*>(allocate(dlpack::kInt, 64));
      break;
    case kDocumentIds:
      out.document_ids = static_cast<int32_t*>(allocate(dlpack::kInt, 32));
      break;
    case kImageIds:
      out.image_ids = static_cast<int32_t*>(allocate(dlpack::kInt, 32));
      break;
    case kKindIds:
      out.kind_ids = static_cast<int8_t*>(allocate(dlpack::kInt, 8));
      break;
    case kAttentionMask:
      out.attention_mask = static_cast<uint8_t*>(allocate(dlpack::kBool, 8));
      break;
    case kLabels:
      if (!batch.labels) refuse(PyExc_ValueError, "labels: none were given");
      out.labels = allocate(dlpack::kInt, 8 * batch.labels.bytes);
      break;
    case kCuSeqlens:
      out.sequences = sequences;
      out.cu_seqlens = static_cast<int32_t*>(allocate(dlpack::kInt, 32));
      break;
    default:
      refuse(PyExc_ValueError, "facts: unknown number");
  }
}

// facts(*batch, width, numbers of the facts wanted, sequences) -> tuple of them
PyObject* py_facts(PyObject* const* args) {
  const Batch batch = read_batch(args);
  args += kBatchFields;
  int64_t shape[] = {output_rows(batch), whole(args[0])};
  const Items wanted(args[1], "facts: expected a tuple of numbers");
  const int64_t sequences = whole(args[2]);
  if (sequences < 0) refuse(PyExc_ValueError, "facts: fewer than no sequences");
  Facts out;
  py::tuple made(wanted.size());
  for (int64_t i = 0; i < wanted.size(); ++i) {
    py::object fact;
    new_fact(whole(wanted[i]), batch, shape, sequences, out, fact);
    PyTuple_SET_ITEM(made.ptr(), i, fact.release().ptr());
  }
  without_gil(shape[0] * shape[1] * 8, [&] { facts(batch, shape[1], out); });
  return made.release().ptr();
}

// --- the rows --------------------------------------------------------------------------------------------------------

// Rows that have numbers of their own: a table may be longer than what the plan gave its kind.
int64_t owned_rows(const Items& starts, int64_t index, int64_t rows) {
  if (index + 1 >= starts.size()) return rows;
  return std::clamp<int64_t>(whole(starts[index + 1]) - whole(starts[index]), 0, rows);
}

// rows(out, text, weight, tokens, scale, features, starts, source_index, text_index, add, only_features, status, fresh)
PyObject* py_rows(PyObject* const* args) {
  Merge merge;
  const dlpack::Tensor out = tensor(args[0], "out");
  merge.dim = last_size(out, "out");
  merge.out = row_table(out, merge.dim, "out");
  if (merge.out.step != size_of(merge.out.dtype)) refuse(PyExc_ValueError, "out: its rows are not contiguous");
  if (args[2] == Py_None) {
    merge.text = row_table(tensor(args[1], "text"), merge.dim, "text");
  } else {
    merge.text = row_table(tensor(args[2], "weight"), merge.dim, "weight");
    const dlpack::Tensor tokens = tensor(args[3], "tokens");
    merge.tokens = integers(tokens, 8, "tokens");
    merge.token_count = elements(tokens);
    merge.scaled = args[4] != Py_None;
    if (merge.scaled) merge.scale = PyFloat_AsDouble(args[4]);
    if (merge.scaled && PyErr_Occurred()) throw py::error_already_set();
  }
  const Items features(args[5], "features: expected a list of tensors"),
      starts(args[6], "starts: expected a list of ints");
  if (features.size() > starts.size()) refuse(PyExc_ValueError, "starts: fewer than features");
  for (int64_t i = 0; i < features.size(); ++i) {
    RowTable table = row_table(tensor(features[i], "features"), merge.dim, "features");
    table.rows = owned_rows(starts, i, table.rows);
    merge.features.append(table, whole(starts[i]), merge.dim);
  }
  merge.source_index = flat<int32_t>(args[7], merge.out.rows, "source_index");
  merge.text_index = flat_or_null<int32_t>(args[8], merge.out.rows, "text_index");
  merge.add = truth(args[9]);
  merge.only_features = truth(args[10]);
  merge.fresh = truth(args[12]);
  const int64_t bytes = merge.out.rows * merge.dim * size_of(merge.out.dtype);
  if (args[11] != Py_None && merge.tokens) report(without_gil(bytes, [&] { return check_tokens(merge); }), args[11]);
  without_gil(bytes, [&] { merge_rows(merge); });
  Py_RETURN_NONE;
}

Gradient gradient(PyObject* object, int64_t dim, const char* name) {
  const dlpack::Tensor found = tensor(object, name);
  if (!contiguous(found) || last_size(found, name) != dim) {
    refuse(PyExc_ValueError, std::string(name) + ": expected contiguous rows of the hidden size");
  }
  int64_t rows = 1;
  for (int32_t i = 0; i + 1 < found.ndim; ++i) rows *= found.shape[i];
  return {static_cast<char*>(found.data), rows, row_dtype(found, name)};
}

// rows_backward(grad, source_index, text_index, tokens, scale, starts, add, grad_text, grad_weight, grad_features,
// fresh)
PyObject* py_rows_backward(PyObject* const* args) {
  MergeBackward backward;
  const dlpack::Tensor grad = tensor(args[0], "grad");
  backward.dim = last_size(grad, "grad");
  backward.grad = row_table(grad, backward.dim, "grad");
  backward.source_index = flat<int32_t>(args[1], backward.grad.rows, "source_index");
  backward.text_index = flat_or_null<int32_t>(args[2], backward.grad.rows, "text_index");
  backward.add = truth(args[6]);
  backward.fresh = truth(args[10]);
  int64_t rows = backward.grad.rows;
  backward.wants_text = args[7] != Py_None;
  if (backward.wants_text) backward.text = gradient(args[7], backward.dim, "grad_text");
  backward.wants_weight = args[8] != Py_None;
  if (backward.wants_weight) {
    backward.weight = gradient(args[8], backward.dim, "grad_weight");
    const dlpack::Tensor tokens = tensor(args[3], "tokens");
    backward.tokens = integers(tokens, 8, "tokens");
    backward.token_count = elements(tokens);
    backward.scaled = args[4] != Py_None;
    if (backward.scaled) backward.scale = PyFloat_AsDouble(args[4]);
    if (backward.scaled && PyErr_Occurred()) throw py::error_already_set();
    rows += backward.weight.rows;
  }
  const Items starts(args[5], "starts: expected a list of ints"), features(args[9], "grad_features: expected a list");
  if (features.size() > starts.size()) refuse(PyExc_ValueError, "starts: fewer than grad_features");
  for (int64_t i = 0; i < features.size(); ++i) {
    if (features[i] == Py_None) continue;
    const Gradient out = gradient(features[i], backward.dim, "grad_features");
    if (out.rows > 0) backward.features.push_back({out, whole(starts[i]), owned_rows(starts, i, out.rows)});
  }
  without_gil(rows * backward.dim * 4, [&] { merge_rows_backward(backward); });
  Py_RETURN_NONE;
}

// --- the usual call --------------------------------------------------------------------------------------------------

bool plain_tensor(PyObject* object) {
  return Py_TYPE(object) == attached.tensor_type || Py_TYPE(object) == attached.parameter_type;
}

// Reads a tensor of the usual kind: plain, with memory of its own, on the CPU.
bool usual(PyObject* object, dlpack::Tensor* found) {
  if (!plain_tensor(object)) return false;
  if (attached.table->tensor_from_py_object_no_sync(object, found) != 0) {
    PyErr_Clear();
    return false;
  }
  return found->device.device_type == dlpack::kCPU && found->dtype.lanes == 1;
}

bool is_whole(const dlpack::Tensor& found, int least) {
  if (found.dtype.code == dlpack::kInt) return found.dtype.bits >= least;
  return least == 8 && found.dtype.bits == 8 &&
         (found.dtype.code == dlpack::kBool || found.dtype.code == dlpack::kUInt);
}

bool is_row_type(const dlpack::Tensor& found) {
  const int bits = found.dtype.bits;
  return (found.dtype.code == dlpack::kFloat && (bits == 16 || bits == 32 || bits == 64)) ||
         (found.dtype.code == dlpack::kBfloat && bits == 16);
}

// ordinary(input_ids, inputs_embeds, weight, image_embeds, attention_mask, labels, document_ids)
//   -> (rows, images, rows_each) of image_embeds as in Batch.kinds, or None where anything is out of the ordinary: then
// the Python checks find out whether that is legal, and say so if not. Nothing is accepted here that they would refuse.
PyObject* py_ordinary(PyObject* const* args) {
  dlpack::Tensor ids, text, other;
  if (!usual(args[0], &ids) || ids.ndim != 2 || !is_whole(ids, 32) || !contiguous(ids)) Py_RETURN_NONE;
  const int64_t samples = ids.shape[0], length = ids.shape[1];
  if (samples * length >= INT32_MAX) Py_RETURN_NONE;
  const bool from_weight = args[1] == Py_None;
  if (from_weight == (args[2] == Py_None) || !usual(args[from_weight ? 2 : 1], &text) || !is_row_type(text))
    Py_RETURN_NONE;
  if (from_weight ? text.ndim != 2 : (text.ndim != 3 || text.shape[0] != samples || text.shape[1] != length))
    Py_RETURN_NONE;
  const int64_t dim = text.shape[text.ndim - 1];
  for (int i = 4; i < 7; ++i) {
    if (args[i] == Py_None) continue;
    if (!usual(args[i], &other) || other.ndim != 2 || other.shape[0] != samples || other.shape[1] != length)
      Py_RETURN_NONE;
    if (!is_whole(other, i == 4 ? 8 : 32) || !contiguous(other)) Py_RETURN_NONE;
  }
  int64_t rows = 0, images = 0, each = 0;
  if (args[3] != Py_None) {
    if (!usual(args[3], &other) || !is_row_type(other) || other.ndim < 2 || other.ndim > 3) Py_RETURN_NONE;
    if (other.shape[other.ndim - 1] != dim) Py_RETURN_NONE;
    images = other.ndim == 3 ? other.shape[0] : -1;
    each = other.ndim == 3 ? other.shape[1] : -1;
    rows = other.ndim == 3 ? images * each : other.shape[0];
  }
  PyObject* numbers[] = {PyLong_FromLongLong(rows), PyLong_FromLongLong(images), PyLong_FromLongLong(each)};
  PyObject* found = PyTuple_New(3);
  for (Py_ssize_t i = 0; i < 3; ++i) {
    if (found == nullptr || numbers[i] == nullptr) throw py::error_already_set();
    PyTuple_SET_ITEM(found, i, numbers[i]);
  }
  return found;
}

// --- masks -----------------------------------------------------------------------------------------------------------

// A host int, or int64 by document id (a single one without dimensions).
void read_prefix(MaskRows& rows, PyObject* object) {
  if (object == Py_None) return;
  if (PyLong_Check(object)) {
    rows.prefix = static_cast<int32_t>(std::clamp<int64_t>(whole(object), 0, kNoLimit));
    return;
  }
  const dlpack::Tensor found = tensor(object, "prefix_lengths");
  rows.prefix_count = elements(found);
  rows.prefix_lengths = flat<int64_t>(object, rows.prefix_count, "prefix_lengths");
  if (found.ndim == 0) {
    rows.prefix = static_cast<int32_t>(std::clamp<int64_t>(rows.prefix_lengths[0], 0, kNoLimit));
    rows.prefix_lengths = nullptr;
  }
}

// intervals(document_ids, image_ids, (kind, window, sinks, chunk_size, images), prefix_lengths, parent_ids, lo, hi,
// lo2, hi2, status) -> whether a row has a second interval
PyObject* py_intervals(PyObject* const* args) {
  MaskRows rows;
  const dlpack::Tensor ids = tensor(args[0], "document_ids");
  if (ids.ndim != 2) refuse(PyExc_ValueError, "document_ids: expected (G, W)");
  rows.rows = ids.shape[0];
  rows.width = ids.shape[1];
  const int64_t count = rows.rows * rows.width;
  if (rows.width >= INT32_MAX) refuse(PyExc_ValueError, "document_ids: rows too long for int32 intervals");
  rows.document_ids = flat<int32_t>(args[0], count, "document_ids");
  rows.image_ids = flat_or_null<int32_t>(args[1], count, "image_ids");
  const Items attend(args[2], "attend: expected a tuple of ints");
  if (attend.size() != 5) refuse(PyExc_ValueError, "attend: expected five ints");
  auto setting = [&](int64_t index) {
    return static_cast<int32_t>(std::clamp<int64_t>(whole(attend[index]), 0, kNoLimit));
  };
  rows.attend.full = setting(0) == 1;
  rows.attend.window = setting(1);
  rows.attend.sinks = setting(2);
  rows.attend.chunk_size = setting(3);
  rows.attend.images = static_cast<ImageAttention>(setting(4));
  read_prefix(rows, args[3]);
  if (args[4] != Py_None) {
    const dlpack::Tensor parents = tensor(args[4], "parent_ids");
    rows.parent_count = elements(parents);
    rows.parent_ids = integers(parents, 32, "parent_ids");
  }
  MaskOut out;
  out.lo = flat<int32_t>(args[5], count, "kv_lo");
  out.hi = flat<int32_t>(args[6], count, "kv_hi");
  out.lo2 = flat_or_null<int32_t>(args[7], count, "kv_lo2");
  out.hi2 = flat_or_null<int32_t>(args[8], count, "kv_hi2");
  const MaskResult result = without_gil(count * 16, [&] { return intervals(rows, out); });
  report(result.error, args[9]);
  return py::bool_(result.second).release().ptr();
}

// --- module ----------------------------------------------------------------------------------------------------------

bool usable(const dlpack::ExchangeTable& table) {
  return table.tensor_from_py_object_no_sync && table.managed_tensor_allocator &&
         table.managed_tensor_to_py_object_no_sync;
}

// The newest table in the chain that this file knows; null: none.
const dlpack::ExchangeTable* known_table(const py::capsule& capsule) {
  auto* header = static_cast<dlpack::ExchangeHeader*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (header == nullptr) throw py::error_already_set();
  while (header != nullptr && header->version.major != dlpack::kMajorVersion) header = header->prev_api;
  auto* table = reinterpret_cast<const dlpack::ExchangeTable*>(header);
  return table != nullptr && usable(*table) ? table : nullptr;
}

// Returns whether the table is one that can be used. `parallel_for`: the address of torch_parallel_for, 0: one thread.
bool attach(const py::capsule& capsule, uintptr_t parallel_for, py::object raise, py::object recorded_error,
            py::object tensor_type, py::object parameter_type) {
  attached.table = known_table(capsule);
  attached.raise = raise.release().ptr();  // kept for good
  attached.recorded_error = recorded_error.release().ptr();
  attached.tensor_type = reinterpret_cast<PyTypeObject*>(tensor_type.release().ptr());
  attached.parameter_type = reinterpret_cast<PyTypeObject*>(parameter_type.release().ptr());
  use_parallel_for(reinterpret_cast<ParallelFor>(parallel_for));
  return attached.table != nullptr;
}

// Arguments come by position, unparsed: a third of the cost of a small call.
template <PyObject* (*Function)(PyObject* const*), int Arguments>
PyObject* entry(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != Arguments) {
    PyErr_Format(PyExc_TypeError, "expected %d arguments, got %zd", Arguments, count);
    return nullptr;
  }
  try {
    return Function(args);
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

template <PyObject* (*Function)(PyObject* const*), int Arguments>
PyMethodDef method(const char* name, const char* doc) {
  auto* pointer = reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&entry<Function, Arguments>));
  return {name, pointer, METH_FASTCALL, doc};
}

PyMethodDef methods[] = {
    method<py_count, kBatchFields>("count", "count(*batch)"),
    method<py_plan, kBatchFields + 2>("plan", "plan(*batch, width, status)"),
    method<py_facts, kBatchFields + 3>("facts", "facts(*batch, width, numbers, sequences)"),
    method<py_rows, 13>("rows", "rows(out, text, weight, tokens, scale, features, starts, source_index, ...)"),
    method<py_rows_backward, 11>("rows_backward", "rows_backward(grad, source_index, text_index, ...)"),
    method<py_ordinary, 7>("ordinary", "ordinary(input_ids, inputs_embeds, weight, image_embeds, ...)"),
    method<py_intervals, 10>("intervals", "intervals(document_ids, image_ids, attend, ...)"),
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace
}  // namespace vlm_fuse

PYBIND11_MODULE(_native, module, py::mod_gil_not_used()) {
  module.def("attach", &vlm_fuse::attach);
  if (PyModule_AddFunctions(module.ptr(), vlm_fuse::methods) != 0) throw py::error_already_set();
}
