"""The clocks of the benchmarks: rounds, ratios and transient memory."""

import time

import pytest
import torch

from benchmarks.memory import transient_bytes
from benchmarks.timing import Contestant, Times, interleave, quantile, short_rounds


def test_ratio_is_taken_within_a_round():
    """A machine that slows down tenfold half way through changes no ratio."""
    times = Times({"base": [1.0, 1.0, 10.0, 10.0, 10.0], "other": [2.0, 2.0, 20.0, 20.0, 20.0]})
    row = times.row("other", "base")
    assert row["ratio"] == row["ratio_p20"] == row["ratio_p80"] == 2.0
    assert row["ms"] == 20000.0 and row["rounds"] == 5


def test_a_contestant_in_a_process_of_its_own():
    from benchmarks.bench_apart import Process

    process = Process("C", "vlm_fuse", "default")
    assert process.answer() == ["ready"]
    runs = [process.run() for _ in range(2)]
    process.end()
    assert all(seconds > 0 and faults >= 0 for seconds, faults in runs)
    assert process.running.returncode == 0


def test_quantile_between_neighbours():
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile([0.0, 10.0], 0.2) == pytest.approx(2.0)


def test_rounds_hold_every_contestant_once():
    calls = []
    contestants = [
        Contestant("a", lambda: calls.append("a"), prepare=lambda: calls.append("prepare")),
        Contestant("b", lambda: calls.append("b")),
    ]
    times = interleave(contestants, budget=0, warmup=1, least=4)
    assert len(times.times["a"]) == len(times.times["b"]) == 4
    assert calls.count("a") == calls.count("b") == calls.count("prepare") == 5
    assert all(calls[i + 1] == "a" for i, call in enumerate(calls) if call == "prepare")


def test_sleep_is_measured():
    times = interleave([Contestant("nap", lambda: time.sleep(0.002))], budget=0, least=3)
    assert 0.002 <= times.median("nap") < 0.1
    assert short_rounds([Contestant("nap", lambda: time.sleep(0.001))], rounds=2, calls=2).median("nap") >= 0.001


def test_transient_memory_leaves_the_result_out():
    x = torch.randn(1000, 1000)
    assert transient_bytes(lambda: x.clone()) < 1000
    held = transient_bytes(lambda: (x + 1) * 2)  # the sum dies when the product is there
    assert 4_000_000 <= held < 4_001_000
