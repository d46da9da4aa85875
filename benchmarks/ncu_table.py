"""ncu's CSV as a short table: a line a launch.

python -m benchmarks.ncu_table FILE
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path


def launches(text: str) -> list[tuple[str, dict[str, str]]]:
    """(kernel, {metric: value with unit}) of each launch, in order. Lines before the header are ncu's own talk."""
    lines = text.splitlines()
    begin = next((number for number, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    found: dict[str, tuple[str, dict[str, str]]] = {}
    for row in csv.DictReader(lines[begin:]):
        if row.get("Metric Name"):
            kernel, metrics = found.setdefault(row["ID"], (row["Kernel Name"].partition("(")[0], {}))
            metrics[row["Metric Name"]] = f"{row['Metric Value']} {row['Metric Unit']}"
    return list(found.values())


def table(text: str) -> str:
    names = list(dict.fromkeys(name for _, metrics in launches(text) for name in metrics))
    rows = [["kernel", *names], ["---"] * (len(names) + 1)]
    rows += [[kernel, *(metrics.get(name, "") for name in names)] for kernel, metrics in launches(text)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)



if __name__ == "__main__":
    print(table(Path(sys.argv[1]).read_text()))
