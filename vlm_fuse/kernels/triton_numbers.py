"""Conversions between the four floating-point types, to the bit those of ``Tensor.to``."""

import triton
import triton.language as tl

from .triton_launch import INTERPRETED


@triton.jit
def to_float32(x):
    """Exact for bf16 and fp16, rounded to nearest even for fp64."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        # the interpreter's own conversion loses denormals and NaN
        y = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        y = x.to(tl.float32)
    return y


@triton.jit
def _float32_to(x, DTYPE: tl.constexpr):
    if INTERPRETED and DTYPE == tl.bfloat16:
        # the interpreter truncates: round to nearest even in integers
        bits = x.to(tl.uint32, bitcast=True).to(tl.int64)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded)
        y = rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        y = x.to(DTYPE)
    return y


@triton.jit
def convert(x, DTYPE: tl.constexpr):
    """x as DTYPE; what is not fp64 on both sides goes through fp32, as torch does."""
    if x.dtype == DTYPE:
        y = x
    else:
        if x.dtype == tl.float64:
            y = _float32_to(x.to(tl.float32), DTYPE)
        else:
            y = _float32_to(to_float32(x), DTYPE)
    return y
