"""dense, additive, bits and the block map on every backend, against the intervals element by element."""

import pickle

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vlm_fuse
from checking import assert_bits, examples, serving
from mask_cases import any_masks, by_hand, document_masks, interval_masks
from test_large import memory_gib
from vlm_fuse import Attend, IntervalMask, reference
from vlm_fuse.backend import choose
from vlm_fuse.batch import ROW_DTYPES

BLOCK_MAP = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices")


def seen(mask) -> torch.Tensor:
    return torch.tensor(by_hand(mask), dtype=torch.bool).view(*mask.kv_lo.shape, mask.kv_length)


def block_map_by_hand(mask, q_block, kv_block):
    """The eight tensors, block by block."""
    elements = seen(mask)
    B, Q, K = elements.shape
    R, C = -(-Q // q_block), -(-K // kv_block)
    full, partial = torch.zeros(2, B, R, C, dtype=torch.bool)
    for b in range(B):
        for r in range(R):
            for c in range(C):
                block = elements[b, r * q_block : (r + 1) * q_block, c * kv_block : (c + 1) * kv_block]
                full[b, r, c] = block.numel() == q_block * kv_block and bool(block.all())
                partial[b, r, c] = bool(block.any()) and not full[b, r, c]
    made = []
    for kind in (partial, full, partial.transpose(1, 2), full.transpose(1, 2)):
        lines = kind.flatten(0, 1).tolist()
        ordered = [[c for c, here in enumerate(line) if here] + [c for c, here in enumerate(line) if not here] for line in lines]
        made.append(torch.tensor([sum(line) for line in lines], dtype=torch.int32).view(B, 1, kind.shape[1]))
        made.append(torch.tensor(ordered, dtype=torch.int32).view(B, 1, *kind.shape[1:]))
    return made


def test_dense_and_additive(backend, device):
    @examples(backend)
    @given(any_masks())
    def check(mask):
        expected, mask = seen(mask)[:, None], mask.to(device)
        with serving(backend):
            assert_bits(mask.dense(), expected, "dense")
            for dtype in ROW_DTYPES if backend != "triton" else ROW_DTYPES[:2]:
                lowest = torch.full((), torch.finfo(dtype).min, dtype=dtype)
                assert_bits(mask.additive(dtype), torch.where(expected, torch.zeros((), dtype=dtype), lowest), f"additive {dtype}")

    check()


def test_bits_are_those_of_numpy(backend, device):
    @examples(backend)
    @given(any_masks())
    def check(mask):
        packed = numpy.packbits(seen(mask).flatten(1).numpy(), axis=1, bitorder="little")
        with serving(backend):
            assert_bits(mask.to(device).bits(), torch.from_numpy(packed), "bits")

    check()


def test_block_map(backend, device):
    @examples(backend)
    @given(any_masks(), st.integers(1, 9), st.integers(1, 9))
    def check(mask, q_block, kv_block):
        expected = block_map_by_hand(mask, q_block, kv_block)
        with serving(backend):
            made = mask.to(device).block_mask((q_block, kv_block))
        for name, tensor in zip(BLOCK_MAP, expected):
            assert_bits(getattr(made, name), tensor, name)
        assert made.BLOCK_SIZE == (q_block, kv_block) and made.seq_lengths == (mask.kv_lo.shape[1], mask.kv_length)

    check()


def test_lowest_and_highest_key_of_a_block_are_not_enough(backend, device):
    """The rows of a block reach from its first key to its last, and none of them covers it."""
    lo = torch.tensor([[0, 2, 0, 0]], dtype=torch.int32, device=device)
    hi = torch.tensor([[2, 4, 4, 4]], dtype=torch.int32, device=device)
    with serving(backend):
        made = IntervalMask(lo, hi, 4).block_mask((4, 4))
    assert made.kv_num_blocks.tolist() == [[[1]]] and made.full_kv_num_blocks.tolist() == [[[0]]]


def test_bounds_of_any_numbers_are_cut(backend, device):
    """On a GPU nobody looks at the values first: whatever they are, out of order or outside, kernels stay inside and agree."""
    kernels = choose(backend, torch.device(device).type)
    generator = torch.Generator().manual_seed(0)
    extremes = torch.tensor((-(2**31), -1, 0, 1, 3, 5, 7, 10, 11, 12, 2**31 - 1))
    numbers = extremes[torch.randint(len(extremes), (4, 3, 60), generator=generator)].int()
    for pair in (True, False):
        parts = [part.contiguous().to(device) if number < 2 or pair else None for number, part in enumerate(numbers)]
        lo, hi, lo2, hi2 = numbers[..., None]
        key = torch.arange(11)
        inside = (key >= lo) & (key < hi) | ((key >= lo2) & (key < hi2) & pair)
        assert_bits(kernels.dense(*parts, 11, torch.bool), inside[:, None], "dense")
        assert_bits(kernels.bits(*parts, 11), torch.from_numpy(numpy.packbits(inside.flatten(1).numpy(), axis=1, bitorder="little")), "bits")
        if hasattr(kernels, "segments"):
            assert torch.equal(kernels.segments(*parts, 11), reference.segments(*numbers[:2], *(numbers[2:] if pair else (None, None)), 11))
        wanted = reference.block_map(*numbers[:2], *(numbers[2:] if pair else (None, None)), 11, 2, 3)
        for name, made, expected in zip(BLOCK_MAP, kernels.block_map(*parts, 11, 2, 3), wanted):
            assert_bits(made, expected, name)


def test_two_runs_are_equal(backend, device):
    mask = IntervalMask.from_cu_seqlens(torch.tensor([0, 5, 5, 30, 41], device=device), Attend(window=6))
    with serving(backend):
        for render in (mask.dense, mask.bits, lambda: mask.additive(torch.float16)):
            assert_bits(render(), render().cpu())
        for one, other in zip(mask.block_mask(8).as_tuple(), mask.block_mask(8).as_tuple()):
            assert torch.equal(one, other) if isinstance(one, torch.Tensor) else True


@pytest.mark.no_poison
@pytest.mark.large
def test_bits_beyond_2_31(backend, device):
    """FlashInfer's own packing counts bits in 32 bits, which end at 46341 rows."""
    if backend == "reference" or (backend == "triton" and device == "cpu") or memory_gib() < 4:
        pytest.skip("too slow, or too little memory")
    T = 46344
    lo = torch.zeros(1, T, dtype=torch.int32, device=device)
    hi = torch.arange(1, T + 1, dtype=torch.int32, device=device)[None]
    with serving(backend):
        bits = IntervalMask(lo, hi, T).bits()
    assert bits.shape == (1, T * T // 8)
    for row in (0, 1, T // 2, T - 2, T - 1):
        line = numpy.unpackbits(bits[0, row * T // 8 : (row + 1) * T // 8].cpu().numpy(), bitorder="little")
        assert line[: row + 1].all() and not line[row + 1 :].any(), f"row {row}"


@pytest.mark.no_poison
@pytest.mark.large
def test_dense_beyond_2_31(backend, device):
    if backend == "reference" or (backend == "triton" and device == "cpu") or memory_gib() < 8:
        pytest.skip("too slow, or too little memory")
    T = 46400
    with serving(backend):
        made = IntervalMask.from_cu_seqlens(torch.tensor([0, T - 3, T], device=device)).dense()
    assert made[0, 0, -1].nonzero()[:, 0].tolist() == [T - 3, T - 2, T - 1]
    assert made[0, 0, T - 4].sum() == T - 3 and made[0, 0, T // 2].sum() == T // 2 + 1


# -- the mask itself ---------------------------------------------------------------------------------------------------


@examples("reference", 3)
@given(st.one_of(document_masks(), interval_masks()), st.data())
def test_slice_is_a_slice_of_the_dense_mask(mask, data):
    def cut(size):
        start = data.draw(st.integers(0, size))
        return start, data.draw(st.integers(start, size))

    q_start, q_stop = cut(mask.kv_lo.shape[1])
    kv_start, kv_stop = cut(mask.kv_length)
    made = mask.slice(q_start, q_stop, kv_start, kv_stop)
    assert torch.equal(made.dense(), mask.dense()[:, :, q_start:q_stop, kv_start:kv_stop])
    IntervalMask(made.kv_lo, made.kv_hi, made.kv_length, made.kv_lo2, made.kv_hi2)  # in order, or refused
    assert torch.equal(mask.slice(q_start, q_stop).dense(), mask.dense()[:, :, q_start:q_stop])


@pytest.mark.parametrize("wrong", [(-1, 2), (2, 1), (0, 6), (0, 2, 3, 2), (0, 2, 0, 6), (0, 2, -1)])
def test_slices_outside_are_refused(wrong):
    with pytest.raises(ValueError, match="not a range of the 5"):
        IntervalMask.from_document_ids(torch.zeros(1, 5, dtype=torch.int32)).slice(*wrong)
    with pytest.raises(TypeError, match="q_start"):
        IntervalMask.from_document_ids(torch.zeros(1, 5, dtype=torch.int32)).slice(0.0, 2)


def test_decoding_with_a_cache_of_the_window_only():
    """One token after another, the cache holds the last keys: what each sees is what its row of the whole mask says."""
    window, length = 4, 11
    whole = IntervalMask.from_document_ids(torch.zeros(1, length, dtype=torch.int32), Attend(window=window))
    for step in range(length):
        first = max(0, step + 1 - window)
        row = whole.slice(step, step + 1, first, step + 1)
        assert row.dense().shape == (1, 1, 1, step + 1 - first) and row.dense().all()


def test_from_cu_seqlens():
    mask = IntervalMask.from_cu_seqlens(torch.tensor([0, 2, 2, 5], dtype=torch.int32), Attend(window=2), length=7)
    same = IntervalMask.from_document_ids(torch.tensor([[0, 0, 2, 2, 2, -1, -1]]), Attend(window=2))
    assert torch.equal(mask.kv_lo, same.kv_lo) and torch.equal(mask.kv_hi, same.kv_hi)
    assert IntervalMask.from_cu_seqlens(torch.tensor([0])).dense().shape == (1, 1, 0, 0)
    assert IntervalMask.from_cu_seqlens(torch.tensor([0]), length=2).kv_hi.tolist() == [[0, 0]]
    for wrong, told in (([1, 2], "begins at 1"), ([0, 3, 2], "falls from 3 to 2 at document 1")):
        with pytest.raises(ValueError, match=told):
            IntervalMask.from_cu_seqlens(torch.tensor(wrong))
    with pytest.raises(ValueError, match="length: 4"):
        IntervalMask.from_cu_seqlens(torch.tensor([0, 5]), length=4)
    with pytest.raises(ValueError, match="image_ids"):
        IntervalMask.from_cu_seqlens(torch.tensor([0, 5]), Attend(images="bidirectional"))
    with pytest.raises(TypeError):
        IntervalMask.from_cu_seqlens(torch.tensor([0.0, 5.0]))


def test_a_mask_made_in_a_data_loader_comes_along_with_its_plan():
    """Pickled, moved and pinned, with what the host knows of its documents; without what cannot be pickled."""
    plan = vlm_fuse.plan(torch.tensor([[1, 2, 0], [3, 0, 0]]), image_token_id=9, attention_mask=torch.tensor([[1, 1, 0], [1, 0, 0]]), layout="packed")
    mask = plan.mask()
    mask.varlen()
    q = torch.randn(1, 1, 3, 8)
    vlm_fuse.attention(q, q, q, mask)
    mask._kept["block_mask"] = mask.block_mask()
    for other in (pickle.loads(pickle.dumps(plan)), plan.to("cpu")):
        found = other.mask()
        assert found is other.mask() and set(found._kept) == {"segments"} and found.varlen().max_seqlen == 2
        assert torch.equal(found.dense(), mask.dense()) and torch.equal(other.kv_lo, mask.kv_lo)


def test_one_pair_of_int32_a_row():
    """Eight bytes a token and pair is all that a mask holds."""
    mask = IntervalMask.from_document_ids(torch.zeros(2, 50, dtype=torch.int64), Attend(window=3, sinks=1))
    held = [value for value in vars(mask).values() if isinstance(value, torch.Tensor)]
    assert sum(value.nbytes for value in held) == 2 * 50 * 16 and not mask._kept
    assert sum(value.nbytes for value in vars(IntervalMask.from_document_ids(torch.zeros(2, 50, dtype=torch.int64))).values() if isinstance(value, torch.Tensor)) == 2 * 50 * 8


def test_block_sizes_that_are_none_are_refused():
    mask = IntervalMask.from_document_ids(torch.zeros(1, 5, dtype=torch.int32))
    for wrong in (0, -1, 2.0, True, (2, 0), (2,), (2, 2, 2), 2**31):
        with pytest.raises(ValueError, match="BLOCK_SIZE"):
            mask.block_mask(wrong)
