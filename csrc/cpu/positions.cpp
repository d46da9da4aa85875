#include "positions.h"

#include <algorithm>
#include <unordered_set>
#include <vector>

#include "threads.h"

namespace vlm_fuse {
namespace {

constexpr int64_t kMost = int64_t{1} << 31;  // a grid never needs more placeholders than there are tokens

int64_t capped_product(int64_t a, int64_t b) { return std::min(a * b, kMost); }

// One row of the grids: `parts` images or frames of t x h x w placeholders each, which begin at `first`.
struct Grid {
  int64_t first;
  int64_t t, h, w;
  int64_t part;
  int64_t row;
};

struct Grids {
  std::vector<Grid> grids;
  int64_t total = 0;
  Record error;

  size_t at(int64_t ordinal) const {
    const auto after = std::upper_bound(grids.begin(), grids.end(), ordinal,
                                        [](int64_t value, const Grid& grid) { return value < grid.first; });
    return static_cast<size_t>(after - grids.begin()) - 1;
  }
};

Grids read_grids(const MropeTask& task, int kind) {
  Grids found;
  const bool split = kind == 1 && task.split;
  found.grids.reserve(static_cast<size_t>(task.counts[kind]));
  for (int64_t row = 0; row < task.counts[kind]; ++row) {
    const int64_t* thw = task.grids[kind] + row * 3;
    const bool sized = std::all_of(thw, thw + 3, [](int64_t size) { return size > 0 && size < kMost; });
    if (!sized || thw[1] % task.merge != 0 || thw[2] % task.merge != 0) {
      if (found.error.code == kFine) {
        found.error = {kBadGrid, 0, kind, thw[0], thw[1], thw[2], task.merge, row};
      }
      continue;
    }
    Grid grid{found.total, split ? 1 : thw[0], thw[1] / task.merge, thw[2] / task.merge, 0, row};
    grid.part = capped_product(capped_product(grid.t, grid.h), grid.w);
    found.total += capped_product(split ? thw[0] : 1, grid.part);
    found.grids.push_back(grid);
  }
  return found;
}

// The end of the run of equal values; sixteen at a time, so that it vectorises.
template <class Value>
int64_t run_of(const Value* values, int64_t from, int64_t end) {
  const Value first = values[from];
  for (; from + 16 <= end; from += 16) {
    Value others = 0;
    for (int i = 0; i < 16; ++i) others |= static_cast<Value>(values[from + i] ^ first);
    if (others != 0) break;
  }
  while (from < end && values[from] == first) ++from;
  return from;
}

// The values of one row of tokens, and where runs of them end.
class Line {
 public:
  Line(const Integers& values, int64_t offset) : values_(values), offset_(offset) {}

  int64_t operator[](int64_t token) const { return values_[offset_ + token]; }

  int64_t run(int64_t from, int64_t end) const {
    return by_width([&](const auto* values) { return run_of(values, from, end); });
  }

  // Of values of which `alike` says the same; they are mostly equal.
  template <class Alike>
  int64_t run(int64_t from, int64_t end, Alike&& alike) const {
    return by_width([&](const auto* values) {
      const bool first = alike(values[from]);
      while (from < end && alike(values[from]) == first) from = run_of(values, from, end);
      return from;
    });
  }

  int64_t count(int64_t end, int64_t value) const {
    return by_width([&](const auto* values) {
      int64_t found = 0;
      for (int64_t i = 0; i < end; ++i) found += values[i] == value;
      return found;
    });
  }

 private:
  template <class Body>
  int64_t by_width(Body&& body) const {
    switch (values_.bytes) {
      case 1:
        return body(static_cast<const int8_t*>(values_.data) + offset_);
      case 2:
        return body(static_cast<const int16_t*>(values_.data) + offset_);
      case 4:
        return body(static_cast<const int32_t*>(values_.data) + offset_);
      default:
        return body(static_cast<const int64_t*>(values_.data) + offset_);
    }
  }

  const Integers& values_;
  int64_t offset_;
};

void count_up(int64_t* to, int64_t count, int64_t first) {
  for (int64_t i = 0; i < count; ++i) to[i] = first + i;
}

// Towards zero; what no position can be is 0.
int64_t whole_of(double value) { return value > -9e18 && value < 9e18 ? static_cast<int64_t>(value) : 0; }

template <class Value>
int64_t time_of(int64_t frame, Value interval) {
  const float product = widen(narrow<Value>(static_cast<float>(frame))) * widen(interval);
  return whole_of(static_cast<double>(widen(narrow<Value>(product))));
}

class Sample {
 public:
  // `before`: placeholders of each kind before the sample.
  Sample(const MropeTask& task, const Grids (&grids)[2], const int64_t (&before)[2], int64_t sample, int64_t* positions)
      : task_(task),
        grids_(grids),
        sample_(sample),
        types_(task.types, sample * task.length),
        mask_(task.attention_mask, sample * task.length),
        ids_(task.document_ids, sample * task.length) {
    const int64_t first = task.rows() - 3;
    for (int row = 0; row < 4; ++row) {
      to_[row] = positions + ((row < 3 ? first + row : 0) * task.samples + sample) * task.length;
    }
    for (int kind = 0; kind < 2; ++kind) {
      ordinal_[kind] = before[kind];
      grid_[kind] = before[kind] < grids[kind].total ? grids[kind].at(before[kind]) : 0;
    }
  }

