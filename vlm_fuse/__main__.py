"""``python -m vlm_fuse info``: versions, and every backend with the reason why it is or is not there.

``python -m vlm_fuse bench``: the benchmarks of the repository; ``bench --help`` tells more.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from . import __version__
from .backend import VARIABLE, backends

ROOT = Path(__file__).resolve().parent.parent  # of the repository, where this is not an installed wheel
WITHOUT_BENCHMARKS = """\
python -m vlm_fuse bench: the benchmarks are not part of the installed package, they live in its repository.
In a checkout of vlm_fuse:

    make bench                             sets up .venv, then all of them
    make bench ARGS="--quick"              small batches

or, with vlm_fuse, tqdm and matplotlib installed (pip install -e '.[bench]'), from its folder: python -m vlm_fuse bench
"""

PACKAGES = ("torch", "triton", "numpy", "transformers")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "none that torch can use"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{', '.join(names)} (CUDA {torch.version.cuda}, HIP {torch.version.hip})"


def info() -> str:
    """The report as text, one fact a line."""
    facts = {"vlm_fuse": __version__, **{name: _version(name) for name in PACKAGES}}
    facts["python"] = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    facts["GPU"] = _gpus()
    facts[VARIABLE] = os.environ.get(VARIABLE) or "not set"
    rows = [("backend", "there", "devices", "why")]
    for name, found in backends().items():
        rows.append((name, "yes" if found.available else "no", ", ".join(found.devices) or "every", found.reason))

    width = max(map(len, facts))
    lines = [f"{name:{width}}  {value}" for name, value in facts.items()]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines.append("")
    lines += ["  ".join(f"{cell:{n}}" for cell, n in zip(row, widths)).rstrip() for row in rows]
    return "\n".join(lines)


def bench(arguments: list[str]) -> int:
    """Hand over to benchmarks/suite.py, which stands beside this package in the repository; 2 where it does not."""
    if not (ROOT / "benchmarks" / "suite.py").is_file():
        print(WITHOUT_BENCHMARKS, end="", file=sys.stderr)
        return 2
    # first, for other folders too may have modules that are called benchmarks
    sys.path.insert(0, str(ROOT))
    from benchmarks import suite

    return suite.main(arguments, "python -m vlm_fuse bench")


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m vlm_fuse")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, and every backend with the reason why it is or is not there")
    commands.add_parser("bench", help="the benchmarks of the repository; bench --help tells more", add_help=False)
    if arguments[:1] == ["bench"]:  # what comes after it is for the suite
        return bench(arguments[1:])
    parser.parse_args(arguments)
    print(info())
    return 0


if __name__ == "__main__":
    sys.exit(main())
