"""``python -m vlm_fuse info``: versions, and every backend with the reason why it is or is not there."""

from __future__ import annotations

import argparse
import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from . import __version__
from .backend import VARIABLE, backends

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


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m vlm_fuse", description=__doc__.split(":", 1)[1].strip())
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions and backends")
    parser.parse_args(arguments)
    print(info())


if __name__ == "__main__":
    main()
