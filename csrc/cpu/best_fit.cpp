#include "best_fit.h"

#include <algorithm>
#include <iterator>
#include <type_traits>
#include <utility>
#include <vector>

namespace vlm_fuse {
namespace {

struct Row {
  int64_t left[kMostBudgets];  // 0 of budgets that there are not
  int64_t number;
};

// By the tokens left, of equal ones by the number.
bool before(const Row& one, const Row& other) {
  return one.left[0] != other.left[0] ? one.left[0] < other.left[0] : one.number < other.number;
}

bool enough(const int64_t* left, const int64_t* need) {
  bool all = true;
  for (int i = 0; i < kMostBudgets; ++i) all &= left[i] >= need[i];
  return all;
}

const Row& last_of(const Row& row) { return row; }
const int64_t* most_of(const Row& row) { return row.left; }
const Row* first_in(const Row& row, const int64_t*) { return &row; }

// Rows in order, or nodes of them: what has not enough of some budget is passed as a whole.
template <class Child>
struct Node {
  std::vector<Child> children;  // none of them empty
  Row last{};
  int64_t most[kMostBudgets] = {};

  // The first row that has room for all of `need`; null where there is none.
  const Row* first(const int64_t* need) const {
    auto child = std::lower_bound(children.begin(), children.end(), need[0],
                                  [](const Child& one, int64_t room) { return last_of(one).left[0] < room; });
    for (; child != children.end(); ++child) {
      if (!enough(most_of(*child), need)) continue;
      if (const Row* found = first_in(*child, need)) return found;
    }
    return nullptr;
  }

  void put(const Row& row) {
    auto child = place_of(row);
    if constexpr (std::is_same_v<Child, Row>) {
      children.insert(child, row);
    } else {
      if (children.empty()) {
        child = children.insert(child, Child{});
      } else if (child == children.end()) {
        --child;
      }
      child->put(row);
      if (child->children.size() > kLongest) {
        Child upper = child->split();
        children.insert(std::next(child), std::move(upper));
      }
    }
    last = last_of(children.back());
    for (int i = 0; i < kMostBudgets; ++i) most[i] = std::max(most[i], row.left[i]);
  }

  void remove(const Row& row) {
    const auto child = place_of(row);
    if constexpr (std::is_same_v<Child, Row>) {
      children.erase(child);
    } else {
      child->remove(row);
      if (child->children.empty()) children.erase(child);
    }
    look(row.left);
  }

  Node split() {
    Node upper;
    const auto middle = children.begin() + static_cast<std::ptrdiff_t>(children.size() / 2);
    upper.children.assign(std::make_move_iterator(middle), std::make_move_iterator(children.end()));
    children.erase(middle, children.end());
    upper.look(nullptr);
    look(nullptr);
    return upper;
  }

 private:
  static constexpr size_t kLongest = 64;

  auto place_of(const Row& row) {
    return std::lower_bound(children.begin(), children.end(), row,
                            [](const Child& one, const Row& placed) { return before(last_of(one), placed); });
  }

  // What a row that is gone had is looked for anew only where it was the most; null: all of it.
  void look(const int64_t* gone) {
    if (!children.empty()) last = last_of(children.back());
    for (int i = 0; i < kMostBudgets; ++i) {
      if (gone != nullptr && gone[i] < most[i]) continue;
      most[i] = 0;
      for (const Child& child : children) most[i] = std::max(most[i], most_of(child)[i]);
    }
  }
};

template <class Child>
const Row& last_of(const Node<Child>& node) {
  return node.last;
}
template <class Child>
const int64_t* most_of(const Node<Child>& node) {
  return node.most;
}
template <class Child>
const Row* first_in(const Node<Child>& node, const int64_t* need) {
  return node.first(need);
}

// Rises with `left`: small numbers have one each, then four share the numbers of as many bits.
size_t level_of(int64_t left) {
  size_t octave = 0;
  for (; left >= 8; left >>= 1) ++octave;
  return octave * 4 + static_cast<size_t>(left);
}

// The open rows. Where two budgets besides the tokens vary, one is not enough to pass rows by: some have no images left
// and others no patches. Rows are then held apart by the level of one of them.
class Rows {
 public:
  explicit Rows(const BestFit& asked) {
    std::copy_n(asked.capacity, asked.budgets, least_);
    int64_t greatest[kMostBudgets] = {};
    for (int64_t i = 0; i < asked.samples; ++i) {
      for (int b = 0; b < asked.budgets; ++b) {
        const int64_t need = asked.needs[i * asked.budgets + b];
        least_[b] = std::min(least_[b], need);
        greatest[b] = std::max(greatest[b], need);
      }
    }
    int varying = 0;
    for (int b = 1; b < asked.budgets; ++b) {
      if (least_[b] == greatest[b]) continue;
      ++varying;
      if (apart_ == 0 || asked.capacity[b] < asked.capacity[apart_]) apart_ = b;
    }
    if (varying < 2) apart_ = 0;
    levels_.resize(apart_ == 0 ? 1 : level_of(asked.capacity[apart_]) + 1);
  }

  // Takes out the first row that has room for all of `need`.
  bool take(const int64_t* need, Row* found) {
    const Row* best = nullptr;
    for (size_t i = level(need); i < levels_.size(); ++i) {
      if (!enough(levels_[i].most, need)) continue;
      const Row* row = levels_[i].first(need);
      if (row != nullptr && (best == nullptr || before(*row, *best))) best = row;
    }
    if (best == nullptr) return false;
    *found = *best;
    levels_[level(found->left)].remove(*found);
    return true;
  }

  // A row in which no sample has room is left out.
  void put(const Row& row) {
    if (enough(row.left, least_)) levels_[level(row.left)].put(row);
  }

 private:
  size_t level(const int64_t* left) const { return apart_ == 0 ? 0 : level_of(left[apart_]); }

  int apart_ = 0;
  int64_t least_[kMostBudgets] = {};  // that a sample needs
  std::vector<Node<Node<Node<Row>>>> levels_;
};

}  // namespace

bool best_fit(const BestFit& asked, int64_t* rows) {
  std::fill(rows, rows + asked.samples, int64_t{-1});
  for (int64_t i = 0; i < asked.samples; ++i) {
    for (int b = 0; b < asked.budgets; ++b) {
      const int64_t need = asked.needs[i * asked.budgets + b];
      if (need < 0 || need > asked.capacity[b]) return false;
    }
  }
  Rows open(asked);
  int64_t count = 0;
  for (int64_t i = 0; i < asked.samples; ++i) {
    const int64_t sample = asked.order[i];
    if (sample < 0 || sample >= asked.samples || rows[sample] >= 0) return false;
    int64_t need[kMostBudgets] = {};
    std::copy_n(asked.needs + sample * asked.budgets, asked.budgets, need);
    Row row;
    if (!open.take(need, &row)) {
      row = Row{{}, count++};
      std::copy_n(asked.capacity, asked.budgets, row.left);
    }
    for (int b = 0; b < asked.budgets; ++b) row.left[b] -= need[b];
    open.put(row);
    rows[sample] = row.number;
  }
  return true;
}

}  // namespace vlm_fuse
