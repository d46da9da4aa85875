// Launches of the token plan: two, one more where rows can be counted only after placeholders ("expand",
// "images_first"), and one more for documents that return.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "launch.cuh"
#include "plan.cuh"

namespace vlm_fuse::cuda {
namespace {

// Hands out memory, or counts it.
class Scratch {
 public:
  explicit Scratch(int64_t* from) : from_(from) {}

  template <class Value>
  Value* take(int64_t count) {
    static_assert(alignof(Value) <= sizeof(int64_t));
    int64_t* at = from_ == nullptr ? nullptr : from_ + taken_;
    taken_ += (count * static_cast<int64_t>(sizeof(Value)) + 7) / 8;
    return reinterpret_cast<Value*>(at);
  }

  int64_t taken() const { return taken_; }

 private:
  int64_t* from_;
  int64_t taken_ = 0;
};

struct Prepared {
  Counting counting;
  int64_t* record;  // where documents may return: what else is wrong
  int64_t taken;
};

CountedKind prepared(const Kind& given, const Batch& batch, Scratch& scratch) {
  constexpr int64_t kRowNumbers = INT32_MAX;
  CountedKind kind = {given, 0, nullptr, nullptr};
  kind.limit = std::min(given.rows, kRowNumbers - std::clamp<int64_t>(given.first_row, 0, kRowNumbers));
  kind.given.rows_each = std::min<int64_t>(given.rows_each, int64_t{1} << 31);
  if (given.sizes != nullptr) kind.image_ends = scratch.take<int64_t>(given.images);
  if (given.images == 0) kind.given.rows_each = 0;
  if (given.counts != nullptr) kind.count_ends = scratch.take<int64_t>(batch.samples);
  return kind;
}

Prepared prepare(const Batch& batch, const PlanOutputs& out, bool open, bool check, int64_t* memory) {
  const auto kinds = static_cast<int64_t>(batch.kinds.size());
  if (kinds > kMostKinds) throw std::invalid_argument("too many kinds");
  if (batch.samples >= INT32_MAX || batch.samples * batch.length >= INT32_MAX) {
    throw std::runtime_error("CUDA: more tokens than source_index can number");
  }
  Prepared made = {};
  Counting& counting = made.counting;
  counting.no_tokens = batch.length == 0;
  const int64_t length = std::max<int64_t>(batch.length, 1), count = batch.samples * length;
  // as many blocks as run at once
  const int64_t most = std::min<int64_t>(int64_t{kPlanBlocks} * current_device().processors, kMostChunks);
  const int64_t steps = std::max<int64_t>((count + most * kPlanThreads - 1) / (most * kPlanThreads), 1);
  const int64_t chunk = steps * kPlanThreads;
  counting.tokens = batch.tokens;
  counting.attention_mask = batch.attention_mask;
  counting.document_ids = batch.document_ids;
  counting.samples = static_cast<int32_t>(batch.samples);
  counting.length = static_cast<int32_t>(length);
  counting.count = static_cast<int32_t>(count);
  counting.kinds = static_cast<int32_t>(kinds);
  counting.segment = static_cast<int32_t>(steps * kLanes);
  counting.chunks = static_cast<int32_t>(std::max<int64_t>((count + chunk - 1) / chunk, 1));
  counting.open = open || batch.document_ids;
  counting.scheme = batch.scheme;

  Scratch scratch(memory);
  const int64_t chunks = counting.chunks, segments = chunks * kPlanWarps;
  for (int64_t c = 0; c < kinds; ++c) {
    CountedKind& kind = counting.kind[c] = prepared(batch.kinds[static_cast<size_t>(c)], batch, scratch);
    counting.counts |= kind.given.counts != nullptr;
    counting.runs |= !kind.given.sizes_known() && batch.scheme == Scheme::kPlaceholders;
  }
  counting.placeholders = scratch.take<int32_t>(kinds * chunks);
  counting.segment_placeholders = scratch.take<int32_t>(kinds * segments);
  counting.sample_placeholders = scratch.take<int32_t>(kinds * batch.samples);
  if (counting.runs) {
    counting.runs_of_chunk = scratch.take<int32_t>(kinds * chunks);
    counting.segment_runs = scratch.take<int32_t>(kinds * segments);
  }
  counting.runs &= memory == nullptr || out.facts.image_ids != nullptr;
  counting.rows = scratch.take<int64_t>(chunks);
  counting.segment_rows = scratch.take<int64_t>(segments);
  counting.sample_rows = scratch.take<int64_t>(batch.samples);
  counting.documents = scratch.take<DocumentRuns>(chunks);
  counting.segment_documents = scratch.take<DocumentRuns>(segments);
  if (batch.scheme == Scheme::kImagesFirst) counting.front = scratch.take<KindRows>(kinds * batch.samples);
  made.record = scratch.take<int64_t>(8);
  if (batch.document_ids && check && !counting.no_tokens) {
    counting.table_size = 1;
    while (counting.table_size < 2 * count) counting.table_size *= 2;
    counting.returning = scratch.take<int32_t>(1);
    counting.table = scratch.take<int32_t>(counting.table_size);
  }
  made.taken = scratch.taken();
  return made;
}

void count_tokens(const Counting& counting, Stream stream) {
  const Grid chunks = {counting.chunks, kPlanThreads, sizeof(CountShared)};
  Grid and_lists = chunks;
  and_lists.blocks += 2 * counting.kinds;
  if (counting.scheme == Scheme::kPlaceholders) {
    launch(count_kernel<true, true>, and_lists, stream, counting);
    return;
  }
  launch(count_kernel<true, false>, and_lists, stream, counting);
  launch(count_kernel<false, true>, chunks, stream, counting);
}

}  // namespace

int64_t plan_scratch(const Batch& batch, bool check) { return prepare(batch, {}, true, check, nullptr).taken; }

void count(const Batch& batch, int64_t* totals, int64_t* scratch, Stream stream) {
  const Counting counting = prepare(batch, {}, true, false, scratch).counting;
  count_tokens(counting, stream);
  launch(totals_kernel, {1, kPlanThreads, sizeof(TotalsShared)}, stream, counting, totals);
}

void plan(const Batch& batch, const PlanOutputs& out, int64_t* scratch, Stream stream) {
  const Prepared made = prepare(batch, out, false, out.status != nullptr, scratch);
  const Counting& counting = made.counting;
  count_tokens(counting, stream);
  const bool later = counting.table != nullptr;  // the status waits for the documents
  Planned planned = {};
  planned.width = out.width;
  planned.layout = batch.layout;
  planned.left = batch.left;
  planned.unused = batch.unused;
  planned.labels = batch.labels;
  planned.source_index = out.source_index;
  planned.facts = out.facts;
  planned.status = later ? made.record : out.status;
  planned.fresh = later || out.fresh;
  const bool many = batch.scheme != Scheme::kPlaceholders, documents = bool(batch.document_ids);
  const Grid grid = {counting.chunks + (out.status != nullptr), kPlanThreads,
                     many ? sizeof(SpreadShared) : sizeof(PlanShared)};
  const auto kernel = many ? (documents ? plan_kernel<true, true> : plan_kernel<true, false>)
                           : (documents ? plan_kernel<false, true> : plan_kernel<false, false>);
  launch(kernel, grid, stream, counting, planned);
  if (later) launch(finish_kernel, {1, kLanes}, stream, counting, made.record, out.status, out.fresh);
}

}  // namespace vlm_fuse::cuda
