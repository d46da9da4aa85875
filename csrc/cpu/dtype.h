// Element types of rows.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../rows.h"

namespace vlm_fuse {

enum class DType : int32_t { kF32 = 0, kBF16 = 1, kF16 = 2, kF64 = 3 };
constexpr int kDTypes = 4;

inline int64_t size_of(DType dtype) { return dtype == DType::kF64 ? 8 : (dtype == DType::kF32 ? 4 : 2); }

}  // namespace vlm_fuse
