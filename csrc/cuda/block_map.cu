#include "block_map.cuh"
#include "block_map.h"
#include "launch.cuh"

namespace vlm_fuse::cuda {
namespace {

// Lines of classes are read and written in words of up to eight bytes.
int64_t pitch_of(int64_t columns) { return (columns + kLanes - 1) / kLanes * kLanes; }

}  // namespace

int64_t block_map_workspace(const MaskIntervals& mask, const Blocks& blocks) {
  return mask.samples * block_count(mask.rows, blocks.q_size) * pitch_of(block_count(mask.keys, blocks.kv_size));
}

void block_map(const MaskIntervals& mask, const Blocks& blocks, const BlockMapOut& out, void* workspace,
               Stream stream) {
  const int64_t lines = block_count(mask.rows, blocks.q_size), columns = block_count(mask.keys, blocks.kv_size);
  BlockMapTask task = {};
  task.mask = mask;
  task.q_size = static_cast<uint32_t>(blocks.q_size);
  task.kv_size = static_cast<uint32_t>(blocks.kv_size);
  task.kv_shift = -1;
  if ((blocks.kv_size & (blocks.kv_size - 1)) == 0) {
    for (task.kv_shift = 0; (int64_t{1} << task.kv_shift) != blocks.kv_size;) ++task.kv_shift;
  }
  task.lines = static_cast<uint32_t>(lines);
  task.columns = static_cast<uint32_t>(columns);
  task.pitch = pitch_of(columns);
  task.classes = static_cast<uint8_t*>(workspace);
  task.out = out;
  launch(classes_kernel, {mask.samples * lines, kClassThreads, sizeof(ClassesShared)}, stream, task);
  launch(column_lists_kernel, {mask.samples * block_count(columns, kLanes), kListThreads, sizeof(ColumnsShared)},
         stream, task);
}

}  // namespace vlm_fuse::cuda
