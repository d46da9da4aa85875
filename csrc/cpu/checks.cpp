#include "checks.h"

namespace vlm_fuse {

Checks::Checks(const Batch& batch) : batch_(batch), borders_(batch.kinds.size()) {}

void Checks::note(const Record& record, int64_t order) {
  const bool earlier = record.sample < first_.sample || (record.sample == first_.sample && order < first_order_);
  if (first_.code != kFine && !earlier) return;
  first_ = record;
  first_order_ = order;
}

void Checks::leave(const Walk& walk, int64_t rows) {
  const int64_t sample = walk.sample();
  rows_ += rows;
  if (rows > widest_) {
    widest_ = rows;
    widest_sample_ = sample;
  }
  const auto& cursors = walk.cursors();
  for (size_t c = 0; c < cursors.size(); ++c) {
    const int64_t index = static_cast<int64_t>(c);
    if (batch_.kinds[c].counts)
      check_counts(batch_.kinds[c], cursors[c], sample, index);
    else
      check_rows(batch_.kinds[c], cursors[c], sample, index);
  }
  if (walk.returning_document() >= 0) {
    note({kDocumentReturns, sample, 0, 0, 0, 0, 0, walk.returning_document()}, static_cast<int64_t>(cursors.size()));
  }
}

void Checks::check_counts(const Kind& kind, const KindCursor& cursor, int64_t sample, int64_t index) {
  const int64_t owned = kind.counts[sample], placeholders = cursor.seen - cursor.sample_seen;
  Border& border = borders_[static_cast<size_t>(index)];
  if (batch_.scheme != Scheme::kPlaceholders) {
    while (border.image < kind.images && border.begin < cursor.owned) border.begin += kind.size(border.image++);
    if (border.begin != cursor.owned && cursor.owned <= kind.rows) {
      note({kImageCut, sample, index, placeholders, owned, 0, 0, 0}, index);
    }
  }
  if (batch_.scheme == Scheme::kImagesFirst) return;
  int64_t wanted = placeholders;
  if (batch_.scheme == Scheme::kExpand) wanted = cursor.beyond ? std::max(kind.rows, owned) + 1 : cursor.named;
  if (wanted > owned || (wanted < owned && !batch_.unused)) {
    note({kCountsDiffer, sample, index, wanted, owned, 0, 0, 0}, index);
  }
}

void Checks::check_rows(const Kind& kind, const KindCursor& cursor, int64_t sample, int64_t index) {
  if (batch_.scheme == Scheme::kImagesFirst) {
    if (kind.images > 0 && sample == kind.images) note({kTooFewRows, sample, index, 1, 0, 0, 0, 0}, index);
    return;
  }
  const int64_t seen = cursor.seen, before = cursor.sample_seen, placeholders = seen - before;
  if (batch_.scheme == Scheme::kPlaceholders && kind.sizes_known()) {
    Border& border = borders_[static_cast<size_t>(index)];
    if (border.pending.code != kFine && placeholders > 0) note(border.pending, index);
    int64_t begun = 0;  // rows of the images that begin in this sample
    for (; border.image < kind.images && border.begin < seen; ++border.image) {
      begun += kind.size(border.image);
      border.begin += kind.size(border.image);
    }
    if (border.begin != seen && seen <= kind.rows) {
      const Record cut = {kImageCut, sample, index, placeholders, begun, 0, 0, 0};
      if (!batch_.unused)
        note(cut, index);
      else if (placeholders > 0)
        border.pending = cut;
    }
  }
  const int64_t there = batch_.scheme == Scheme::kPlaceholders ? kind.rows : std::max<int64_t>(kind.images, 0);
  if (seen > there && before <= there) note({kTooFewRows, sample, index, placeholders, there - before, 0, 0, 0}, index);
}

// Rows (images) left over, where no sample is bad.
Record Checks::totals(const Walk& walk) const {
  for (size_t c = 0; c < batch_.kinds.size(); ++c) {
    const Kind& kind = batch_.kinds[c];
    const int64_t index = static_cast<int64_t>(c);
    if (kind.counts) {
      const int64_t owned = walk.cursors()[c].owned;
      if (owned > kind.rows || (owned < kind.rows && !batch_.unused)) {
        return {kCountsDiffer, -1, index, owned, kind.rows, 0, 0, 0};
      }
      continue;
    }
    int64_t seen = walk.cursors()[c].seen, there = kind.rows;
    if (batch_.scheme != Scheme::kPlaceholders) there = std::max<int64_t>(kind.images, 0);
    if (batch_.scheme == Scheme::kImagesFirst) seen = there > 0 ? batch_.samples : 0;
    if (seen < there && !batch_.unused) return {kTooManyRows, -1, index, 0, 0, 0, 0, 0};
  }
  return {};
}

Record Checks::finish(const Walk& walk, int64_t width) {
  Record record = first_.code != kFine ? first_ : totals(walk);
  if (record.code == kFine) {
    if (batch_.layout == Layout::kPacked && rows_ > width) return {kTooLong, -1, 0, 0, 0, 0, 0, rows_};
    if (batch_.layout == Layout::kPadded && widest_ > width) return {kTooLong, widest_sample_, 0, 0, 0, 0, 0, widest_};
    return record;
  }
  if (record.code == kDocumentReturns) return record;
  const Kind& kind = batch_.kinds[static_cast<size_t>(record.kind)];
  const bool by_image = !kind.counts && batch_.scheme != Scheme::kPlaceholders;
  record.total_placeholders = walk.cursors()[static_cast<size_t>(record.kind)].seen;
  record.total_rows = by_image ? std::max<int64_t>(kind.images, 0) : kind.rows;
  if (by_image && batch_.scheme == Scheme::kImagesFirst) record.total_placeholders = batch_.samples;
  return record;
}

}  // namespace vlm_fuse
