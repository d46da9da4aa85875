"""`pip install -e .` as it stands: with and without build isolation, with and without a compiler; what it leaves behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COPIED = ("csrc", "vlm_fuse", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
BUILT = shutil.ignore_patterns("_native*", "_build_info.json", "__pycache__")
HAS_COMPILER = bool(shutil.which("g++") or shutil.which("clang++"))

pytestmark = pytest.mark.no_poison


def environment(**changes) -> dict:
    clean = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX", "PYTHONPATH", "VLM_FUSE_NATIVE", "VLM_FUSE_CUDA")}
    return {**clean, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **changes}


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


def report(interpreter, tree: Path) -> str:
    """`python -m vlm_fuse info`, and a merge, with the package of that tree."""
    script = (
        "import torch, vlm_fuse, vlm_fuse.__main__\n"
        f"assert vlm_fuse.__file__.startswith({str(tree)!r}), vlm_fuse.__file__\n"
        "out = vlm_fuse.merge(torch.tensor([[1, 9]]), torch.zeros(1, 2, 4), torch.ones(1, 4), image_token_id=9)\n"
        "assert out.inputs_embeds[0, :, 0].tolist() == [0, 1]\n"
        "print(vlm_fuse.__main__.info())\n"
    )
    ran = subprocess.run([interpreter, "-W", "ignore", "-c", script], capture_output=True, text=True, env=environment(), cwd="/")
    assert ran.returncode == 0, ran.stderr[-2000:]
    return next(line for line in ran.stdout.splitlines() if line.startswith("cpu "))


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
    ran = build(tree, VLM_FUSE_NATIVE="0", VLM_FUSE_CUDA="1")
    assert ran.returncode != 0 and "no CUDA kernels" in ran.stderr


def test_the_source_distribution_has_all_sources(tree):
    subprocess.run([sys.executable, "setup.py", "-q", "sdist"], cwd=tree, check=True, capture_output=True, env=environment())
    (archive,) = (tree / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        packed = {name.split("/", 1)[1] for name in opened.getnames() if "/" in name}
    for name in ("csrc", "vlm_fuse"):
        for file in (tree / name).rglob("*"):
            if file.is_file() and file.suffix in (".h", ".cpp", ".py"):
                assert str(file.relative_to(tree)) in packed, file
    assert not any("_build_info" in name for name in packed)


@pytest.mark.slow
@pytest.mark.parametrize("compiler", [True, False], ids=["compiler", "no compiler"])
def test_editable_without_isolation(tree, python, compiler):
    if compiler and not HAS_COMPILER:
        pytest.skip("no C++ compiler")
    command = [python, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "-e", tree]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment(**({} if compiler else NO_COMPILER)))
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]
    line = report(python, tree)
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
    assert not HAS_COMPILER or "compiled by" in report(python, tree)


@pytest.mark.slow
def test_a_wheel_carries_the_module(tree, tmp_path):
    target = tmp_path / "target"
    command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "--target", target, tree]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]
    assert info_of(target)["native"] == HAS_COMPILER
    assert bool(list((target / "vlm_fuse").glob("_native*"))) == HAS_COMPILER
    assert not (target / "csrc").exists()
