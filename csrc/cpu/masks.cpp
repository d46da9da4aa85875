#include "masks.h"

#include <algorithm>
#include <vector>

namespace vlm_fuse {
namespace {

// One output row: its documents and the padding inside them, then the keys of each of its rows.
class MaskRow {
 public:
  explicit MaskRow(const MaskRows& rows) : rows_(rows), width_(static_cast<int32_t>(rows.width)) {
    if (rows.parent_ids) documents_.resize(static_cast<size_t>(rows.parent_count));
  }

  void enter(int64_t row) {
    ids_ = rows_.document_ids + row * width_;
    images_ = rows_.image_ids == nullptr ? nullptr : rows_.image_ids + row * width_;
    find_documents();
  }

  // Whether the rules of every row are those of its document alone: then `plain_row` says all.
  bool is_plain() const {
    return holes_.empty() && rows_.attend.sinks == 0 && rows_.prefix == 0 && rows_.prefix_lengths == nullptr &&
           !rows_.parent_ids && (images_ == nullptr || rows_.attend.images == ImageAttention::kCausal);
  }

  // Writes the one interval of every row of a plain output row.
  void write_plain(int32_t* lo, int32_t* hi) const {
    int32_t done = 0;
    auto padding = [&](int32_t end) {
      std::fill(lo + done, lo + end, 0);
      std::fill(hi + done, hi + end, 0);
    };
    for (const Interval& run : runs_) {
      padding(run.begin);
      done = run.end;
      if (rows_.attend.window == 0 && rows_.attend.chunk_size == 0) {
        std::fill(lo + run.begin, lo + run.end, run.begin);
        if (rows_.attend.full) {
          std::fill(hi + run.begin, hi + run.end, run.end);
        } else {
          for (int32_t q = run.begin; q < run.end; ++q) hi[q] = q + 1;
        }
        continue;
      }
      QueryRow query{};
      query.document = run;
      for (query.row = run.begin; query.row < run.end; ++query.row) {
        const Interval keys = own_document(rows_.attend, query);
        lo[query.row] = keys.begin;
        hi[query.row] = keys.end;
      }
    }
    padding(width_);
  }

  template <class Each>
  void for_each(Each&& each) {
    QueryRow query{};
    size_t next = 0;
    for (int32_t q = 0; q < width_; ++q) {
      if (ids_[q] < 0) {
        each(q, nullptr, true);
        continue;
      }
      if (q >= query.document.end || next == 0) enter_document(query, runs_[next++]);
      if (images_ != nullptr && rows_.attend.images != ImageAttention::kCausal && q >= query.image.end) {
        query.image = image_run(q);
      }
      query.row = q;
      Interval keys[2];
      const bool fits =
          cut_holes(visible(rows_.attend, query), holes_.data(), static_cast<int64_t>(holes_.size()), keys);
      each(q, keys, fits);
    }
  }

 private:
  void find_documents() {
    runs_.clear();
    holes_.clear();
    for (Interval& document : documents_) document = {0, 0};
    int32_t end = 0;  // behind the last kept row
    for (int32_t q = 0; q < width_; ++q) {
      if (ids_[q] < 0) continue;
      if (!runs_.empty() && ids_[end - 1] == ids_[q]) {
        if (end < q) holes_.push_back({end, q});
        runs_.back().end = q + 1;
      } else {
        runs_.push_back({q, q + 1});
      }
      end = q + 1;
    }
    if (documents_.empty()) return;
    for (const Interval& run : runs_) {
      const size_t id = static_cast<size_t>(ids_[run.begin]);
      if (id < documents_.size()) documents_[id] = run;
    }
  }

  // The neighbouring rows from q on with its image id, in its document; empty at text.
  Interval image_run(int32_t q) const {
    if (images_[q] < 0) return {0, 0};
    int32_t end = q + 1;
    while (end < width_ && images_[end] == images_[q] && ids_[end] == ids_[q]) ++end;
    return {q, end};
  }

  void enter_document(QueryRow& query, Interval run) const {
    const int64_t id = ids_[run.begin];
    query.document = run;
    query.image = {0, 0};
    query.prefix = rows_.prefix;
    if (rows_.prefix_lengths != nullptr) {
      query.prefix = id < rows_.prefix_count
                         ? static_cast<int32_t>(std::clamp<int64_t>(rows_.prefix_lengths[id], 0, kNoLimit))
                         : 0;
    }
    query.parent = {0, 0};
    if (rows_.parent_ids && id < rows_.parent_count) {
      const int64_t parent = rows_.parent_ids[id];
      if (parent >= 0 && parent < rows_.parent_count) query.parent = documents_[static_cast<size_t>(parent)];
    }
  }

  const MaskRows& rows_;
  int32_t width_;
  const int32_t* ids_ = nullptr;
  const int32_t* images_ = nullptr;
  std::vector<Interval> runs_;
  std::vector<Interval> holes_;      // padding inside documents
  std::vector<Interval> documents_;  // by id, for parents
};

}  // namespace

MaskResult intervals(const MaskRows& rows, const MaskOut& out) {
  MaskResult result;
  MaskRow line(rows);
  for (int64_t g = 0; g < rows.rows; ++g) {
    line.enter(g);
    const int64_t offset = g * rows.width;
    if (line.is_plain()) {
      line.write_plain(out.lo + offset, out.hi + offset);
      if (out.lo2 != nullptr) {
        std::fill(out.lo2 + offset, out.lo2 + offset + rows.width, 0);
        std::fill(out.hi2 + offset, out.hi2 + offset + rows.width, 0);
      }
      continue;
    }
    line.for_each([&](int32_t q, const Interval* keys, bool fits) {
      const int64_t at = offset + q;
      const Interval first = keys == nullptr ? Interval{0, 0} : keys[0];
      const Interval second = keys == nullptr ? Interval{0, 0} : keys[1];
      out.lo[at] = first.begin;
      out.hi[at] = first.end;
      if (out.lo2 != nullptr) {
        out.lo2[at] = second.begin;
        out.hi2[at] = second.end;
      }
      const bool two = second.begin < second.end;
      result.second |= two;
      if ((!fits || (two && out.lo2 == nullptr)) && result.error.code == kFine) {
        result.error = {kTooManyIntervals, at, 0, 0, 0, 0, 0, q};
      }
    });
  }
  return result;
}

}  // namespace vlm_fuse
