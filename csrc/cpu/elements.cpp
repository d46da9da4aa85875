#include "elements.h"

namespace vlm_fuse {

Reader::Reader(const RowTable& table, bool scaled_, double scale_)
    : dtype(table.dtype),
      step(table.step),
      dense_elements(table.step == size_of(table.dtype)),
      scaled(scaled_),
      scale(round_to(table.dtype, scale_)) {}

void Reader::load(const char* row, int64_t first, int64_t count, DType to, void* out) const {
  Block gathered;
  const void* values = row + first * step;
  if (!dense_elements) {
    gather(gathered.bytes, row + first * step, step, count, dtype);
    values = gathered.bytes;
  }
  if (scaled)
    scaler(dtype, to)(out, values, scale, count);
  else
    converter(dtype, to)(out, values, count);
}

const void* Reader::read(const char* row, int64_t first, int64_t count, DType to, void* buffer) const {
  if (as_is() && dtype == to) return row + first * step;
  load(row, first, count, to, buffer);
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
  if (reader.as_is() && reader.dtype == dtype_) return copy_bytes(to, from, count * size_, store_, ahead);
  if (reader.as_is() && store_ == Store::kOrdinary && ahead == nullptr)
    return converter(reader.dtype, dtype_)(to, from, count);
  Block block;
  int64_t n = first_block(to, count);
  for (int64_t i = 0; i < count; i += n, n = std::min(count - i, kElementBlock)) {
    if (ahead != nullptr) prefetch(ahead + i * reader.step, n * reader.step);
    if (store_ == Store::kOrdinary) {
      reader.load(from, i, n, dtype_, to + i * size_);
    } else {
      reader.load(from, i, n, dtype_, block.bytes);
      copy_bytes(to + i * size_, block.bytes, n * size_, store_);
    }
  }
}

template <class Wide>
void Writer::sum_in(char* to, const char* text, const Reader& text_reader, const char* feature,
                    const Reader& feature_reader, int64_t count) const {
  constexpr DType wide = kWide<Wide>;
  Block total, more;
  int64_t n = first_block(to, count);
  for (int64_t i = 0; i < count; i += n, n = std::min(count - i, kElementBlock)) {
    text_reader.load(text, i, n, wide, total.bytes);
    const void* values = feature_reader.read(feature, i, n, wide, more.bytes);
    add(reinterpret_cast<Wide*>(total.bytes), static_cast<const Wide*>(values), n);
    put(to + i * size_, total.bytes, wide, n, more.bytes);
  }
}

// Both rows of the output's type, as they stand: the common case, in one step a block.
void Writer::sum_alike(char* to, const char* text, const char* feature, int64_t count) const {
  const Sum add_up = adder(dtype_);
  if (store_ == Store::kOrdinary && to != text) return add_up(to, text, feature, count);
  Block block;
  int64_t n = first_block(to, count);
  for (int64_t i = 0; i < count; i += n, n = std::min(count - i, kElementBlock)) {
    add_up(block.bytes, text + i * size_, feature + i * size_, n);
    copy_bytes(to + i * size_, block.bytes, n * size_, store_);
  }
}

void Writer::sum(char* to, const char* text, const Reader& text_reader, const char* feature,
                 const Reader& feature_reader, int64_t count, bool wide) const {
  // fp64 would round to the same: it has more than twice the digits of any narrower type
  const bool alike = text_reader.as_is() && feature_reader.as_is() && text_reader.dtype == feature_reader.dtype;
  if (alike && text_reader.dtype == dtype_) return sum_alike(to, text, feature, count);
  if (wide)
    sum_in<double>(to, text, text_reader, feature, feature_reader, count);
  else
    sum_in<float>(to, text, text_reader, feature, feature_reader, count);
}

}  // namespace vlm_fuse
