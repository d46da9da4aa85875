"""The emulator that runs CUDA kernels on the host: what it must do right, and the mistakes that it must notice.

The kernels are the test's own, tests/emulator/kernels.cu, one program run case by case: as it is (threads are fibers), under
AddressSanitizer, and with threads of the system under ThreadSanitizer.
"""

from __future__ import annotations

import pytest
import torch

from emulator import build

FIBERS, ADDRESS, THREADS = "fibers", "address", "threads"
RIGHT = ("block", "warp", "cluster", "warps", "atomics", "inside", "shared_inside", "no_blocks")

pytestmark = [pytest.mark.no_poison, pytest.mark.skipif(build.missing() is not None, reason=f"nothing to build with: {build.missing()}")]


@pytest.fixture(scope="module")
def programs():
    sources = [build.ROOT / "tests/emulator/kernels.cu", build.CSRC / "cuda/device.cu"]
    folder = build.ROOT / "build" / "emulator"
    return {name: build.compile_together(sources, folder / f"kernels_{name}", flags) for name, flags in build.VARIANTS.items()}


@pytest.fixture
def run(programs):
    def run(variant, case, **environment):
        return build.run_program(programs[variant], case, environment=environment)

    return run


@pytest.mark.parametrize("case", RIGHT)
@pytest.mark.parametrize("variant", build.VARIANTS)
def test_what_is_right_passes(run, variant, case):
    for seed in range(3 if variant == FIBERS else 1):
        ran = run(variant, case, VLM_FUSE_EMULATOR_SEED=str(seed))
        assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.parametrize(
    "case", ["block_without_barrier", "warp_without_barrier", "cluster_without_first_barrier", "cluster_without_last_barrier"]
)
def test_a_missing_barrier_shows(run, case):
    for seed in range(5):
        ran = run(FIBERS, case, VLM_FUSE_EMULATOR_SEED=str(seed))
        assert ran.returncode == 1 and ", not " in ran.stdout, f"seed {seed}: {ran.stdout}{ran.stderr}"
    ran = run(THREADS, case)
    assert "ThreadSanitizer: data race" in ran.stderr, ran.stderr


def test_a_barrier_that_some_threads_do_not_reach_ends_the_process(run):
    ran = run(FIBERS, "deserted")
    assert ran.returncode < 0 and "wait at a barrier that others do not reach" in ran.stderr


def test_a_warp_operation_for_some_lanes_ends_the_process(run):
    ran = run(FIBERS, "some_lanes")
    assert ran.returncode < 0 and "for some lanes only" in ran.stderr


def test_shared_memory_is_poisoned_before_and_after(run):
    assert run(FIBERS, "unwritten").returncode == 0
    too_late = "cluster_without_last_barrier"
    assert f": {0xdbdbdbdb}, not" in run(FIBERS, too_late).stdout
    ran = run(ADDRESS, too_late)
    assert ran.returncode != 0 and "AddressSanitizer: use-after-poison" in ran.stderr, ran.stderr


@pytest.mark.parametrize("variant", build.VARIANTS)
def test_more_shared_memory_than_given_ends_the_process(run, variant):
    ran = run(variant, "less_shared_memory_than_used")
    assert ran.returncode < 0 and "more shared memory than its launch gave" in ran.stderr


def test_an_access_out_of_bounds_ends_the_process(run):
    for case, words in (("outside", "heap-buffer-overflow"), ("shared_outside", "AddressSanitizer")):
        ran = run(ADDRESS, case)
        assert ran.returncode != 0 and words in ran.stderr, ran.stderr


def test_warps_and_lanes_come_in_an_order_of_the_seed(run):
    orders = {seed: run(FIBERS, "order", VLM_FUSE_EMULATOR_SEED=str(seed)).stdout.split() for seed in range(20)}
    assert all(sorted(map(int, order)) == list(range(128)) for order in orders.values())
    assert len({order[0] for order in orders.values()}) >= 6, "of four warps, and the first or last lane of each"
    assert orders[0] == run(FIBERS, "order", VLM_FUSE_EMULATOR_SEED="0").stdout.split()


def test_the_device_is_what_the_environment_says(run):
    assert run(FIBERS, "device").stdout == "4 processors, clusters\n"
    assert run(FIBERS, "device", VLM_FUSE_EMULATED_PROCESSORS="132", VLM_FUSE_EMULATED_CAPABILITY="8").stdout == "132 processors, no clusters\n"


def test_a_launch_that_no_gpu_takes_is_an_error(run):
    ran = run(FIBERS, "part_of_a_warp")
    assert ran.returncode == 3 and "CUDA: launch" in ran.stderr


def test_a_compile_error_is_told_in_the_compilers_words(tmp_path):
    source = tmp_path / "broken.cu"
    source.write_text("int broken = nothing_of_that_name;\n")
    with pytest.raises(RuntimeError, match="nothing_of_that_name"):
        build.compile_together([source], tmp_path / "broken", [])


def test_without_a_gpu_the_tests_of_the_cuda_backend_run_on_the_emulator(backend, device):
    if backend == "cuda":
        assert device == ("cuda" if torch.cuda.is_available() else "cpu")
