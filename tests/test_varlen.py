"""varlen and segments: what variable-length attention makes of the offsets is what the mask says."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checking import examples, serving
from mask_cases import any_masks, document_masks
from vlm_fuse import Attend, IntervalMask
from vlm_fuse.batch import CAUSAL_SEGMENT, EMPTY_SEGMENT, FULL_SEGMENT, OTHER_SEGMENT, WINDOWED_FULL_SEGMENT, WINDOWED_SEGMENT

#: rules that variable-length attention has for a document
EXPRESSIBLE = (Attend(), Attend("full"), Attend(window=1), Attend(window=3), Attend("full", window=4), Attend(chunk_size=5))


def by_rule(found, rows: int, keys: int) -> torch.Tensor:
    """Dense (rows, keys) as flash-attn 2.1 and later read the arguments: the last row of a document sees its last key."""
    seen = torch.zeros(rows, keys, dtype=torch.bool)
    left, right = found.window_size
    offsets = zip(found.cu_seqlens.tolist(), found.cu_seqlens[1:].tolist(), found.cu_seqlens_k.tolist(), found.cu_seqlens_k[1:].tolist())
    for q_begin, q_end, k_begin, k_end in offsets:
        for q in range(q_begin, q_end):
            place = k_end - (q_end - q)
            for k in range(k_begin, k_end):
                seen[q, k] = (left < 0 or k >= place - left) and (right < 0 or k <= place + right)
    return seen


def check_varlen(mask):
    found = mask.varlen()
    (samples, rows), keys = mask.kv_lo.shape, mask.kv_length
    assert found.cu_seqlens.dtype == found.cu_seqlens_k.dtype == torch.int32
    assert int(found.cu_seqlens[0]) == int(found.cu_seqlens_k[0]) == 0
    assert int(found.cu_seqlens[-1]) == samples * rows and int(found.cu_seqlens_k[-1]) == samples * keys
    for offsets, longest in ((found.cu_seqlens, found.max_seqlen), (found.cu_seqlens_k, found.max_seqlen_k)):
        lengths = offsets.diff()
        assert lengths.ge(0).all() and type(longest) is int and longest == (int(lengths.max()) if len(lengths) else 0)
    assert found.causal == (found.window_size[1] == 0) or found.window_size == (0, 0)
    dense = torch.block_diag(*mask.dense()[:, 0]).bool() if samples else torch.zeros(0, 0, dtype=torch.bool)
    tokens = dense.any(1)
    assert torch.equal(by_rule(found, *dense.shape)[tokens], dense[tokens])
    return found


@settings(max_examples=200)
@given(document_masks(attends=EXPRESSIBLE))
def test_every_mask_that_it_can_express(mask):
    check_varlen(mask)


@settings(max_examples=300)
@given(any_masks(), st.data())
def test_any_other_mask_is_right_or_refused(mask, data):
    start = data.draw(st.integers(0, mask.kv_lo.shape[1]))
    first = data.draw(st.integers(0, mask.kv_length))
    mask = mask.slice(start, mask.kv_lo.shape[1], first)
    try:
        mask.varlen()
    except ValueError as error:
        assert str(error).startswith("varlen: ") and "block_mask()" in str(error)
        return
    check_varlen(mask)


def test_offsets_are_those_of_the_documents():
    offsets = torch.tensor([0, 3, 4, 9], dtype=torch.int32)
    found = IntervalMask.from_cu_seqlens(offsets).varlen()
    assert found.cu_seqlens.equal(offsets) and found.cu_seqlens_k is found.cu_seqlens
    assert (found.max_seqlen, found.max_seqlen_k, found.causal, found.window_size) == (5, 5, True, (-1, 0))
    padded = IntervalMask.from_cu_seqlens(offsets, length=12).varlen()
    assert padded.cu_seqlens.tolist() == padded.cu_seqlens_k.tolist() == [0, 3, 4, 9, 12], "the padding is one more document"
    batch = IntervalMask.from_document_ids(torch.tensor([[-1, -1, 0, 0], [0, 0, 0, -1]])).varlen()
    assert batch.cu_seqlens.tolist() == [0, 2, 4, 7, 8], "rows of all samples, one after the other"


def test_windows_do_not_count_the_row_itself():
    documents = torch.tensor([0, 9])
    assert IntervalMask.from_cu_seqlens(documents, Attend(window=4)).varlen().window_size == (3, 0)
    full = IntervalMask.from_cu_seqlens(documents, Attend("full", window=4)).varlen()
    assert full.window_size == (3, 3) and not full.causal
    assert IntervalMask.from_cu_seqlens(documents, Attend("full")).varlen()[-2:] == (False, (-1, -1))


def test_a_prefill_chunk_has_fewer_rows_than_keys():
    found = check_varlen(IntervalMask.from_cu_seqlens(torch.tensor([0, 5, 20])).slice(8, 14, 0, 14))
    assert found.cu_seqlens.tolist() == [0, 0, 6] and found.cu_seqlens_k.tolist() == [0, 5, 14]


@pytest.mark.parametrize(
    "mask, told",
    [
        (lambda: IntervalMask.from_cu_seqlens(torch.tensor([0, 9]), Attend(window=3, sinks=1)), "rows 0 to 8 of sample 0 are neither"),
        (lambda: IntervalMask.from_document_ids(torch.zeros(1, 6, dtype=torch.int32), prefix_lengths=2), "rows 0 to 5 of sample 0 are neither"),
        (lambda: IntervalMask.from_document_ids(torch.tensor([[0, 0, -1, 0]])), "rows 0 to 3 of sample 0 are neither"),
        (lambda: IntervalMask(*torch.tensor([[[0, 0, 2, 2]], [[2, 2, 3, 4]]], dtype=torch.int32), 4), "rows 0 to 1 of sample 0 are full and rows 2 to 3 of sample 0 are causal"),
    ],
)
def test_what_it_cannot_express_is_refused_with_the_rows(mask, told):
    with pytest.raises(ValueError, match=told):
        mask().varlen()


# -- segments ----------------------------------------------------------------------------------------------------------


def classed(rows):
    """Class of a segment from its dense rows, keys cut to those that it sees; None: not to be told from these."""
    n, m = rows.shape
    place = torch.arange(m - n, m)[:, None]
    key = torch.arange(m)[None]
    if torch.equal(rows, key <= place):
        return CAUSAL_SEGMENT, 0
    if rows.all():
        return FULL_SEGMENT, 0
    for window in range(1, m + 1):
        if torch.equal(rows, (key <= place) & (key > place - window)):
            return WINDOWED_SEGMENT, window
        if n == m and torch.equal(rows, (key - place).abs() < window):
            return WINDOWED_FULL_SEGMENT, window
    return OTHER_SEGMENT, 0


def test_segments_are_the_finest_cut_and_classed_rightly(backend, device):
    @examples(backend)
    @given(any_masks())
    def check(mask):
        with serving(backend):
            segments = mask.to(device)._segments()
        dense = mask.dense()[:, 0]
        for sample in range(len(dense)):
            own = [one for one in segments if one.sample == sample]
            assert [one.row_begin for one in own] == [0, *(one.row_end for one in own[:-1])][: len(own)]
            assert not own or own[-1].row_end == dense.shape[1]
            cuts = {one.row_end for one in own[:-1]}
            for cut in range(1, dense.shape[1]):
                before, behind = dense[sample, :cut].any(0).nonzero()[:, 0], dense[sample, cut:].any(0).nonzero()[:, 0]
                free = not len(before) or not len(behind) or int(before.max()) < int(behind.min())
                inside_padding = not dense[sample, cut - 1 : cut + 1].any() and free
                assert (cut in cuts) == (free and not inside_padding), f"cut at {cut}"
            for one in own:
                rows = dense[sample, one.row_begin : one.row_end]
                if one.kind == EMPTY_SEGMENT:
                    assert not rows.any()
                    continue
                keys = rows.any(0).nonzero()[:, 0]
                assert (one.key_begin, one.key_end) == (int(keys.min()), int(keys.max()) + 1)
                assert (one.kind, one.window) == classed(rows[:, one.key_begin : one.key_end])

    check()
