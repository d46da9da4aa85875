#include "launch.cuh"
#include "merge_backward.cuh"
#include "merge_backward.h"
#include "weight_gradient.cuh"

namespace vlm_fuse::cuda {
namespace {

// The targets of one launch.
class Gradients {
 public:
  explicit Gradients(const MergeBackward& backward) : backward_(backward) {
    arguments_.grad = backward.grad;
    arguments_.source_index = backward.source_index;
    arguments_.text_index = backward.text_index;
    arguments_.dim = static_cast<unsigned>(backward.dim);
    arguments_.add = backward.add;
    int64_t rows = backward.wants_text ? backward.text.rows : 0;
    for (const FeatureGradient& feature : backward.features) rows += feature.out.rows;
    // all blocks at the same time, but not more rows than a block has notes for
    const int64_t targets = static_cast<int64_t>(backward.features.size()) + 1;
    const int64_t blocks = blocks_at_once<gradients_kernel<void>>(kGradientThreads, sizeof(GradientShared), cluster());
    const int64_t each = rows / (blocks > 2 * targets ? blocks - targets : blocks) + 1;
    arguments_.rows_each = static_cast<unsigned>(each < kMostOwned ? each : kMostOwned);
  }

  bool full() const { return arguments_.targets == kGradients; }

  void add_text(const Gradient& out) {
    arguments_.has_text = true;
    add(out, 0, 0);
  }

  void add(const Gradient& out, int64_t first, int64_t owned) {
    if (first > INT32_MAX) first = INT32_MAX, owned = 0;  // no row can have such a number
    list_.targets[arguments_.targets++] = {out.data,
                                           static_cast<unsigned>(out.rows),
                                           static_cast<unsigned>(owned),
                                           static_cast<int32_t>(first),
                                           arguments_.blocks,
                                           out.dtype};
    arguments_.blocks += (static_cast<unsigned>(out.rows) + arguments_.rows_each - 1) / arguments_.rows_each;
    const bool alike = out.dtype == backward_.grad.dtype && backward_.grad.step == size_of(out.dtype);
    copied_ &= alike;
  }

  // And is empty again.
  void launch_on(Stream stream) {
    Grid grid = {arguments_.blocks, kGradientThreads, sizeof(GradientShared)};
    if (arguments_.blocks > 1) {
      grid.cluster = cluster();
      grid.blocks = (grid.blocks + grid.cluster - 1) / grid.cluster * grid.cluster;
    }
    const bool sums = arguments_.has_text && backward_.add && backward_.text_index != nullptr;
    if (copied_ && !sums)
      launch(gradients_kernel<void>, grid, stream, arguments_, list_);
    else if (backward_.grad.dtype == DType::kF64 ||
             backward_.text.dtype == DType::kF64)  // a sum is in fp64 where either is
      launch(gradients_kernel<double>, grid, stream, arguments_, list_);
    else
      launch(gradients_kernel<float>, grid, stream, arguments_, list_);
    arguments_.targets = 0;
    arguments_.blocks = 0;
    arguments_.has_text = false;
    copied_ = true;
  }

 private:
  static int cluster() { return current_device().clusters ? kGradientCluster : 1; }

  const MergeBackward& backward_;
  GradientArguments arguments_ = {};
  GradientList list_ = {};
  bool copied_ = true;
};

}  // namespace

void merge_rows_backward(const MergeBackward& backward, Stream stream) {
  if (backward.dim == 0) return;
  Gradients gradients(backward);
  if (backward.wants_text && backward.text.rows > 0) gradients.add_text(backward.text);
  for (const FeatureGradient& feature : backward.features) {
    if (gradients.full()) gradients.launch_on(stream);
    gradients.add(feature.out, feature.first, feature.owned);
  }
  gradients.launch_on(stream);
}

void weight_ids(const MergeBackward& backward, int32_t* ids, Stream stream) {
  const IdArguments arguments = {backward.source_index,
                                 backward.text_index,
                                 backward.tokens,
                                 backward.token_count,
                                 backward.weight.rows,
                                 ids,
                                 static_cast<unsigned>(backward.grad.rows),
                                 backward.add};
  launch(ids_kernel, {(backward.grad.rows + kWeightThreads - 1) / kWeightThreads, kWeightThreads}, stream, arguments);
}

void weight_gradient(const MergeBackward& backward, const int32_t* ids, const int64_t* order, bool accumulate,
                     Stream stream) {
  if (backward.dim == 0 || backward.weight.rows == 0) return;
  WeightArguments arguments = {};
  arguments.grad = backward.grad;
  arguments.weight = backward.weight.data;
  arguments.ids = ids;
  arguments.order = order;
  arguments.scale = round_to(backward.weight.dtype, backward.scale);
  arguments.rows = static_cast<unsigned>(backward.grad.rows);
  arguments.vocabulary = static_cast<unsigned>(backward.weight.rows);
  arguments.dim = static_cast<unsigned>(backward.dim);
  arguments.dtype = backward.weight.dtype;
  arguments.scaled = backward.scaled;
  arguments.accumulate = accumulate;
  const Grid grid = {(backward.weight.rows + kIdsEach - 1) / kIdsEach, kWeightThreads, sizeof(WeightShared)};
  if (backward.weight.dtype == DType::kF64 || backward.grad.dtype == DType::kF64)
    launch(weight_kernel<double>, grid, stream, arguments);
  else
    launch(weight_kernel<float>, grid, stream, arguments);
}

}  // namespace vlm_fuse::cuda
