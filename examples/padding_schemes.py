"""The same samples as a batch of each scheme: where padding stands, which rows see which, and from where positions count."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import vlm_fuse
from vlm_fuse import packing

from .digit_questions import IMAGE, LONGEST, PAD, ROWS, Sample
from .small_vlm import SmallVLM

CAPACITY = 256  # tokens of a packed row

#: what each scheme is, in the order in which it is shown
SCHEMES = {
    "left": "a: image, padding, text (nanoVLM v0.1)",
    "left_seen": "a': the same, the padding attended to",
    "right": "b: image, text, padding",
    "placeholders": "c: placeholders, padded",
    "packed": "d: placeholders, packed, isolated",
    "not_isolated": "e: placeholders, packed, not isolated",
}


class Batch(NamedTuple):
    """Merged rows and what the model needs with them."""

    rows: Tensor  # (G, W, hidden)
    position_ids: Tensor  # (G, W)
    attend: Callable  # f(q, k, v)
    asks: Tensor  # (samples,) flat index of the row from which each answer is predicted
    answers: Tensor  # (samples,) its token id
    useful: int  # rows that are tokens
    kinds: Tensor  # (G, W) 0 text, 1 image, -1 padding
    samples: Tensor  # (G, W) number of the sample, -1 at padding


def images_of(model: SmallVLM, samples: list[Sample]) -> Tensor:
    return model.vision(torch.stack([sample.image for sample in samples]))  # [samples, ROWS, hidden]


def dense(mask: vlm_fuse.IntervalMask) -> Callable:
    """SDPA under a dense mask: the quickest for short rows."""
    allowed = mask.dense()
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)


def left(model: SmallVLM, samples: list[Sample], *, seen: bool = False) -> Batch:
    """Text padded on the left to one length, the image put in front: padding between the two, positions run on through it.

    merge never makes that, so it is made by hand, as nanoVLM v0.1 did: ``torch.cat((image_embd, token_embd), dim=1)``.
    """
    text = torch.full((len(samples), LONGEST), PAD)
    for row, sample in enumerate(samples):
        text[row, LONGEST - len(sample.text) :] = torch.tensor(sample.text)
    rows = torch.cat([images_of(model, samples), model.text(text)], dim=1)
    is_image = torch.arange(rows.shape[1]) < ROWS
    real = is_image | F.pad(text != PAD, (ROWS, 0), value=False)
    number = torch.arange(len(samples))[:, None].expand_as(real)
    sees = torch.zeros_like(number) if seen else torch.where(real, 0, -1)
    mask = vlm_fuse.IntervalMask.from_document_ids(sees)
    position_ids = torch.arange(rows.shape[1]).expand(len(samples), -1)
    kinds = torch.where(is_image, 1, torch.where(real, 0, -1))
    return _batch(samples, rows, position_ids, dense(mask), kinds, torch.where(real, number, -1))


def right(model: SmallVLM, samples: list[Sample]) -> Batch:
    """Image, text, padding at the end: merge's scheme "images_first"."""
    text = padded([sample.text for sample in samples])
    merged = vlm_fuse.merge(
        text, weight=model.text.weight, image_embeds=images_of(model, samples), attention_mask=text != PAD, scheme="images_first", layout="padded"
    )
    return _of(merged, samples, dense(merged.mask))


def placeholders(model: SmallVLM, samples: list[Sample]) -> Batch:
    """A placeholder for each image row in the text, padded."""
    ids = padded([(IMAGE,) * ROWS + sample.text for sample in samples])
    merged = vlm_fuse.merge(ids, weight=model.text.weight, image_embeds=images_of(model, samples), image_token_id=IMAGE, attention_mask=ids != PAD)
    return _of(merged, samples, dense(merged.mask))


def packed(model: SmallVLM, samples: list[Sample], *, isolated: bool = True) -> Batch:
    """Placeholders, several samples a row, isolated or, as nanoVLM packs, as if each row were one text."""
    rows = packing.pack_lengths([sample.tokens for sample in samples], CAPACITY)
    order = [samples[number] for row in rows for number in row]
    members = [[{"input_ids": (IMAGE,) * ROWS + samples[number].text} for number in row] for row in rows]
    ids = packing.PackingCollator(length=CAPACITY, pad_token_id=PAD)(members)
    documents = ids["plan"].document_ids
    merged = vlm_fuse.merge(
        ids["input_ids"], weight=model.text.weight, image_embeds=images_of(model, order), image_token_id=IMAGE,
        document_ids=documents if isolated else documents.clamp(max=0),
    )  # fmt: skip
    found = _of(merged, order, dense(merged.mask))
    return found._replace(samples=documents)


def padded(texts: list[tuple[int, ...]]) -> Tensor:
    """``(B, longest)``, padding on the right."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(text) for text in texts], batch_first=True, padding_value=PAD)


def _of(merged: vlm_fuse.MergedBatch, samples: list[Sample], attend: Callable) -> Batch:
    kinds = merged.kind_ids.long() if merged.plan.scheme == "placeholders" else torch.where(merged.image_ids >= 0, 1, torch.where(merged.attention_mask, 0, -1))
    number = torch.arange(kinds.shape[0])[:, None].expand_as(kinds)
    return _batch(samples, merged.inputs_embeds, merged.position_ids, attend, kinds, torch.where(kinds >= 0, number, -1))


def _batch(samples: list[Sample], rows: Tensor, position_ids: Tensor, attend: Callable, kinds: Tensor, numbers: Tensor) -> Batch:
    """Tokens stand in the order of the samples, so the end of each is where so many tokens have come."""
    there = (kinds >= 0).flatten().nonzero()[:, 0]
    ends = torch.tensor([sample.tokens for sample in samples]).cumsum(0)
    answers = torch.tensor([sample.text[-1] for sample in samples])
    # the answer is the last token: it is predicted from the one before
    return Batch(rows, position_ids, attend, there[ends - 2], answers, len(there), kinds, numbers)


def batch_of(scheme: str, model: SmallVLM, samples: list[Sample]) -> Batch:
    """The samples as the scheme has them."""
    return {
        "left": left,
        "left_seen": lambda model, samples: left(model, samples, seen=True),
        "right": right,
        "placeholders": placeholders,
        "packed": packed,
        "not_isolated": lambda model, samples: packed(model, samples, isolated=False),
    }[scheme](model, samples)
