#include "plan.h"

#include "checks.h"
#include "placement.h"
#include "walk.h"

namespace vlm_fuse {
namespace {

template <class Value>
void fill(Value* out, Place place, Value value) {
  std::fill_n(out + place.row, place.count, value);
}

// first, first + step, ...
template <class Value>
void fill_steps(Value* out, Place place, Value first, Value step) {
  Value* to = out + place.row;
  for (int64_t i = 0; i < place.count; ++i) to[i] = static_cast<Value>(first + static_cast<Value>(i) * step);
}

bool needs_length(const Batch& batch) { return batch.left && batch.layout == Layout::kPadded; }

struct SourceSink {
  Placement placement;
  int32_t* source_index;
  int64_t kept = 0;  // rows of this sample, written or not

  void document(int64_t) {}

  void rows(const RowRun& run) {
    kept += run.kept ? run.count : 0;
    fill_steps(source_index, placement.next(run.count), static_cast<int32_t>(run.source), run.source_step);
  }

  void padding(Place place) { fill(source_index, place, kPad); }
};

// Writes the facts of every row exactly once.
class FactSink {
 public:
  FactSink(const Batch& batch, int64_t width, const Facts& out)
      : placement(batch, width), batch_(batch), out_(out), packed_(batch.layout == Layout::kPacked) {
    bounded_ = packed_ || batch.document_ids;
  }

  Placement placement;
  int64_t last_kept = 0;  // row behind the last kept row of this output row

  void document(int64_t id) {
    if (out_.cu_seqlens && sequences_ <= out_.sequences) out_.cu_seqlens[sequences_] = static_cast<int32_t>(kept_);
    document_ = packed_ && batch_.document_ids ? sequences_ : id;
    position_ = 0;
    ++sequences_;
  }

  void rows(const RowRun& run) {
    const Place place = placement.next(run.count);
    if (out_.text_index) {
      fill_steps(out_.text_index, place, static_cast<int32_t>(run.token), run.token >= 0 && !run.one_token ? 1 : 0);
    }
    if (!run.kept) {
      absent(place);
      return;
    }
    if (out_.position_ids) fill_steps(out_.position_ids, place, position_, int64_t{1});
    if (out_.document_ids) fill(out_.document_ids, place, static_cast<int32_t>(document_));
    if (out_.image_ids) fill(out_.image_ids, place, static_cast<int32_t>(run.image));
    if (out_.kind_ids) fill(out_.kind_ids, place, static_cast<int8_t>(run.kind));
    if (out_.attention_mask) fill(out_.attention_mask, place, uint8_t{1});
    if (out_.labels) label(place, run);
    position_ += run.count;
    kept_ += run.count;
    last_kept = place.row + place.count;
  }

  void padding(Place place) {
    if (out_.text_index) fill(out_.text_index, place, int32_t{-1});
    absent(place);
  }

  // The padding behind the last kept row counts on its own where boundaries are told by positions.
  void number_tail(int64_t end) {
    if (bounded_ && out_.position_ids)
      fill_steps(out_.position_ids, Place{last_kept, end - last_kept}, int64_t{0}, int64_t{1});
  }

  // Sequences that the caller expects beyond the real ones are empty.
  void finish() {
    if (!out_.cu_seqlens) return;
    for (int64_t i = sequences_; i <= out_.sequences; ++i) out_.cu_seqlens[i] = static_cast<int32_t>(kept_);
  }

 private:
  void absent(Place place) {
    if (out_.position_ids) fill(out_.position_ids, place, int64_t{0});
    if (out_.document_ids) fill(out_.document_ids, place, int32_t{-1});
    if (out_.image_ids) fill(out_.image_ids, place, int32_t{-1});
    if (out_.kind_ids) fill(out_.kind_ids, place, int8_t{-1});
    if (out_.attention_mask) fill(out_.attention_mask, place, uint8_t{0});
    if (out_.labels) ignore(place);
  }

  void ignore(Place place) {
    if (batch_.labels.bytes == 4)
      fill(static_cast<int32_t*>(out_.labels), place, int32_t{-100});
    else
      fill(static_cast<int64_t*>(out_.labels), place, int64_t{-100});
  }

  void label(Place place, const RowRun& run) {
    if (run.kind != 0) return ignore(place);
    const size_t bytes = static_cast<size_t>(batch_.labels.bytes);
    if (place.count == 0) return;
    std::memcpy(static_cast<char*>(out_.labels) + static_cast<size_t>(place.row) * bytes,
                static_cast<const char*>(batch_.labels.data) + static_cast<size_t>(run.token) * bytes,
                static_cast<size_t>(place.count) * bytes);
    if (bounded_ && position_ == 0) ignore(Place{place.row, 1});
  }

  const Batch& batch_;
  const Facts& out_;
  bool packed_;
  bool bounded_;           // documents end inside an output row
  int64_t document_ = 0;
  int64_t position_ = 0;   // kept rows of the document so far
  int64_t sequences_ = 0;  // begun
  int64_t kept_ = 0;
};

}  // namespace

Counts count(const Batch& batch, int64_t* placeholders) {
  struct {
    int64_t kept = 0;
    int64_t documents = 0;
    void document(int64_t) { ++documents; }
    void rows(const RowRun& run) { kept += run.kept ? run.count : 0; }
  } sums;
  Counts counts;
  Walk walk(batch);
  for (int64_t b = 0; b < batch.samples; ++b) {
    const int64_t before = sums.kept;
    walk.enter(b);
    walk.emit<false>(sums);
    counts.widest = std::max(counts.widest, sums.kept - before);
  }
  counts.rows = sums.kept;
  counts.documents = sums.documents;
  for (size_t c = 0; c < batch.kinds.size(); ++c) placeholders[c] = walk.cursors()[c].seen;
  return counts;
}

Record plan(const Batch& batch, int64_t width, bool check, int32_t* source_index) {
  Walk walk(batch);
  Checks checks(batch);
  SourceSink sink{Placement(batch, width), source_index};
  for (int64_t b = 0; b < batch.samples; ++b) {
    walk.enter(b);
    sink.padding(sink.placement.enter(b, needs_length(batch) ? walk.rows_of_sample() : 0));
    sink.kept = 0;
    walk.emit<false>(sink);
    if (batch.layout != Layout::kPacked) sink.padding(sink.placement.rest());
    if (check) checks.leave(walk, sink.kept);
  }
  if (batch.layout == Layout::kPacked) sink.padding(sink.placement.rest());
  return check ? checks.finish(walk, width) : Record{};
}

void facts(const Batch& batch, int64_t width, const Facts& out) {
  Walk walk(batch);
  if (out.image_ids) walk.number_images();
  FactSink sink(batch, width, out);
  const bool packed = batch.layout == Layout::kPacked;
  for (int64_t b = 0; b < batch.samples; ++b) {
    walk.enter(b);
    const Place front = sink.placement.enter(b, needs_length(batch) ? walk.rows_of_sample() : 0);
    sink.padding(front);
    if (!packed) sink.last_kept = front.row;
    walk.emit<true>(sink);
    if (packed) continue;
    sink.padding(sink.placement.rest());
    sink.number_tail((b + 1) * width);
  }
  if (packed) {
    sink.padding(sink.placement.rest());
    sink.number_tail(width);
  }
  sink.finish();
}

}  // namespace vlm_fuse
