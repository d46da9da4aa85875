// The tokens of a batch, read once in order: which rows each sample gives. Layouts and facts are made from this.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "../rows.h"
#include "batch.h"

namespace vlm_fuse {

// Neighbouring rows of one kind.
struct RowRun {
  int64_t count;
  int64_t token;        // of the first row, -1: none
  bool one_token;       // all rows stand for that token (expand), else each row for the next one
  int64_t source;       // source_index of the first row
  int32_t source_step;  // to that of the next row: 1 features, -1 tokens, 0 without a feature
  int32_t kind;         // 0 text, 1 .. the kinds
  int64_t image;        // -1: none
  bool kept;            // false: padding, which only the layout "keep" has as rows
};

// Where the walk stands within one kind.
struct KindCursor {
  int64_t seen = 0;         // placeholders so far
  int64_t sample_seen = 0;  // those before this sample
  int64_t next = 0;         // feature row (within the kind) of the next placeholder
  int64_t limit = 0;        // first feature row (within the kind) that this sample does not own
  int64_t owned = 0;        // rows that the samples before this one own, by feature_counts
  int64_t image = 0;        // next image, or the one that holds `next`
  int64_t image_begin = 0;  // its first row
  int64_t named = 0;        // rows of the images that this sample's placeholders stand for (expand)
  bool beyond = false;      // a placeholder of this sample stands for an image that does not exist
  int64_t runs = 0;         // runs of placeholders so far, where sizes are not known
  int64_t first_image = 0;  // number of the kind's first image over the batch
};

// First index after `begin` whose value differs from that at `begin`.
template <class Value>
int64_t run_end(const Value* values, int64_t begin, int64_t end) {
  const Value first = values[begin];
  int64_t i = begin + 1;
  while (i < end && values[i] == first) ++i;
  return i;
}

template <>
inline int64_t run_end<uint8_t>(const uint8_t* values, int64_t begin, int64_t end) {
  const uint8_t first = values[begin];
  const uint64_t pattern = first * uint64_t{0x0101010101010101};
  int64_t i = begin + 1;
  for (; i + 8 <= end; i += 8) {
    uint64_t eight;
    memcpy(&eight, values + i, sizeof eight);
    if (eight != pattern) break;
  }
  while (i < end && values[i] == first) ++i;
  return i;
}

class Walk {
 public:
  explicit Walk(const Batch& batch);

  // Reads the tokens of a sample; `rows_of` and `emit` may follow, in this order.
  void enter(int64_t sample);

  // Kept rows of the sample, without moving on.
  int64_t rows_of_sample();

  // Hands the sample's rows and documents to the sink and moves on:
  // sink.document(id) where a document begins, sink.rows(RowRun). `Images`: runs are split by image.
  template <bool Images, class Sink>
  void emit(Sink& sink);

  // Numbers images over the batch: kinds before the last whose sizes are not known are counted first.
  void number_images();

  const std::vector<KindCursor>& cursors() const { return cursors_; }
  const uint8_t* codes() const { return codes_; }
  int64_t sample() const { return sample_; }
  int64_t returning_document() const { return returning_; }  // -1: none in this sample

 private:
  static constexpr uint8_t kDropped = 0x80;  // bit of a token that is not kept; the rest is 0 text, 1 .. the kinds
  static constexpr int64_t kInline = 1024;

  void begin_documents();
  bool begin_document(int64_t id);
  int64_t document_end(int64_t begin, int64_t end) const;

  template <bool Images, class Sink>
  void emit_placeholders(Sink& sink, int64_t token, int64_t count, int32_t kind, bool kept, bool joined);
  template <class Sink>
  void emit_expanded(Sink& sink, int64_t token, int64_t count, int32_t kind, bool kept);
  template <class Sink>
  void emit_images_first(Sink& sink);

