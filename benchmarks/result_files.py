"""The JSON file of any benchmark as rows: what was timed, every round of it, and its ratio to a plain copy where it has one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

OWN = "vlm_fuse"  # how the names of our contestants begin


class NotResults(ValueError):
    """A file that no benchmark has written; the message says which, and what is wrong with it."""


class Row(NamedTuple):
    """One contestant on one batch."""

    place: str  # page condition, batch and operation, in words
    contestant: str
    seconds: list[float]  # of every round
    base: str | None  # the contestant that its ratios are to; None: only its time is told
    ratios: list[float] | None  # within each round

    @property
    def is_base(self) -> bool:
        return self.contestant == self.base


class ResultFile(NamedTuple):
    """What a benchmark has written. Most know one condition, named ""; bench_merge has one for each kind of pages."""

    path: Path
    environments: dict[str, dict[str, Any]]  # condition -> facts
    notes: list[str]  # that the machine was busy, and so on
    rows: list[Row]


class Form(NamedTuple):
    """How an entry is told: its fields, in words, and what its ratios are to."""

    words: str
    fields: tuple[str, ...]
    base: str | None = None  # None: the entry says it itself, or has none


#: the first whose fields an entry has is its form.
FORMS = (
    Form("{batch}, {operation}", ("batch", "operation")),  # merge, apart, masks
    Form("{distribution}, {samples} samples, rows of {capacity}", ("distribution", "samples", "capacity", "contestants")),  # packing
    Form("{samples} samples, {tokens} tokens", ("collators", "samples", "tokens"), "pad and stack"),
    Form("{load}, {shape} x {width}", ("load", "shape", "width"), "as it is"),  # patched
    Form("{load} ({family})", ("load", "family")),  # positions
    Form("{title}, {size}, {useful_tokens} tokens a step", ("title", "size", "useful_tokens"), "stock, left padding"),  # throughput
)
HOST_COST_BASE = "F.embedding"

#: page conditions of bench_merge in words.
CONDITIONS = {"default": "default pages", "huge": "huge pages"}


def read(path: Path) -> ResultFile:
    """The rows of a result file.

    Args:
        path: of a JSON file that a benchmark has written: results.json, masks.json, overhead.json, packing.json, ...

    Raises:
        NotResults: the file is not there, is no JSON, holds no times of a benchmark, or several under one name.

    Example:
        >>> import tempfile
        >>> entry = dict(batch="A", operation="forward", base="clone", times={"clone": [2.0, 4.0], "vlm_fuse": [1.0, 2.0]})
        >>> path = Path(tempfile.mkdtemp()) / "results.json"
        >>> _ = path.write_text(json.dumps({"default": {"environment": {"cores": 2}, "results": [entry]}}))
        >>> read(path).rows[1]
        Row(place='default pages, A, forward', contestant='vlm_fuse', seconds=[1.0, 2.0], base='clone', ratios=[0.5, 0.5])
    """
    content = load(path)
    rows = [row for condition, run in conditions(content).items() for row in _rows(path, condition, run)]
    if not rows:
        raise NotResults(f"{path}: no times of a benchmark are in it")
    runs = conditions(content).items()
    names = [(row.place, row.contestant) for row in rows]
    if len(set(names)) < len(names):
        place, contestant = next(name for name in names if names.count(name) > 1)
        raise NotResults(f"{path}: several rows are called {contestant}, {place}")
    notes = [note for _, run in runs for note in (run.get("busy"), run.get("note"), *(run.get("notes") or ())) if note]
    return ResultFile(path, {condition: run.get("environment") or {} for condition, run in runs}, list(dict.fromkeys(notes)), rows)


def load(path: Path) -> Any:
    """The content of a JSON file. Raises NotResults where there is none."""
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise NotResults(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise NotResults(f"{path}: not a JSON file ({error})") from None


def conditions(content: Any) -> dict[str, dict[str, Any]]:
    """A file's runs by page condition: {} where it is not a file of results, {"": run} where it knows no conditions."""
    if not isinstance(content, dict):
        return {}
    if "results" in content or "rounds" in content:
        return {"": content}
    return {name: run for name, run in content.items() if isinstance(run, dict) and isinstance(run.get("results"), list)}


def _rows(path: Path, condition: str, run: dict[str, Any]) -> Iterator[Row]:
    before = f"{CONDITIONS.get(condition, condition)}, " if condition else ""
    if isinstance(run.get("rounds"), dict):  # bench_overhead: mode -> contestant -> rounds
        for mode, times in run["rounds"].items():
            yield from _contestants(path, before + mode, times, HOST_COST_BASE)
    for entry in run["results"] if isinstance(run.get("results"), list) else []:
        times = isinstance(entry, dict) and (entry.get("times") or entry.get("rounds"))
        form = next((form for form in FORMS if times and all(field in entry for field in form.fields)), None)
        if form is None:  # refused, failed or left out
            continue
        place, base = before + form.words.format(**entry), entry.get("base", form.base)
        nested = isinstance(times, dict) and all(isinstance(value, dict) for value in times.values())  # bench_patched: by operation
        for operation, own in times.items() if nested else [("", times)]:
            yield from _contestants(path, f"{place}, {operation}" if operation else place, own, base)


def _contestants(path: Path, place: str, times: Any, base: str | None) -> Iterator[Row]:
    if not isinstance(times, dict):
        raise NotResults(f"{path}: the times of {place} are not listed by contestant")
    for name, seconds in times.items():
        if not (isinstance(seconds, list) and seconds and all(isinstance(value, (int, float)) and value > 0 for value in seconds)):
            raise NotResults(f"{path}: {place}: the times of {name} are not a list of seconds")
    # a ratio to ourselves says nothing about us
    known = base in times and not base.startswith(OWN)
    for name, seconds in times.items():
        ratios = [own / other for own, other in zip(seconds, times[base])] if known else None
        yield Row(place, name, seconds, base if known else None, ratios)
