// The row op read the other way: gradients of the text, the features and the embedding weight.
#pragma once

#include "../cpu/merge.h"
#include "device.h"

namespace vlm_fuse::cuda {

// Every row of the gradients of text and features, written once, in one launch up to 48 of them. (Not the weight's.)
void merge_rows_backward(const MergeBackward& backward, Stream stream);

// The embedding row that each row of grad was looked up from, -1: none. For sorting.
void weight_ids(const MergeBackward& backward, int32_t* ids, Stream stream);

// Every row of the weight's gradient: the sum of its rows of grad in ascending order, rounded once. `ids`: those of
// weight_ids in ascending order, and `order`: the rows that they belong to. `accumulate`: added to what is there.
void weight_gradient(const MergeBackward& backward, const int32_t* ids, const int64_t* order, bool accumulate,
                     Stream stream);

}  // namespace vlm_fuse::cuda
