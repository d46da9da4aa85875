"""The CUDA kernels compiled by nvcc for GPUs that are not here: warnings, registers, spills, and the width of accesses.

Kernels are found in the sources, so that a new one is looked at too. What is compiled stays in build/cuda_compile until a source,
a flag or nvcc changes.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from emulator.build import brought_up_to_date, of_setup

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
REGISTERS = 2**16  # of a processor
#: kernels that move rows or masks: every one of them must have a path of 16 bytes at a time.
WIDE_LOADS = ("rows_kernel", "gradients_kernel", "weight_kernel", "merge_tokens_kernel")
WIDE_STORES = (*WIDE_LOADS, "entries_kernel")


NVCC = of_setup("find_nvcc")()
TARGETS = [f"sm_{arch}" for arch in of_setup("ARCHITECTURES")]
LAST = TARGETS[-1].replace("sm", "compute")

pytestmark = [pytest.mark.no_poison, pytest.mark.skipif(NVCC is None, reason="no nvcc")]


def declared_kernels() -> set[str]:
    """The names of all __global__ functions of the sources."""
    names = set()
    for source in sorted((ROOT / "csrc/cuda").glob("*.cu*")):
        text = re.sub(r"//.*", "", source.read_text())
        for head in text.split("__global__")[1:]:
            head = re.sub(r"^\s*void\b", "", head)
            while bounds := re.match(r"\s*__launch_bounds__\s*\(", head):
                depth, end = 1, bounds.end()
                while depth:
                    depth += {"(": 1, ")": -1}.get(head[end], 0)
                    end += 1
                head = re.sub(r"^\s*void\b", "", head[end:])
            names.add(re.match(r"\s*(\w+)\s*\(", head).group(1))
    return names


def named(symbol: str) -> str:
    """The kernel's own name in a mangled one: the last part of its nested name."""
    rest, name = re.sub(r"^_ZN?", "", symbol), ""
    while part := re.match(r"(?:St)?(\d+)", rest):
        name, rest = rest[part.end() : part.end() + int(part.group(1))], rest[part.end() + int(part.group(1)) :]
    return name


@pytest.fixture(scope="module")
def folder() -> Path:
    """For every source and target a .cubin, with what ptxas says of it beside it; and the PTX of the last target."""
    folder = ROOT / "build" / "cuda_compile"
    version = subprocess.run([NVCC, "--version"], capture_output=True, text=True).stdout.split()[-1]
    flags = of_setup("NVCC_FLAGS")

    def describe(writer) -> None:
        command = f"{NVCC} {' '.join(flags)} -Xptxas -v -arch=$arch $form -MD -MF $out.d $in -o $out > $out.said 2>&1 || (cat $out.said && false)"
        writer.rule("nvcc", f": {version}; {command}", depfile="$out.d", deps="gcc")
        for source in SOURCES:
            for target in TARGETS:
                writer.build(str(folder / f"{source.stem}.{target}.cubin"), "nvcc", str(source), variables={"arch": target, "form": "-cubin"})
            writer.build(str(folder / f"{source.stem}.ptx"), "nvcc", str(source), variables={"arch": LAST, "form": "-ptx"})

    ran = brought_up_to_date(folder, describe, "-k", "0")
    assert ran.returncode == 0, ran.stdout[-4000:]
    return folder


def said_of(cubin: Path) -> dict[str, str]:
    """What ptxas says of each kernel of a source."""
    text = cubin.with_name(f"{cubin.name}.said").read_text()
    return {part.split("'", 1)[0]: part for part in text.split("Compiling entry function '")[1:]}


def said(folder: Path, target: str) -> dict[str, str]:
    found = {}
    for source in SOURCES:
        found |= said_of(folder / f"{source.stem}.{target}.cubin")
    return found


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_is_compiled_for_every_target(folder, target):
    assert {named(symbol) for symbol in said(folder, target)} == declared_kernels()


def test_nothing_is_warned_of(folder):
    logs = {log.name: log.read_text() for log in folder.glob("*.said")}
    assert len(logs) >= len(SOURCES) * (len(TARGETS) + 1)
    assert not {name: text for name, text in logs.items() if "warning" in text}


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_is_spilled(folder, target):
    spilled = {}
    for symbol, text in said(folder, target).items():
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text)
        if spills.groups() != ("0", "0"):
            spilled[symbol] = spills.group()
    assert spilled == {}


def test_registers_allow_the_blocks_that_launch_bounds_ask_for(folder):
    """Every kernel says how many threads its blocks have, and as many blocks as it says fit."""
    bounds = {}
    for source in SOURCES:
        for part in (folder / f"{source.stem}.ptx").read_text().split(".entry ")[1:]:
            head = part.split("{", 1)[0]
            threads, blocks = (re.search(rf"\.{word} (\d+)", head) for word in ("maxntid", "minnctapersm"))
            assert threads, f"{head.split('(')[0]}: no __launch_bounds__"
            bounds[head.split("(")[0].strip()] = int(threads.group(1)), int(blocks.group(1)) if blocks else 1
    for target in TARGETS:
        for symbol, text in said(folder, target).items():
            registers, (threads, blocks) = int(re.search(r"Used (\d+) registers", text).group(1)), bounds[symbol]
            assert -(-registers // 8) * 8 * threads * blocks <= REGISTERS, f"{target}: {symbol}: {registers} registers, {blocks} blocks of {threads}"


def disassembler() -> str | None:
    found = shutil.which("nvdisasm") or shutil.which(Path(NVCC).parent / "nvdisasm")
    if found:
        return found
    try:
        import triton
    except ImportError:
        return None
    return shutil.which(Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm")


@pytest.fixture(scope="module")
def machine_code(folder) -> dict[str, dict[str, str]]:
    """target -> kernel -> instructions, of the sources that have kernels with wide accesses."""
    tool = disassembler()
    if tool is None:
        pytest.skip("no nvdisasm, neither of CUDA nor of Triton")

    def disassembled(target: str) -> dict[str, str]:
        found = {}
        for source in SOURCES:
            cubin = folder / f"{source.stem}.{target}.cubin"
            if not any(named(symbol) in (*WIDE_LOADS, *WIDE_STORES) for symbol in said_of(cubin)):
                continue
            ran = subprocess.run([tool, "-c", cubin], capture_output=True, text=True)
            assert ran.returncode == 0, ran.stderr
            for part in re.split(r"^\s*\.section\s+\.text\.", ran.stdout, flags=re.MULTILINE)[1:]:
                found[part.split(",", 1)[0].strip()] = part
        return found

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(TARGETS, pool.map(disassembled, TARGETS)))


@pytest.mark.parametrize("target", TARGETS)
def test_rows_and_masks_are_moved_16_bytes_at_a_time(machine_code, target):
    for names, pattern in ((WIDE_LOADS, r"\bLDG?\.E[\w.]*\.128"), (WIDE_STORES, r"\bSTG?\.E[\w.]*\.128")):
        for name in names:
            code = {symbol: text for symbol, text in machine_code[target].items() if named(symbol) == name}
            assert code, f"no {name}"
            for symbol, text in code.items():
                assert re.search(pattern, text), f"{symbol}: none of {pattern}"
