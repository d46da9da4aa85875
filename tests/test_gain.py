"""README's "what do I gain?": its numbers are those of the files that it names."""

import re

import pytest

pytest.importorskip("matplotlib")

from benchmarks import gain
from benchmarks.throughput import ways
from test_docs import ROOT

README = (ROOT / "README.md").read_text()


def test_readme_has_the_table_that_the_files_give():
    assert gain.in_readme(README, gain.table(gain.gains())) == README, "run python -m benchmarks.gain --readme"


def test_every_line_names_a_file_that_is_there():
    found = gain.gains()
    assert len(found) >= 10 and all(line.file.is_file() for line in found)
    assert gain.PICTURE.read_bytes().startswith(b"\x89PNG")


def test_gains_are_told_once_a_model_and_in_the_same_order():
    results = gain.load(gain.newest("throughput/throughput.json"))["results"]
    line = gain.gains()[0]
    assert line.before.split(" / ") == [f"{result['rows'][ways.STOCK]['tokens_per_second']:,.0f}" for result in results]
    assert len(line.gain.split(" / ")) == len(results) == 4


def test_what_was_to_be_shown_is():
    """Of the result that is kept: 1.25 and 3 times the useful tokens a second of padding, and isolation for nothing."""
    for line, least in zip(gain.gains(), (1.25, 3.0, 1.0)):
        assert all(float(ratio) >= least for ratio in re.findall(r"[\d.]+(?= x)", line.gain)), line


def test_the_newest_result_is_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(gain, "RESULTS", tmp_path)
    with pytest.raises(FileNotFoundError, match="not measured yet"):
        gain.newest("masks/masks.json")
    for date in ("2026-01-02", "2026-11-30", "2026-02-03"):
        (tmp_path / f"cpu-{date}").mkdir()
        (tmp_path / f"cpu-{date}" / "one.json").touch()
    assert gain.newest("one.json") == tmp_path / "cpu-2026-11-30" / "one.json"


def test_only_the_table_is_replaced():
    text = f"before\n{gain.BEGIN}\nold\n{gain.END}\nafter"
    assert gain.in_readme(text, "new") == f"before\n{gain.BEGIN}\nnew\n{gain.END}\nafter"
