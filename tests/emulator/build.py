"""Builds the CUDA module for the host: the sources of csrc/cuda as plain C++ against cuda_runtime.h of this folder."""

from __future__ import annotations

import ast
import fcntl
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
EMULATOR = ROOT / "tests/emulator/emulator.cpp"
COMPILER = shutil.which(os.environ.get("CXX", "")) or shutil.which("g++")
WARNINGS = ["-Wall", "-Wextra", "-Wno-unknown-pragmas"]
#: how a program of tests is built: the threads of a kernel as fibers, the same with every access checked, and as threads of the
#: system, so that accesses without a barrier between them are told.
VARIANTS = {
    "fibers": ["-O1", "-g1"],
    "address": ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "threads": ["-O1", "-g1", "-fsanitize=thread", "-DVLM_FUSE_EMULATE_WITH_THREADS"],
}


def of_setup(name: str):
    """A constant or a function of setup.py, which itself is not run."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == name:
            return ast.literal_eval(node.value)
        if isinstance(node, ast.FunctionDef) and node.name == name:
            names = {"os": os, "shutil": shutil, "Path": Path}
            exec(compile(ast.Module([node], []), "setup.py", "exec"), names)
            return names[name]
    raise LookupError(f"setup.py has no {name}")


def missing() -> str | None:
    """What a build needs and is not here."""
    if COMPILER is None:
        return "no g++"
    return next((f"no {name}" for name in ("ninja", "pybind11") if importlib.util.find_spec(name) is None), None)


def kernel_sources(csrc: Path = CSRC) -> list[Path]:
    return sorted((csrc / "cuda").glob("*.cu"))


def flags(given: list[str], csrc: Path = CSRC) -> list[str]:
    return ["-std=c++17", "-fPIC", "-ffp-contract=off", *WARNINGS, f"-I{ROOT / 'tests/emulator'}", f"-I{csrc}", *given]


def object_of(source: Path) -> str:
    """The name of its object file; folders tell sources of one name apart."""
    return f"{'_'.join(source.parts[-3:])}.o"


def brought_up_to_date(folder: Path, describe: Callable, *options: str) -> subprocess.CompletedProcess:
    """A folder that ninja keeps. `describe` writes the rules and the builds to a ninja_syntax.Writer. What ninja says is in stdout."""
    import ninja
    from ninja.ninja_syntax import Writer

    folder.mkdir(parents=True, exist_ok=True)
    # processes of pytest run side by side
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with open(folder / "build.ninja", "w") as file:
            describe(Writer(file))
        command = [shutil.which("ninja", path=ninja.BIN_DIR) or "ninja", *options, "-C", str(folder)]
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def compile_together(sources: list[Path], target: Path, given: list[str], others: dict[Path, list[str]] | None = None) -> Path:
    """A library (or, without -shared, a program) of the sources and the emulator; only what changed is compiled again.

    `given`: options of the compiler; `others`: of the sources that are compiled with others.
    """
    others = others or {}
    work = target.parent / f"{target.name}.objects"

    def describe(writer) -> None:
        writer.variable("flags", " ".join(flags(given)))
        writer.rule("compile", f"{COMPILER} $flags -MMD -MF $out.d -x c++ -c $in -o $out", depfile="$out.d", deps="gcc")
        writer.rule("link", f"{COMPILER} $flags $in -o $out -lpthread")
        objects = []
        for source in [*sources, EMULATOR]:
            own = {"flags": " ".join(flags(others[source]))} if source in others else None
            objects += writer.build(str(work / object_of(source)), "compile", str(source), variables=own)
        writer.build(str(target), "link", objects)

    ran = brought_up_to_date(work, describe)
    if ran.returncode:
        raise RuntimeError("\n".join(line for line in ran.stdout.splitlines() if not line.startswith((str(COMPILER), "[")))[-4000:])
    return target


def run_program(program: Path, *arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    # the address space as ThreadSanitizer wants it
    fixed = ["setarch", "-R"] if shutil.which("setarch") else []
    asked = {"TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_leaks=1", "PATH": os.environ.get("PATH", "")}
    return subprocess.run([*fixed, program, *arguments], capture_output=True, text=True, env=asked | (environment or {}))


@functools.cache
def module() -> Path:
    """The whole of vlm_fuse._cuda, emulated; what is not a kernel is compiled as setup.py does, so that its time can be told."""
    import pybind11

    folder = ROOT / "build" / "emulator"
    includes = [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_paths()["include"])]
    host = [*sorted((CSRC / "python/cuda").glob("*.cpp")), *(CSRC / "python" / name for name in of_setup("SHARED"))]
    target = folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    shipped = dict.fromkeys(host, [*of_setup("FLAGS"), *includes])
    return compile_together([*kernel_sources(), *host], target, ["-O1", "-g1", "-fvisibility=hidden", "-shared"], shipped)


def install() -> None:
    """Makes it the vlm_fuse._cuda of this process, before vlm_fuse is asked for its backends."""
    spec = importlib.util.spec_from_file_location("vlm_fuse._cuda", module())
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    sys.modules["vlm_fuse._cuda"] = made


if __name__ == "__main__":
    print(module())
