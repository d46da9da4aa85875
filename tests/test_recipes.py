"""The functions of docs/mask_recipes.md on generated masks, and the pictures of every kind. (The page itself runs in test_docs.)"""

import re
from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mask_cases import document_masks
from test_docs import BLOCK, ROOT
from vlm_fuse import Attend, IntervalMask

PAGE = (ROOT / "docs" / "mask_recipes.md").read_text()


def recipe(name):
    """A function of the page."""
    (source,) = (found.group(0) for block in BLOCK.findall(PAGE) for found in re.finditer(rf"^def {name}\(.*?(?=^\S)", block, re.MULTILINE | re.DOTALL))
    namespace = {"torch": torch}
    exec(source, namespace)
    return namespace[name]


def some(mask):
    return mask.kv_lo.numel() > 0


@settings(max_examples=200)
@given(document_masks().filter(some))
def test_inclusive_ranges(mask):
    ranges = torch.stack([mask.kv_lo, mask.kv_hi - 1], -1)
    if mask.kv_lo2 is not None and bool(mask.kv_hi2.any()):
        return  # one interval a row
    key = torch.arange(mask.kv_length)
    assert torch.equal((key >= ranges[..., :1]) & (key <= ranges[..., 1:]), mask.dense()[:, 0])


@settings(max_examples=300)
@given(document_masks().filter(some))
def test_startend_row_indices(mask):
    """Every mask of one interval a row: the bounds never fall, so that the binary search finds them."""
    if mask.kv_lo2 is not None and bool(mask.kv_hi2.any()):
        return
    ends, begins = recipe("startend_row_indices")(mask)[:, 0].unbind(-1)
    row, key = torch.arange(mask.kv_length)[:, None], torch.arange(mask.kv_length)
    masked = ((row > key) & (row >= ends[:, None])) | ((row < key) & (row < begins[:, None]))
    tokens, seen = mask.kv_hi > 0, mask.dense()[:, 0]
    assert torch.equal(~masked[tokens], seen[tokens])
    # with causal=True the first number alone does, and padding sees itself at most
    causal = (key <= row) & (row < ends[:, None])
    assert torch.equal(causal[tokens], (seen & (key <= row))[tokens])


@settings(max_examples=200)
@given(document_masks(attends=(Attend(), Attend("full"), Attend(window=3), Attend("full", window=4))).filter(some), st.data())
def test_what_variable_length_attention_sees(mask, data):
    start = data.draw(st.integers(0, mask.kv_length - 1))
    for one in (mask, mask.slice(start, mask.kv_length)):
        try:
            found = one.varlen()
        except ValueError:
            continue  # rules that differ between documents, and rows cut out of their middle
        seen = recipe("seen_by_varlen")(found)
        wanted = torch.block_diag(*one.dense()[:, 0]).bool()
        tokens = one.kv_hi.flatten() > 0
        assert seen.shape == wanted.shape and torch.equal(seen[tokens], wanted[tokens])


# -- pictures ----------------------------------------------------------------------------------------------------------

pytest.importorskip("matplotlib")

from examples import draw_masks  # noqa: E402


@pytest.mark.parametrize("tokens, block", [(12, 4), (12, 12), (11, 4), (3, 5), (7, 1), (1, 1)])
def test_block_diffusion(tokens, block):
    q, k = torch.arange(2 * tokens)[:, None], torch.arange(2 * tokens)
    block_q, block_k = q % tokens // block, k % tokens // block
    wanted = ((block_q == block_k) & ((q >= tokens) == (k >= tokens))) | ((block_q > block_k) & (k >= tokens))
    assert torch.equal(draw_masks.block_diffusion(tokens, block).dense()[0, 0], wanted)


def test_every_word_of_attend_is_drawn():
    drawn = draw_masks.kinds()
    calls = " ".join(kind.call for kind in drawn)
    assert all(field.name in calls or field.name == "kind" for field in fields(Attend)) and 'Attend("full"' in calls
    for kind in drawn:
        assert kind.mask.dense().shape == (1, 1, draw_masks.ROWS, draw_masks.ROWS)
        assert torch.equal(kind.mask.dense()[0, 0].any(-1), kind.document_ids >= 0), f"{kind.name}: padding alone sees nothing"
        if kind.call.startswith("Attend"):  # the title is the call that makes it
            given = eval(f"dict(attend={kind.call})", {"Attend": Attend})
            again = IntervalMask.from_document_ids(kind.document_ids[None], image_ids=kind.image_ids[None], **given)
            assert torch.equal(again.dense(), kind.mask.dense())


def test_the_picture_is_the_same_every_time(tmp_path):
    first, second = (draw_masks.picture(tmp_path / name / "masks.png", draw_masks.kinds()).read_bytes() for name in "ab")
    assert first == second and len(first) < 300_000
    assert (ROOT / "docs" / "pictures" / "masks.png").stat().st_size < 300_000
