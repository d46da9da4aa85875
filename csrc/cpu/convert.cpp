#include "convert.h"

#include <cstring>

#if (defined(__x86_64__) || defined(_M_X64)) && defined(__GNUC__)
#include <cpuid.h>
#include <immintrin.h>
#define VLM_FUSE_X86 1
#define VLM_FUSE_AVX2 __attribute__((target("avx2,f16c")))
#endif

namespace vlm_fuse {
namespace {

constexpr int64_t kBlock = 256;  // elements of fp32 that stay in the first-level cache between two steps

template <class To, class From>
inline __attribute__((always_inline)) void loop(void* to, const void* from, int64_t count) {
  To* __restrict t = static_cast<To*>(to);
  const From* __restrict f = static_cast<const From*>(from);
  for (int64_t i = 0; i < count; ++i) t[i] = convert<To>(f[i]);
}

// fp64 is computed in itself, everything else in fp32.
template <class Value>
inline float wide(Value value) {
  return widen(value);
}
inline double wide(double value) { return value; }

template <class To, class From>
inline __attribute__((always_inline)) void scale_loop(void* to, const void* from, double by, int64_t count) {
  To* __restrict t = static_cast<To*>(to);
  const From* __restrict f = static_cast<const From*>(from);
  const auto factor = static_cast<decltype(wide(From{}))>(by);
  for (int64_t i = 0; i < count; ++i) t[i] = convert<To>(convert<From>(wide(f[i]) * factor));
}

template <class Value>
inline __attribute__((always_inline)) void sum_loop(void* to, const void* a, const void* b, int64_t count) {
  Value* __restrict t = static_cast<Value*>(to);
  const Value* __restrict x = static_cast<const Value*>(a);
  const Value* __restrict y = static_cast<const Value*>(b);
  for (int64_t i = 0; i < count; ++i) t[i] = convert<Value>(wide(x[i]) + wide(y[i]));
}

template <class To, class From>
void plain_scale(void* to, const void* from, double by, int64_t count) {
  scale_loop<To, From>(to, from, by, count);
}

template <class Value>
void plain_sum(void* to, const void* a, const void* b, int64_t count) {
  sum_loop<Value>(to, a, b, count);
}

template <class To, class From>
void plain(void* to, const void* from, int64_t count) {
  loop<To, From>(to, from, count);
}

template <class Same>
void copy(void* to, const void* from, int64_t count) {
  std::memcpy(to, from, static_cast<size_t>(count) * sizeof(Same));
}

constexpr Scale kPlainScale[kDTypes][kDTypes] = {
    {plain_scale<float, float>, plain_scale<bf16, float>, plain_scale<f16, float>, plain_scale<double, float>},
    {plain_scale<float, bf16>, plain_scale<bf16, bf16>, plain_scale<f16, bf16>, plain_scale<double, bf16>},
    {plain_scale<float, f16>, plain_scale<bf16, f16>, plain_scale<f16, f16>, plain_scale<double, f16>},
    {plain_scale<float, double>, plain_scale<bf16, double>, plain_scale<f16, double>, plain_scale<double, double>},
};

constexpr Sum kPlainSum[kDTypes] = {plain_sum<float>, plain_sum<bf16>, plain_sum<f16>, plain_sum<double>};

constexpr Convert kPlain[kDTypes][kDTypes] = {
    {copy<float>, plain<bf16, float>, plain<f16, float>, plain<double, float>},
    {plain<float, bf16>, copy<bf16>, plain<f16, bf16>, plain<double, bf16>},
    {plain<float, f16>, plain<bf16, f16>, copy<f16>, plain<double, f16>},
    {plain<float, double>, plain<bf16, double>, plain<f16, double>, copy<double>},
};

#ifdef VLM_FUSE_X86

template <class To, class From>
VLM_FUSE_AVX2 void avx2(void* to, const void* from, int64_t count) {
  loop<To, From>(to, from, count);
}

VLM_FUSE_AVX2 void halves_to_floats(float* to, const f16* from, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  }
  for (; i < count; ++i) to[i] = widen(from[i]);
}

VLM_FUSE_AVX2 void floats_to_halves(f16* to, const float* from, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), halves);
  }
  for (; i < count; ++i) to[i] = narrow<f16>(from[i]);
}

template <>
VLM_FUSE_AVX2 void avx2<float, f16>(void* to, const void* from, int64_t count) {
  halves_to_floats(static_cast<float*>(to), static_cast<const f16*>(from), count);
}

template <>
VLM_FUSE_AVX2 void avx2<f16, float>(void* to, const void* from, int64_t count) {
  floats_to_halves(static_cast<f16*>(to), static_cast<const float*>(from), count);
}

