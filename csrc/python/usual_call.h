// The usual call of merge, recognised at one go: what costs Python twenty looks at tensors. Nothing is accepted here
// that the Python checks would refuse.
#pragma once

#include "../cpu/batch.h"
#include "tensors.h"

namespace vlm_fuse {

// Where the rows come from.
struct Sources {
  Batch batch;  // its tokens, samples and length
  Kind kind;
  PyObject* table_object = nullptr;  // inputs_embeds or weight
  dlpack::Tensor table{};
  dlpack::Tensor features{};  // without data: none
};

// input_ids, inputs_embeds, weight and image_embeds of the usual kind, fitting one another.
bool usual_sources(PyObject* const* args, Sources* sources);

// attention_mask, labels, document_ids, and the id of the one kind.
bool usual_batch(PyObject* const* args, Sources* sources);

// Memory of rows that is contiguous and of its own. The table may be the output itself.
bool usual_output(PyObject* object, const Sources& sources, int64_t groups, int64_t width);

// rows_of(input_ids, inputs_embeds, weight, image_embeds, out, source_index) -> rows of image_embeds where all is of
// the usual kind, and `out`, if given, can hold the rows of the plan; or None
PyObject* rows_of(PyObject* const* args);

}  // namespace vlm_fuse
