#include "launch.cuh"
#include "merge_arguments.cuh"
#include "merge_tokens.cuh"
#include "merge_tokens.h"

namespace vlm_fuse::cuda {
namespace {

static_assert(kMostSamples == kSampleEnds);

// A chunk a block, and as many blocks as run at the same time.
struct Chunks {
  unsigned size;
  unsigned count;
};

Chunks chunks_of(int64_t tokens) {
  constexpr int64_t kLeast = 16;  // tokens, a row for each warp
  const int cluster = current_device().clusters ? kTokenCluster : 1;
  int64_t blocks = blocks_at_once<merge_tokens_kernel<AsBytes>>(kTokenThreads, sizeof(TokenShared), cluster);
  if (blocks > kMostChunks) blocks = kMostChunks;
  int64_t size = (tokens + blocks - 1) / blocks;
  if (size < kLeast) size = kLeast;
  return {static_cast<unsigned>(size), static_cast<unsigned>((tokens + size - 1) / size)};
}

}  // namespace

int64_t merge_tokens_workspace(const Batch& batch) {
  if (current_device().clusters) return 0;
  const Chunks chunks = chunks_of(batch.samples * batch.length);
  return chunks.count * static_cast<int64_t>(sizeof(ChunkCount)) +
         batch.samples * static_cast<int64_t>(sizeof(unsigned));
}

void merge_tokens(const Batch& batch, const Merge& merge, int64_t width, const TokenFacts& facts, void* workspace,
                  int64_t* status, Stream stream) {
  const Kind& kind = batch.kinds.front();
  const Chunks chunks = chunks_of(batch.samples * batch.length);
  TokenArguments tokens = {};
  tokens.tokens = batch.tokens;
  tokens.attention_mask = batch.attention_mask;
  tokens.labels = batch.labels;
  tokens.placeholder = kind.token;
  tokens.vocabulary = merge.tokens ? merge.text.rows : -1;
  tokens.status = status;
  tokens.source_index = facts.source_index;
  tokens.text_index = facts.text_index;
  tokens.position_ids = facts.position_ids;
  tokens.document_ids = facts.document_ids;
  tokens.out_mask = facts.attention_mask;
  tokens.out_labels = facts.labels;
  tokens.cu_seqlens = facts.cu_seqlens;
  tokens.kv_lo = facts.kv_lo;
  tokens.kv_hi = facts.kv_hi;
  tokens.window = facts.window;
  tokens.workspace = workspace;
  tokens.samples = static_cast<unsigned>(batch.samples);
  tokens.length = static_cast<unsigned>(batch.length);
  tokens.count = tokens.samples * tokens.length;
  tokens.chunk = chunks.size;
  tokens.chunks = chunks.count;
  tokens.width = static_cast<unsigned>(width);
  tokens.features = static_cast<unsigned>(kind.rows);
  tokens.image = kind.images > 0 ? static_cast<unsigned>(kind.rows_each) : 0;
  tokens.packed = batch.layout == Layout::kPacked;
  tokens.unused = batch.unused;
  tokens.add = merge.add;
  RowArguments rows = arguments_of(merge, nullptr);
  rows.others = true;
  TableList<kOneTable> features = {};
  for (const FeatureTable& feature : merge.features.all()) features.tables[features.count++] = feature;
  Grid grid = {chunks.count, kTokenThreads, sizeof(TokenShared)};
  if (workspace == nullptr) {
    grid.cluster = kTokenCluster;
    grid.blocks = (grid.blocks + kTokenCluster - 1) / kTokenCluster * kTokenCluster;
  } else {
    launch(count_kernel, {(chunks.count + kTokenWarps - 1) / kTokenWarps, kTokenThreads}, stream, tokens);
  }
  with_numbers(merge, [&](auto numbers) {
    launch(merge_tokens_kernel<decltype(numbers)>, grid, stream, tokens, rows, features);
  });
}

}  // namespace vlm_fuse::cuda