  // Writes the sample and returns its delta.
  int64_t run() {
    int64_t type_end = 0, mask_end = 0, ids_end = 0, last = 0;
    const int64_t length = task_.length;
    for (int64_t token = 0; token < length;) {
      if (token == type_end) type_end = types_.run(token, length);
      int64_t end = type_end;
      bool kept = true;
      if (task_.attention_mask) {
        if (token == mask_end) mask_end = mask_.run(token, length, [](auto value) { return value != 0; });
        kept = mask_[token] != 0;
        end = std::min(end, mask_end);
      }
      if (task_.document_ids) {
        // ids below 0 mean the same, whichever they are
        if (token == ids_end) {
          ids_end = ids_[token] < 0 ? ids_.run(token, length, [](auto id) { return id < 0; }) : ids_.run(token, length);
        }
        kept &= ids_[token] >= 0;
        end = std::min(end, ids_end);
        if (kept && (!open_ || ids_[token] != document_)) begin_document(token);
      } else if (kept) {
        open_ = true;
      }
      write(token, end, types_[token], kept);
      token = end;
      if (kept) last = end;
    }
    if (task_.document_ids) {
      for (int64_t* row : to_) count_up(row + last, length - last, 0);
    }
    return open_ ? highest_ + 1 - kept_ : 0;
  }

  // The first one; `complete` adds the counts.
  const Record& error() const { return error_; }

  int64_t ordinal(int kind) const { return ordinal_[kind]; }  // placeholders of a kind up to here

 private:
  void begin_document(int64_t token) {
    document_ = ids_[token];
    // ids that rise cannot return
    if (document_ <= largest_ && seen_.empty()) {
      for (int64_t before = 0; before < token; ++before) {
        if (is_kept(before)) seen_.insert(ids_[before]);
      }
    }
    if (document_ <= largest_ || !seen_.empty()) {
      if (!seen_.insert(document_).second) note({kDocumentReturns, sample_, 0, 0, 0, 0, 0, document_});
    }
    largest_ = std::max(largest_, document_);
    open_ = true;
    here_ = kept_ = 0;
    highest_ = -1;
  }

  bool is_kept(int64_t token) const { return ids_[token] >= 0 && (!task_.attention_mask || mask_[token] != 0); }

  void note(const Record& record) {
    if (error_.code == kFine) error_ = record;
  }

  // Tokens of one type and document, all kept or all padding.
  void write(int64_t token, int64_t end, int64_t type, bool kept) {
    if (type != 1 && type != 2) {
      if (kept && type != 0) note({kUnknownType, sample_, 0, token, 0, 0, 0, type});
      return write_text(token, end - token, kept);
    }
    const int kind = static_cast<int>(type) - 1;
    const Grids& grids = grids_[kind];
    int64_t& ordinal = ordinal_[kind];
    while (token < end) {
      if (ordinal >= grids.total) {
        note({kNoGrid, sample_, kind, 0, 0, 0, grids.total, task_.counts[kind]});
        ordinal += end - token;
        return write_text(token, end - token, kept);
      }
      size_t& number = grid_[kind];
      while (number + 1 < grids.grids.size() && grids.grids[number + 1].first <= ordinal) ++number;
      const Grid& grid = grids.grids[number];
      const int64_t offset = (ordinal - grid.first) % grid.part;
      const int64_t count = std::min(end - token, grid.part - offset);
      if (kept) {
        write_grid(token, count, grid, offset, kind);
        if (offset + count == grid.part) here_ += std::max(grid.h, grid.w);
      } else {
        write_text(token, count, false);
      }
      if (offset + count < grid.part) {
        note({kGridCut, sample_, kind, offset + count, grid.part, 0, grids.total, grid.row});
      }
      ordinal += count;
      token += count;
    }
  }

  void write_text(int64_t token, int64_t count, bool kept) {
    if (!kept) {
      for (int64_t* row : to_) std::fill_n(row + token, count, 0);
      return;
    }
    write_count(token, count);
    count_up(to_[0] + token, count, here_);
    for (int row = 1; row < 3; ++row) std::copy_n(to_[0] + token, count, to_[row] + token);
    here_ += count;
    highest_ = std::max(highest_, here_ - 1);
  }

  void write_count(int64_t token, int64_t count) {
    if (task_.document_ids) count_up(to_[3] + token, count, kept_);
    kept_ += count;
  }

