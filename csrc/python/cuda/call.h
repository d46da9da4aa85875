// One call of a function of the CUDA module: its device, and the stream that torch works on there.
#pragma once

#include "../../cuda/device.h"
#include "../tensors.h"

namespace vlm_fuse {

class Call {
 public:
  // On the device of this tensor; all others of the call must be there too.
  Call(PyObject* like, const char* name);

  cuda::Stream stream() const { return stream_; }

 private:
  int device_;
  cuda::OnDevice on_device_;
  cuda::Stream stream_ = nullptr;
};

// Makes the tensor's device that of the call, without making it current. False: not a tensor of this module.
bool at_device_of(PyObject* like);

// The (8,) int64 that keeps the first error on the device, or null for None.
int64_t* status_record(PyObject* object);

}  // namespace vlm_fuse
