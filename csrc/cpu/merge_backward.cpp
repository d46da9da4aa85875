#include <cstring>
#include <memory>

#include "elements.h"
#include "merge.h"
#include "threads.h"

namespace vlm_fuse {
namespace {

constexpr int64_t kBlockBytes = 256 * 1024;  // of gradient that a thread takes at a time
constexpr int32_t kNone = -1;

using RowNumbers = std::unique_ptr<int32_t[]>;

RowNumbers no_rows(int64_t count) {
  RowNumbers numbers(new int32_t[static_cast<size_t>(count)]);
  std::memset(numbers.get(), 0xff, static_cast<size_t>(count) * sizeof(int32_t));
  return numbers;
}

// One gradient with, for each of its rows, the row of `grad` that it is (the first of several), or kNone.
struct Target {
  Gradient out;
  const int32_t* from;  // null: kNone for all
  bool text;            // rows may be sums
  Store store;
};

class RowGradients {
 public:
  explicit RowGradients(const MergeBackward& backward) : backward_(backward), reader_(backward.grad, false, 1.0) {
    if (backward.wants_text) text_rows_ = no_rows(backward.text.rows);
    int64_t first = INT64_MAX, last = 0;
    for (const FeatureGradient& feature : backward.features) {
      first = std::min(first, feature.first);
      last = std::max(last, feature.first + feature.owned);
    }
    first_feature_ = std::min(first, last);
    features_ = last - first_feature_;
    if (features_ > 0) feature_rows_ = no_rows(features_);
    find_rows();
    int64_t bytes = backward.wants_text ? bytes_of(backward.text) : 0;
    for (const FeatureGradient& feature : backward.features) bytes += bytes_of(feature.out);
    if (backward.wants_text) add_target(backward.text, text_rows_.get(), true, bytes);
    for (const FeatureGradient& feature : backward.features) {
      Gradient owned = feature.out, beyond = feature.out;
      owned.rows = feature.owned;
      beyond.rows -= owned.rows;
      beyond.data += bytes_of(owned);
      add_target(owned, feature_rows_.get() + (feature.first - first_feature_), false, bytes);
      add_target(beyond, nullptr, false, bytes);
    }
  }

  void write() {
    parallel_blocks(static_cast<int64_t>(blocks_.size()),
                    [this](int64_t block) { write_block(blocks_[static_cast<size_t>(block)]); });
  }

 private:
  struct Part {
    size_t target;
    int64_t begin, end;
  };

  int64_t bytes_of(const Gradient& gradient) const { return gradient.rows * backward_.dim * size_of(gradient.dtype); }

  // A row of another gradient may come between two of this one, and none need come in order.
  void find_rows() {
    const int64_t rows = backward_.grad.rows;
    for (int64_t row = 0; row < rows; ++row) {
      const RowSources sources = row_sources(row, backward_.source_index, backward_.text_index, backward_.add);
      if (text_rows_ && sources.text >= 0 && sources.text < backward_.text.rows) {
        int32_t& found = text_rows_[static_cast<size_t>(sources.text)];
        if (found == kNone) found = static_cast<int32_t>(row);
      }
      const int64_t feature = sources.feature - first_feature_;
      if (feature_rows_ && sources.feature >= 0 && feature >= 0 && feature < features_) {
        feature_rows_[static_cast<size_t>(feature)] = static_cast<int32_t>(row);
      }
    }
  }

  void add_target(const Gradient& out, const int32_t* from, bool text, int64_t all_bytes) {
    if (out.rows == 0) return;
    const Store store = prepare(out.data, all_bytes);
    const int64_t rows_each = std::max<int64_t>(1, kBlockBytes / (backward_.dim * size_of(out.dtype)));
    for (int64_t begin = 0; begin < out.rows; begin += rows_each) {
      blocks_.push_back({targets_.size(), begin, std::min(begin + rows_each, out.rows)});
    }
    targets_.push_back({out, from, text, store});
  }

  void write_block(const Part& part) const {
    const Target& target = targets_[part.target];
    const Writer writer(target.out.dtype, target.store);
    const int64_t row_bytes = backward_.dim * size_of(target.out.dtype);
    const bool sums = target.text && backward_.add && backward_.text_index != nullptr;
    for (int64_t k = part.begin; k < part.end;) {
      char* to = target.out.data + k * row_bytes;
      const int32_t row = target.from == nullptr ? kNone : target.from[k];
      int64_t count = 1;
      if (row == kNone) {
        if (target.from == nullptr) count = part.end - k;
        while (k + count < part.end && target.from[k + count] == kNone) ++count;
        writer.zero(to, count * backward_.dim);
      } else if (sums) {
        write_sum(writer, to, row, k);
      } else if (!backward_.grad.dense(backward_.dim)) {
        writer.copy(to, backward_.grad.row(row), backward_.dim, reader_);
      } else {
        const int64_t most = std::min(part.end - k, backward_.grad.together(row));
        while (count < most && target.from[k + count] == row + count) ++count;
        writer.copy(to, backward_.grad.row(row), count * backward_.dim, reader_);
      }
      k += count;
    }
    writer.finish();
  }

  // The rows of an expanded placeholder stand side by side and all have its text row under them.
  void write_sum(const Writer& writer, char* to, int64_t row, int64_t token) const {
    int64_t end = row + 1;
    auto has_token = [&](int64_t r) {
      return row_sources(r, backward_.source_index, backward_.text_index, true).text == token;
    };
    while (end < backward_.grad.rows && has_token(end)) ++end;
    if (end == row + 1) return writer.copy(to, backward_.grad.row(row), backward_.dim, reader_);
    writer.total(
        to, backward_.dim, reader_, end - row, [&](int64_t i) { return backward_.grad.row(row + i); }, false, 1.0,
        false);
  }