  void write_grid(int64_t token, int64_t count, const Grid& grid, int64_t offset, int kind) {
    write_count(token, count);
    int64_t x = offset % grid.w, y = offset / grid.w % grid.h, frame = offset / (grid.h * grid.w);
    int64_t time = here_ + time_at(frame, grid.row, kind);
    for (const int64_t end = token + count; token < end;) {
      const int64_t line = std::min(end - token, grid.w - x);
      std::fill_n(to_[0] + token, line, time);
      std::fill_n(to_[1] + token, line, here_ + y);
      count_up(to_[2] + token, line, here_ + x);
      highest_ = std::max({highest_, time, here_ + y, here_ + x + line - 1});
      token += line;
      x = 0;
      if (++y == grid.h && token < end) {
        y = 0;
        time = here_ + time_at(++frame, grid.row, kind);
      }
    }
  }

  int64_t time_at(int64_t frame, int64_t row, int kind) const {
    if (kind == 0) return frame;
    const Intervals& intervals = task_.intervals;
    if (intervals.data == nullptr) return frame * intervals.each;
    switch (intervals.type) {
      case Intervals::Type::kWhole: {
        const int64_t by = static_cast<const int64_t*>(intervals.data)[row];
        return whole_of(static_cast<double>(frame) * static_cast<double>(by)) == 0 ? 0 : frame * by;
      }
      case Intervals::Type::kF32:
        return time_of(frame, static_cast<const float*>(intervals.data)[row]);
      case Intervals::Type::kBF16:
        return time_of(frame, static_cast<const bf16*>(intervals.data)[row]);
      case Intervals::Type::kF16:
        return time_of(frame, static_cast<const f16*>(intervals.data)[row]);
      default:
        return whole_of(static_cast<double>(frame) * static_cast<const double*>(intervals.data)[row]);
    }
  }

  const MropeTask& task_;
  const Grids (&grids_)[2];
  const int64_t sample_;
  const Line types_, mask_, ids_;
  int64_t* to_[4];        // time, height, width; the count, or time once more
  int64_t ordinal_[2];    // placeholders of each kind before the token
  size_t grid_[2];
  bool open_ = false;     // there is a document
  int64_t document_ = 0;  // its id
  int64_t here_ = 0;      // next position
  int64_t kept_ = 0;      // its tokens
  int64_t highest_ = -1;
  int64_t largest_ = -1;                // id so far
  std::unordered_set<int64_t> seen_;    // ids so far, once one has not risen
  Record error_;
};

int64_t placeholders(const MropeTask& task, int64_t sample, int64_t kind) {
  return Line(task.types, sample * task.length).count(task.length, kind + 1);
}

// The counts of an error, which nobody needs where there is none.
Record complete(Record error, const MropeTask& task) {
  if (error.code != kNoGrid && error.code != kGridCut) return error;
  int64_t before = 0;
  for (int64_t sample = 0; sample < task.samples; ++sample) {
    if (sample == error.sample) before = error.total_placeholders;
    error.total_placeholders += placeholders(task, sample, error.kind);
  }
  if (error.code == kNoGrid) {
    error.placeholders = placeholders(task, error.sample, error.kind);
    error.rows = std::max<int64_t>(error.total_rows - before, 0);
  }
  return error;
}

}  // namespace

Record mrope_position_ids(const MropeTask& task, int64_t* positions, int64_t* deltas) {
  struct Counts {
    int64_t of[2] = {0, 0};
  };
  const Grids grids[2] = {read_grids(task, 0), read_grids(task, 1)};
  Counts total;
  std::vector<Record> errors(static_cast<size_t>(task.samples));
  auto write = [&](int64_t sample, Counts before) {
    Sample one(task, grids, before.of, sample, positions);
    deltas[sample] = one.run();
    errors[static_cast<size_t>(sample)] = one.error();
    return Counts{{one.ordinal(0), one.ordinal(1)}};
  };
  // a megabyte takes less time than a second thread that comes late
  const int64_t eighth = task.length * task.rows();
  if (task.samples * eighth <= kGrainBytes) {
    for (int64_t sample = 0; sample < task.samples; ++sample) total = write(sample, total);
  } else {
    std::vector<Counts> before(static_cast<size_t>(task.samples));
    for (int64_t sample = 0; sample < task.samples; ++sample) {
      before[static_cast<size_t>(sample)] = total;
      for (int kind = 0; kind < 2; ++kind) total.of[kind] += placeholders(task, sample, kind);
    }
    parallel_parts(task.samples, eighth, [&](int64_t begin, int64_t end) {
      for (int64_t sample = begin; sample < end; ++sample) write(sample, before[static_cast<size_t>(sample)]);
    });
  }
  for (const Grids& of_kind : grids) {
    if (of_kind.error.code != kFine) return of_kind.error;
  }
  for (const Record& error : errors) {
    if (error.code != kFine) return complete(error, task);
  }
  for (int kind = 0; kind < 2; ++kind) {
    const int64_t found = total.of[kind];
    const Grids& unused = grids[kind];
    if (found < unused.total) {
      return {kGridUnused, -1, kind, found, unused.total, found, unused.total, unused.grids[unused.at(found)].row};
    }
  }
  return {};
}

}  // namespace vlm_fuse
