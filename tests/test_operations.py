"""What the benchmarks time is right, on batches small enough for a test: ours and theirs give the same, to the bit."""

import pytest
import torch

import vlm_fuse
from benchmarks import batches, bench_overhead, operations
from benchmarks.memory import resident_bytes
from benchmarks.presets import IMAGE_SHARES, Load

BF16, FP32 = torch.bfloat16, torch.float32
SHARES = {"half": 0.5, "one": None, "none": 0.0, "all": 1.0}


def batch(share=0.5, dtype=FP32):
    return batches.runs("T", 2, 64, 32, dtype, share=share, run=8, vocab_size=100)


@pytest.mark.parametrize("share", SHARES.values(), ids=SHARES)
@pytest.mark.parametrize("make", [operations.forward_into, operations.forward, operations.forward_backward, operations.in_place])
def test_merges_agree(make, share):
    operations.verify(make(batch(share)))


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize(
    "make",
    [
        operations.backward,
        operations.backward_into,
        lambda made: operations.backward_into(made, text_frozen=True),
        operations.fused_into,
        operations.fused,
        operations.fused_gradient,
    ],
    ids=["backward", "backward_into", "text_frozen", "fused_into", "fused", "fused_gradient"],
)
def test_backward_and_fused_agree(make, dtype):
    operations.verify(make(batch(dtype=dtype)))


def test_conversions_agree():
    for dtypes in ((BF16, FP32, BF16), (FP32, BF16, FP32), (FP32, FP32, BF16)):
        operations.verify(operations.converted(batch(), *dtypes))


def test_packed_legacy_and_documents_agree():
    operations.verify(operations.packed(batches.load("padded", Load("nanovlm-450m", "cauldron_64", 4, 512))))
    operations.verify(operations.images_first(batches.load("legacy", Load("nanovlm-222m", "legacy_49", 8, 128))))
    operations.verify(operations.facts(batches.with_documents(12, length=256, hidden=16)))


def test_a_wrong_result_is_refused():
    right = operations.forward_into(batch())
    with pytest.raises(operations.WrongResult, match="vlm_fuse"):
        operations.verify(right._replace(expected=lambda: (torch.zeros(2, 64, 32),)))


def test_host_cost_is_measured_in_every_mode():
    for mode in bench_overhead.MODES:
        rows = bench_overhead.rows_of(bench_overhead.measure(mode, "cpu", rounds=2, repeats=1))
        assert rows[bench_overhead.EMBEDDING]["p10_us"] > 0
        assert {limit.contestant for limit in bench_overhead.LIMITS} <= {name.removesuffix(", keep").removesuffix(", packed") for name in rows}


@pytest.mark.no_poison
def test_merge_takes_no_memory_of_the_size_of_the_rows():
    """Also none that native code takes from malloc behind torch's back: the process grows by the output, and a little."""
    made = batches.case_a()
    run = next(c.run for c in operations.forward(made, ()).contestants if c.name == operations.OURS)
    grown = resident_bytes(run)
    if grown is None:
        pytest.skip("the kernel does not let the mark of the highest resident size be reset")
    if not vlm_fuse.backends()["cpu"].available:
        pytest.skip("the reference does")
    assert grown <= made.out_bytes + 64 * made.tokens + (4 << 20)


@pytest.mark.parametrize("share", IMAGE_SHARES)
def test_batches_of_every_share_are_whole(share):
    """The images that a batch lists begin and end within its samples, also where the last run of a row is cut short."""
    batch = batches.runs("S", 4, 300, 2, torch.float32, share=share)
    plan = vlm_fuse.plan(batch.input_ids, image_token_id=batch.image_token_id, image_sizes=list(batch.image_sizes) or None)
    assert sum(batch.image_sizes) == len(batch.features) == int((plan.image_ids >= 0).sum())
    assert int(plan.image_ids.max()) == len(batch.image_sizes) - 1