  const MergeBackward& backward_;
  Reader reader_;
  RowNumbers text_rows_;
  RowNumbers feature_rows_;
  int64_t first_feature_ = 0;
  int64_t features_ = 0;
  std::vector<Target> targets_;
  std::vector<Part> blocks_;
};

// The gradient of the embedding weight: the rows of grad sorted by id, so that every sum has one order.
class WeightGradient {
 public:
  explicit WeightGradient(const MergeBackward& backward)
      : backward_(backward), reader_(backward.grad, false, 1.0), ids_(backward.weight.rows) {
    offsets_.reset(new int32_t[static_cast<size_t>(ids_) + 1]());
    const int64_t rows = backward.grad.rows;
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t id = id_of(row);
      if (id >= 0) ++offsets_[static_cast<size_t>(id)];
    }
    int32_t total = 0;
    for (int64_t id = 0; id <= ids_; ++id) {
      const int32_t here = id < ids_ ? offsets_[static_cast<size_t>(id)] : 0;
      offsets_[static_cast<size_t>(id)] = total;
      total += here;
    }
    rows_.reset(new int32_t[static_cast<size_t>(total)]);
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t id = id_of(row);
      if (id >= 0) rows_[static_cast<size_t>(offsets_[static_cast<size_t>(id)]++)] = static_cast<int32_t>(row);
    }
    // Now offsets_[id] is where the next id begins.
    for (int64_t id = 0; id < ids_; ++id) {
      if (is_frequent(id)) frequent_.push_back(id);
    }
    // what is added to is in the cache by then
    store_ = backward.accumulate ? Store::kOrdinary : prepare(backward.weight.data, ids_ * row_bytes());
  }

  void write() {
    const int64_t rows_each = std::max<int64_t>(1, kBlockBytes / row_bytes());
    const int64_t ranges = (ids_ + rows_each - 1) / rows_each;
    const int64_t columns = (backward_.dim + kColumns - 1) / kColumns;
    const int64_t pieces = static_cast<int64_t>(frequent_.size()) * columns;
    parallel_blocks(pieces + ranges, [&](int64_t block) {  // the long sums first
      if (block < pieces)
        return write_columns(frequent_[static_cast<size_t>(block / columns)], block % columns * kColumns);
      const int64_t begin = (block - pieces) * rows_each;
      write_ids(begin, std::min(begin + rows_each, ids_));
    });
  }

 private:
  int64_t row_bytes() const { return backward_.dim * size_of(backward_.weight.dtype); }

  int64_t id_of(int64_t row) const {
    const int64_t token = row_sources(row, backward_.source_index, backward_.text_index, backward_.add).text;
    if (token < 0 || token >= backward_.token_count) return -1;
    const int64_t id = backward_.tokens[token];
    return id < ids_ ? id : -1;
  }

  // An id that stands in many rows (padding): its sum is shared out by columns, which leaves its order as it is.
  bool is_frequent(int64_t id) const {
    return offsets_[static_cast<size_t>(id)] - begin_of(id) > std::max<int64_t>(kFrequent, kBlockBytes / row_bytes());
  }

  void write_columns(int64_t id, int64_t column) const {
    const Writer writer(backward_.weight.dtype, store_);
    const int32_t first = begin_of(id), count = offsets_[static_cast<size_t>(id)] - first;
    const int32_t* rows = rows_.get() + first;
    char* to = backward_.weight.data + id * row_bytes() + column * size_of(backward_.weight.dtype);
    writer.total(
        to, std::min(kColumns, backward_.dim - column), reader_, count,
        [&](int64_t i) { return backward_.grad.row(rows[i]) + column * reader_.step; }, backward_.scaled,
        backward_.scale, backward_.accumulate);
    writer.finish();
  }

  int32_t begin_of(int64_t id) const { return id == 0 ? 0 : offsets_[static_cast<size_t>(id) - 1]; }

  void write_ids(int64_t begin, int64_t end) const {
    const Writer writer(backward_.weight.dtype, store_);
    for (int64_t id = begin; id < end;) {
      char* to = backward_.weight.data + id * row_bytes();
      const int32_t first = begin_of(id), count = offsets_[static_cast<size_t>(id)] - first;
      if (count == 0) {
        int64_t empty = id + 1;
        while (empty < end && offsets_[static_cast<size_t>(empty)] == first) ++empty;
        if (!backward_.accumulate) writer.zero(to, (empty - id) * backward_.dim);
        id = empty;
        continue;
      }
      if (is_frequent(id)) {
        ++id;
        continue;
      }
      const int32_t* rows = rows_.get() + first;
      writer.total(
          to, backward_.dim, reader_, count, [&](int64_t i) { return backward_.grad.row(rows[i]); }, backward_.scaled,
          backward_.scale, backward_.accumulate);
      ++id;
    }
    writer.finish();
  }

  static constexpr int64_t kColumns = 128;
  static constexpr int64_t kFrequent = 64;

  const MergeBackward& backward_;
  Reader reader_;
  int64_t ids_;
  std::vector<int64_t> frequent_;
  RowNumbers offsets_;
  RowNumbers rows_;
  Store store_;
};

}  // namespace

void merge_rows_backward(const MergeBackward& backward) {
  if (backward.dim == 0) return;
  if (backward.wants_text || !backward.features.empty()) RowGradients(backward).write();
  if (backward.wants_weight && backward.weight.rows > 0) WeightGradient(backward).write();
}

}  // namespace vlm_fuse
