"""`pip install -e .` as it stands: with and without build isolation, with and without a compiler; what it leaves behind.

The CUDA module takes nvcc minutes for all GPUs: it is built here once, for one of them, and is otherwise switched off.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest

from emulator.build import of_setup

ROOT = Path(__file__).parent.parent
COPIED = ("csrc", "vlm_fuse", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
BUILT = shutil.ignore_patterns("_native*", "_cuda*.so", "_build_info.json", "__pycache__")
HAS_COMPILER = bool(shutil.which("g++") or shutil.which("clang++"))
NVCC = of_setup("find_nvcc")()
#: where setup.py finds no nvcc, whatever there is.
NO_NVCC = {"NVCC": "/nowhere/nvcc", "CUDA_HOME": "/nowhere", "CUDA_PATH": ""}

pytestmark = pytest.mark.no_poison


def environment(**changes) -> dict:
    clean = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX", "PYTHONPATH", "VLM_FUSE_NATIVE", "VLM_FUSE_CUDA")}
    return {**clean, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "VLM_FUSE_CUDA": "0", **changes}


NO_COMPILER = {"CC": "/nowhere/cc", "CXX": "/nowhere/c++", "LDSHARED": "/nowhere/cc", "LDCXXSHARED": "/nowhere/c++"}


@pytest.fixture
def tree(tmp_path):
    """A clone without anything built."""
    copy = tmp_path / "clone"
    copy.mkdir()
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=BUILT)
        else:
            shutil.copy(ROOT / name, copy / name)
    # what is tested is the build, not the code: without optimisation it takes a third of the time
    script = copy / "setup.py"
    assert script.read_text().count('"-O3"') == 2
    script.write_text(script.read_text().replace('"-O3"', '"-O0"'))
    return copy


@pytest.fixture
def python(tmp_path):
    """An interpreter of its own that sees the packages of this one (torch), but not this vlm_fuse."""
    folder = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    interpreter = folder / "bin" / "python"
    site = subprocess.run([interpreter, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True, check=True)
    # in front of its own: a new environment may come with a setuptools older than the build asks for
    borrowed = sysconfig.get_path("purelib")
    (Path(site.stdout.strip()) / "borrowed.pth").write_text(f"import sys; sys.path.insert(0, {borrowed!r})\n")
    return interpreter


def build(tree: Path, **changes) -> subprocess.CompletedProcess:
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    return subprocess.run(command, cwd=tree, capture_output=True, text=True, env=environment(**changes))


def info_of(folder: Path) -> dict:
    return json.loads((folder / "vlm_fuse" / "_build_info.json").read_text())


def report(interpreter, tree: Path) -> dict[str, str]:
    """Lines of `python -m vlm_fuse info` by their first word, and a merge, with the package of that tree."""
    script = (
        f"import sys; sys.path.insert(0, {str(tree)!r})\n"
        "import torch, vlm_fuse, vlm_fuse.__main__\n"
        f"assert vlm_fuse.__file__.startswith({str(tree)!r}), vlm_fuse.__file__\n"
        "out = vlm_fuse.merge(torch.tensor([[1, 9]]), torch.zeros(1, 2, 4), torch.ones(1, 4), image_token_id=9)\n"
        "assert out.inputs_embeds[0, :, 0].tolist() == [0, 1]\n"
        "print(vlm_fuse.__main__.info())\n"
    )
    ran = subprocess.run([interpreter, "-W", "ignore", "-c", script], capture_output=True, text=True, env=environment(), cwd="/")
    assert ran.returncode == 0, ran.stderr[-2000:]
    return {line.split()[0]: line for line in ran.stdout.splitlines() if line.strip()}


def test_without_a_compiler_the_build_succeeds_and_keeps_the_reason(tree):
    ran = build(tree, **NO_COMPILER)
    assert ran.returncode == 0, ran.stderr
    found = info_of(tree)
    assert not found["native"] and "/nowhere/c" in found["reason"], found
    assert not list((tree / "vlm_fuse").glob("_native*"))


def test_a_compile_error_is_the_reason(tree):
    source = tree / "csrc" / "cpu" / "plan.cpp"
    source.write_text(source.read_text() + "\nint broken = nothing_of_that_name;\n")
    if not HAS_COMPILER:
        pytest.skip("no C++ compiler")
    assert build(tree).returncode == 0
    assert "nothing_of_that_name" in info_of(tree)["reason"]
    assert build(tree, VLM_FUSE_NATIVE="1").returncode != 0


def test_the_variables_force_and_switch_off(tree):
    assert build(tree, VLM_FUSE_NATIVE="0").returncode == 0
    assert info_of(tree) == info_of(tree) | {"native": False, "reason": "switched off by VLM_FUSE_NATIVE=0"}
    ran = build(tree, VLM_FUSE_NATIVE="1", **NO_COMPILER)
    assert ran.returncode != 0 and "/nowhere/c" in ran.stderr + ran.stdout
    ran = build(tree, VLM_FUSE_NATIVE="yes")
    assert ran.returncode != 0 and "VLM_FUSE_NATIVE" in ran.stderr
    assert info_of(tree)["cuda"] == {"compiled": False, "reason": "switched off by VLM_FUSE_CUDA=0"}


def only_one_gpu(tree: Path) -> None:
    """The tree compiles CUDA for one GPU, and is done sooner."""
    script = tree / "setup.py"
    text, times = re.subn(r"^ARCHITECTURES = .*", "ARCHITECTURES = (90,)", script.read_text(), flags=re.MULTILINE)
    assert times == 1
    script.write_text(text)


def without_nvcc(tree: Path) -> None:
    """setup.py also looks at the usual place, which no variable hides."""
    script = tree / "setup.py"
    text = script.read_text()
    assert text.count('"/usr/local/cuda/bin/nvcc"') == 1 and text.count('shutil.which("nvcc")') == 1
    script.write_text(text.replace('"/usr/local/cuda/bin/nvcc"', "None").replace('shutil.which("nvcc")', "None"))


def test_without_nvcc_the_build_succeeds_and_keeps_the_reason(tree):
    without_nvcc(tree)
    ran = build(tree, VLM_FUSE_NATIVE="0", VLM_FUSE_CUDA="", **NO_NVCC)
    assert ran.returncode == 0, ran.stderr
    found = info_of(tree)["cuda"]
    assert not found["compiled"] and "no nvcc" in found["reason"], found
    ran = build(tree, VLM_FUSE_NATIVE="0", VLM_FUSE_CUDA="1", **NO_NVCC)
    assert ran.returncode != 0 and "VLM_FUSE_CUDA=1: no nvcc" in ran.stderr


@pytest.mark.skipif(NVCC is None or not HAS_COMPILER, reason="no nvcc")
def test_a_compile_error_of_cuda_is_the_reason(tree):
    only_one_gpu(tree)
    header = tree / "csrc" / "cuda" / "device.h"
    header.write_text(header.read_text() + "\nint broken = nothing_of_that_name;\n")
    assert build(tree, VLM_FUSE_NATIVE="0", VLM_FUSE_CUDA="").returncode == 0
    found = info_of(tree)["cuda"]
    assert not found["compiled"] and "nothing_of_that_name" in found["reason"], found
    assert not list((tree / "vlm_fuse").glob("_cuda*.so"))
    assert build(tree, VLM_FUSE_NATIVE="0", VLM_FUSE_CUDA="1").returncode != 0


def test_the_cuda_module_beside_the_package_loads_without_a_gpu():
    """As `make test` built it, for all GPUs; from scratch it is built with --full."""
    found = json.loads((ROOT / "vlm_fuse" / "_build_info.json").read_text())["cuda"]
    if not found["compiled"]:
        pytest.skip(found["reason"])
    line = report(sys.executable, ROOT)["cuda"]
    assert "yes" in line or "compiled, but no GPU" in line, line


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.skipif(NVCC is None or not HAS_COMPILER, reason="no nvcc")
def test_with_nvcc_the_cuda_module_is_built_and_loads_without_a_gpu(tree):
    only_one_gpu(tree)
    assert build(tree, VLM_FUSE_NATIVE="0", VLM_FUSE_CUDA="1").returncode == 0
    found = info_of(tree)["cuda"]
    assert found["compiled"] and "compiled by nvcc" in found["reason"] and "sm_90" in found["reason"], found
    lines = report(sys.executable, tree)
    assert "yes" in lines["cuda"] or "compiled, but no GPU" in lines["cuda"], lines


def test_the_source_distribution_has_all_sources(tree):
    subprocess.run([sys.executable, "setup.py", "-q", "sdist"], cwd=tree, check=True, capture_output=True, env=environment())
    (archive,) = (tree / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        packed = {name.split("/", 1)[1] for name in opened.getnames() if "/" in name}
    for name in ("csrc", "vlm_fuse"):
        for file in (tree / name).rglob("*"):
            if file.is_file() and file.suffix in (".h", ".cpp", ".cu", ".cuh", ".py"):
                assert str(file.relative_to(tree)) in packed, file
    assert not any("_build_info" in name for name in packed)


# with a compiler: a wheel is built without isolation and an editable install with it, below
@pytest.mark.slow
@pytest.mark.parametrize("compiler", [pytest.param(True, marks=pytest.mark.full), False], ids=["compiler", "no compiler"])
def test_editable_without_isolation(tree, python, compiler):
    if compiler and not HAS_COMPILER:
        pytest.skip("no C++ compiler")
    command = [python, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "-e", tree]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment(**({} if compiler else NO_COMPILER)))
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]
    line = report(python, tree)["cpu"]
    assert ("yes" in line and "compiled by" in line) if compiler else ("no" in line and "/nowhere/c" in line)


@pytest.mark.slow
def test_editable_with_isolation_downloads_no_torch(tree, python):
    """The isolated build takes its tools from the package index: skipped where that is not reached."""
    command = [python, "-m", "pip", "install", "--no-deps", "-v", "-e", tree]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment())
    if ran.returncode and ("No matching distribution" in ran.stderr or "Connection" in ran.stderr):
        pytest.skip("no package index")
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]
    fetched = [line for line in (ran.stdout + ran.stderr).splitlines() if line.strip().startswith(("Downloading", "Using cached", "Collecting"))]
    assert fetched and not any("torch" in line or "cuda" in line for line in fetched), fetched
    assert not HAS_COMPILER or "compiled by" in report(python, tree)["cpu"]


@pytest.mark.slow
def test_a_wheel_carries_the_module(tree, tmp_path):
    target = tmp_path / "target"
    command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "--target", target, tree]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]
    assert info_of(target)["native"] == HAS_COMPILER
    assert bool(list((target / "vlm_fuse").glob("_native*"))) == HAS_COMPILER
    assert not (target / "csrc").exists()
