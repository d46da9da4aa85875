// What one output row is: which text row and which feature row it is made of, and how an element is converted.
// Shared by host and device code: no torch, no Python, no allocation.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__) || defined(__HIPCC__)
#define VLM_FUSE_HD __host__ __device__ inline
#else
#define VLM_FUSE_HD inline
#endif

namespace vlm_fuse {

// source_index of a row without a source.
constexpr int32_t kPad = INT32_MIN;

struct bf16 {
  uint16_t bits;
};

struct f16 {
  uint16_t bits;
};

VLM_FUSE_HD uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

VLM_FUSE_HD float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// Conversions go through fp32, as torch's do (fp64 -> fp16 rounds twice); round to nearest even, denormals kept.
// Written with selects instead of branches, so that loops over them vectorise.
VLM_FUSE_HD float widen(float value) { return value; }
VLM_FUSE_HD float widen(double value) { return static_cast<float>(value); }
VLM_FUSE_HD float widen(bf16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }
VLM_FUSE_HD float widen(f16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t shifted = static_cast<uint32_t>(value.bits & 0x7fffu) << 13;
  const uint32_t exponent = shifted & 0x0f800000u;
  const uint32_t normal = shifted + 0x38000000u;
  const uint32_t special = shifted + 0x70000000u;  // infinity and NaN
  // A denormal half is a multiple of 2^-24: put it below 2^-14's exponent and subtract that.
  const uint32_t denormal = bits_of(float_of(shifted + 0x38800000u) - float_of(0x38800000u));
  const uint32_t magnitude = exponent == 0x0f800000u ? special : (exponent == 0 ? denormal : normal);
  return float_of(magnitude | sign);
}

template <class To>
VLM_FUSE_HD To narrow(float value);

template <>
VLM_FUSE_HD float narrow<float>(float value) {
  return value;
}

template <>
VLM_FUSE_HD double narrow<double>(float value) {
  return static_cast<double>(value);
}

template <>
VLM_FUSE_HD bf16 narrow<bf16>(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return bf16{static_cast<uint16_t>(nan ? 0x7fc0u : rounded)};
}

template <>
VLM_FUSE_HD f16 narrow<f16>(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 0.5 leaves exactly the bits of a denormal half at the end of the mantissa, rounded by the addition.
  const uint32_t denormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t special = magnitude > 0x7f800000u ? (0x7e00u | ((magnitude >> 13) & 0x3ffu)) : 0x7c00u;
  const uint32_t half = magnitude >= 0x47800000u ? special : (magnitude < 0x38800000u ? denormal : normal);
  return f16{static_cast<uint16_t>(half | sign)};
}

template <class To, class From>
struct Conversion {
  VLM_FUSE_HD static To of(From value) { return narrow<To>(widen(value)); }
};

template <class Same>
struct Conversion<Same, Same> {
  VLM_FUSE_HD static Same of(Same value) { return value; }
};

template <class To, class From>
VLM_FUSE_HD To convert(From value) {
  return Conversion<To, From>::of(value);
}

// The rows that one output row is made of; -1: none. Both: their sum. Neither: zeros.
struct RowSources {
  int64_t text;     // token j of the flattened text
  int64_t feature;  // feature row k
};

// `text_index` may be null: with `add` a row then stands for the text row of its own number (add_features).
VLM_FUSE_HD RowSources row_sources(int64_t row, const int32_t* source_index, const int32_t* text_index, bool add) {
  const int32_t source = source_index[row];
  if (source >= 0) return {add ? (text_index ? static_cast<int64_t>(text_index[row]) : row) : -1, source};
  if (add && !text_index) return {row, -1};
  return {source == kPad ? -1 : -1 - static_cast<int64_t>(source), -1};
}

}  // namespace vlm_fuse
