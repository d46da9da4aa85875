// Tables of rows in memory, with any strides, and the list of tables that feature rows are numbered through.
#pragma once

#include <algorithm>
#include <vector>

#include "dtype.h"

namespace vlm_fuse {

// Row r stands at (r / inner) * outer_stride + (r % inner) * row_stride: (n, D), or (i, P, D) with inner = P.
struct RowTable {
  char* data = nullptr;
  int64_t rows = 0;
  int64_t inner = 1;
  int64_t outer_stride = 0;  // strides in bytes
  int64_t row_stride = 0;
  int64_t step = 0;          // from one element to the next
  DType dtype = DType::kF32;

  VLM_FUSE_HD char* row(int64_t r) const {
    if (inner >= rows) return data + r * row_stride;
    return data + (r / inner) * outer_stride + (r % inner) * row_stride;
  }

  // Rows from r on that stand row_stride apart.
  VLM_FUSE_HD int64_t together(int64_t r) const { return inner >= rows ? rows - r : inner - r % inner; }

  VLM_FUSE_HD bool dense(int64_t dim) const { return step == size_of(dtype) && row_stride == dim * step; }
};

struct FeatureTable {
  RowTable table;
  int64_t first;  // number of its first feature row

  VLM_FUSE_HD bool holds(int64_t k) const { return k >= first && k - first < table.rows; }
};

// Feature rows by number; `first` ascends, numbers between and behind the tables have no row.
class FeatureTables {
 public:
  // Tables that go on in memory where the one before ends become one.
  void append(const RowTable& table, int64_t first, int64_t dim) {
    if (table.rows == 0) return;
    if (!tables_.empty()) {
      FeatureTable& last = tables_.back();
      const bool flat = last.table.inner >= last.table.rows && table.inner >= table.rows;
      const bool alike = last.table.dtype == table.dtype && last.table.dense(dim) && table.dense(dim);
      if (flat && alike && last.first + last.table.rows == first &&
          last.table.data + last.table.rows * last.table.row_stride == table.data) {
        last.table.rows += table.rows;
        last.table.inner = last.table.rows;
        return;
      }
    }
    tables_.push_back({table, first});
  }

  const std::vector<FeatureTable>& all() const { return tables_; }

  int64_t rows() const {
    int64_t count = 0;
    for (const FeatureTable& entry : tables_) count += entry.table.rows;
    return count;
  }

  // The table that holds feature row k, or null; `hint` is where the last one was found.
  const FeatureTable* find(int64_t k, size_t& hint) const {
    if (hint < tables_.size() && tables_[hint].holds(k)) return &tables_[hint];
    if (hint + 1 < tables_.size() && tables_[hint + 1].holds(k)) return &tables_[++hint];
    const auto behind = std::upper_bound(tables_.begin(), tables_.end(), k,
                                         [](int64_t row, const FeatureTable& table) { return row < table.first; });
    if (behind == tables_.begin()) return nullptr;
    hint = static_cast<size_t>(behind - tables_.begin()) - 1;
    return tables_[hint].holds(k) ? &tables_[hint] : nullptr;
  }

 private:
  std::vector<FeatureTable> tables_;
};

}  // namespace vlm_fuse
