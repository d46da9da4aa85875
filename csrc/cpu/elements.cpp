#include "elements.h"

namespace vlm_fuse {
namespace {

constexpr int64_t kAheadBytes = 1024;  // more at once would fill the processor's list of pending lines

// values * by, rounded to the type that `by` has been rounded to already.
template <class Wide>
void scale_rounded(void* values, DType dtype, double by, int64_t count) {
  if (dtype == kWide<Wide>) return scale(static_cast<Wide*>(values), static_cast<Wide>(by), count);
  Block wide;
  converter(dtype, kWide<Wide>)(wide.bytes, values, count);
  scale(reinterpret_cast<Wide*>(wide.bytes), static_cast<Wide>(by), count);
  converter(kWide<Wide>, dtype)(values, wide.bytes, count);
}

}  // namespace

double round_to(DType dtype, double value) {
  if (dtype == DType::kF64) return value;
  const float single = static_cast<float>(value);
  if (dtype == DType::kBF16) return widen(narrow<bf16>(single));
  if (dtype == DType::kF16) return widen(narrow<f16>(single));
  return single;
}

Reader::Reader(const RowTable& table, bool scaled_, double scale_)
    : dtype(table.dtype),
      step(table.step),
      dense_elements(table.step == size_of(table.dtype)),
      scaled(scaled_),
      scale(round_to(table.dtype, scale_)) {}

const void* Reader::read(const char* row, int64_t first, int64_t count, void* buffer) const {
  if (dense_elements && !scaled) return row + first * step;
  gather(buffer, row + first * step, step, count, dtype);
  if (scaled && dtype == DType::kF64) scale_rounded<double>(buffer, dtype, scale, count);
  else if (scaled) scale_rounded<float>(buffer, dtype, scale, count);
  return buffer;
}

// Elements up to the next cache line, so that the blocks behind them are whole lines.
int64_t Writer::first_block(const char* to, int64_t count) const {
  const int64_t ahead = static_cast<int64_t>(reinterpret_cast<uintptr_t>(to) & 63) / size_;
  return std::min(count, kElementBlock - ahead);
}

void Writer::put(char* to, const void* values, DType from, int64_t count, void* buffer) const {
  const Convert convert = converter(from, dtype_);
  if (store_ == Store::kOrdinary) return convert(to, values, count);
  convert(buffer, values, count);
  copy_bytes(to, static_cast<const char*>(buffer), count * size_, store_);
}

void Writer::copy(char* to, const char* from, int64_t count, const Reader& reader, const char* ahead) const {
  const bool as_is = reader.dense_elements && !reader.scaled;
  if (as_is && reader.dtype == dtype_) return copy_bytes(to, from, count * size_, store_, ahead);
  if (ahead != nullptr) prefetch(ahead, std::min<int64_t>(count * reader.step, kAheadBytes));
  if (as_is && store_ == Store::kOrdinary) return converter(reader.dtype, dtype_)(to, from, count);
  Block source, target;
  int64_t n = first_block(to, count);
  for (int64_t i = 0; i < count; i += n, n = std::min(count - i, kElementBlock)) {
    const void* values = reader.read(from, i, n, source.bytes);
    put(to + i * size_, values, reader.dtype, n, target.bytes);
  }
}

template <class Wide>
void Writer::sum_in(char* to, const char* text, const Reader& text_reader, const char* feature, const Reader& feature_reader,
                    int64_t count) const {
  const Convert widen_text = converter(text_reader.dtype, kWide<Wide>);
  const Convert widen_feature = converter(feature_reader.dtype, kWide<Wide>);
  Block raw, total, more;
  int64_t n = first_block(to, count);
  for (int64_t i = 0; i < count; i += n, n = std::min(count - i, kElementBlock)) {
    widen_text(total.bytes, text_reader.read(text, i, n, raw.bytes), n);
    widen_feature(more.bytes, feature_reader.read(feature, i, n, raw.bytes), n);
    add(reinterpret_cast<Wide*>(total.bytes), reinterpret_cast<const Wide*>(more.bytes), n);
    put(to + i * size_, total.bytes, kWide<Wide>, n, more.bytes);
  }
}

void Writer::sum(char* to, const char* text, const Reader& text_reader, const char* feature, const Reader& feature_reader,
                 int64_t count) const {
  const bool wide = text_reader.dtype == DType::kF64 || feature_reader.dtype == DType::kF64;
  if (wide) sum_in<double>(to, text, text_reader, feature, feature_reader, count);
  else sum_in<float>(to, text, text_reader, feature, feature_reader, count);
}

}  // namespace vlm_fuse
