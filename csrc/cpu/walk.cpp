#include "walk.h"

namespace vlm_fuse {
namespace {

constexpr int64_t kHuge = int64_t{1} << 40;  // counts are cut to it, so that their sums cannot overflow

template <class Token>
void classify(uint8_t* codes, const Token* tokens, int64_t length, const std::vector<Kind>& kinds) {
  std::memset(codes, 0, static_cast<size_t>(length));
  for (size_t c = kinds.size(); c-- > 0;) {  // the first kind of an id wins
    const Token wanted = static_cast<Token>(kinds[c].token);
    if (static_cast<int64_t>(wanted) != kinds[c].token) continue;
    const uint8_t code = static_cast<uint8_t>(c + 1);
    for (int64_t t = 0; t < length; ++t) codes[t] = tokens[t] == wanted ? code : codes[t];
  }
}

void classify_mask(uint8_t* codes, const uint8_t* mask, int64_t length, bool any_kind) {
  for (int64_t t = 0; t < length; ++t) codes[t] = any_kind && mask[t] != 0;
}

template <class Value>
void drop_zeros(uint8_t* codes, const Value* mask, int64_t length, uint8_t dropped) {
  for (int64_t t = 0; t < length; ++t) codes[t] = static_cast<uint8_t>(codes[t] | (mask[t] == 0 ? dropped : 0));
}

template <class Value>
void drop_negative(uint8_t* codes, const Value* ids, int64_t length, uint8_t dropped) {
  for (int64_t t = 0; t < length; ++t) codes[t] = static_cast<uint8_t>(codes[t] | (ids[t] < 0 ? dropped : 0));
}

template <class Value>
const Value* at(const Integers& integers, int64_t offset) {
  return static_cast<const Value*>(integers.data) + offset;
}

}  // namespace

Walk::Walk(const Batch& batch) : batch_(batch), cursors_(batch.kinds.size()) {
  plain_ = !batch.attention_mask && !batch.document_ids;
  codes_ = inline_codes_;
  if (batch.length > kInline) {
    long_codes_.resize(static_cast<size_t>(batch.length));
    codes_ = long_codes_.data();
  }
  int64_t images = 0;
  for (size_t c = 0; c < cursors_.size(); ++c) {
    cursors_[c].first_image = images;
    images += std::max<int64_t>(batch.kinds[c].images, 0);
  }
}

void Walk::enter(int64_t sample) {
  sample_ = sample;
  const int64_t length = batch_.length, offset = sample * length;
  if (batch_.scheme == Scheme::kImagesFirst) {
    std::memset(codes_, 0, static_cast<size_t>(length));
  } else if (batch_.tokens.bytes == 1) {
    classify_mask(codes_, at<uint8_t>(batch_.tokens, offset), length, !batch_.kinds.empty());
  } else if (batch_.tokens.bytes == 4) {
    classify(codes_, at<int32_t>(batch_.tokens, offset), length, batch_.kinds);
  } else {
    classify(codes_, at<int64_t>(batch_.tokens, offset), length, batch_.kinds);
  }
  if (batch_.attention_mask) {
    switch (batch_.attention_mask.bytes) {
      case 1:
        drop_zeros(codes_, at<int8_t>(batch_.attention_mask, offset), length, kDropped);
        break;
      case 2:
        drop_zeros(codes_, at<int16_t>(batch_.attention_mask, offset), length, kDropped);
        break;
      case 4:
        drop_zeros(codes_, at<int32_t>(batch_.attention_mask, offset), length, kDropped);
        break;
      default:
        drop_zeros(codes_, at<int64_t>(batch_.attention_mask, offset), length, kDropped);
        break;
    }
  }
  if (batch_.document_ids.bytes == 4) drop_negative(codes_, at<int32_t>(batch_.document_ids, offset), length, kDropped);
  if (batch_.document_ids.bytes == 8) drop_negative(codes_, at<int64_t>(batch_.document_ids, offset), length, kDropped);

  for (size_t c = 0; c < cursors_.size(); ++c) {
    const Kind& kind = batch_.kinds[c];
    KindCursor& cursor = cursors_[c];
    // A row number must fit source_index.
    const int64_t rows = std::min(kind.rows, INT32_MAX - std::min<int64_t>(kind.first_row, INT32_MAX));
    cursor.sample_seen = cursor.seen;
    cursor.named = 0;
    cursor.beyond = false;
    cursor.limit = rows;
    if (!kind.counts) continue;
    const int64_t begin = cursor.owned;
    cursor.owned += std::clamp<int64_t>(kind.counts[sample], 0, kHuge);
    cursor.next = begin;
    cursor.limit = std::min(rows, cursor.owned);
    if (!kind.sizes_known()) continue;
    if (cursor.image_begin > begin) cursor.image = cursor.image_begin = 0;
    const bool whole_images = batch_.scheme != Scheme::kPlaceholders;
    while (whole_images && cursor.image < kind.images && cursor.image_begin < begin) {
      cursor.image_begin += kind.size(cursor.image++);
    }
  }
}

int64_t Walk::rows_of_sample() {
  struct {
    int64_t kept = 0;
    void document(int64_t) {}
    void rows(const RowRun& run) { kept += run.kept ? run.count : 0; }
  } sum;
  if (batch_.scheme == Scheme::kPlaceholders) {
    for (int64_t t = 0; t < batch_.length; ++t) sum.kept += (codes_[t] & kDropped) == 0;
    return sum.kept;
  }
  const std::vector<KindCursor> cursors = cursors_;
  emit<false>(sum);
  cursors_ = cursors;
  return sum.kept;
}

void Walk::number_images() {
  bool needed = false;
  for (size_t c = 0; c + 1 < batch_.kinds.size(); ++c) needed |= !batch_.kinds[c].sizes_known();
  if (!needed) return;
  struct {
    void document(int64_t) {}
    void rows(const RowRun&) {}
  } nothing;
  Walk count(batch_);
  for (int64_t b = 0; b < batch_.samples; ++b) {
    count.enter(b);
    count.emit<false>(nothing);
  }
  int64_t images = 0;
  for (size_t c = 0; c < cursors_.size(); ++c) {
    cursors_[c].first_image = images;
    images += batch_.kinds[c].sizes_known() ? batch_.kinds[c].images : count.cursors_[c].runs;
  }
}

void Walk::begin_documents() {
  document_ = highest_ = returning_ = -1;
  documents_.clear();
}

// An id above all before it is new without a look at the others.
bool Walk::begin_document(int64_t id) {
  document_ = id;
  const bool fresh = id > highest_;
  if (!fresh && returning_ < 0 && std::find(documents_.begin(), documents_.end(), id) != documents_.end())
    returning_ = id;
  highest_ = std::max(highest_, id);
  documents_.push_back(id);
  return fresh;
}

int64_t Walk::document_end(int64_t begin, int64_t end) const {
  const int64_t offset = sample_ * batch_.length;
  return batch_.document_ids.bytes == 4 ? run_end(at<int32_t>(batch_.document_ids, offset), begin, end)
                                        : run_end(at<int64_t>(batch_.document_ids, offset), begin, end);
}

}  // namespace vlm_fuse
