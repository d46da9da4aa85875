"""``python -m vlm_fuse bench``: the suite and what it does with a benchmark that fails; two results compared; the roofline picture."""

import doctest
import json
import subprocess
import sys

import pytest

import vlm_fuse.__main__ as command_line
from benchmarks import bars, compare, result_files, roofline, suite, watched
from test_docs import ROOT


@pytest.mark.parametrize("module", [bars, compare, result_files, roofline, suite, watched], ids=lambda module: module.__name__)
def test_examples_run(module):
    failed, tried = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert tried and not failed


# --- compare ----------------------------------------------------------------------------------------------------------


def entry(**times):
    """Rounds of a base and of contestants, as multiples of a base that drifts from round to round."""
    drift = [0.010, 0.020, 0.015, 0.012, 0.018]
    made = {name: [factor * base for factor, base in zip(factors, drift)] for name, factors in times.items()}
    return dict(batch="A", operation="forward", base="clone", base_bytes=8_000_000, pages="default", times={"clone": drift, **made})


def write(path, *entries, **facts):
    path.parent.mkdir(parents=True, exist_ok=True)
    about = dict(cpu="EPYC", torch="2.13", commit="abc", threads=2, date="today", load=0.1) | facts
    path.write_text(json.dumps({"default": {"environment": about, "busy": None, "results": list(entries)}}))
    return path


STEADY = [1.0, 1.01, 0.99, 1.0, 1.0]


@pytest.fixture
def planted(tmp_path):
    old = entry(same=STEADY, faster=STEADY, slower=STEADY, wide=[0.5, 1.0, 2.0, 1.0, 1.5], gone=STEADY)
    new = entry(same=STEADY, faster=[0.5] * 5, slower=[2.0] * 5, wide=[1.3] * 5, come=STEADY)
    # the whole machine is three times as slow: nothing that a ratio to the copy would show
    new["times"] = {name: [3 * value for value in values] for name, values in new["times"].items()}
    return write(tmp_path / "old.json", old), write(tmp_path / "new.json", new, torch="2.14", date="tomorrow", load=9)


def test_only_what_lies_outside_both_spreads_is_called_faster_or_slower(planted):
    made = compare.compare(*map(result_files.read, planted))
    verdicts = {row.contestant: row.verdict for row in made.rows}
    assert verdicts == {"clone": compare.BASE, "same": compare.WITHIN, "faster": compare.FASTER, "slower": compare.SLOWER, "wide": compare.WITHIN}
    assert {row.contestant: row.unit for row in made.rows}["faster"] == "x clone"
    rows = {row.contestant: row for row in made.rows}
    assert rows["faster"].ratio == pytest.approx(0.5) and rows["slower"].ratio == pytest.approx(2) and rows["clone"].ratio == pytest.approx(3)
    assert [name for _, name in made.only_old] == ["gone"] and [name for _, name in made.only_new] == ["come"]


def test_facts_that_differ_are_told_but_not_date_and_load(planted):
    made = compare.compare(*map(result_files.read, planted))
    assert made.environment == [compare.Difference("torch", "", "2.13", "2.14")]
    two = {"default": {"cores": 2, "threads": 2}, "huge": {"cores": 2, "threads": 2}}
    other = {"default": {"cores": 4, "threads": 2}, "huge": {"cores": 4, "threads": 1}}
    assert compare.differences(two, other) == [compare.Difference("cores", "", 2, 4), compare.Difference("threads", "huge", 2, 1)]


def test_the_command_prints_and_writes(planted, tmp_path, capsys):
    files = tmp_path / "made.json", tmp_path / "made.png"
    status = suite.main(["compare", *map(str, planted), "--json", str(files[0]), "--plot", str(files[1])])
    told = capsys.readouterr().out
    assert status == 0
    assert "1 faster, 1 slower, 2 within the spread of both; 1 in old only; 1 in new only." in told
    assert "| torch" in told and "default pages, A, forward" in told and "gone" in told and "come" in told
    (made,) = json.loads(files[0].read_text())
    assert {row["contestant"] for row in made["rows"]} == {"clone", "same", "faster", "slower", "wide"}
    assert files[1].read_bytes().startswith(b"\x89PNG")


