"""How contestants are timed: interleaved in one process, medians, ratios round by round.

The speed of a shared machine drifts by a factor of two within the hour, so only what ran side by side is compared:
each round runs every contestant once, in an order shuffled anew (seeded), and a ratio is taken within its round.
"""

from __future__ import annotations

import os
import platform
import random
import resource
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any, Callable, NamedTuple

import torch

FLUSH_BYTES = 256 << 20  # larger than the L2 of any GPU at hand
LONG_ROUND = 2.0  # seconds after which one round is enough to warm up
HEADSTART_CYCLES = 2_000_000  # about 1 ms of GPU work queued ahead, so that the host is not timed


class Contestant(NamedTuple):
    """Something to time. `run` is timed, its result dropped after the clock has stopped; `prepare` is not timed."""

    name: str
    run: Callable[[], Any]
    prepare: Callable[[], Any] | None = None


class Times(NamedTuple):
    """What each contestant took in each round: times[name][round] in seconds, faults[name][round] in page faults."""

    times: dict[str, list[float]]
    faults: dict[str, list[int]] = {}

    def median(self, name: str) -> float:
        return statistics.median(self.times[name])

    def quantile(self, name: str, q: float) -> float:
        return quantile(self.times[name], q)

    def ratios(self, name: str, base: str) -> list[float]:
        """Time of `name` over time of `base`, within each round."""
        return [a / b for a, b in zip(self.times[name], self.times[base])]

    def row(self, name: str, base: str) -> dict[str, float]:
        """What a table shows of one contestant: milliseconds and the ratio to `base`, with their spread."""
        ratios = self.ratios(name, base)
        return {
            "ms": 1e3 * self.median(name),
            "ms_p20": 1e3 * self.quantile(name, 0.2),
            "ms_p80": 1e3 * self.quantile(name, 0.8),
            "ratio": statistics.median(ratios),
            "ratio_p20": quantile(ratios, 0.2),
            "ratio_p80": quantile(ratios, 0.8),
            "rounds": len(ratios),
            "faults": statistics.median(self.faults[name]) if self.faults.get(name) else None,
        }


def quantile(values: list[float], q: float) -> float:
    """The q-th quantile, 0 to 1, between neighbours by straight line."""
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def interleave(
    contestants: list[Contestant],
    *,
    budget: float,
    warmup: int = 2,
    least: int = 5,
    most: int = 60,
    device: str = "cpu",
    seed: int = 0,
    tick: Callable[[], None] | None = None,
) -> Times:
    """Time contestants in turn.

    Args:
        contestants: names must differ.
        budget: seconds for the measured rounds; decides their number together with `least` and `most`.
        warmup: rounds that are not counted (also where compilers run).
        device: "cpu" or "cuda"; on a GPU a clearing of its caches is queued ahead of each run, and events are timed.
        seed: of the order of the contestants in each round.
        tick: called after every round, for a progress bar.
    """
    clock = _Cuda() if device == "cuda" else cpu_clock
    for _ in range(warmup):
        started = time.perf_counter()
        for contestant in contestants:
            _once(contestant, clock)
        round_seconds = time.perf_counter() - started
        if round_seconds > LONG_ROUND:
            break
    rounds = max(least, min(most, int(budget / max(round_seconds, 1e-9))))
    order, shuffle = list(contestants), random.Random(seed).shuffle
    times: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    faults: dict[str, list[int]] = {contestant.name: [] for contestant in contestants}
    for _ in range(rounds):
        shuffle(order)
        for contestant in order:
            seconds, faulted = _once(contestant, clock)
            times[contestant.name].append(seconds)
            faults[contestant.name].append(faulted)
        if tick is not None:
            tick()
    return Times(times, faults)


class Turns(NamedTuple):
    """What `take_turns` found: a median of each turn, and what the first call of each turn took by itself."""

    times: Times
    first: dict[str, list[float]]


