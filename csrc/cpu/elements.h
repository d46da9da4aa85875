// Moving the elements of rows from a table to an output: conversion, scaling and adding on the way, through blocks
// that stay in the first-level cache.
#pragma once

#include "convert.h"
#include "memory.h"
#include "table.h"

namespace vlm_fuse {

constexpr int64_t kElementBlock = 512;

struct alignas(64) Block {
  char bytes[kElementBlock * 8];
};

template <class Wide>
constexpr DType kWide = sizeof(Wide) == 8 ? DType::kF64 : DType::kF32;

// How the rows of one table are read. `scaled`: times `scale`, rounded to the table's type.
struct Reader {
  Reader() = default;
  Reader(const RowTable& table, bool scaled, double scale);

  DType dtype = DType::kF32;
  int64_t step = 0;
  bool dense_elements = true;
  bool scaled = false;
  double scale = 1.0;

  bool as_is() const { return dense_elements && !scaled; }

  // Elements first .. first + count of a row in the type `to`: where they stand if that can be, else in `buffer`.
  const void* read(const char* row, int64_t first, int64_t count, DType to, void* buffer) const;

  // The same, always written to `out`, which may be the row's own memory where nothing is gathered.
  void load(const char* row, int64_t first, int64_t count, DType to, void* out) const;
};

class Writer {
 public:
  Writer(DType dtype, Store store) : dtype_(dtype), size_(size_of(dtype)), store_(store) {}

  // count elements of one row (or of neighbouring rows, where both sides are dense). `ahead`: the row that is read
  // soon after, or null.
  void copy(char* to, const char* from, int64_t count, const Reader& reader, const char* ahead = nullptr) const;

  // The sum of two rows in fp64, if `wide`, else in fp32, rounded once.
  void sum(char* to, const char* text, const Reader& text_reader, const char* feature, const Reader& feature_reader,
           int64_t count, bool wide) const;

  // The sum of `rows` rows in order, row(i) being the i-th, in fp64 where either side is, else in fp32; times `scale`
  // rounded to the output's type, if `scaled`; added to what is there, if `accumulate`; rounded once.
  template <class Row>
  void total(char* to, int64_t dim, const Reader& reader, int64_t rows, Row&& row, bool scaled, double scale,
             bool accumulate) const;

  void zero(char* to, int64_t count) const { zero_bytes(to, count * size_, store_); }
  void finish() const { finish_stores(store_); }

 private:
  template <class Wide>
  void sum_in(char* to, const char* text, const Reader& text_reader, const char* feature, const Reader& feature_reader,
              int64_t count) const;
  template <class Wide, class Row>
  void total_in(char* to, int64_t dim, const Reader& reader, int64_t rows, Row&& row, bool scaled, double scale,
                bool accumulate) const;
  int64_t first_block(const char* to, int64_t count) const;
  void put(char* to, const void* values, DType from, int64_t count, void* buffer) const;
  void sum_alike(char* to, const char* text, const char* feature, int64_t count) const;

  DType dtype_;
  int64_t size_;
  Store store_;
};

template <class Wide, class Row>
void Writer::total_in(char* to, int64_t dim, const Reader& reader, int64_t rows, Row&& row, bool scaled, double scale,
                      bool accumulate) const {
  constexpr DType wide = kWide<Wide>;
  Block sum, more;
  int64_t n = first_block(to, dim);
  for (int64_t i = 0; i < dim; i += n, n = std::min(dim - i, kElementBlock)) {
    reader.load(row(0), i, n, wide, sum.bytes);
    for (int64_t r = 1; r < rows; ++r) {
      const void* next = reader.read(row(r), i, n, wide, more.bytes);
      add(reinterpret_cast<Wide*>(sum.bytes), static_cast<const Wide*>(next), n);
    }
    if (scaled) vlm_fuse::scale(reinterpret_cast<Wide*>(sum.bytes), static_cast<Wide>(round_to(dtype_, scale)), n);
    if (accumulate) {
      converter(dtype_, wide)(more.bytes, to + i * size_, n);
      add(reinterpret_cast<Wide*>(sum.bytes), reinterpret_cast<const Wide*>(more.bytes), n);
    }
    put(to + i * size_, sum.bytes, wide, n, more.bytes);
  }
}

template <class Row>
void Writer::total(char* to, int64_t dim, const Reader& reader, int64_t rows, Row&& row, bool scaled, double scale,
                   bool accumulate) const {
  if (reader.dtype == DType::kF64 || dtype_ == DType::kF64)
    total_in<double>(to, dim, reader, rows, row, scaled, scale, accumulate);
  else
    total_in<float>(to, dim, reader, rows, row, scaled, scale, accumulate);
}

}  // namespace vlm_fuse
