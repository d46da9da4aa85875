// Merging from token ids. The tokens are cut into as many chunks as there are blocks at a time, a chunk a block. How
// many placeholders and kept tokens come before a chunk is counted anew in every cluster, whose blocks share the
// counting (sm_90 on; before, a launch of its own counts into a workspace): no block waits for another cluster, and
// nothing has to be reset between calls. Then a thread takes a token, says where its row comes from, and the warps move
// the rows. The first block also looks for what is wrong with the batch.
//
// Recounting instead of a prefix that is handed on: the comparison of designs is in docs/cuda.md.
#pragma once

#include "record.cuh"
#include "row_source.cuh"

namespace vlm_fuse::cuda {

constexpr int kTokenThreads = 512;
constexpr int kTokenWarps = kTokenThreads / kLanes;
constexpr int kTokenCluster = 8;
constexpr unsigned kMostChunks = kTokenThreads;  // a thread each
constexpr unsigned kSampleEnds = 1024;
constexpr unsigned kNoToken = 0xffffffffu;

struct TokenArguments {
  Integers tokens;
  Integers attention_mask;
  Integers labels;
  int64_t placeholder;
  int64_t vocabulary;  // rows of the table that ids are looked up in, -1: in none
  int64_t* status;  // may be null
  int32_t* source_index;  // these may be null, as in TokenFacts
  int32_t* text_index;
  int64_t* position_ids;
  int32_t* document_ids;
  uint8_t* out_mask;
  void* out_labels;
  int32_t* cu_seqlens;
  int32_t* kv_lo;
  int32_t* kv_hi;
  void* workspace;  // ChunkCount of each chunk and a number for each sample, where blocks do not count
  unsigned samples;
  unsigned length;
  unsigned count;  // samples * length
  unsigned chunk;  // tokens of a chunk
  unsigned chunks;
  unsigned width;  // of an output row
  unsigned features;  // rows there are
  unsigned image;  // rows of an image, 0: not known
  int32_t window;
  bool packed;
  bool unused;  // features beyond the placeholders are fine
  bool add;
};

struct alignas(16) ChunkCount {
  unsigned placeholders;
  unsigned kept;
  unsigned kept_of_last;  // those that belong to the sample of the chunk's last token
  unsigned outside;  // first token whose id is looked up but not in the table, kNoToken: none
};

struct TokenShared {
  ChunkCount counts[kMostChunks];
  unsigned sample_ends[kSampleEnds];  // in the first block: placeholders of a chunk up to the end of a sample in it
  unsigned before[kMostChunks];  // in the first block: placeholders before each chunk
  unsigned sums[5][kTokenWarps];
  unsigned placeholders, kept;  // before the tile
  unsigned sample_begin;  // kept tokens before the sample that the tile's first token belongs to
  unsigned kept_before[kTokenThreads];
  unsigned row[kTokenThreads];  // of each token of the tile, kNoToken: none
  int32_t source[kTokenThreads];
};

// What a thread knows of a token.
struct PlainToken {
  int64_t id;
  bool here;
  bool kept;
  bool placeholder;
};

__device__ inline PlainToken read_token(const TokenArguments& batch, unsigned token, bool here) {
  PlainToken found = {0, here, false, false};
  if (!here) return found;
  found.id = batch.tokens[token];
  found.kept = !batch.attention_mask || batch.attention_mask[token] != 0;
  found.placeholder = found.id == batch.placeholder;
  return found;
}

// Counts a chunk, as a warp. `sample_ends`, if given, gets the placeholders of the chunk up to each sample's end in it.
__device__ inline ChunkCount count_chunk(const TokenArguments& batch, unsigned chunk, unsigned* sample_ends) {
  ChunkCount counted = {0, 0, 0, kNoToken};
  const unsigned first = chunk * batch.chunk;
  if (first >= batch.count) return counted;
  const unsigned end = batch.count - first < batch.chunk ? batch.count : first + batch.chunk;
  const unsigned last_sample = (end - 1) / batch.length * batch.length;
#pragma unroll 4
  for (unsigned at = first; at < end; at += kLanes) {
    const unsigned token = at + lane();
    const PlainToken found = read_token(batch, token, token < end);
    const unsigned placeholders = __ballot_sync(kAllLanes, found.placeholder);
    counted.kept += __popc(__ballot_sync(kAllLanes, found.kept));
    counted.kept_of_last += __popc(__ballot_sync(kAllLanes, found.kept && token >= last_sample));
    if (sample_ends != nullptr) {
      const bool looked_up =
          batch.vocabulary >= 0 && found.here && (!batch.packed || found.kept) && (batch.add || !found.placeholder);
      const unsigned outside = __ballot_sync(kAllLanes, looked_up && (found.id < 0 || found.id >= batch.vocabulary));
      if (outside != 0 && counted.outside == kNoToken) counted.outside = at + __ffs(static_cast<int>(outside)) - 1;
      if (found.here && (token + 1) % batch.length == 0) {
        sample_ends[token / batch.length] = counted.placeholders + __popc(placeholders & lanes_upto());
      }
    }
    counted.placeholders += __popc(placeholders);
  }
  return counted;
}

// Fills shared.counts of every block of the cluster, and in the first block shared.sample_ends. Chunks behind the
// cluster's own are left out where nobody asks for totals.
__device__ inline void count_in_cluster(const TokenArguments& batch, TokenShared& shared) {
  const unsigned first_block = blockIdx.x - cluster_rank();
  const bool inspects = first_block == 0;
  const unsigned own_end = first_block + cluster_size();
  const unsigned needed = batch.packed || inspects || own_end > batch.chunks ? batch.chunks : own_end;
  unsigned* const sample_ends = inspects ? in_block(shared.sample_ends, 0) : nullptr;
  cluster_barrier();  // every block of the cluster runs: its memory can be written
#pragma unroll 1
  for (unsigned chunk = cluster_rank() * kTokenWarps + warp(); chunk < needed; chunk += cluster_size() * kTokenWarps) {
    const ChunkCount counted = count_chunk(batch, chunk, sample_ends);
    if (lane() < cluster_size()) *in_block(&shared.counts[chunk], lane()) = counted;
  }
  for (unsigned chunk = needed + threadIdx.x; chunk < batch.chunks; chunk += kTokenThreads) shared.counts[chunk] = {};
  cluster_barrier();  // no block touches another's memory from here on
}

__device__ inline const ChunkCount* counts_of(const TokenArguments& batch) {
  return static_cast<const ChunkCount*>(batch.workspace);
}
__device__ inline unsigned* sample_ends_of(const TokenArguments& batch) {
  return reinterpret_cast<unsigned*>(static_cast<ChunkCount*>(batch.workspace) + batch.chunks);
}

__device__ inline void counts_from_workspace(const TokenArguments& batch, TokenShared& shared) {
  for (unsigned i = threadIdx.x; i < batch.chunks; i += kTokenThreads) shared.counts[i] = counts_of(batch)[i];
  if (blockIdx.x == 0) {
    for (unsigned b = threadIdx.x; b < batch.samples; b += kTokenThreads)
      shared.sample_ends[b] = sample_ends_of(batch)[b];
  }
  __syncthreads();
}

// What comes before the block's chunk, and in all.
struct Before {
  unsigned placeholders;
  unsigned kept;
  unsigned kept_of_sample;  // of the sample that the chunk's first token belongs to
  unsigned all_placeholders;
  unsigned all_kept;
};

__device__ inline Before sum_counts(const TokenArguments& batch, TokenShared& shared, unsigned chunk) {
  const unsigned first = chunk * batch.chunk, sample_chunk = first / batch.length * batch.length / batch.chunk;
  const unsigned i = threadIdx.x;
  const ChunkCount own = i < batch.chunks ? shared.counts[i] : ChunkCount{};
  const bool before = i < chunk;
  const unsigned sums[5] = {warp_sum(before ? own.placeholders : 0), warp_sum(before ? own.kept : 0),
                            warp_sum(before && i >= sample_chunk ? own.kept_of_last : 0), warp_sum(own.placeholders),
                            warp_sum(own.kept)};
  if (lane() == 0) {
    for (int s = 0; s < 5; ++s) shared.sums[s][warp()] = sums[s];
  }
  __syncthreads();
  unsigned totals[5] = {};
#pragma unroll 1
  for (int w = 0; w < kTokenWarps; ++w) {
#pragma unroll
    for (int s = 0; s < 5; ++s) totals[s] += shared.sums[s][w];
  }
  __syncthreads();  // sums are written again
  const bool begins = first % batch.length == 0;  // the chunk begins with its sample
  return {totals[0], totals[1], begins ? 0 : totals[2], totals[3], totals[4]};
}

// --- what is wrong ---------------------------------------------------------------------------------------------------

// Placeholders up to the end of a sample.
__device__ inline unsigned seen_after(const TokenArguments& batch, const TokenShared& shared, unsigned sample) {
  const unsigned last = (sample + 1) * batch.length - 1;
  return shared.before[last / batch.chunk] + shared.sample_ends[sample];
}

__device__ inline Record record_of(const TokenArguments& batch, const TokenShared& shared, const Before& before,
                                   unsigned bad, unsigned outside) {
  Record record;
  if (bad != kNoToken) {
    const unsigned seen = seen_after(batch, shared, bad), earlier = bad > 0 ? seen_after(batch, shared, bad - 1) : 0;
    const bool cut = seen <= batch.features;
    record.code = cut ? kImageCut : kTooFewRows;
    record.sample = bad;
    record.placeholders = seen - earlier;
    record.rows = batch.features - earlier;
    if (cut) {  // rows of the images that begin in the sample
      const unsigned begun = (seen + batch.image - 1) / batch.image - (earlier + batch.image - 1) / batch.image;
      record.rows = static_cast<int64_t>(begun) * batch.image;
    }
  } else if (before.all_placeholders < batch.features && !batch.unused) {
    record.code = kTooManyRows;
    record.sample = -1;
  } else if (batch.packed && before.all_kept > batch.width) {
    return {kTooLong, -1, 0, 0, 0, 0, 0, before.all_kept};
  } else if (outside != kNoToken) {
    return {kOutsideVocabulary, outside, 0, 0, 0, 0, batch.vocabulary, batch.tokens[outside]};
  }
  if (record.code != kFine) {
    record.total_placeholders = before.all_placeholders;
    record.total_rows = batch.features;
  }
  return record;
}

// The first block, all of its threads.
__device__ inline void inspect(const TokenArguments& batch, TokenShared& shared, const Before& before) {
  const unsigned i = threadIdx.x;
  const unsigned own = i < batch.chunks ? shared.counts[i].placeholders : 0;
  const unsigned scanned = warp_scan(own);
  if (lane() == kLanes - 1) shared.sums[0][warp()] = scanned;
  __syncthreads();
  unsigned earlier = 0;
#pragma unroll 1
  for (int w = 0; w < warp(); ++w) earlier += shared.sums[0][w];
  if (i < batch.chunks) shared.before[i] = earlier + scanned - own;
  __syncthreads();
  // complements, so that the first is the largest
  unsigned bad = 0;
#pragma unroll 1
  for (unsigned b = i; b < batch.samples; b += kTokenThreads) {
    const unsigned seen = seen_after(batch, shared, b), there = b > 0 ? seen_after(batch, shared, b - 1) : 0;
    const bool few = seen > batch.features && there <= batch.features;
    const bool cut = batch.image != 0 && seen <= batch.features && seen % batch.image != 0;
    if ((few || cut) && bad == 0) bad = ~b;
  }
  bad = warp_max(bad);
  const unsigned outside = warp_max(i < batch.chunks ? ~shared.counts[i].outside : 0u);
  if (lane() == 0) {
    shared.sums[1][warp()] = bad;
    shared.sums[2][warp()] = outside;
  }
  __syncthreads();
  if (i == 0 && batch.status[0] == kFine) {
    unsigned first = 0, first_outside = 0;
#pragma unroll 1
    for (int w = 0; w < kTokenWarps; ++w) {
      first = shared.sums[1][w] > first ? shared.sums[1][w] : first;
      first_outside = shared.sums[2][w] > first_outside ? shared.sums[2][w] : first_outside;
    }
    flag(batch.status, record_of(batch, shared, before, ~first, ~first_outside));
  }
  __syncthreads();  // sums are written again
}

// --- rows ------------------------------------------------------------------------------------------------------------

template <class Value>
__device__ void put(Value* to, unsigned row, Value value) {
  if (to != nullptr) to[row] = value;
}

// The label of a row, or the one that no loss counts.
__device__ inline void put_label(const TokenArguments& batch, unsigned row, unsigned token, bool labelled) {
  if (batch.out_labels == nullptr) return;
  const int64_t label = labelled ? batch.labels[token] : -100;
  if (batch.labels.bytes == 4)
    static_cast<int32_t*>(batch.out_labels)[row] = static_cast<int32_t>(label);
  else
    static_cast<int64_t*>(batch.out_labels)[row] = label;
}

__device__ inline void put_padding(const TokenArguments& batch, unsigned row, int64_t position) {
  put<int64_t>(batch.position_ids, row, position);
  put<int32_t>(batch.document_ids, row, -1);
  put<uint8_t>(batch.out_mask, row, 0);
  put<int32_t>(batch.kv_lo, row, 0);
  put<int32_t>(batch.kv_hi, row, 0);
  put_label(batch, row, 0, false);
}

// A kept row: `position` in its document, which begins at row `begin` of its output row.
__device__ inline void put_facts(const TokenArguments& batch, unsigned row, unsigned token, unsigned sample,
                                 unsigned position, unsigned begin, bool text) {
  put<int64_t>(batch.position_ids, row, position);
  put<int32_t>(batch.document_ids, row, static_cast<int32_t>(sample));
  put<uint8_t>(batch.out_mask, row, 1);
  if (batch.kv_lo != nullptr) {
    const int32_t at = static_cast<int32_t>(position);
    const int32_t seen = batch.window == 0 || at < batch.window ? 0 : at - batch.window + 1;
    batch.kv_lo[row] = static_cast<int32_t>(begin) + seen;
    batch.kv_hi[row] = static_cast<int32_t>(begin) + at + 1;
  }
  put_label(batch, row, token, text && (!batch.packed || position > 0));
}

// Up to kTokenThreads tokens of the chunk: facts, and for each the row that it gives and its source.
// What comes before the tile goes on to what comes before the next.
__device__ inline void plan_tile(const TokenArguments& batch, TokenShared& shared, unsigned first, unsigned end) {
  const unsigned token = first + threadIdx.x;
  const PlainToken found = read_token(batch, token, token < end);
  const unsigned placeholders = __ballot_sync(kAllLanes, found.placeholder),
                 kept = __ballot_sync(kAllLanes, found.kept);
  if (lane() == 0) {
    shared.sums[0][warp()] = __popc(placeholders);
    shared.sums[1][warp()] = __popc(kept);
  }
  __syncthreads();
  unsigned ordinal = shared.placeholders + __popc(placeholders & lanes_before());
  unsigned kept_before = shared.kept + __popc(kept & lanes_before());
#pragma unroll 1
  for (int w = 0; w < warp(); ++w) {
    ordinal += shared.sums[0][w];
    kept_before += shared.sums[1][w];
  }
  shared.kept_before[threadIdx.x] = kept_before;
  __syncthreads();
  // kept tokens before a sample that begins in the tile, or did before
  auto kept_before_sample = [&](unsigned start) {
    return start >= first ? shared.kept_before[start - first] : shared.sample_begin;
  };
  unsigned row = kNoToken;
  int32_t source = kPad;
  if (found.here) {
    const unsigned sample = token / batch.length, start = sample * batch.length;
    const unsigned begin = kept_before_sample(start);
    row = batch.packed ? (found.kept && kept_before < batch.width ? kept_before : kNoToken) : token;
    if (!found.placeholder) source = -1 - static_cast<int32_t>(token);
    if (found.placeholder && ordinal < batch.features) source = static_cast<int32_t>(ordinal);
    if (row != kNoToken) {
      put<int32_t>(batch.source_index, row, source);
      put<int32_t>(batch.text_index, row, static_cast<int32_t>(token));
      if (found.kept)
        put_facts(batch, row, token, sample, kept_before - begin, batch.packed ? begin : 0, !found.placeholder);
      else
        put_padding(batch, row, 0);
    }
    if (batch.cu_seqlens != nullptr) {
      if (token == start) batch.cu_seqlens[sample] = static_cast<int32_t>(kept_before);
      if (token + 1 == batch.count) batch.cu_seqlens[batch.samples] = static_cast<int32_t>(kept_before + found.kept);
    }
  }
  shared.row[threadIdx.x] = row;
  shared.source[threadIdx.x] = source;
  __syncthreads();
  if (threadIdx.x + 1 == kTokenThreads) {  // the last thread has all of the tile before it
    const unsigned next = first + kTokenThreads, start = next / batch.length * batch.length;
    if (start < next) shared.sample_begin = kept_before_sample(start);  // else the next tile sees it begin
    shared.placeholders = ordinal + found.placeholder;
    shared.kept = kept_before + found.kept;
  }
}

// The rows of the tile.
template <class Numbers>
__device__ void write_tile(const RowArguments& rows, const TableList<kOneTable>& features, const TokenShared& shared,
                           unsigned first, unsigned count) {
#pragma unroll 1
  for (unsigned at = warp() * kMostRows; at < count; at += kTokenWarps * kMostRows) {
    const unsigned left = count - at < kMostRows ? count - at : kMostRows;
    RowSource own = {0, 0, -1, true};
    unsigned row = 0;
    if (static_cast<unsigned>(lane()) < left) {
      const unsigned i = at + lane();
      const int32_t source = shared.source[i];
      const int64_t token = first + i;
      RowSources sources = {source == kPad ? -1 : token, -1};
      if (source >= 0) sources = {rows.add ? token : -1, source};
      if (shared.row[i] != kNoToken) {
        row = shared.row[i];
        own = row_source(rows, features, sources);
      }
    }
    write_rows_of_lanes<Numbers>(rows, features, own, row, left);
  }
}

// Packed rows behind the last kept token: zeros, shared by all blocks.
__device__ inline void write_tail(const TokenArguments& batch, const RowArguments& rows, unsigned all_kept) {
  const unsigned threads = gridDim.x * kTokenThreads;
  for (unsigned row = all_kept + blockIdx.x * kTokenThreads + threadIdx.x; row < batch.width; row += threads) {
    put<int32_t>(batch.source_index, row, kPad);
    put<int32_t>(batch.text_index, row, -1);
    put_padding(batch, row, row - all_kept);
  }
  const unsigned bytes = rows.dim * static_cast<unsigned>(size_of(rows.out.dtype));
#pragma unroll 1
  for (unsigned row = all_kept + blockIdx.x * kTokenWarps + warp(); row < batch.width; row += gridDim.x * kTokenWarps) {
    copy_bytes(rows.out.row(row), nullptr, bytes);
  }
}

template <class Numbers>
__global__ void __launch_bounds__(kTokenThreads, std::is_same_v<Numbers, double> ? 1 : 2)
    merge_tokens_kernel(const __grid_constant__ TokenArguments batch, const __grid_constant__ RowArguments rows,
                        const __grid_constant__ TableList<kOneTable> features) {
  TokenShared& shared = shared_memory<TokenShared>();
  if (batch.workspace == nullptr)
    count_in_cluster(batch, shared);
  else
    counts_from_workspace(batch, shared);
  const Before before = sum_counts(batch, shared, blockIdx.x);
  if (blockIdx.x == 0 && batch.status != nullptr) inspect(batch, shared, before);
  if (batch.packed) write_tail(batch, rows, before.all_kept);
  if (blockIdx.x >= batch.chunks) return;
  const unsigned begin = blockIdx.x * batch.chunk;
  const unsigned end = batch.count - begin < batch.chunk ? batch.count : begin + batch.chunk;
  if (threadIdx.x == 0) {
    shared.placeholders = before.placeholders;
    shared.kept = before.kept;
    shared.sample_begin = before.kept - before.kept_of_sample;
  }
#pragma unroll 1
  for (unsigned first = begin; first < end; first += kTokenThreads) {
    plan_tile(batch, shared, first, end);
    write_tile<Numbers>(rows, features, shared, first, end - first < kTokenThreads ? end - first : kTokenThreads);
    __syncthreads();  // the tile has been read
  }
}

// A warp counts a chunk.
__global__ void __launch_bounds__(kTokenThreads) count_kernel(const __grid_constant__ TokenArguments batch) {
  const unsigned chunk = blockIdx.x * kTokenWarps + warp();
  if (chunk >= batch.chunks) return;
  const ChunkCount counted = count_chunk(batch, chunk, sample_ends_of(batch));
  if (lane() == 0) static_cast<ChunkCount*>(batch.workspace)[chunk] = counted;
}

}  // namespace vlm_fuse::cuda
