"""``python -m benchmarks [--quick] [--name NAME]``: the host cost of a call, masks, then merge, into one results folder.

Further arguments go to ``benchmarks.bench_merge``; ``--help`` shows them.
"""

from __future__ import annotations

import subprocess
import sys

SHARED = ("--quick",)  # flags that all understand
SHARED_WITH_VALUE = ("--name", "--out", "--device")


def _shared(arguments: list[str]) -> list[str]:
    chosen = [argument for argument in arguments if argument in SHARED or argument.split("=")[0] in SHARED_WITH_VALUE]
    values = {flag: arguments[i + 1] for i, flag in enumerate(arguments[:-1]) if flag in SHARED_WITH_VALUE}
    return [part for flag in chosen for part in ([flag, values[flag]] if flag in values else [flag])]


def main() -> int:
    arguments = sys.argv[1:]
    if "--help" not in arguments and "-h" not in arguments:
        # processes of their own: the first runs on one thread, the second compiles
        for name in ("bench_overhead", "bench_masks"):
            subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *_shared(arguments)], check=False)
    return subprocess.run([sys.executable, "-m", "benchmarks.bench_merge", *arguments], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
