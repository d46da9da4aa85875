"""Builds vlm_fuse/_native with ninja. Without a compiler the Python part is installed, and the reason is kept.

VLM_FUSE_NATIVE=0 skips the module, =1 makes a failure an error. VLM_FUSE_CUDA likewise, for CUDA kernels.
"""

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MODULE = "vlm_fuse._native"
FLAGS = ["-std=c++17", "-O3", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-g0", "-Wall", "-Wextra"]


def asked(variable: str) -> str:
    """"0", "1", or "" where it is left to what is found."""
    value = os.environ.get(variable, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"{variable}: expected 0 or 1, got {value!r}")
    return value


class BuildNative(build_ext):
    def run(self):
        info = {"native": False, "reason": "switched off by VLM_FUSE_NATIVE=0", "cuda": cuda()}
        inplace = self.inplace  # the base class leaves it changed where the build fails
        if asked("VLM_FUSE_NATIVE") != "0":
            try:
                super().run()
                info.update(native=True, reason=f"compiled by {self.compiled_by}")
            except Exception as error:
                if asked("VLM_FUSE_NATIVE") == "1":
                    raise
                info["reason"] = f"not compiled: {error}"
                print(f"vlm_fuse: the native module was {info['reason']}\nvlm_fuse: installing without it", file=sys.stderr)
        self.inplace = inplace
        for folder in self.folders():
            folder.mkdir(parents=True, exist_ok=True)
            if not info["native"]:
                for stale in folder.glob("_native.*"):
                    stale.unlink()
            (folder / "_build_info.json").write_text(json.dumps(info, indent=1) + "\n")

    def folders(self):
        """Where the module stands: what gets installed, and the source package in development."""
        inplace, self.inplace = self.inplace, False
        folders = [Path(self.get_ext_fullpath(MODULE)).resolve().parent]
        self.inplace = inplace
        if inplace or getattr(self, "editable_mode", False):
            folders.append(ROOT / "vlm_fuse")
        return folders

    def build_extensions(self):
        import ninja
        import pybind11
        from ninja.ninja_syntax import Writer

        compiler = getattr(self.compiler, "compiler_so_cxx", None) or self.compiler.compiler_so
        # older setuptools know the C linker alone, which leaves out the C++ library
        linker = getattr(self.compiler, "linker_so_cxx", None) or self.compiler.compiler_cxx[:1] + self.compiler.linker_so[1:]
        self.compiled_by = version_of(compiler[0])
        target = Path(self.get_ext_fullpath(MODULE)).resolve()
        work = Path(self.build_temp).resolve()
        work.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        includes = [f"-I{folder}" for folder in [pybind11.get_include(), *self.compiler.include_dirs]]
        with open(work / "build.ninja", "w") as file:
            writer = Writer(file)
            writer.variable("flags", shlex.join(FLAGS + includes))
            writer.rule("compile", shlex.join(compiler) + " $flags -MMD -MF $out.d -c $in -o $out", depfile="$out.d", deps="gcc", description="compile $in")
            writer.rule("link", shlex.join(linker) + " $in -o $out", description="link $out")
            objects = []
            for source in sorted((ROOT / "csrc").rglob("*.cpp")):
                out = work / source.relative_to(ROOT).with_suffix(".o")
                objects += writer.build(path(out), "compile", path(source))
            writer.build(path(target), "link", objects)
        command = [shutil.which("ninja", path=ninja.BIN_DIR) or "ninja", "-C", str(work)]
        ran = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        print(ran.stdout)
        if ran.returncode:
            raise RuntimeError(first_error(ran.stdout))


def path(file: Path) -> str:
    """As build.ninja writes it; the shell sees it unquoted."""
    if shlex.quote(str(file)) != str(file):
        raise RuntimeError(f"the path {str(file)!r} has characters that a compiler's command line does not take")
    return str(file)


def first_error(log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    marks = (" error: ", ": not found", "No such file")
    return next((line for line in lines if any(mark in line for mark in marks)), (lines or ["ninja failed"])[-1])


def version_of(compiler: str) -> str:
    ran = subprocess.run([compiler, "--version"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return ran.stdout.splitlines()[0] if ran.stdout else compiler


def cuda() -> dict:
    """What there is to say about CUDA kernels: this version has none to compile."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [os.environ.get("NVCC"), home and f"{home}/bin/nvcc", shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    nvcc = next((place for place in places if place and shutil.which(place)), None)
    if asked("VLM_FUSE_CUDA") == "1":
        raise SystemExit("VLM_FUSE_CUDA=1: this version has no CUDA kernels; GPUs are served by Triton")
    return {"compiled": False, "nvcc": nvcc, "reason": "this version has no CUDA kernels; GPUs are served by Triton"}


if platform.system() == "Windows":
    extensions = []
else:
    # optional: the editable install must not fail where the module is missing
    extensions = [Extension(MODULE, sources=[], optional=True)]

setup(license="Apache-2.0", ext_modules=extensions, cmdclass={"build_ext": BuildNative})