def take_turns(
    contestants: list[Contestant],
    *,
    budget: float,
    turn: float = 0.02,
    calls: int = 12,
    warmup: int = 2,
    least: int = 3,
    most: int = 30,
    device: str = "cpu",
    seed: int = 0,
    tick: Callable[[], None] | None = None,
) -> Turns:
    """Time contestants of very different length in turn: microseconds beside seconds.

    Each round gives every contestant a turn of several calls. The first call, after all the others' work, finds cold
    caches and sleeping threads: that costs a short contestant more than the work itself, and is kept apart. The rest of the
    turn counts with its median. A contestant whose call is longer than a turn makes only one call a round, which counts.

    Args:
        budget: seconds for the measured rounds; decides their number together with `least` and `most`.
        turn: seconds of a turn, `calls`: its calls at most, beside the first.
        warmup, device, seed, tick: as in `interleave`.
    """
    clock = _Cuda() if device == "cuda" else cpu_clock
    # the shortest of the warm-up: one that compiles in its first call, or is held up once, is not long for that
    shortest = dict.fromkeys((contestant.name for contestant in contestants), float("inf"))
    for _ in range(max(1, warmup)):
        for contestant in contestants:
            shortest[contestant.name] = min(shortest[contestant.name], _once(contestant, clock)[0])
    more = {name: min(calls, int(turn / max(seconds, 1e-9))) for name, seconds in shortest.items()}
    round_seconds = sum(seconds * (1 + more[name]) for name, seconds in shortest.items())
    rounds = max(least, min(most, int(budget / max(round_seconds, 1e-9))))
    order, shuffle = list(contestants), random.Random(seed).shuffle
    times: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    faults: dict[str, list[int]] = {contestant.name: [] for contestant in contestants}
    first: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    for _ in range(rounds):
        shuffle(order)
        for contestant in order:
            name = contestant.name
            cold = _once(contestant, clock)
            rest = [_once(contestant, clock) for _ in range(more[name])] or [cold]
            first[name].append(cold[0])
            times[name].append(statistics.median(seconds for seconds, _ in rest))
            faults[name].append(statistics.median_low(faulted for _, faulted in rest))
        if tick is not None:
            tick()
    return Turns(Times(times, faults), first)


def _once(contestant: Contestant, clock) -> tuple[float, int]:
    if contestant.prepare is not None:
        contestant.prepare()
    return clock(contestant.run)


def cpu_clock(run) -> tuple[float, int]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    started = time.perf_counter()
    result = run()
    stopped = time.perf_counter()
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    del result
    return stopped - started, faults


class _Cuda:
    """Event time of one run, behind queued work that also clears the L2 cache.

    A contestant that reads from the device on the host waits for that work too; the start event lies behind it, so
    the wait itself is not counted, but what the host does afterwards is, as in real use.
    """

    def __init__(self):
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def __call__(self, run) -> tuple[float, int]:
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(HEADSTART_CYCLES)
        self.flush.zero_()
        start.record()
        result = run()
        stop.record()
        stop.synchronize()
        del result
        return start.elapsed_time(stop) / 1e3, 0


def short_rounds(contestants: list[Contestant], *, rounds: int, calls: int, settle: Callable[[], None] = lambda: None) -> Times:
    """Host time of one call, for functions of microseconds: each round makes `calls` calls of every contestant.

    settle: called untimed before each; on a GPU a synchronisation, so that no one waits for another's queue.
    """
    times: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    order, shuffle = list(contestants), random.Random(0).shuffle
    for contestant in contestants:
        for _ in range(calls):
            contestant.run()
    clock = time.perf_counter
    for _ in range(rounds):
        shuffle(order)
        for contestant in order:
            run, repeats = contestant.run, range(calls)
            settle()
            started = clock()
            for _ in repeats:
                run()
            times[contestant.name].append((clock() - started) / calls)
    return Times(times)


def environment(device: str = "cpu") -> dict[str, Any]:
    """Where and how a run was made: what a reader needs to judge its numbers."""
    facts = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "transparent_hugepage": _thp_state(),
        "THP_MEM_ALLOC_ENABLE": os.environ.get("THP_MEM_ALLOC_ENABLE"),
        "free_page_reporting": _free_page_reporting(),
        **{name: value for name, value in sorted(os.environ.items()) if name.startswith("VLM_FUSE_")},
        "load": os.getloadavg()[0],
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts.update(gpu=properties.name, gpu_memory_gib=round(properties.total_memory / 2**30), cuda=torch.version.cuda)
    return facts


def busy_note(load: float | None = None) -> str | None:
    """A sentence where something else ran when the measurement began, else None."""
    load = os.getloadavg()[0] if load is None else load
    if load > 0.5:
        return f"the machine was not idle: load {load:.1f} on {os.cpu_count()} cores before the run"
    return None


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _thp_state() -> str | None:
    try:
        with open("/sys/kernel/mm/transparent_hugepage/enabled") as file:
            return file.read().split("[")[1].split("]")[0]
    except (OSError, IndexError):
        return None


def _free_page_reporting() -> bool:
    """A virtual machine that hands free memory back to its host after two seconds; huge pages then are slow to come back.

    Bit 5 of the features of virtio-balloon (virtio specification 1.2, section 5.5.3).
    """
    for features in Path("/sys/bus/virtio/drivers/virtio_balloon").glob("virtio*/features"):
        try:
            if features.read_text()[5] == "1":
                return True
        except (OSError, IndexError):
            pass
    return False


def _commit() -> str | None:
    try:
        here = os.path.dirname(os.path.abspath(__file__))
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        dirty = subprocess.run(["git", "status", "--porcelain", "--untracked-files=no"], cwd=here, capture_output=True, text=True, check=True)
        return commit.stdout.strip() + ("+changes" if dirty.stdout.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return None
