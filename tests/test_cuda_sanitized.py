"""The CUDA kernels on the emulator beside those of csrc/cpu, under sanitizers: emulator/sanitized.cpp, a program without Python.

Then the same program is shown kernels with a mistake, and must fail: every barrier of the sources left out in turn, and some
texts changed.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from emulator import build

CUDA = build.CSRC / "cuda"
OPS = [source.stem for source in build.kernel_sources() if "launch(" in source.read_text()]
#: what machine is emulated: with clusters, and without.
MACHINES = {"clusters": {}, "no_clusters": {"VLM_FUSE_EMULATED_CAPABILITY": "8"}, "one_processor": {"VLM_FUSE_EMULATED_PROCESSORS": "1"}}
#: a thread of the system for each of the kernel's, so that blocks are few.
FEW_THREADS = {"VLM_FUSE_EMULATED_CAPABILITY": "8", "VLM_FUSE_EMULATED_PROCESSORS": "1"}
SOURCES = [build.ROOT / "tests/emulator/sanitized.cpp", *build.kernel_sources(), *sorted((build.CSRC / "cpu").glob("*.cpp"))]
FOLDER = build.ROOT / "build" / "emulator"

pytestmark = [pytest.mark.no_poison, pytest.mark.skipif(build.missing() is not None, reason=f"nothing to build with: {build.missing()}")]


@functools.cache
def program(variant: str) -> Path:
    return build.compile_together(SOURCES, FOLDER / f"sanitized_{variant}", build.VARIANTS[variant])


def run(variant: str, op: str, cases: int, seed: int = 0, **environment: str) -> subprocess.CompletedProcess:
    return build.run_program(program(variant), op, str(cases), str(seed), environment=environment)


def test_every_source_with_kernels_has_cases():
    listed = build.run_program(program("fibers")).stdout.split()
    assert sorted(listed) == sorted(OPS)


@pytest.mark.parametrize("machine", ["clusters", "no_clusters", pytest.param("one_processor", marks=pytest.mark.full)])
@pytest.mark.parametrize("op", OPS)
def test_kernels_write_what_the_cpu_writes_and_nothing_else(op, machine):
    """AddressSanitizer and UBSan; every tensor in a block of memory of its own size, output gaps compared too."""
    ran = run("address", op, 300 if machine == "clusters" else 100, **MACHINES[machine])
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert f"cases of {op}" in ran.stdout


@pytest.mark.parametrize("op", OPS)
def test_no_access_without_a_barrier(op, request):
    """ThreadSanitizer, each thread of the kernel a thread of the system."""
    ran = run("threads", op, 20 if request.config.getoption("--full") else 2, seed=1, **FEW_THREADS)
    assert ran.returncode == 0, ran.stderr[-3000:]


# --- mistakes ---------------------------------------------------------------------------------------------------------


@functools.cache
def included(name: str) -> frozenset[str]:
    """The files of csrc/cuda that one of them includes, itself too."""
    found = {name}
    for other in re.findall(r'#include "(\w+\.cuh?)"', (CUDA / name).read_text()):
        found |= included(other)
    return frozenset(found)


def ops_with(name: str) -> list[str]:
    return [op for op in OPS if name in included(f"{op}.cu")]


def barriers() -> dict[str, list[int]]:
    """Lines of every barrier in the kernels, by file."""
    found = {}
    for source in sorted(CUDA.glob("*.cu*")):
        for number, line in enumerate(source.read_text().splitlines(), 1):
            if source.name != "device.cuh" and re.search(r"\b(__syncthreads|__syncwarp|cluster_barrier)\(\)", line.partition("//")[0]):
                found.setdefault(source.name, []).append(number)
    return found


#: how many barriers of a file can go without notice: a caller or a callee has one too, or cases as small as these do not show it.
SPARE = {
    "merge_tokens.cuh": 4, "vocabulary.cuh": 1, "block_map.cuh": 1, "block_sums.cuh": 1, "check.cuh": 1, "documents.cuh": 1, "intervals.cuh": 5, "plan.cuh": 1,
}  # fmt: skip


def what_happens_without(site: str, threads: bool) -> str:
    """One barrier, FILE:LINE, left out: "noticed" by a wrong result or an end of the process, "unnoticed", or "never reached"."""
    reached = False
    for op in ops_with(site.split(":")[0]):
        for machine in MACHINES.values():
            for seed in range(3):
                # the launches of merge_tokens are the largest
                ran = run("fibers", op, 80 if op == "merge_tokens" else 150, seed, VLM_FUSE_EMULATOR_SKIPS=site, VLM_FUSE_EMULATOR_SEED=str(seed), **machine)
                reached |= f"leaves out the barrier at {site}" in ran.stderr
                if ran.returncode != 0:
                    return "noticed"
        if threads and run("threads", op, 6, VLM_FUSE_EMULATOR_SKIPS=site, **FEW_THREADS).returncode != 0:
            return "noticed"
    return "unnoticed" if reached else "never reached"


#: files whose barriers are looked at in every run; all others with --full.
ALWAYS = ("merge_backward.cuh", "weight_gradient.cuh")


@pytest.mark.parametrize("file", [file if file in ALWAYS else pytest.param(file, marks=pytest.mark.full) for file in barriers()])
def test_a_barrier_left_out_is_noticed(file, request):
    """Every barrier of the file in turn; with --full by ThreadSanitizer too."""
    for op in ops_with(file):
        assert run("fibers", op, 60).returncode == 0, f"{op} fails with all its barriers"
    sites = [f"{file}:{line}" for line in barriers()[file]]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = dict(zip(sites, pool.map(lambda site: what_happens_without(site, request.config.getoption("--full")), sites)))
    assert "never reached" not in found.values(), found
    unnoticed = [site for site, what in found.items() if what == "unnoticed"]
    assert len(unnoticed) <= SPARE.get(file, 0), unnoticed


#: (op that notices, file, what it says, what it says with the mistake)
MISTAKES = {
    "the end of a row plus one": (
        "merge", "elements.cuh", "if (i + u * kLanes < count) target[u * kLanes] = held[u];", "if (i + u * kLanes <= count) target[u * kLanes] = held[u];"
    ),
    "a token id that is not clamped": ("merge", "row_source.cuh", "row >= 0 && row < rows.text.rows ?", "row >= 0 ?"),
    "a feature row of no tensor": ("merge_backward", "merge_backward.cuh", " || static_cast<unsigned>(k - target.first) >= target.owned", ""),
    "sums in another order": ("merge_backward", "merge_backward.cuh", "arguments.grad.row(row + r), reader", "arguments.grad.row(row + count - r), reader"),
    "more sequences than places": ("plan", "plan.cuh", "found.begins && found.number <= facts.sequences", "found.begins"),
    "the last row of a slice": ("intervals", "intervals.cuh", "return row + 1 < width && images[row + 1]", "return images[row + 1]"),
    "a mask shifted by one": ("dense", "dense.cuh", "larger(keys.end - at, 0)", "larger(keys.end - at - 1, 0)"),
    "a block too few": ("block_map", "block_map.cuh", "column - static_cast<int32_t>(first), 0", "column - static_cast<int32_t>(first), 1"),
}  # fmt: skip


def with_mistake(folder: Path, op: str, name: str, text: str, mistake: str) -> Path:
    """The program with one source of an op compiled from a changed copy, and all others as they are."""
    shutil.copytree(build.CSRC, folder / "csrc")
    source = folder / "csrc/cuda" / name
    said = source.read_text()
    assert text in said, f"{name} says no more: {text}"
    source.write_text(said.replace(text, mistake))
    flags = build.flags(build.VARIANTS["address"], folder / "csrc")
    made, target = folder / "changed.o", folder / "sanitized"
    objects = [FOLDER / "sanitized_address.objects" / build.object_of(path) for path in (*SOURCES, build.EMULATOR) if path != CUDA / f"{op}.cu"]
    # the changed one first: of the inline functions that several sources have, the linker takes the first
    for arguments in (["-x", "c++", "-c", folder / "csrc/cuda" / f"{op}.cu", "-o", made], [made, *objects, "-o", target, "-lpthread"]):
        ran = subprocess.run([build.COMPILER, *flags, *arguments], capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr[-3000:]
    return target


@pytest.fixture(scope="module")
def mistaken(tmp_path_factory):
    """Programs by mistake, compiled side by side; or what went wrong."""
    program("address")

    folders = {mistake: tmp_path_factory.mktemp("mistake") for mistake in MISTAKES}

    def made(mistake: str):
        try:
            return with_mistake(folders[mistake], *MISTAKES[mistake])
        except AssertionError as error:
            return error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(MISTAKES, pool.map(made, MISTAKES)))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_noticed(mistaken, mistake):
    made = mistaken[mistake]
    if isinstance(made, AssertionError):
        raise made
    ran = build.run_program(made, MISTAKES[mistake][0], "300")
    assert ran.returncode != 0, "nobody noticed"
    assert "AddressSanitizer" in ran.stderr or "runtime error" in ran.stderr or "on the CPU" in ran.stderr, ran.stderr[-2000:]
