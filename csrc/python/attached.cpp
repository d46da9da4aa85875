#include "attached.h"

#include "../cpu/dtype.h"

namespace vlm_fuse {
namespace {

bool usable(const dlpack::ExchangeTable& table) {
  return table.tensor_from_py_object_no_sync && table.managed_tensor_to_py_object_no_sync;
}

// The newest table in the chain that this file knows; null: none.
const dlpack::ExchangeTable* known_table(const py::capsule& capsule) {
  auto* header = static_cast<dlpack::ExchangeHeader*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (header == nullptr) throw py::error_already_set();
  while (header != nullptr && header->version.major != dlpack::kMajorVersion) header = header->prev_api;
  auto* table = reinterpret_cast<const dlpack::ExchangeTable*>(header);
  return table != nullptr && usable(*table) ? table : nullptr;
}

}  // namespace

bool attach_to(const py::capsule& capsule, const FromPython& from) {
  attached.table = known_table(capsule);
  attached.raise = from.raise.inc_ref().ptr();  // kept for good
  attached.recorded_error = from.recorded_error.inc_ref().ptr();
  attached.tensor_type = reinterpret_cast<PyTypeObject*>(from.tensor_type.inc_ref().ptr());
  attached.parameter_type = reinterpret_cast<PyTypeObject*>(from.parameter_type.inc_ref().ptr());
  for (size_t i = 0; i < kDTypes; ++i) attached.row_dtypes[i] = py::object(from.row_dtypes[i]).release().ptr();
  for (size_t i = 0; i < 3; ++i) attached.modes[i] = py::object(from.modes[i]).release().ptr();
  return attached.table != nullptr;
}

}  // namespace vlm_fuse
