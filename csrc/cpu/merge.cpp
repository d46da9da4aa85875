#include "merge.h"

#include "elements.h"
#include "threads.h"

namespace vlm_fuse {
namespace {

// The rows of one part of the output, written by one thread.
class RowWriter {
 public:
  RowWriter(const Merge& merge, Store store)
      : merge_(merge),
        writer_(merge.out.dtype, store),
        text_reader_(merge.text, merge.scaled, merge.scale),
        dense_out_(merge.out.dense(merge.dim)),
        dense_text_(merge.text.dense(merge.dim) && !merge.tokens && !merge.scaled),
        wide_sums_(merge.has_doubles()) {
    if (!merge.features.all().empty()) use(merge.features.all()[0].table);
  }

  void write(int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end;) row += write_some(row, end);
    writer_.finish();
  }

 private:
  // Writes the row, and those behind it that go on in the same source. Returns how many.
  int64_t write_some(int64_t row, int64_t end) {
    const RowSources sources = row_sources(row, merge_.source_index, merge_.text_index, merge_.add);
    if (merge_.only_features && sources.feature < 0) return 1;
    if (sources.feature < 0) {
      const char* text = text_row(sources.text);
      if (text == nullptr) return write_zeros(row, end);
      if (!dense_text_) {
        writer_.copy(merge_.out.row(row), text, merge_.dim, text_reader_, ahead(row + kAhead, end));
        return 1;
      }
      const int64_t most = std::min(end - row, merge_.text.together(sources.text));
      return write_rows(row, run(row, most, merge_.add && merge_.text_index == nullptr ? 0 : -1), text, text_reader_);
    }
    const FeatureTable* entry = merge_.features.find(sources.feature, hint_);
    const char* text = text_row(sources.text);
    if (entry == nullptr) {
      if (text == nullptr)
        writer_.zero(merge_.out.row(row), merge_.dim);
      else
        writer_.copy(merge_.out.row(row), text, merge_.dim, text_reader_);
      return 1;
    }
    const int64_t local = sources.feature - entry->first;
    const char* feature = entry->table.row(local);
    if (&entry->table != current_) use(entry->table);
    if (text != nullptr) {
      writer_.sum(merge_.out.row(row), text, text_reader_, feature, feature_reader_, merge_.dim, wide_sums_);
      return 1;
    }
    if (merge_.add || !dense_feature_) return write_rows(row, 1, feature, feature_reader_);
    const int64_t most = std::min(end - row, entry->table.together(local));
    return write_rows(row, run(row, most, 1), feature, feature_reader_);
  }

  // Rows from `row` on whose source_index goes on by `step`; 0: they are the rows of their own number.
  int64_t run(int64_t row, int64_t most, int32_t step) const {
    const int32_t* source = merge_.source_index + row;
    int64_t count = 1;
    if (step == 0) {
      while (count < most && source[count] < 0) ++count;
    } else {
      int32_t next = source[0] + step;
      while (count < most && source[count] == next) ++count, next += step;
    }
    return count;
  }

  int64_t write_rows(int64_t row, int64_t count, const char* from, const Reader& reader) {
    count = std::min(count, merge_.out.together(row));
    if (count == 1 || !dense_out_) {
      for (int64_t i = 0; i < count; ++i) {
        writer_.copy(merge_.out.row(row + i), from + i * merge_.dim * size_of(reader.dtype), merge_.dim, reader);
      }
    } else {
      writer_.copy(merge_.out.row(row), from, count * merge_.dim, reader);
    }
    return count;
  }

  int64_t write_zeros(int64_t row, int64_t end) {
    int64_t count = 1;
    if (dense_out_ && merge_.source_index[row] == kPad) {
      const int64_t most = std::min(end - row, merge_.out.together(row));
      while (count < most && merge_.source_index[row + count] == kPad) ++count;
    }
    writer_.zero(merge_.out.row(row), count * merge_.dim);
    return count;
  }

  const char* text_row(int64_t token) const {
    if (merge_.tokens) {
      if (token < 0 || token >= merge_.token_count) return nullptr;
      token = merge_.tokens[token];
    }
    return token >= 0 && token < merge_.text.rows ? merge_.text.row(token) : nullptr;
  }

  // Where the row that comes a little later is read, or null. Rows of an embedding table are far apart: the processor
  // does not guess the next one by itself.
  const char* ahead(int64_t row, int64_t end) const {
    if (row >= end) return nullptr;
    const int64_t token = row_sources(row, merge_.source_index, merge_.text_index, merge_.add).text;
    return token < 0 ? nullptr : text_row(token);
  }

  void use(const RowTable& table) {
    current_ = &table;
    feature_reader_ = Reader(table, false, 1.0);
    dense_feature_ = table.dense(merge_.dim);
  }

  static constexpr int64_t kAhead = 2;

  const Merge& merge_;
  Writer writer_;
  Reader text_reader_;
  Reader feature_reader_;
  bool dense_out_;
  bool dense_text_;
  bool wide_sums_;
  bool dense_feature_ = false;
  const RowTable* current_ = nullptr;
  size_t hint_ = 0;
};

}  // namespace

Record check_tokens(const Merge& merge) {
  if (!merge.tokens) return {};
  for (int64_t row = 0; row < merge.out.rows; ++row) {
    const int64_t token = row_sources(row, merge.source_index, merge.text_index, merge.add).text;
    if (token < 0 || token >= merge.token_count) continue;
    const int64_t id = merge.tokens[token];
    if (id < 0 || id >= merge.text.rows) return {kOutsideVocabulary, token, 0, 0, 0, 0, merge.text.rows, id};
  }
  return {};
}

void merge_rows(const Merge& merge) {
  const int64_t row_bytes = merge.dim * size_of(merge.out.dtype);
  if (merge.out.rows == 0 || row_bytes == 0) return;
  const int64_t bytes = merge.out.rows * row_bytes;
  const Store store =
      prepare(merge.out.data, merge.only_features ? std::min(bytes, merge.features.rows() * row_bytes) : bytes);
  auto write = [&](int64_t begin, int64_t end) { RowWriter(merge, store).write(begin, end); };
  if (!merge.only_features) return parallel_parts(merge.out.rows, row_bytes, write);
  // Feature rows may all stand in one part.
  const int64_t each = std::max<int64_t>(1, kGrainBytes / row_bytes);
  parallel_blocks((merge.out.rows + each - 1) / each,
                  [&](int64_t block) { write(block * each, std::min((block + 1) * each, merge.out.rows)); });
}

}  // namespace vlm_fuse
