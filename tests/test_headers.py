"""csrc/rows.h and csrc/intervals.h, which every compiled backend shares, compiled alone; and all of csrc/cpu under sanitizers."""

from __future__ import annotations

import ctypes
import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from oracle import PAD, may_see, runs_of_keys

HERE = Path(__file__).parent
CSRC = HERE.parent / "csrc"
COMPILER = shutil.which(os.environ.get("CXX", "")) or shutil.which("g++") or shutil.which("clang++")
STRICT = ["-std=c++17", "-Wall", "-Wextra", "-Wconversion", "-Wshadow", "-Werror"]

pytestmark = [pytest.mark.skipif(COMPILER is None, reason="no C++ compiler"), pytest.mark.no_poison]


def compile_with(*arguments) -> None:
    ran = subprocess.run([COMPILER, *STRICT, *map(str, arguments)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]


@pytest.fixture(scope="module")
def headers(tmp_path_factory):
    """The headers as a library that stops at undefined behaviour."""
    library = tmp_path_factory.mktemp("headers") / "headers.so"
    compile_with("-O2", "-fPIC", "-shared", "-fsanitize=undefined", "-fsanitize-undefined-trap-on-error", f"-I{CSRC}", HERE / "headers.cpp", "-o", library)
    return ctypes.CDLL(str(library))


def pointer(tensor: torch.Tensor | None):
    return None if tensor is None else ctypes.c_void_p(tensor.data_ptr())


def all_patterns(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to the bit, any NaN equal to any."""
    width = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return bool(((a.view(width) == b.view(width)) | (a.isnan() & b.isnan())).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_number_widens_as_in_torch(headers, dtype):
    narrow = all_patterns(dtype)
    wide = torch.empty(len(narrow))
    getattr(headers, "widen_bf16" if dtype is torch.bfloat16 else "widen_f16")(pointer(narrow), pointer(wide), ctypes.c_int64(len(wide)))
    assert same_bits(wide, narrow.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_floats_narrow_as_in_torch(headers, dtype):
    """Every 16-bit number, the floats halfway between two of them and beside those, denormals, and random bits."""
    numbers = all_patterns(dtype).float()
    numbers = numbers[numbers.isfinite()].double().unique()
    halfway = ((numbers[1:] + numbers[:-1]) / 2).float()
    bits = torch.randint(-(2**31), 2**31 - 1, (1_000_000,), generator=torch.Generator().manual_seed(0)).int().view(torch.float32)
    edges = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, -0.0, 65504.0, 65519.99, 65520.0, 3.4e38, 1e-45, 2.0**-25, 2.0**-24])
    inf = torch.tensor(float("inf"))
    wide = torch.cat([numbers.float(), halfway, halfway.nextafter(inf), halfway.nextafter(-inf), bits, edges])
    narrow = torch.empty(len(wide), dtype=dtype)
    getattr(headers, "narrow_bf16" if dtype is torch.bfloat16 else "narrow_f16")(pointer(wide), pointer(narrow), ctypes.c_int64(len(wide)))
    assert same_bits(narrow, wide.to(dtype))


def test_sources_of_a_row(headers):
    source_index = torch.tensor([-1, 5, PAD, -4, 0], dtype=torch.int32)
    text_index = torch.tensor([0, 1, -1, 3, -1], dtype=torch.int32)

    def found(text_index, add):
        out = torch.empty(5, 2, dtype=torch.int64)
        headers.sources(pointer(source_index), pointer(text_index), add, pointer(out), ctypes.c_int64(5))
        return out.tolist()

    assert found(None, 0) == [[0, -1], [-1, 5], [-1, -1], [3, -1], [-1, 0]]
    assert found(text_index, 1) == [[0, -1], [1, 5], [-1, -1], [3, -1], [-1, 0]]
    assert found(None, 1) == [[0, -1], [1, 5], [2, -1], [3, -1], [4, 0]]


def random_row(rng: random.Random):
    """Document ids and image ids of one output row: a parent, a document with holes, another one behind it."""
    ids, images, image = [], [], 0
    for document in range(rng.randint(1, 3)):
        for _ in range(rng.randint(1, 8)):
            ids.append(document)
    ids = [-1 if rng.random() < 0.15 else d for d in ids]
    for d in ids:
        if rng.random() < 0.4:
            image += 1
        images.append(image if d >= 0 and image % 2 else -1)
    return ids, images


@pytest.mark.parametrize("seed", range(300))
def test_mask_rows_against_the_oracle(headers, seed):
    rng = random.Random(seed)
    ids, images = random_row(rng)
    kinds = ("causal", "causal"), ("causal", "bidirectional"), ("causal", "bidirectional_windowed"), ("full", "causal"), ("full", "bidirectional")
    kind, how = rng.choice(kinds)
    window = rng.choice((0, 0, 1, 3))
    chunk = rng.choice((0, 2, 3)) if window == 0 and how != "bidirectional_windowed" else 0
    sinks, prefix = rng.choice((0, 0, 1, 2)), rng.choice((0, 0, 2))
    parents = [-1] + [rng.randint(-1, d - 1) for d in range(1, 4)] if rng.random() < 0.3 else None
    expected = may_see(
        ids, images, kind=kind, window=window or None, sinks=sinks, chunk_size=chunk or None, images=how, prefix_lengths=prefix, parent_ids=parents
    )
    bounds = {d: (ids.index(d), len(ids) - ids[::-1].index(d)) for d in set(ids) if d >= 0}
    inside = [q for begin, end in bounds.values() for q in range(begin, end) if ids[q] < 0]
    holes = torch.tensor([[q, q + 1] for q in sorted(inside)], dtype=torch.int32).reshape(-1, 2)
    for q, d in enumerate(ids):
        if d < 0:
            continue
        begin, end = q, q + 1
        while images[q] >= 0 and begin > 0 and images[begin - 1] == images[q] and ids[begin - 1] == d:
            begin -= 1
        while images[q] >= 0 and end < len(ids) and images[end] == images[q] and ids[end] == d:
            end += 1
        image = (begin, end) if images[q] >= 0 else (0, 0)
        parent = bounds.get(parents[d], (0, 0)) if parents and parents[d] >= 0 else (0, 0)
        modes = ("causal", "bidirectional", "bidirectional_windowed")
        fields = torch.tensor([kind == "full", window, sinks, chunk, modes.index(how), q, *bounds[d], *image, prefix, *parent], dtype=torch.int32)
        keys = torch.zeros(4, dtype=torch.int32)
        fits = headers.mask_row(pointer(fields), pointer(holes), ctypes.c_int64(len(holes)), pointer(keys))
        assert bool(fits) == (runs_of_keys(expected[q]) <= 2), (q, ids, images)
        if fits:
            lo, hi, lo2, hi2 = keys.tolist()
            assert [lo <= k < hi or lo2 <= k < hi2 for k in range(len(ids))] == expected[q], (q, ids, images, fields.tolist())
            assert (lo2, hi2) == (0, 0) or lo < hi < lo2 < hi2


@pytest.mark.slow
def test_the_kernels_under_sanitizers(tmp_path):
    """sanitized.cpp runs every kernel on random and on broken batches, each tensor in a block of memory of its own size."""
    program = tmp_path / "sanitized"
    sources = sorted((CSRC / "cpu").glob("*.cpp"))
    compile_with("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", f"-I{CSRC}", *sources, HERE / "sanitized.cpp", "-o", program)
    ran = subprocess.run([program, "4000"], capture_output=True, text=True, env={"ASAN_OPTIONS": "detect_leaks=1"})
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "4000 batches" in ran.stdout
