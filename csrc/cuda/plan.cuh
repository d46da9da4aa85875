// Sources and facts of the output rows, each written once.
//
// A warp owns a segment of the tokens (tokens.cuh). Where a token has one row ("placeholders") each lane writes that of
// its token; else the block shares out the rows of the tokens that its warps have just read, so that a large image does
// not wait for one warp. The padding is shared out over all warps: pieces of output rows, or what is behind the packed
// rows.
#pragma once

#include "check.cuh"

namespace vlm_fuse::cuda {

// What plan_kernel makes, beside Counting.
struct Planned {
  int64_t width;
  Layout layout;
  bool left;
  bool unused;
  Integers labels;
  int32_t* source_index;
  Facts facts;
  int64_t* status;  // null: nothing is checked; else a first block does
  bool fresh;
};

struct PlanShared {
  CheckShared check;  // its row_base serves all blocks
  KindBases bases;
  int64_t images_before[kMostKinds];  // of the kinds before each
  DocumentRuns documents[kPlanWarps];
};

// An output row, kept or padding within "keep".
struct Row {
  int64_t at;  // its address
  int64_t position;
  int32_t token;  // -1: an image row of images_first
  int32_t feature;  // -1: none
  int32_t image;
  int32_t document;
  int32_t kind;  // -1: text
  bool kept;
};

__device__ inline void store_label(const Planned& out, int64_t at, int64_t label) {
  if (out.labels.bytes == 4)
    static_cast<int32_t*>(out.facts.labels)[at] = static_cast<int32_t>(label);
  else
    static_cast<int64_t*>(out.facts.labels)[at] = label;
}

// `bounded`: documents end inside an output row, and their first row has no label.
__device__ inline void write_row(const Planned& out, const Row& row, bool bounded) {
  const Facts& facts = out.facts;
  const bool text = row.kind < 0;
  if (out.source_index) {
    out.source_index[row.at] = text ? -1 - row.token : (row.feature >= 0 ? row.feature : kPad);
  }
  if (facts.text_index) facts.text_index[row.at] = row.token;
  if (facts.position_ids) facts.position_ids[row.at] = row.position;
  if (facts.document_ids) facts.document_ids[row.at] = row.kept ? row.document : -1;
  if (facts.image_ids) facts.image_ids[row.at] = row.kept && !text ? row.image : -1;
  if (facts.kind_ids) facts.kind_ids[row.at] = static_cast<int8_t>(row.kept ? row.kind + 1 : -1);
  if (facts.attention_mask) facts.attention_mask[row.at] = row.kept;
  if (facts.labels) {
    const bool labelled = row.kept && text && !(bounded && row.position == 0);
    store_label(out, row.at, labelled ? out.labels[row.token] : -100);
  }
}

__device__ inline void write_padding(const Planned& out, int64_t at, int64_t position) {
  const Facts& facts = out.facts;
  if (out.source_index) out.source_index[at] = kPad;
  if (facts.text_index) facts.text_index[at] = -1;
  if (facts.position_ids) facts.position_ids[at] = position;
  if (facts.document_ids) facts.document_ids[at] = -1;
  if (facts.image_ids) facts.image_ids[at] = -1;
  if (facts.kind_ids) facts.kind_ids[at] = -1;
  if (facts.attention_mask) facts.attention_mask[at] = 0;
  if (facts.labels) store_label(out, at, -100);
}

// Where the rows of a sample go.
struct SamplePlace {
  int64_t first;  // address of its first row
  int64_t room;  // rows that fit
};

// `begin`: rows before the sample, `count`: its own (which left padding alone needs).
__device__ inline SamplePlace place_of(const Planned& out, int64_t sample, int64_t begin, int64_t count) {
  if (out.layout == Layout::kPacked) return {begin, out.width - begin};
  const int64_t front = out.left && out.layout == Layout::kPadded && count < out.width ? out.width - count : 0;
  return {sample * out.width + front, out.width};
}

// The padding of "padded" and (where it is wider than the tokens) "keep", a piece of an output row a warp.
__device__ inline void pad_samples(const Counting& batch, const Planned& out, const int64_t* row_base, bool bounded,
                                   int64_t warp_number, int64_t warps) {
  constexpr int64_t kPiece = 1024;
  const int64_t pieces = (out.width + kPiece - 1) / kPiece;
  int64_t sample = warp_number, piece = 0;
  if (pieces > 1) {
    sample = warp_number / pieces;
    piece = warp_number % pieces;
  }
  const int64_t sample_step = pieces > 1 ? warps / pieces : warps, piece_step = pieces > 1 ? warps % pieces : 0;
  while (sample < batch.samples) {
    int64_t begin = 0, count = batch.length;  // of the output row
    if (batch.no_tokens && out.layout == Layout::kKeep) count = 0;
    if (out.layout == Layout::kPadded) {
      count = rows_before_sample(batch, row_base, sample + 1) - rows_before_sample(batch, row_base, sample);
      begin = place_of(out, 0, 0, count).first;
    }
    const bool tail = bounded && out.layout == Layout::kPadded;
    const int64_t low = piece * kPiece, high = at_most(low + kPiece, out.width);
    if (low < begin) {
      const int64_t stop = at_most(high, begin);
      for (int64_t i = low + lane(); i < stop; i += kLanes) {
        write_padding(out, sample * out.width + i, tail && count == 0 ? i : 0);
      }
    }
    const int64_t end = begin + count;
    for (int64_t i = (low > end ? low : end) + lane(); i < high; i += kLanes) {
      write_padding(out, sample * out.width + i, tail ? i - (count == 0 ? 0 : end) : 0);
    }
    sample += sample_step;
    piece += piece_step;
    if (piece >= pieces) {
      piece -= pieces;
      ++sample;
    }
  }
}

__device__ inline void pad_behind(const Planned& out, int64_t total, int64_t thread, int64_t threads) {
  for (int64_t row = total + thread; row < out.width; row += threads) write_padding(out, row, row - total);
}

// What lies behind the last sequence: they are empty.
__device__ inline void end_sequences(const Counting& batch, const Planned& out, int32_t begun, int64_t total) {
  const int64_t first = batch.document_ids ? begun : batch.samples;
  for (int64_t i = first + lane(); i <= out.facts.sequences; i += kLanes) {
    out.facts.cu_seqlens[i] = static_cast<int32_t>(total);
  }
}

// The rows of a token that may give any number of them.
struct Spread {
  Row row;  // the first
  int64_t front;  // images_first: rows of images among them
  int32_t sample;
};

struct SpreadShared {
  PlanShared plan;
  Spread tokens[kPlanThreads];  // those that the block has just read
  int64_t begins[kPlanThreads + 1];  // their rows before each
};

// A row of images_first: row `offset` of what stands in front of a sample.
__device__ inline void front_row(const Counting& batch, const PlanShared& shared, int64_t sample, int64_t offset,
                                 bool images, Row& row) {
  for (int c = 0; c < batch.kinds; ++c) {
    const KindRows own = batch.front[int64_t{c} * batch.samples + sample];
    if (offset >= own.count) {
      offset -= own.count;
      continue;
    }
    const CountedKind& kind = batch.kind[c];
    row.kind = c;
    row.feature = static_cast<int32_t>(kind.given.first_row + own.first + offset);
    if (images) row.image = static_cast<int32_t>(shared.images_before[c] + images_ending(kind, own.first + offset));
    return;
  }
}

// Writes the rows of the block's tokens; `count`: those of the thread's token that there is room for.
__device__ inline void write_spread(const Counting& batch, const Planned& out, SpreadShared& shared, const Spread& mine,
                                    int64_t count, bool bounded) {
  const int thread = static_cast<int>(threadIdx.x);
  const Scanned scanned = block_scan(count, shared.plan.check.of_warps);
  shared.tokens[thread] = mine;
  shared.begins[thread] = scanned.before;
  if (thread == 0) shared.begins[kPlanThreads] = scanned.total;
  __syncthreads();
  int owner = 0;
  for (int64_t number = thread; number < scanned.total; number += kPlanThreads) {
    if (number >= shared.begins[owner + 1]) {  // the last token that begins at or before the row
      owner = 0;
      for (int step = kPlanThreads / 2; step > 0; step /= 2) {
        if (shared.begins[owner + step] <= number) owner += step;
      }
    }
    const Spread& token = shared.tokens[owner];
    const int64_t within = number - shared.begins[owner];
    Row row = token.row;
    row.at += within;
    row.position += within;
    row.feature = static_cast<int32_t>(row.feature + within);
    if (within < token.front) {
      row.token = -1;
      front_row(batch, shared.plan, token.sample, within, out.facts.image_ids != nullptr, row);
    }
    write_row(out, row, bounded);
  }
  __syncthreads();
}

// The kernel's shared memory.
template <bool kMany>
__device__ PlanShared& plan_shared() {
  if constexpr (kMany)
    return shared_memory<SpreadShared>().plan;
  else
    return shared_memory<PlanShared>();
}

// kMany: a token may give any number of rows. kDocuments: ids of documents are given.
template <bool kMany, bool kDocuments>
__global__ void __launch_bounds__(kPlanThreads, kPlanBlocks)
    plan_kernel(const __grid_constant__ Counting batch, const __grid_constant__ Planned out) {
  PlanShared& shared = plan_shared<kMany>();
  const bool check = out.status != nullptr;
  if (check && blockIdx.x == 0) {
    const Record record = check_batch(batch, out.layout, out.width, out.unused, shared.check);
    if (threadIdx.x == 0) report(out.status, out.fresh, record);
    return;
  }
  const Facts& facts = out.facts;
  const int chunk = static_cast<int>(blockIdx.x) - check;
  const bool packed = out.layout == Layout::kPacked, keep = out.layout == Layout::kKeep;
  const bool bounded = kDocuments || packed;
  const int64_t* row_base = shared.check.row_base;
  sums_before(batch.rows, batch.chunks, shared.check.row_base, shared.check.of_warps);
  const bool numbered = batch.scheme != Scheme::kImagesFirst && batch.kinds > 0;
  if (numbered) sum_kinds(batch, chunk, shared.bases);
  if (facts.image_ids != nullptr) {
    for (int c = warp(); c < batch.kinds; c += kPlanWarps) {
      int64_t images = batch.kind[c].given.images;
      if (images < 0) {
        images = 0;
        if (batch.runs) {
          for (int i = lane(); i < batch.chunks; i += kLanes)
            images += batch.runs_of_chunk[int64_t{c} * batch.chunks + i];
        }
        images = warp_sum(images);
      }
      if (lane() == 0) shared.images_before[c] = images;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      int64_t before = 0;
      for (int c = 0; c < batch.kinds; ++c) {
        const int64_t own = shared.images_before[c];
        shared.images_before[c] = before;
        before += own;
      }
    }
  }
  DocumentRuns joined_before = no_documents();
  bool enters = false;
  if (kDocuments) {
    joined_before = join_chunks(batch.documents, 0, chunk, shared.documents);
    if (batch.table != nullptr) {
      enters = joined(joined_before, join_chunks(batch.documents, chunk, batch.chunks, shared.documents)).falls != 0;
    }
  }
  __syncthreads();

  const int64_t segment = int64_t{chunk} * kPlanWarps + warp();
  const int64_t low = segment * batch.segment;
  const int64_t high = at_most(low + batch.segment, batch.count);
  const int64_t first_sample = low < batch.count ? static_cast<uint32_t>(low) / static_cast<uint32_t>(batch.length) : 0;
  KindWalk walk = {0, 0};
  int32_t next_run = 0;
  if (numbered) {
    walk = walk_from(batch, shared.bases, chunk, low, first_sample);
    if (batch.runs && lane() < batch.kinds) {
      next_run = shared.bases.runs[lane()] + batch.segment_runs[lane() * segments(batch) + segment];
    }
  }
  const unsigned counted = counted_kinds(batch);
  int64_t rows = row_base[chunk] + batch.segment_rows[segment];
  int64_t sample_begin = low < high ? rows_before_sample(batch, row_base, first_sample) : 0;  // of the open sample
  OpenDocument open = after(no_documents());
  if (kDocuments) open = after(joined(joined_before, batch.segment_documents[segment]));
  const bool needs_end = kMany ? out.left : (out.left && out.layout == Layout::kPadded) || (keep && kDocuments);

  // a block's warps read on together where they share out rows
  const int64_t stop = kMany ? low + batch.segment : high;
  for (int64_t at = low; at < stop; at += kLanes) {
    const Token token = read_token(batch, at + lane(), high);
    const unsigned begins = __ballot_sync(kAllLanes, token.column == 0);
    const unsigned kept = __ballot_sync(kAllLanes, token.kept);
    Ordinal ordinal = {0, 0};
    if (numbered) ordinal = number_placeholders(batch, walk, token, begins);
    int32_t run = 0;
    if (!kMany && batch.runs) {
      const bool joins = joins_run(batch, token);
      if (__any_sync(kAllLanes, token.kind >= 0)) run = number_runs(batch, next_run, token, joins);
    }
    // the feature, and the image, of its placeholder
    int64_t gives = token.kept, front = 0;
    int32_t feature = -1, image = -1;
    if (kMany) {
      if (batch.scheme == Scheme::kExpand) {
        const ExpandedImage own = expand_token(batch, token, ordinal, counted);
        if (token.kept) gives = own.rows.count;
        if (token.kind >= 0) {
          feature = static_cast<int32_t>(batch.kind[token.kind].given.first_row + own.rows.first);
          if (facts.image_ids != nullptr) image = static_cast<int32_t>(shared.images_before[token.kind] + own.image);
        }
      } else if (token.column == 0) {
        for (int c = 0; c < batch.kinds; ++c) front += batch.front[int64_t{c} * batch.samples + token.sample].count;
        gives += front;
      }
    } else if (token.kind >= 0) {
      const CountedKind& kind = batch.kind[token.kind];
      int64_t row = ordinal.ordinal;
      bool own = true;
      if ((counted >> token.kind & 1) != 0) {
        row = (token.sample > 0 ? kind.count_ends[token.sample - 1] : 0) + ordinal.inside;
        own = ordinal.inside < kind.given.counts[token.sample];
      }
      own = own && row < kind.limit;
      if (own) feature = static_cast<int32_t>(kind.given.first_row + row);
      if (facts.image_ids != nullptr && (own || !kind.given.sizes_known())) {
        const int64_t number = kind.given.sizes_known() ? images_ending(kind, row) : run;
        image = static_cast<int32_t>(shared.images_before[token.kind] + number);
      }
    }
    // rows before it, and before its sample and document
    int64_t before;
    if (kMany) {
      const int64_t upto = warp_scan(gives);
      before = rows + upto - gives;
      rows += __shfl_sync(kAllLanes, upto, kLanes - 1);
    } else {
      before = rows + __popc(kept & lanes_before());
      rows += __popc(kept);
    }
    const unsigned begun_samples = begins & lanes_upto();
    int64_t own_begin = __shfl_sync(kAllLanes, before, last_lane(begun_samples));
    if (begun_samples == 0) own_begin = sample_begin;
    if (begins != 0) sample_begin = __shfl_sync(kAllLanes, before, last_lane(begins));
    int64_t sample_count = 0;
    if (needs_end && token.here)
      sample_count = rows_before_sample(batch, row_base, int64_t{token.sample} + 1) - own_begin;
    int32_t document = token.sample, tail = 0;
    int64_t begun = own_begin;
    if (kDocuments) {
      const DocumentOfToken found = open_documents(open, token, kept, before);
      document = packed ? found.number : static_cast<int32_t>(token.document);
      begun = found.row;
      if (enters && found.begins) enter_document(batch, token);
      if (facts.cu_seqlens != nullptr && found.begins && found.number <= facts.sequences) {
        facts.cu_seqlens[found.number] = static_cast<int32_t>(before);
      }
      if (keep && before == own_begin + sample_count) {  // padding behind the last kept token
        const int32_t sample_token = token.number - token.column;
        tail = token.number - (found.previous + 1 > sample_token ? found.previous + 1 : sample_token);
      }
    } else if (facts.cu_seqlens != nullptr && token.column == 0) {
      facts.cu_seqlens[token.sample] = static_cast<int32_t>(before);
    }
    const SamplePlace place = place_of(out, token.sample, own_begin, sample_count);
    const int64_t offset = keep && !kMany ? token.column : before - own_begin;  // in the sample
    if (kMany) {
      const int64_t room = place.room > offset ? place.room - offset : 0;
      const Row first = {
          place.first + offset, before - begun, token.number, feature, image, document, token.kind, true};
      write_spread(batch, out, shared_memory<SpreadShared>(), {first, front, token.sample}, at_most(gives, room),
                   bounded);
    } else {
      if (offset < place.room && (token.kept || (keep && token.here && !batch.no_tokens))) {
        const int64_t position = token.kept ? before - begun : tail;
        write_row(out, {place.first + offset, position, token.number, feature, image, document, token.kind, token.kept},
                  bounded);
      }
    }
  }
  const int64_t total = row_base[batch.chunks];
  if (facts.cu_seqlens != nullptr && segment == segments(batch) - 1) end_sequences(batch, out, open.runs, total);
  const int64_t warps = segments(batch);
  if (packed)
    pad_behind(out, total, segment * kLanes + lane(), warps * kLanes);
  else if (!keep || out.width > batch.length || batch.no_tokens)
    pad_samples(batch, out, row_base, bounded, segment, warps);
}

}  // namespace vlm_fuse::cuda