// The other pairs with a half go through a block of floats.
template <class To>
VLM_FUSE_AVX2 void from_half(void* to, const void* from, int64_t count) {
  float block[kBlock];
  for (int64_t i = 0; i < count; i += kBlock) {
    const int64_t n = count - i < kBlock ? count - i : kBlock;
    halves_to_floats(block, static_cast<const f16*>(from) + i, n);
    loop<To, float>(static_cast<To*>(to) + i, block, n);
  }
}

template <class From>
VLM_FUSE_AVX2 void to_half(void* to, const void* from, int64_t count) {
  float block[kBlock];
  for (int64_t i = 0; i < count; i += kBlock) {
    const int64_t n = count - i < kBlock ? count - i : kBlock;
    loop<float, From>(block, static_cast<const From*>(from) + i, n);
    floats_to_halves(static_cast<f16*>(to) + i, block, n);
  }
}

constexpr Convert kAvx2[kDTypes][kDTypes] = {
    {copy<float>, avx2<bf16, float>, avx2<f16, float>, avx2<double, float>},
    {avx2<float, bf16>, copy<bf16>, to_half<bf16>, avx2<double, bf16>},
    {avx2<float, f16>, from_half<bf16>, copy<f16>, from_half<double>},
    {avx2<float, double>, avx2<bf16, double>, to_half<double>, copy<double>},
};

template <class To, class From>
VLM_FUSE_AVX2 void avx2_scale(void* to, const void* from, double by, int64_t count) {
  scale_loop<To, From>(to, from, by, count);
}

template <class Value>
VLM_FUSE_AVX2 void avx2_sum(void* to, const void* a, const void* b, int64_t count) {
  sum_loop<Value>(to, a, b, count);
}

constexpr Scale kAvx2Scale[kDTypes][kDTypes] = {
    {avx2_scale<float, float>, avx2_scale<bf16, float>, avx2_scale<f16, float>, avx2_scale<double, float>},
    {avx2_scale<float, bf16>, avx2_scale<bf16, bf16>, avx2_scale<f16, bf16>, avx2_scale<double, bf16>},
    {avx2_scale<float, f16>, avx2_scale<bf16, f16>, avx2_scale<f16, f16>, avx2_scale<double, f16>},
    {avx2_scale<float, double>, avx2_scale<bf16, double>, avx2_scale<f16, double>, avx2_scale<double, double>},
};

constexpr Sum kAvx2Sum[kDTypes] = {avx2_sum<float>, avx2_sum<bf16>, avx2_sum<f16>, avx2_sum<double>};

bool has_avx2() {
  static const bool has = [] {
    __builtin_cpu_init();
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;  // clang's builtin does not know f16c by name
    const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
    return f16c && __builtin_cpu_supports("avx2") != 0;
  }();
  return has;
}

#endif

template <class Element>
void gather_elements(void* to, const char* from, int64_t step, int64_t count) {
  for (int64_t i = 0; i < count; ++i) std::memcpy(static_cast<Element*>(to) + i, from + i * step, sizeof(Element));
}

}  // namespace

Convert converter(DType from, DType to) {
  const int f = static_cast<int>(from), t = static_cast<int>(to);
#ifdef VLM_FUSE_X86
  if (has_avx2()) return kAvx2[f][t];
#endif
  return kPlain[f][t];
}

Scale scaler(DType from, DType to) {
  const int f = static_cast<int>(from), t = static_cast<int>(to);
#ifdef VLM_FUSE_X86
  if (has_avx2()) return kAvx2Scale[f][t];
#endif
  return kPlainScale[f][t];
}

Sum adder(DType dtype) {
#ifdef VLM_FUSE_X86
  if (has_avx2()) return kAvx2Sum[static_cast<int>(dtype)];
#endif
  return kPlainSum[static_cast<int>(dtype)];
}

void gather(void* to, const char* from, int64_t step, int64_t count, DType dtype) {
  switch (size_of(dtype)) {
    case 2:
      return gather_elements<uint16_t>(to, from, step, count);
    case 4:
      return gather_elements<uint32_t>(to, from, step, count);
    default:
      return gather_elements<uint64_t>(to, from, step, count);
  }
}

void add(float* __restrict to, const float* __restrict from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] += from[i];
}

void add(double* __restrict to, const double* __restrict from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] += from[i];
}

void scale(float* values, float by, int64_t count) {
  for (int64_t i = 0; i < count; ++i) values[i] *= by;
}

void scale(double* values, double by, int64_t count) {
  for (int64_t i = 0; i < count; ++i) values[i] *= by;
}

}  // namespace vlm_fuse
