// The elements of rows, moved by one warp: as bytes where nothing is computed, else widened eight at a time, scaled or
// added, and narrowed.
#pragma once

#include "../cpu/table.h"
#include "device.cuh"

namespace vlm_fuse::cuda {

// --- bytes -----------------------------------------------------------------------------------------------------------

// Loads that a lane has under way before it stores the first.
constexpr unsigned kInFlight = 4;

template <class Unit>
__device__ inline Unit load_unit(const Unit* from) {
  return *from;
}
template <>
__device__ inline uint4 load_unit<uint4>(const uint4* from) {
  return load_once(from);
}

template <class Unit>
__device__ void copy_units(char* to, const char* from, unsigned count) {
  const Unit* source = reinterpret_cast<const Unit*>(from) + lane();
  Unit* target = reinterpret_cast<Unit*>(to) + lane();
  Unit held[kInFlight];
  unsigned i = lane();
#pragma unroll 1
  for (; i + (kInFlight - 1) * kLanes < count; i += kInFlight * kLanes) {
#pragma unroll
    for (unsigned u = 0; u < kInFlight; ++u) held[u] = load_unit(source + u * kLanes);
#pragma unroll
    for (unsigned u = 0; u < kInFlight; ++u) target[u * kLanes] = held[u];
    source += kInFlight * kLanes;
    target += kInFlight * kLanes;
  }
  // what is left: fewer than kInFlight units a lane, again all under way at once
#pragma unroll
  for (unsigned u = 0; u < kInFlight - 1; ++u) {
    if (i + u * kLanes < count) held[u] = load_unit(source + u * kLanes);
  }
#pragma unroll
  for (unsigned u = 0; u < kInFlight - 1; ++u) {
    if (i + u * kLanes < count) target[u * kLanes] = held[u];
  }
}

template <class Unit>
__device__ void zero_units(char* to, unsigned count) {
#pragma unroll 1
  for (unsigned i = lane(); i < count; i += kLanes) reinterpret_cast<Unit*>(to)[i] = Unit{};
}

// The largest power of two, up to 16, that divides all of these.
__device__ inline unsigned alignment(uint64_t a, uint64_t b, uint64_t c) {
  const unsigned low = static_cast<unsigned>(a | b | c) | 16u;
  return low & (0u - low);
}

// One row of `bytes`, in the widest units that both sides stand at. Without `from`: zeros.
__device__ inline void copy_bytes(char* to, const char* from, unsigned bytes) {
  switch (alignment(reinterpret_cast<uint64_t>(to), reinterpret_cast<uint64_t>(from), bytes)) {
    case 16:
      return from == nullptr ? zero_units<uint4>(to, bytes / 16) : copy_units<uint4>(to, from, bytes / 16);
    case 8:
      return from == nullptr ? zero_units<uint2>(to, bytes / 8) : copy_units<uint2>(to, from, bytes / 8);
    case 4:
      return from == nullptr ? zero_units<uint32_t>(to, bytes / 4) : copy_units<uint32_t>(to, from, bytes / 4);
    case 2:
      return from == nullptr ? zero_units<uint16_t>(to, bytes / 2) : copy_units<uint16_t>(to, from, bytes / 2);
    default:
      return from == nullptr ? zero_units<uint8_t>(to, bytes) : copy_units<uint8_t>(to, from, bytes);
  }
}

// --- numbers ---------------------------------------------------------------------------------------------------------

constexpr unsigned kPack = 8;  // elements that a lane takes at a time

// fp64 is computed in itself, everything else in fp32, as on the CPU.
template <class Wide, class Value>
__device__ Wide wide(Value value) {
  return static_cast<Wide>(widen(value));
}
template <>
__device__ inline double wide<double, double>(double value) {
  return value;
}

template <class Value, class Wide>
__device__ Value narrow_from(Wide value) {
  return narrow<Value>(static_cast<float>(value));
}
template <>
__device__ inline double narrow_from<double, double>(double value) {
  return value;
}

// Where a row of a table stands and what its elements are.
struct RowReader {
  DType dtype;
  int64_t step;   // bytes from one element to the next
  bool scaled;    // times `scale`, rounded to the row's type
  double scale;
};

template <class Value, class Wide>
__device__ void load_pack_as(const char* row, int64_t step, unsigned first, unsigned count, Wide* values) {
  const char* from = row + static_cast<int64_t>(first) * step;
  if (count == kPack && step == sizeof(Value) && reinterpret_cast<uint64_t>(from) % 16 == 0) {
    constexpr unsigned kUnits = kPack * sizeof(Value) / 16;
    union {
      uint4 units[kUnits];
      Value elements[kPack];
    } pack;
#pragma unroll
    for (unsigned u = 0; u < kUnits; ++u) pack.units[u] = load_once(reinterpret_cast<const uint4*>(from) + u);
#pragma unroll
    for (unsigned e = 0; e < kPack; ++e) values[e] = wide<Wide>(pack.elements[e]);
    return;
  }
#pragma unroll
  for (unsigned e = 0; e < kPack; ++e) {
    values[e] =
        e < count ? wide<Wide>(*reinterpret_cast<const Value*>(from + static_cast<int64_t>(e) * step)) : Wide(0);
  }
}

template <class Value, class Wide>
__device__ void scale_pack_as(Wide* values, Wide scale) {
#pragma unroll
  for (unsigned e = 0; e < kPack; ++e) values[e] = wide<Wide>(narrow_from<Value>(values[e] * scale));
}

template <class Value, class Wide>
__device__ void store_pack_as(char* row, unsigned first, unsigned count, const Wide* values) {
  Value* to = reinterpret_cast<Value*>(row) + first;
  if (count == kPack && reinterpret_cast<uint64_t>(to) % 16 == 0) {
    constexpr unsigned kUnits = kPack * sizeof(Value) / 16;
    union {
      uint4 units[kUnits];
      Value elements[kPack];
    } pack;
#pragma unroll
    for (unsigned e = 0; e < kPack; ++e) pack.elements[e] = narrow_from<Value>(values[e]);
#pragma unroll
    for (unsigned u = 0; u < kUnits; ++u) reinterpret_cast<uint4*>(to)[u] = pack.units[u];
    return;
  }
#pragma unroll
  for (unsigned e = 0; e < kPack; ++e) {
    if (e < count) to[e] = narrow_from<Value>(values[e]);
  }
}

// Elements first .. first + count of a row; zeros behind them.
template <class Wide>
__device__ void load_pack(const char* row, const RowReader& reader, unsigned first, unsigned count, Wide* values) {
  switch (reader.dtype) {
    case DType::kF32:
      return load_pack_as<float>(row, reader.step, first, count, values);
    case DType::kBF16:
      return load_pack_as<bf16>(row, reader.step, first, count, values);
    case DType::kF16:
      return load_pack_as<f16>(row, reader.step, first, count, values);
    default:
      return load_pack_as<double>(row, reader.step, first, count, values);
  }
}

template <class Wide>
__device__ void scale_pack(const RowReader& reader, Wide* values) {
  const Wide scale = static_cast<Wide>(reader.scale);
  switch (reader.dtype) {
    case DType::kF32:
      return scale_pack_as<float>(values, scale);
    case DType::kBF16:
      return scale_pack_as<bf16>(values, scale);
    case DType::kF16:
      return scale_pack_as<f16>(values, scale);
    default:
      return scale_pack_as<double>(values, scale);
  }
}

template <class Wide>
__device__ void store_pack(char* row, DType dtype, unsigned first, unsigned count, const Wide* values) {
  switch (dtype) {
    case DType::kF32:
      return store_pack_as<float>(row, first, count, values);
    case DType::kBF16:
      return store_pack_as<bf16>(row, first, count, values);
    case DType::kF16:
      return store_pack_as<f16>(row, first, count, values);
    default:
      return store_pack_as<double>(row, first, count, values);
  }
}

__device__ inline unsigned pack_size(unsigned first, unsigned dim) { return dim - first < kPack ? dim - first : kPack; }

}  // namespace vlm_fuse::cuda