def test_without_a_copy_milliseconds_are_compared():
    """A ratio to ourselves would call it a success of the others when we become slower."""
    rounds = dict(batch="4K", operation="BlockMask", base="vlm_fuse", base_bytes=0, pages="default")
    rows = {}
    for which, seconds in (("old", 0.001), ("new", 0.002)):
        content = {"environment": {}, "results": [rounds | {"times": {"vlm_fuse": [seconds] * 5, "create_block_mask": [0.1] * 5}}]}
        rows[which] = list(result_files._rows(ROOT, "", content))
    made = [compare._compared(old, new) for old, new in zip(rows["old"], rows["new"])]
    assert [(row.contestant, row.unit, row.verdict) for row in made] == [("vlm_fuse", "ms", "slower"), ("create_block_mask", "ms", "within spread")]


def test_throughput_is_compared_by_its_ratio_to_the_stock_model(tmp_path):
    path = tmp_path / "throughput.json"
    result = dict(
        title="nanoVLM",
        size="tiny",
        useful_tokens=100,
        distribution="m4",
        samples=[[9]],
        capacity=64,
        times={"stock, left padding": [2.0, 4.0], "packed": [1.0, 1.0]},
    )
    path.write_text(json.dumps({"environment": {}, "notes": ["busy"], "seconds": 1.0, "results": [result]}))
    file = result_files.read(path)
    assert file.notes == ["busy"] and file.rows[1] == ("nanoVLM, tiny, 100 tokens a step", "packed", [1.0, 1.0], "stock, left padding", [0.5, 0.25])


def test_few_rounds_are_said(tmp_path, capsys):
    short = entry(vlm_fuse=STEADY)
    short["times"] = {name: values[:2] for name, values in short["times"].items()}
    path = str(write(tmp_path / "a.json", short))
    assert suite.main(["compare", path, path]) == 0
    assert "Some rows have 2 rounds" in capsys.readouterr().out


def test_folders_are_compared_file_by_file(tmp_path, capsys):
    for which in ("old", "new"):
        write(tmp_path / which / "merge" / "results.json", entry(vlm_fuse=STEADY))
        (tmp_path / which / "suite.json").write_text("{}")
        (tmp_path / which / "notes.json").write_text("{}")
    write(tmp_path / "old" / "apart" / "results.json", entry(vlm_fuse=STEADY))
    assert suite.main(["compare", str(tmp_path / "old"), str(tmp_path / "new")]) == 0
    told = capsys.readouterr().out
    assert told.count("# merge/results.json") == 1
    assert "notes.json is not compared" in told and "suite.json" not in told and "apart/results.json is in" in told


#: every kind of file that a benchmark has written.
STORED = sorted(path for path in (ROOT / "benchmarks" / "results").rglob("*.json") if path.parent.name != "padding_experiment")


@pytest.mark.parametrize("path", STORED, ids=lambda path: "/".join(path.parts[-3:-1]))
def test_stored_results_are_read_and_equal_themselves(path):
    file = result_files.read(path)
    assert all(facts["torch"] for facts in file.environments.values())
    made = compare.compare(file, file)
    assert len(made.rows) == len(file.rows) and not made.only_old and not made.environment
    assert {row.verdict for row in made.rows} <= {compare.WITHIN, compare.BASE}
    assert compare.text(made)


REFUSED = {
    "no_json": ("not json", "not a JSON file"),
    "a_list": ("[1, 2]", "no times of a benchmark"),
    "no_results": ('{"environment": {}, "runs": []}', "no times of a benchmark"),
    "no_rounds": ('{"environment": {}, "results": [{"batch": "A", "operation": "f", "times": {"clone": []}}]}', "not a list of seconds"),
    "words": ('{"environment": {}, "results": [{"batch": "A", "operation": "f", "times": {"clone": ["x"]}}]}', "not a list of seconds"),
    "two_of_a_name": (json.dumps({"results": [{"batch": "A", "operation": "f", "times": {"clone": [1.0]}}] * 2}), "several rows are called clone"),
    "no_contestants": ('{"environment": {}, "results": [{"batch": "A", "operation": "f", "times": [1.0]}]}', "not listed by contestant"),
}


@pytest.mark.parametrize("content, message", REFUSED.values(), ids=REFUSED)
def test_files_that_are_no_results_are_refused(tmp_path, capsys, content, message):
    good, bad = write(tmp_path / "good.json", entry(vlm_fuse=STEADY)), tmp_path / "bad.json"
    bad.write_text(content)
    assert suite.main(["compare", str(good), str(bad)]) == 2
    told = capsys.readouterr().err
    assert message in told and "bad.json" in told


