"""The Triton kernels compiled ahead of time for GPUs that are not here: access width, spills, and what counts as a new kernel.

The kernels' own launchers run on CPU tensors with launching replaced by a recorder, so that what is compiled is what would
be launched: the same arguments, constants and specialisation. That needs a process without Triton's interpreter: this file
run as a script, once for all tests, in two processes that take some of the targets each.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

triton = pytest.importorskip("triton") if __name__ != "__main__" else None

NVIDIA, AMD = ("sm_80", "sm_90", "sm_100"), ("gfx942",)
TARGETS = (*NVIDIA, *AMD)
#: of each process. The one with MAIN also looks at launches and keys, and at the cases that are compiled for one GPU.
MAIN = "sm_90"
PARTS = (("gfx942",), (MAIN,))
#: with --full
ALL_PARTS = (("sm_80", "gfx942"), (MAIN, "sm_100"))
ROW_KERNELS = ("rows_kernel", "gather_kernel", "weight_kernel")

# (name, hidden size, dtype of out or grad, of the text or its gradient, of the features or theirs, what else)
ROWS = [
    ("bf16_from_bf16", 3584, "bfloat16", "bfloat16", "bfloat16", {}),
    ("bf16_from_fp32", 2048, "bfloat16", "float32", "float32", {}),
    ("fp32_from_fp32", 4096, "float32", "float32", "float32", {}),
    ("fp32_from_bf16", 960, "float32", "bfloat16", "bfloat16", {}),
    # a hidden size of which 8 is the largest power of two
    ("narrow_rows", 72, "bfloat16", "bfloat16", "bfloat16", {}),
    ("several_tensors", 960, "bfloat16", "bfloat16", "float32", {"tensors": 3}),
    ("sum", 4096, "bfloat16", "bfloat16", "bfloat16", {"add": True}),
    ("fused_embedding", 3584, "bfloat16", "bfloat16", "float32", {"weight": True}),
]
ODD = ("odd_rows", 1023, "bfloat16", "bfloat16", "bfloat16", {})


# --- the script -------------------------------------------------------------------------------------------------------


class Recorder:
    """Launches instead of kernels: what each was called with."""

    def __init__(self):
        from triton.runtime import jit

        self.launches = []
        jit.JITFunction.run = lambda kernel, *args, grid, warmup=False, **options: self.launches.append((kernel, args, options))

    def of(self, call, *args):
        self.launches.clear()
        call(*args)
        return list(self.launches)


def specialised(launch, target):
    """(options, signature, constants, attributes) as Triton would compile the launch, and the key that it would look it up by."""
    from triton.compiler import make_backend
    from triton.runtime import jit

    kernel, args, options = launch
    backend = make_backend(target)
    if target.backend == "hip":
        options = {name: value for name, value in options.items() if name != "maxnreg"}
    bind = jit.create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialisation, given = bind(*args, **options)
    key = repr((specialisation, options))
    return kernel._pack_args(backend, dict(given, debug=False), bound, specialisation, given), key


def compiled(launch, target):
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_source

    (options, signature, constants, attributes), _ = specialised(launch, target)
    return compile_source(ASTSource(launch[0], signature, constants, attributes), target=target, options=options.__dict__)


def assembler(arch: int) -> str | None:
    from triton.backends.nvidia.compiler import get_ptxas

    try:
        return get_ptxas(arch).path
    except (RuntimeError, AttributeError):
        return None


def measured(kernel, name: str) -> dict:
    """Accesses to global memory, registers and spilled bytes of a compiled kernel."""
    if name in AMD:
        text = kernel.asm["amdgcn"]
        return {
            "loads": sorted(set(re.findall(r"(?:global|buffer|flat)_load_(\w+)", text))),
            "stores": sorted(set(re.findall(r"(?:global|buffer|flat)_store_(\w+)", text))),
            "spilled": sum(int(n) for n in re.findall(r"\.vgpr_spill_count:\s*(\d+)", text)),
            "registers": int(re.search(r"\.vgpr_count:\s*(\d+)", text).group(1)),
        }
    text, arch = kernel.asm["ptx"], int(name[3:])
    found = {
        "loads": sorted(set(re.findall(r"ld\.global[\w.:]*?\.((?:v\d\.)?b\d+)\b", text))),
        "stores": sorted(set(re.findall(r"st\.global[\w.:]*?\.((?:v\d\.)?b\d+)\b", text))),
        "spilled": None,
    }
    tool = assembler(arch)
    if tool:
        with tempfile.NamedTemporaryFile("w", suffix=".ptx") as source:
            source.write(text)
            source.flush()
            gpu = name + ("a" if arch >= 90 else "")
            said = subprocess.run([tool, "-v", f"--gpu-name={gpu}", source.name, "-o", os.devnull], capture_output=True, text=True).stderr
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
        found["spilled"] = int(spills.group(1)) + int(spills.group(2)) if spills else said
        found["registers"] = int(re.search(r"Used (\d+) registers", said).group(1)) if spills else None
    return found


def run_rows(dim, out, text, feature, options, batch=16):
    import torch

    from vlm_fuse.kernels import triton_merge

    dtype = {name: getattr(torch, name) for name in (out, text, feature)}
    tensors, weight, add = options.get("tensors", 1), options.get("weight", False), options.get("add", False)
    source = torch.zeros(batch, dtype=torch.int32)
    # apart in memory, so that they are not joined
    features = [torch.zeros(8 + batch, dim, dtype=dtype[feature])[:batch] for _ in range(tensors)]
    triton_merge.rows(
        torch.empty(batch, dim, dtype=dtype[out]),
        None if weight else torch.zeros(batch, dim, dtype=dtype[text]),
        torch.zeros(50, dim, dtype=dtype[text]) if weight else None,
        torch.zeros(batch, dtype=torch.int64) if weight else None,
        2.5 if weight else None,
        features,
        [batch * index for index in range(tensors)],
        source,
        source if add else None,
        add,
        False,
        torch.zeros(8, dtype=torch.int64) if weight else None,
    )
    if not weight:
        triton_merge.rows_backward(
            torch.zeros(batch, dim, dtype=dtype[out]), source, source if add else None, None, None,
            [batch * index for index in range(tensors)], add,
            torch.zeros(batch, dim, dtype=dtype[text]), None, [torch.zeros(8 + batch, dim, dtype=dtype[feature])[:batch] for _ in range(tensors)],
        )  # fmt: skip


def run_weight_gradient(batch=16):
    import torch

    from vlm_fuse.kernels import triton_merge

    source, ids = torch.zeros(batch, dtype=torch.int32), torch.zeros(batch, dtype=torch.int64)
    weight = torch.zeros(50, 3584, dtype=torch.bfloat16)
    try:
        triton_merge.rows_backward(torch.zeros(batch, 3584, dtype=torch.bfloat16), source, None, ids, 2.5, [0], False, None, weight, [None])
    except (IndexError, RuntimeError):
        raise AssertionError("the sort between the launches saw ids that nobody wrote") from None


def run_plan(scheme, layout, documents, samples=4, length=64, listed=True):
    """plan and every fact of a batch with two kinds."""
    import torch

    from vlm_fuse.batch import Batch
    from vlm_fuse.kernels import triton_plan

    ids = torch.zeros(samples, length, dtype=torch.int64)
    images, each = (samples, -1) if listed else (-1, -1)
    kinds = (7, 0, 4 * samples, images, each, 8, 4 * samples, 4 * samples, images, each)
    batch = Batch(
        ids,
        torch.ones(samples, length, dtype=torch.bool),
        torch.zeros(samples, length, dtype=torch.int32) if documents else None,
        ids,
        kinds,
        torch.full((2 * samples,), 4) if listed else None,
        torch.full((2, samples), 4) if listed else None,
        scheme,
        layout,
        False,
        False,
    )
    names = ("text_index", "position_ids", "document_ids", "image_ids", "kind_ids", "attention_mask", "labels", "cu_seqlens")
    triton_plan.plan(batch, length, torch.zeros(8, dtype=torch.int64))
    triton_plan.facts(batch, length, names, samples)


def run_masks(samples=2, length=700):
    import torch

    from vlm_fuse.kernels import triton_masks

    ids, status = torch.zeros(samples, length, dtype=torch.int32), torch.zeros(8, dtype=torch.int64)
    triton_masks.intervals(ids, None, (0, 0, 0, 0, 0), None, None, False, status)
    triton_masks.intervals(ids, ids, (0, 1024, 4, 0, 1), torch.zeros(samples), torch.zeros(samples, dtype=torch.int32), True, status)


def run_dense(dtype, pair=True, samples=2, rows=70, keys=900):
    """dense of a dtype, bits for uint8."""
    import torch

    from vlm_fuse.kernels import triton_dense

    bound = torch.zeros(samples, rows, dtype=torch.int32)
    parts = (bound, bound, bound if pair else None, bound if pair else None)
    if dtype == "uint8":
        triton_dense.bits(*parts, keys)
    else:
        triton_dense.dense(*parts, keys, getattr(torch, dtype))


def run_block_map(pair=True, samples=2, rows=700, keys=900, q_block=128, kv_block=128):
    import torch

    from vlm_fuse.kernels import triton_block_map

    # bounds may be a slice: where it begins is no reason for a new kernel
    bound = torch.zeros(samples + 1, rows, dtype=torch.int32)[1:]
    triton_block_map.block_map(bound, bound, bound if pair else None, bound if pair else None, keys, q_block, kv_block)


def run_positions(packed=True, seconds="float32", split=False, samples=2, length=700, grids=5):
    import torch

    from vlm_fuse.kernels import triton_positions

    types, ids = torch.zeros(samples, length, dtype=torch.int64), torch.zeros(samples, length, dtype=torch.int32)
    grid = torch.zeros(grids, 3, dtype=torch.int64)
    intervals = None if seconds is None else torch.zeros(grids, dtype=getattr(torch, seconds))
    beside = (types.bool(), ids) if packed else (types, None)
    triton_positions.mrope_position_ids(types, grid, grid, intervals, *beside, 2, grids, split, torch.zeros(8, dtype=torch.int64) if packed else None)


# batch sizes that differ in everything Triton could look at: 1, multiples of 16, odd numbers
STEPS = {
    "rows": [(run_rows, (960, "bfloat16", "bfloat16", "bfloat16", {"tensors": tensors}, batch)) for tensors in (1, 3) for batch in (1, 16, 37)],
    "keep": [(run_plan, (0, 0, False, samples, length, False)) for samples, length in ((1, 1), (16, 64), (5, 77))],
    "packed": [(run_plan, (0, 2, True, samples, length)) for samples, length in ((1, 1), (16, 64), (5, 77))],
    "expand": [(run_plan, (1, 1, False, samples, length)) for samples, length in ((2, 1), (16, 64), (5, 77))],
    "masks": [(run_masks, (samples, length)) for samples, length in ((1, 1), (16, 64), (5, 777))],
    "dense": [(run_dense, ("bfloat16", True, *sizes)) for sizes in ((1, 1, 1), (16, 64, 2**14), (5, 77, 4099))],
    "bits": [(run_dense, ("uint8", True, *sizes)) for sizes in ((1, 1, 1), (16, 64, 2**14), (5, 77, 4099))],
    "block_map": [(run_block_map, (True, *sizes)) for sizes in ((1, 1, 1, 1, 1), (16, 64, 2**14, 16, 128), (5, 77, 4099, 7, 100))],
    "positions": [(run_positions, (True, "float32", False, *sizes)) for sizes in ((1, 1, 1), (16, 64, 16), (5, 777, 37))],
}
#: packed, type of the seconds of videos, frames that stand apart
POSITIONS = {"positions": (True, "float32"), "positions_bf16": (True, "bfloat16"), "positions_float64": (False, "float64"), "positions_frames": (False, None, True)}
DENSE = ("bool", "bfloat16", "float32", "float64", "uint8")
PLANS = {"keep": (0, 0, False), "packed_documents": (0, 2, True), "expand_padded": (1, 1, False), "images_first": (2, 2, False)}


def main(wanted):
    from triton.backends.compiler import GPUTarget

    targets = {name: GPUTarget("cuda", int(name[3:]), 32) for name in NVIDIA} | {name: GPUTarget("hip", name, 64) for name in AMD}
    recorder = Recorder()
    found = {"launches": {}, "kernels": [], "keys": {}}

    def note(case, launches, names):
        seen = set()
        for launch in launches:
            for name in wanted & {*names}:
                _, key = specialised(launch, targets[name])
                if (launch[0].__name__, name, key) not in seen:
                    seen.add((launch[0].__name__, name, key))
                    facts = measured(compiled(launch, targets[name]), name)
                    found["kernels"].append({"case": case, "kernel": launch[0].__name__, "target": name, **facts})

    for case, *arguments in (*ROWS, ODD):
        note(case, [launch for launch in recorder.of(run_rows, *arguments) if launch[0].__name__ in ROW_KERNELS], TARGETS)
    note("weight_gradient", recorder.of(run_weight_gradient), TARGETS)
    for case, arguments in PLANS.items():
        launches = recorder.of(run_plan, *arguments)
        found["launches"][case] = [launch[0].__name__ for launch in launches]
        # these kernels compile for seconds: the fullest case for every GPU, the others for one
        note(case, launches, TARGETS if case == "packed_documents" else (MAIN,))
    note("masks", recorder.of(run_masks), TARGETS)
    for dtype in DENSE:
        found["launches"][f"dense_{dtype}"] = [launch[0].__name__ for launch in recorder.of(run_dense, dtype)]
        note(f"dense_{dtype}", recorder.of(run_dense, dtype), TARGETS)
        note(f"dense_{dtype}", recorder.of(run_dense, dtype, False), (MAIN,))
    note("dense_float16", recorder.of(run_dense, "float16"), (MAIN,))
    found["launches"]["block_map"] = [launch[0].__name__ for launch in recorder.of(run_block_map)]
    note("block_map", recorder.of(run_block_map), TARGETS)
    note("block_map", recorder.of(run_block_map, False), (MAIN,))
    for case, arguments in POSITIONS.items():
        found["launches"][case] = [launch[0].__name__ for launch in recorder.of(run_positions, *arguments)]
        note(case, recorder.of(run_positions, *arguments), TARGETS if case == "positions" else (MAIN,))
    for case, steps in STEPS.items() if MAIN in wanted else ():
        keys = {}
        for call, arguments in steps:
            group = str(arguments[4].get("tensors")) if call is run_rows else ""
            step = [(launch[0].__name__, specialised(launch, targets["sm_90"])[1]) for launch in recorder.of(call, *arguments)]
            keys.setdefault(group, []).append(step)
        found["keys"][case] = [all(step == steps_of[0] for step in steps_of) for steps_of in keys.values()]
        if not all(found["keys"][case]):
            found["keys"][case + "_differ"] = [
                (a[0], b[1]) for steps_of in keys.values() for other in steps_of for a, b in zip(steps_of[0], other) if a != b
            ]
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main({*sys.argv[1:]})
    sys.exit()


# --- the tests --------------------------------------------------------------------------------------------------------

every_target = pytest.mark.parametrize("target", [name if (name,) in PARTS else pytest.param(name, marks=pytest.mark.full) for name in TARGETS])


@pytest.fixture(scope="module")
def found(request):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent.parent), environment.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory() as cache:
        # what is tested is the compiler's answer today, not yesterday's
        environment["TRITON_CACHE_DIR"] = cache

        def run(targets):
            return subprocess.run([sys.executable, "-W", "ignore", __file__, *targets], capture_output=True, text=True, env=environment)

        with ThreadPoolExecutor() as pool:
            ran = list(pool.map(run, ALL_PARTS if request.config.getoption("--full") else PARTS))
    assert all(part.returncode == 0 for part in ran), "".join(part.stderr[-4000:] for part in ran)
    parts = [json.loads(part.stdout) for part in ran]
    return parts[1] | {"kernels": [kernel for part in parts for kernel in part["kernels"]]}


def kernels(found, target=None, cases=None, names=None):
    return [
        kernel
        for kernel in found["kernels"]
        if (target is None or kernel["target"] == target) and (cases is None or kernel["case"] in cases) and (names is None or kernel["kernel"] in names)
    ]


@pytest.mark.parametrize("case", [*(case for case, *_ in ROWS), "weight_gradient"])
@every_target
def test_rows_are_read_and_written_16_bytes_at_a_time(found, target, case):
    compiled_kernels = kernels(found, target, {case}, ROW_KERNELS)
    assert compiled_kernels
    wide = "dwordx4" if target in AMD else "v4.b32"
    for kernel in compiled_kernels:
        assert wide in kernel["loads"] and wide in kernel["stores"], kernel
        # what else is read are numbers of one row: indices, addresses, never parts of a row
        narrow = {"short", "byte", "ushort", "ubyte"} if target in AMD else {"b8", "b16", "v2.b16", "v4.b16"}
        assert not narrow & {*kernel["loads"], *kernel["stores"]}, kernel


@pytest.mark.parametrize("dtype", DENSE)
@every_target
def test_masks_are_written_16_bytes_at_a_time(found, target, dtype):
    compiled_kernels = kernels(found, target, {f"dense_{dtype}"})
    assert compiled_kernels
    wide = "dwordx4" if target in AMD else "v2.b64" if dtype == "float64" else "v4.b32"
    # what fills no 16 bytes, at a sample's begin or end
    narrow = {
        "bool": {"b8", "byte"}, "uint8": {"b8", "byte"}, "bfloat16": {"b16", "short"}, "float32": {"b32", "dword"}, "float64": {"b64", "dwordx2"},
    }[dtype]  # fmt: skip
    for kernel in compiled_kernels:
        assert wide in kernel["stores"] and {*kernel["stores"]} <= {wide} | narrow, kernel
        assert kernel["loads"] == ["dword" if target in AMD else "b32"], "bounds and nothing else"
        # half of what a lane may have at most: many tiles are under way at once
        assert kernel.get("registers") is None or kernel["registers"] <= 128, kernel


@every_target
def test_nothing_is_spilled(found, target):
    compiled_kernels = kernels(found, target)
    assert compiled_kernels
    if any(kernel["spilled"] is None for kernel in compiled_kernels):
        pytest.skip("no ptxas here to count spills")
    assert [kernel for kernel in compiled_kernels if kernel["spilled"]] == []


@every_target
def test_rows_of_odd_width_compile(found, target):
    assert kernels(found, target, {"odd_rows"})


@pytest.mark.parametrize("case", STEPS)
def test_another_batch_size_is_no_new_kernel(found, case):
    assert all(found["keys"][case]), found["keys"][case + "_differ"]


def test_launches_are_few(found):
    count, tokens, rows, returns = "count_kernel", "tokens_kernel", "rows_kernel", "returns_kernel"
    assert found["launches"] == {
        "keep": [count, tokens, count, tokens],
        "packed_documents": [count, tokens, returns, rows, count, tokens, rows],
        "expand_padded": [count, count, tokens, rows, count, count, tokens, rows],
        "images_first": [count, tokens, rows, count, tokens, rows],
        **{f"dense_{dtype}": ["entries_kernel"] for dtype in DENSE},
        "block_map": ["classes_kernel", "lists_kernel"],
        **dict.fromkeys(POSITIONS, ["count_kernel", "sums_kernel", "positions_kernel", "finish_kernel"]),
    }
