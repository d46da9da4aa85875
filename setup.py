"""Builds vlm_fuse/_native, and vlm_fuse/_cuda where there is nvcc, with ninja. Without a compiler the Python part is installed,
and the reason is kept.

VLM_FUSE_NATIVE=0 skips the CPU module, =1 makes a failure an error. VLM_FUSE_CUDA likewise, for the CUDA module.
"""

import functools
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
NATIVE = "vlm_fuse._native"
CUDA = "vlm_fuse._cuda"
VARIABLES = {NATIVE: "VLM_FUSE_NATIVE", CUDA: "VLM_FUSE_CUDA"}
FLAGS = ["-std=c++17", "-O3", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-g0", "-Wall", "-Wextra"]
#: machine code for these, which others of the same major version run too (86, 89, 103), and PTX of the last for those that come.
ARCHITECTURES = (80, 90, 100, 120)
NVCC_FLAGS = ["-std=c++17", "-O3", "-DNDEBUG", "--fmad=false", "--threads", "0", "-Xcompiler", "-fPIC,-fvisibility=hidden,-ffp-contract=off"]
#: what both modules take from csrc/python.
SHARED = ("attached.cpp", "batch_arguments.cpp", "row_arguments.cpp", "tensors.cpp", "usual_call.cpp", "versions.cpp")


def asked(variable: str) -> str:
    """"0", "1", or "" where it is left to what is found."""
    value = os.environ.get(variable, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"{variable}: expected 0 or 1, got {value!r}")
    return value


class BuildNative(build_ext):
    def run(self):
        inplace = self.inplace  # the base class leaves it changed where something fails
        self.built = {}
        try:
            super().run()
        except Exception as error:  # before anything was tried: no compiler that setuptools knows
            for name in (NATIVE, CUDA):
                self.attempt(name, functools.partial(raise_, error))
        self.inplace = inplace
        info = {"native": self.built[NATIVE]["compiled"], "reason": self.built[NATIVE]["reason"], "cuda": self.built[CUDA]}
        for folder in self.folders():
            folder.mkdir(parents=True, exist_ok=True)
            for name, module in self.built.items():
                if not module["compiled"]:
                    for stale in folder.glob(f"{name.rpartition('.')[2]}.*"):
                        stale.unlink()
            (folder / "_build_info.json").write_text(json.dumps(info, indent=1) + "\n")

    def attempt(self, name, build):
        """One module; a failure is told, and is an error only where the module was asked for."""
        if name in self.built:
            return
        variable = VARIABLES[name]
        wanted = asked(variable)
        if wanted == "0":
            self.built[name] = {"compiled": False, "reason": f"switched off by {variable}=0"}
            return
        try:
            self.built[name] = {"compiled": True, "reason": f"compiled by {build()}"}
        except Exception as error:
            if wanted == "1":
                raise SystemExit(f"{variable}=1: {error}") from error
            self.built[name] = {"compiled": False, "reason": f"not compiled: {error}"}
            print(f"vlm_fuse: {name} was not compiled: {error}\nvlm_fuse: installing without it", file=sys.stderr)

    def folders(self):
        """Where the modules stand: what gets installed, and the source package in development."""
        inplace, self.inplace = self.inplace, False
        folders = [Path(self.get_ext_fullpath(NATIVE)).resolve().parent]
        self.inplace = inplace
        if inplace or getattr(self, "editable_mode", False):
            folders.append(ROOT / "vlm_fuse")
        return folders

    def build_extensions(self):
        self.attempt(NATIVE, self.native)
        self.attempt(CUDA, self.cuda)

    def native(self) -> str:
        compiler, linker = self.cxx()
        self.ninja(NATIVE, [*(ROOT / "csrc/cpu").glob("*.cpp"), *(ROOT / "csrc/python").glob("*.cpp")], linker)
        return version_of(compiler[0])

    def cuda(self) -> str:
        nvcc = find_nvcc()
        if nvcc is None:
            raise RuntimeError("no nvcc (looked at NVCC, CUDA_HOME, PATH, /usr/local/cuda)")
        sources = [*(ROOT / "csrc/cuda").glob("*.cu"), *(ROOT / "csrc/python/cuda").glob("*.cpp"), *(ROOT / "csrc/python" / name for name in SHARED)]
        # static, so that the module loads where there is no CUDA, and can say so
        self.ninja(CUDA, sources, [nvcc, "-shared", "-cudart", "static"], nvcc)
        return f"nvcc {version_of(nvcc, 'release ')} for sm_{', sm_'.join(map(str, ARCHITECTURES))}"

    def cxx(self):
        """(compiler, linker) of C++ as lists."""
        compiler = getattr(self.compiler, "compiler_so_cxx", None) or self.compiler.compiler_so
        # older setuptools know the C linker alone, which leaves out the C++ library
        linker = getattr(self.compiler, "linker_so_cxx", None) or self.compiler.compiler_cxx[:1] + self.compiler.linker_so[1:]
        return compiler, linker

    def ninja(self, name, sources, linker, nvcc=None):
        import ninja
        import pybind11
        from ninja.ninja_syntax import Writer

        target = Path(self.get_ext_fullpath(name)).resolve()
        work = Path(self.build_temp).resolve() / name
        work.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        includes = [f"-I{folder}" for folder in [pybind11.get_include(), *self.compiler.include_dirs]]
        targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES]
        targets.append(f"-gencode=arch=compute_{ARCHITECTURES[-1]},code=compute_{ARCHITECTURES[-1]}")
        with open(work / "build.ninja", "w") as file:
            writer = Writer(file)
            writer.variable("flags", shlex.join(FLAGS + includes))
            writer.rule("compile", shlex.join(self.cxx()[0]) + " $flags -MMD -MF $out.d -c $in -o $out", depfile="$out.d", deps="gcc", description="compile $in")
            if nvcc:
                writer.variable("nvcc_flags", shlex.join(NVCC_FLAGS + targets))
                writer.rule("nvcc", f"{path(Path(nvcc))} $nvcc_flags -MD -MF $out.d -c $in -o $out", depfile="$out.d", deps="gcc", description="compile $in")
            writer.rule("link", shlex.join(linker) + " $in -o $out", description="link $out")
            objects = []
            for source in sorted(sources):
                out = work / source.relative_to(ROOT).with_suffix(".o")
                objects += writer.build(path(out), "nvcc" if source.suffix == ".cu" else "compile", path(source))
            writer.build(path(target), "link", objects)
        command = [shutil.which("ninja", path=ninja.BIN_DIR) or "ninja", "-C", str(work)]
        ran = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        print(ran.stdout)
        if ran.returncode:
            raise RuntimeError(first_error(ran.stdout))


def raise_(error):
    raise error


def path(file: Path) -> str:
    """As build.ninja writes it; the shell sees it unquoted."""
    if shlex.quote(str(file)) != str(file):
        raise RuntimeError(f"the path {str(file)!r} has characters that a compiler's command line does not take")
    return str(file)


def first_error(log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    marks = (" error: ", ": not found", "No such file")
    return next((line for line in lines if any(mark in line for mark in marks)), (lines or ["ninja failed"])[-1])


def version_of(compiler: str, mark: str = "") -> str:
    """The first line of what it says of itself, or what follows `mark` there."""
    ran = subprocess.run([compiler, "--version"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    line = next((line for line in ran.stdout.splitlines() if mark in line), compiler)
    return line.partition(mark)[2].partition(",")[0] if mark else line


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [os.environ.get("NVCC"), home and f"{home}/bin/nvcc", shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    return next((place for place in places if place and shutil.which(place)), None)


if platform.system() == "Windows":
    extensions = []
else:
    # optional: the editable install must not fail where a module is missing
    extensions = [Extension(name, sources=[], optional=True) for name in (NATIVE, CUDA)]

setup(license="Apache-2.0", ext_modules=extensions, cmdclass={"build_ext": BuildNative})