  const Batch& batch_;
  std::vector<KindCursor> cursors_;
  int64_t sample_ = 0;
  bool plain_ = false;  // every token of the batch is kept
  uint8_t inline_codes_[kInline];
  std::vector<uint8_t> long_codes_;
  uint8_t* codes_;
  // documents of this sample
  int64_t document_ = -1;
  int64_t highest_ = -1;
  int64_t returning_ = -1;
  std::vector<int64_t> documents_;
};

template <bool Images, class Sink>
void Walk::emit(Sink& sink) {
  const int64_t length = batch_.length, offset = sample_ * length;
  begin_documents();
  if (!batch_.document_ids) sink.document(sample_);
  if (batch_.scheme == Scheme::kImagesFirst) emit_images_first(sink);
  int64_t before_document = 0;
  uint8_t before = 0;
  for (int64_t t = 0; t < length;) {
    const uint8_t code = codes_[t];
    const bool kept = (code & kDropped) == 0;
    const int32_t kind = code & ~kDropped;
    int64_t end = run_end(codes_, t, length);
    int64_t document = 0;
    if (batch_.document_ids) {
      end = document_end(t, end);
      document = batch_.document_ids[offset + t];
      if (kept && document != document_) {
        begin_document(document);
        sink.document(document);
      }
    }
    const int64_t token = offset + t, count = end - t;
    if (kind == 0) {
      if (kept || batch_.layout == Layout::kKeep) {
        sink.rows(RowRun{count, token, false, -1 - token, -1, 0, -1, kept});
      }
    } else if (batch_.scheme == Scheme::kExpand) {
      emit_expanded(sink, token, count, kind, kept);
    } else {
      const bool joined = t > 0 && (before & ~kDropped) == kind && before_document == document;
      emit_placeholders<Images>(sink, token, count, kind, kept, joined);
    }
    before = code;
    before_document = document;
    t = end;
  }
}

template <bool Images, class Sink>
void Walk::emit_placeholders(Sink& sink, int64_t token, int64_t count, int32_t kind, bool kept, bool joined) {
  const Kind& about = batch_.kinds[static_cast<size_t>(kind - 1)];
  KindCursor& cursor = cursors_[static_cast<size_t>(kind - 1)];
  const bool written = kept || batch_.layout == Layout::kKeep;
  int64_t row = cursor.next;
  int64_t own = std::clamp<int64_t>(cursor.limit - row, 0, count);
  cursor.next += count;
  cursor.seen += count;
  if (!about.sizes_known() && !joined) ++cursor.runs;
  const int64_t run_image = about.sizes_known() ? -1 : cursor.first_image + cursor.runs - 1;
  const int64_t missing = count - own;
  while (own > 0) {
    int64_t piece = own, image = run_image;
    if (Images && about.sizes_known()) {
      while (cursor.image < about.images && row >= cursor.image_begin + about.size(cursor.image)) {
        cursor.image_begin += about.size(cursor.image++);
      }
      if (cursor.image < about.images) {
        piece = std::min(own, cursor.image_begin + about.size(cursor.image) - row);
        image = cursor.first_image + cursor.image;
      }
    }
    if (written) sink.rows(RowRun{piece, token, false, about.first_row + row, 1, kind, image, kept});
    row += piece;
    token += piece;
    own -= piece;
  }
  if (missing > 0 && written) sink.rows(RowRun{missing, token, false, kPad, 0, kind, run_image, kept});
}

template <class Sink>
void Walk::emit_expanded(Sink& sink, int64_t token, int64_t count, int32_t kind, bool kept) {
  const Kind& about = batch_.kinds[static_cast<size_t>(kind - 1)];
  KindCursor& cursor = cursors_[static_cast<size_t>(kind - 1)];
  cursor.seen += count;
  for (int64_t i = 0; i < count; ++i) {
    if (cursor.image >= about.images) {
      cursor.beyond = true;
      return;
    }
    const int64_t size = about.size(cursor.image), row = cursor.image_begin;
    if (kept && size > 0 && row + size <= cursor.limit) {
      sink.rows(RowRun{size, token + i, true, about.first_row + row, 1, kind, cursor.first_image + cursor.image, true});
    }
    cursor.named += size;
    cursor.image_begin += size;
    ++cursor.image;
  }
}

template <class Sink>
void Walk::emit_images_first(Sink& sink) {
  for (size_t c = 0; c < cursors_.size(); ++c) {
    const Kind& about = batch_.kinds[c];
    KindCursor& cursor = cursors_[c];
    for (; cursor.image < about.images; ++cursor.image) {
      const int64_t size = about.size(cursor.image), row = cursor.image_begin;
      if (row + size > cursor.limit || (!about.counts && cursor.image > sample_)) break;
      if (size > 0) {
        sink.rows(RowRun{size, -1, false, about.first_row + row, 1, static_cast<int32_t>(c + 1),
                         cursor.first_image + cursor.image, true});
      }
      cursor.image_begin += size;
    }
  }
}

}  // namespace vlm_fuse