def test_paths_that_cannot_be_compared_are_refused(tmp_path, capsys):
    good = write(tmp_path / "good.json", entry(vlm_fuse=STEADY))
    other = write(tmp_path / "other.json", entry(vlm_fuse=STEADY) | {"batch": "B"})
    (tmp_path / "empty").mkdir()
    for old, new, message in (
        (good, tmp_path / "none.json", "no such file"),
        (good, tmp_path, "one is a folder"),
        (good, other, "no row in common"),
        (tmp_path, tmp_path / "empty", "no results in files of equal names"),
    ):
        assert suite.main(["compare", str(old), str(new)]) == 2
        assert message in capsys.readouterr().err


# --- suite ------------------------------------------------------------------------------------------------------------

FAKE = """
import argparse, json, pathlib, sys
parser = argparse.ArgumentParser()
parser.add_argument("--out", type=pathlib.Path)
parser.add_argument("--quick", action="store_true")
parser.add_argument("--device", default="none")
asked = parser.parse_args()
(asked.out / "fake.json").write_text(json.dumps(vars(asked), default=str))
(asked.out / "fake.md").write_text("# Fake\\n\\nwords\\n\\n| contestant | ms |\\n| --- | --- |\\n| ours | 1 |\\n\\nmore\\n")
print("drawn", end="\\r")
print("measured")
"""


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    """Three benchmarks in a folder of their own; the second fails."""
    (tmp_path / "good_benchmark.py").write_text(FAKE)
    (tmp_path / "bad_benchmark.py").write_text("print('begins'); raise RuntimeError('wrong result')")
    monkeypatch.setattr(suite, "ROOT", tmp_path)
    good, bad = suite.Benchmark("good", "good_benchmark", "", "0 / 0", ("cpu", "cuda")), suite.Benchmark("bad", "bad_benchmark", "", "0 / 0")
    made = (good, bad, good._replace(name="last", devices=("cpu",)))
    monkeypatch.setattr(suite, "BENCHMARKS", made)
    return tmp_path / "out"


def test_one_that_fails_does_not_stop_the_others(fakes, capsys):
    assert suite.main(["--quick", "--out", str(fakes)]) == 1
    told = capsys.readouterr().out
    assert "torch: " in told.splitlines()[4], "the environment comes first"
    assert "good: ok" in told and "bad: failed (1)" in told and "last: ok" in told
    assert "bad: RuntimeError: wrong result" in told
    assert "| ours | 1 |" in told and "good/fake.json, fake.md, log.txt" in told
    assert json.loads((fakes / "good" / "fake.json").read_text()) == {"out": str(fakes / "good"), "quick": True, "device": "cpu"}
    assert json.loads((fakes / "last" / "fake.json").read_text())["device"] == "none", "it knows no --device"
    assert (fakes / "good" / "log.txt").read_text() == "measured\n"
    data = json.loads((fakes / "suite.json").read_text())
    assert [(told["name"], told["ended"]) for told in data["benchmarks"]] == [("good", "ok"), ("bad", "failed (1)"), ("last", "ok")]
    assert data["environment"]["torch"] and "| ours | 1 |" in (fakes / "suite.md").read_text()


def test_only_some_and_those_of_the_device(fakes, capsys, monkeypatch):
    assert suite.main(["--only", "last, good", "--out", str(fakes)]) == 0
    assert "bad" not in capsys.readouterr().out
    # a second run tells its own files only
    (fakes / "good" / "older.json").write_text("{}")
    outcome = suite.run_one(suite.BENCHMARKS[0], fakes / "good", bars.Bars(1), device="cuda", quick=False)
    assert json.loads((fakes / "good" / "fake.json").read_text())["device"] == "cuda"
    assert [path.name for path in outcome.files] == ["fake.json", "fake.md", "log.txt"]
    assert suite.run_one(suite.BENCHMARKS[2], fakes / "x", bars.Bars(1), device="cuda", quick=False).ended == "left out: measures no cuda"


def test_an_interruption_ends_the_suite_and_tells_what_there_is(fakes, capsys, monkeypatch):
    run = suite.run_one

    def interrupted(benchmark, *given, **more):
        if benchmark.name == "bad":
            raise KeyboardInterrupt
        return run(benchmark, *given, **more)

    monkeypatch.setattr(suite, "run_one", interrupted)
    assert suite.main(["--out", str(fakes)]) == suite.INTERRUPTED
    told = capsys.readouterr().out
    assert "good: ok" in told and "| bad       | interrupted" in told and "Interrupted." in told and "last" not in told


