// What tests/test_headers.py calls: the shared headers alone, behind plain C functions.
#include "intervals.h"
#include "rows.h"

using namespace vlm_fuse;

extern "C" {

void widen_bf16(const uint16_t* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = widen(bf16{from[i]});
}

void widen_f16(const uint16_t* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = widen(f16{from[i]});
}

void narrow_bf16(const float* from, uint16_t* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = convert<bf16>(from[i]).bits;
}

void narrow_f16(const float* from, uint16_t* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = convert<f16>(from[i]).bits;
}

// (text, feature) of every row, two numbers a row
void sources(const int32_t* source_index, const int32_t* text_index, int add, int64_t* out, int64_t rows) {
  for (int64_t row = 0; row < rows; ++row) {
    const RowSources found = row_sources(row, source_index, text_index, add != 0);
    out[2 * row] = found.text;
    out[2 * row + 1] = found.feature;
  }
}

// fields: full, window, sinks, chunk_size, images; row, document (2), image (2), prefix, parent (2)
int mask_row(const int32_t* fields, const int32_t* holes, int64_t hole_count, int32_t* out) {
  Attend attend;
  attend.full = fields[0] != 0;
  attend.window = fields[1];
  attend.sinks = fields[2];
  attend.chunk_size = fields[3];
  attend.images = static_cast<ImageAttention>(fields[4]);
  const QueryRow query = {fields[5], {fields[6], fields[7]}, {fields[8], fields[9]}, fields[10], {fields[11], fields[12]}};
  Interval keys[2];
  const bool fits = cut_holes(visible(attend, query), reinterpret_cast<const Interval*>(holes), hole_count, keys);
  for (int i = 0; i < 2; ++i) {
    out[2 * i] = keys[i].begin;
    out[2 * i + 1] = keys[i].end;
  }
  return fits ? 1 : 0;
}
}
