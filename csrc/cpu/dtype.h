// Element types of rows.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../rows.h"

namespace vlm_fuse {

enum class DType : int32_t { kF32 = 0, kBF16 = 1, kF16 = 2, kF64 = 3 };
constexpr int kDTypes = 4;

VLM_FUSE_HD int64_t size_of(DType dtype) { return dtype == DType::kF64 ? 8 : (dtype == DType::kF32 ? 4 : 2); }

// The nearest number of the type; as conversions, through fp32.
inline double round_to(DType dtype, double value) {
  if (dtype == DType::kF64) return value;
  const float single = static_cast<float>(value);
  if (dtype == DType::kBF16) return widen(narrow<bf16>(single));
  if (dtype == DType::kF16) return widen(narrow<f16>(single));
  return single;
}

}  // namespace vlm_fuse