def test_unknown_names_are_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        suite.main(["--only", "merge,moon"])
    assert ended.value.code == 2
    assert "no benchmark is called moon; there are overhead, merge" in capsys.readouterr().err


def test_the_list_has_every_benchmark(capsys):
    assert suite.main(["--list"]) == 0
    told = capsys.readouterr().out
    modules = {benchmark.module for benchmark in suite.BENCHMARKS}
    assert {f"benchmarks.{path.stem}" for path in (ROOT / "benchmarks").glob("bench_*.py")} <= modules
    assert all(f"| {benchmark.name} " in told for benchmark in suite.BENCHMARKS)


def test_a_command_that_believes_to_have_a_terminal(tmp_path):
    code = "import sys; print(sys.stderr.isatty(), end='\\r'); print('é' * 3); sys.exit(3)"
    seen = []
    assert watched.run([sys.executable, "-c", code], tmp_path / "log.txt", seen.append, columns=60) == 3
    assert (tmp_path / "log.txt").read_text() == "ééé\n" and seen[-1] == "ééé"


def test_an_interrupted_command_is_ended(tmp_path):
    def interrupt(line):
        if line:
            raise KeyboardInterrupt

    begun = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    with pytest.raises(KeyboardInterrupt):
        watched.run([sys.executable, "-c", begun], tmp_path / "log.txt", interrupt)
    process = int((tmp_path / "log.txt").read_text())
    assert subprocess.run(["kill", "-0", str(process)], capture_output=True).returncode != 0


# --- python -m vlm_fuse -----------------------------------------------------------------------------------------------


def test_an_installed_package_says_where_the_benchmarks_are(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command_line, "ROOT", tmp_path)
    assert command_line.main(["bench", "--quick"]) == 2
    told = capsys.readouterr().err
    assert "not part of the installed package" in told and "make bench" in told


def test_the_package_imports_no_benchmark_and_bench_hands_over(tmp_path):
    """From a folder that has modules called benchmarks of its own."""
    (tmp_path / "benchmarks.py").write_text("raise RuntimeError('the wrong one')")
    code = (
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]\n"
        "import vlm_fuse, vlm_fuse.__main__\n"
        "assert not any(name.split('.')[0] == 'benchmarks' for name in sys.modules)\n"
        "sys.exit(vlm_fuse.__main__.main(['bench', '--list']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == suite.listing()


# --- roofline ---------------------------------------------------------------------------------------------------------


def test_every_base_that_moves_bytes_has_its_panel():
    """A new operation whose base is not known would be missing from the picture without a word."""
    entries = [entry for path in STORED for run in result_files.conditions(result_files.load(path)).values() for entry in run.get("results", [])]
    bases = {entry["base"] for entry in entries if entry.get("base_bytes")}
    assert len(bases) >= 6 and bases <= set(roofline.KINDS)


def test_the_picture_has_a_limit_for_every_point(tmp_path, monkeypatch, capsys):
    small = entry(vlm_fuse=STEADY, hf=[5.0] * 5)
    large = small | {"base_bytes": 2 * small["base_bytes"], "operation": "forward + backward", "base": "two clones"}
    large["times"] = {"two clones" if name == "clone" else name: values for name, values in small["times"].items()}
    masks = small | {"operation": "dense", "base": "fill_", "times": {"fill_": [0.1] * 3, "vlm_fuse": [0.2] * 3}}
    nothing = [small | {"base_bytes": 0}, {"left_out": "time"}, dict(small, times={})]
    made = roofline.panels([small, large, masks, *nothing])
    assert [(panel.kind, len(panel.points), list(panel.limits)) for panel in made] == [
        (roofline.ALLOCATED, 4, ["clone", "two clones"]),
        (roofline.FILLED, 1, ["fill_"]),
    ]
    write(tmp_path / "merge" / "results.json", small, large)
    write(tmp_path / "masks" / "masks.json", masks)
    monkeypatch.setattr(sys, "argv", ["roofline", str(tmp_path)])
    assert roofline.main() == 0
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("roofline.png", "roofline_masks.png"))
    monkeypatch.setattr(sys, "argv", ["roofline", str(tmp_path / "none")])
    assert roofline.main() == 2
    assert "no such folder" in capsys.readouterr().err
