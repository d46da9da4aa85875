// What is wrong with a batch: the first bad sample, then totals, then a width that is too small.
#pragma once

#include <vector>

#include "walk.h"

namespace vlm_fuse {

class Checks {
 public:
  explicit Checks(const Batch& batch);

  void leave(const Walk& walk, int64_t rows);  // after a sample has been emitted; `rows` it gave
  Record finish(const Walk& walk, int64_t width);

 private:
  struct Border {  // "placeholders" with sizes: the first image that begins at or behind the placeholders so far
    int64_t image = 0;
    int64_t begin = 0;
    Record pending;  // an image cut off, legal unless placeholders follow
  };

  void check_counts(const Kind& kind, const KindCursor& cursor, int64_t sample, int64_t index);
  void check_rows(const Kind& kind, const KindCursor& cursor, int64_t sample, int64_t index);
  void note(const Record& record, int64_t order);
  Record totals(const Walk& walk) const;

  const Batch& batch_;
  std::vector<Border> borders_;
  Record first_;
  int64_t first_order_ = 0;  // among the errors of one sample
  int64_t widest_ = 0;
  int64_t widest_sample_ = 0;
  int64_t rows_ = 0;
};

}  // namespace vlm_fuse
