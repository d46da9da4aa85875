#include "best_fit.h"

#include <algorithm>
#include <iterator>
#include <memory>
#include <vector>

namespace vlm_fuse {
namespace {

struct Row {
  int64_t left[kMostBudgets];
  int64_t number;

  bool before(int64_t room, int64_t opened) const { return left[0] != room ? left[0] < room : number < opened; }
};

// Rows by (tokens left, number), in blocks of neighbours: a block that has not enough of some other budget is passed as
// a whole, and a row that changes moves no more than one block.
class Rows {
 public:
  explicit Rows(int budgets) : budgets_(budgets) {}

  // Takes out the first row that has room for all of `need`.
  bool take(const int64_t* need, Row* found) {
    auto block = std::lower_bound(blocks_.begin(), blocks_.end(), need[0],
                                  [](const auto& one, int64_t room) { return one->rows.back().left[0] < room; });
    for (; block != blocks_.end(); ++block) {
      if (!enough((*block)->most, need)) continue;
      std::vector<Row>& rows = (*block)->rows;
      for (size_t i = 0; i < rows.size(); ++i) {
        if (!enough(rows[i].left, need)) continue;
        *found = rows[i];
        rows.erase(rows.begin() + static_cast<std::ptrdiff_t>(i));
        if (rows.empty()) {
          blocks_.erase(block);
        } else {
          (*block)->look(budgets_);
        }
        return true;
      }
    }
    return false;
  }

  void put(const Row& row) {
    if (blocks_.empty()) blocks_.push_back(std::make_unique<Block>());
    auto block = std::lower_bound(blocks_.begin(), blocks_.end(), row, [](const auto& one, const Row& placed) {
      return !one->rows.empty() && one->rows.back().before(placed.left[0], placed.number);
    });
    if (block == blocks_.end()) block = std::prev(block);
    std::vector<Row>& rows = (*block)->rows;
    rows.insert(
        std::lower_bound(rows.begin(), rows.end(), row,
                         [](const Row& one, const Row& placed) { return one.before(placed.left[0], placed.number); }),
        row);
    if (rows.size() > kLongest) {
      auto upper = std::make_unique<Block>();
      const auto middle = rows.begin() + static_cast<std::ptrdiff_t>(rows.size() / 2);
      upper->rows.assign(middle, rows.end());
      rows.erase(middle, rows.end());
      upper->look(budgets_);
      (*block)->look(budgets_);
      blocks_.insert(std::next(block), std::move(upper));
    } else {
      (*block)->look(budgets_);
    }
  }

 private:
  static constexpr size_t kLongest = 128;

  struct Block {
    std::vector<Row> rows;
    int64_t most[kMostBudgets];

    void look(int budgets) {
      for (int i = 0; i < budgets; ++i) {
        most[i] = -1;
        for (const Row& row : rows) most[i] = std::max(most[i], row.left[i]);
      }
    }
  };

  bool enough(const int64_t* left, const int64_t* need) const {
    for (int i = 0; i < budgets_; ++i) {
      if (left[i] < need[i]) return false;
    }
    return true;
  }

  int budgets_;
  std::vector<std::unique_ptr<Block>> blocks_;  // none of them empty
};

}  // namespace

bool best_fit(const BestFit& asked, int64_t* rows) {
  std::fill(rows, rows + asked.samples, int64_t{-1});
  Rows open(asked.budgets);
  int64_t count = 0;
  for (int64_t i = 0; i < asked.samples; ++i) {
    const int64_t sample = asked.order[i];
    if (sample < 0 || sample >= asked.samples || rows[sample] >= 0) return false;
    const int64_t* need = asked.needs + sample * asked.budgets;
    for (int b = 0; b < asked.budgets; ++b) {
      if (need[b] < 0 || need[b] > asked.capacity[b]) return false;
    }
    Row row;
    if (!open.take(need, &row)) {
      row = Row{{}, count++};
      std::copy(asked.capacity, asked.capacity + asked.budgets, row.left);
    }
    for (int b = 0; b < asked.budgets; ++b) row.left[b] -= need[b];
    open.put(row);
    rows[sample] = row.number;
  }
  return true;
}

}  // namespace vlm_fuse
