#include "new_tensors.h"

#include <algorithm>
#include <atomic>
#include <new>

#include "../cpu/blocks.h"

namespace vlm_fuse {
namespace {

constexpr int64_t kAlignment = 64;  // as torch's own

std::atomic<int64_t> held_bytes{0}, peak_bytes{0};

void account(int64_t bytes) {
  const int64_t now = held_bytes.fetch_add(bytes, std::memory_order_relaxed) + bytes;
  int64_t peak = peak_bytes.load(std::memory_order_relaxed);
  while (now > peak && !peak_bytes.compare_exchange_weak(peak, now, std::memory_order_relaxed)) {
  }
}

int64_t aligned(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// Sizes can be those of expanded tensors, larger than any memory.
int64_t bytes_of(const NewTensor& tensor) {
  constexpr int64_t kMost = int64_t{1} << 56;
  int64_t bytes = tensor.bits / 8;
  for (int32_t i = 0; i < tensor.ndim; ++i) {
    const int64_t size = tensor.shape[i];
    if (size < 0) refuse(PyExc_ValueError, "a size below zero");
    if (size > 0 && bytes > kMost / size) refuse(PyExc_MemoryError, "a result larger than any memory");
    bytes *= size;
  }
  return bytes;
}

// A tensor as torch takes it over, with its shape.
struct Description {
  dlpack::ManagedTensorVersioned managed;
  int64_t shape[kMostDims];
  int64_t strides[kMostDims];
};

// Memory of tensors that live and die together. Their descriptions stand behind it, and the elements behind these, or
// in a block.
struct Piece {
  std::atomic<int64_t> owners;
  int64_t bytes;
  Block block;
};

void release(dlpack::ManagedTensorVersioned* managed) {
  Piece* piece = static_cast<Piece*>(managed->manager_ctx);
  if (piece->owners.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
  held_bytes.fetch_sub(piece->bytes, std::memory_order_relaxed);
  if (piece->block.data != nullptr) give_back(piece->block);
  ::operator delete(piece, std::align_val_t{kAlignment});
}

PyObject* to_python(Description* made, Piece* piece, const NewTensor& tensor) {
  int64_t stride = 1;
  for (int32_t i = tensor.ndim - 1; i >= 0; --i) {
    made->shape[i] = tensor.shape[i];
    made->strides[i] = stride;
    stride *= std::max<int64_t>(tensor.shape[i], 1);
  }
  dlpack::ManagedTensorVersioned& managed = made->managed;
  managed.version = {dlpack::kMajorVersion, 0};
  managed.manager_ctx = piece;
  managed.deleter = release;
  managed.flags = 0;
  managed.tensor = {
      tensor.data, {dlpack::kCPU, 0}, tensor.ndim, {tensor.code, tensor.bits, 1}, made->shape, made->strides, 0};
  void* object = nullptr;
  if (attached.table->managed_tensor_to_py_object_no_sync(&managed, &object) != 0) throw py::error_already_set();
  return static_cast<PyObject*>(object);
}

}  // namespace

void new_tensors(NewTensor* wanted, int64_t count, PyObject** made) {
  int64_t bytes = 0;
  for (int64_t i = 0; i < count; ++i) bytes += aligned(bytes_of(wanted[i]));
  const int64_t head = aligned(static_cast<int64_t>(sizeof(Piece) + static_cast<size_t>(count) * sizeof(Description)));
  const Block block = bytes >= kLargeBytes ? take_block(bytes) : Block{};
  const int64_t total = block.data != nullptr ? head : head + bytes;
  char* memory =
      static_cast<char*>(::operator new(static_cast<size_t>(total), std::align_val_t{kAlignment}, std::nothrow));
  if (memory == nullptr) {
    if (block.data != nullptr) give_back(block);
    refuse(PyExc_MemoryError, "no memory for a result of " + std::to_string(bytes) + " bytes");
  }
  Piece* piece = new (memory) Piece{{count}, bytes, block};
  account(bytes);
  Description* descriptions = reinterpret_cast<Description*>(memory + sizeof(Piece));
  char* next = block.data != nullptr ? block.data : memory + head;
  for (int64_t i = 0; i < count; ++i) {
    wanted[i].data = next;
    made[i] = to_python(new (descriptions + i) Description, piece, wanted[i]);
    next += aligned(bytes_of(wanted[i]));
  }
}

NewTensor new_rows(PyObject* dtype) {
  const auto found = std::find(attached.row_dtypes, attached.row_dtypes + kDTypes, dtype);
  if (found == attached.row_dtypes + kDTypes) refuse(PyExc_TypeError, "dtype: not one of rows");
  const DType wanted = static_cast<DType>(found - attached.row_dtypes);
  const uint8_t code = wanted == DType::kBF16 ? dlpack::kBfloat : dlpack::kFloat;
  return {code, static_cast<uint8_t>(8 * size_of(wanted)), 0, {}};
}

DType new_dtype(const NewTensor& rows) {
  if (rows.code == dlpack::kBfloat) return DType::kBF16;
  return rows.bits == 64 ? DType::kF64 : (rows.bits == 32 ? DType::kF32 : DType::kF16);
}

MemoryUse memory_use() {
  return {held_bytes.load(std::memory_order_relaxed), peak_bytes.load(std::memory_order_relaxed)};
}

void reset_peak() { peak_bytes.store(held_bytes.load(std::memory_order_relaxed), std::memory_order_relaxed); }

}  // namespace vlm_fuse
