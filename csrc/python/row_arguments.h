// The arguments of the row ops, as both modules take them.
#pragma once

#include "../cpu/merge.h"
#include "arguments.h"
#include "tensors.h"

namespace vlm_fuse {

// Rows that have numbers of their own: a table may be longer than what the plan gave its kind.
int64_t owned_rows(const Items& starts, int64_t index, int64_t rows);

// A factor, or None. Returns whether there is one.
bool read_scale(PyObject* object, double* scale);

// Of `rows`: out, text, weight, tokens, scale, features, starts, source_index, text_index, add, only_features. All but
// the output and what is of its size.
Merge read_sources(PyObject* const* args);
void read_output(PyObject* out, Merge* merge);                                // into merge->out
void read_indexes(PyObject* const* args, const dlpack::Tensor& index, Merge* merge);  // once the output is known

// Of `rows_backward`: grad, source_index, text_index, tokens, scale, starts, add. All but the gradients.
MergeBackward read_grad(PyObject* const* args);
void read_weight_tokens(PyObject* const* args, MergeBackward* backward);

// Contiguous rows to be written.
Gradient read_gradient(PyObject* object, int64_t dim, const char* name);

// The same up to `add`, then the gradient of the embedding weight.
MergeBackward read_weight_backward(PyObject* const* args);

}  // namespace vlm_fuse
