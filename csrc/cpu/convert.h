// Loops over elements, in the best form that this processor has.
#pragma once

#include "dtype.h"

namespace vlm_fuse {

// to[i] = from[i] in another type, i < count. The two do not overlap.
using Convert = void (*)(void* to, const void* from, int64_t count);

Convert converter(DType from, DType to);

// Elements that stand `step` bytes apart, put beside each other.
void gather(void* to, const char* from, int64_t step, int64_t count, DType dtype);

// to[i] = from[i] * by, rounded to from's type, then converted. `by` is of from's type already.
using Scale = void (*)(void* to, const void* from, double by, int64_t count);

Scale scaler(DType from, DType to);

// to[i] = a[i] + b[i], all of one type, in fp32 (fp64), rounded once.
using Sum = void (*)(void* to, const void* a, const void* b, int64_t count);

Sum adder(DType dtype);

void add(float* to, const float* from, int64_t count);
void add(double* to, const double* from, int64_t count);
void scale(float* values, float by, int64_t count);
void scale(double* values, double by, int64_t count);

}  // namespace vlm_fuse
