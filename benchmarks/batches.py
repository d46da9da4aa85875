"""Tensors to measure on: hand-made batches of round numbers, and the loads of presets.py."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import generator
from benchmarks.presets import LOADS, PRESETS, Load

RANDOM_BYTES = 64 << 20  # random numbers are drawn once and repeated: the values do not matter to a copy


class Batch(NamedTuple):
    """One batch with its rows. B samples of T tokens, N feature rows, V rows of the embedding table."""

    name: str
    input_ids: Tensor  # (B, T) int64
    attention_mask: Tensor | None  # (B, T) bool
    document_ids: Tensor | None  # (B, T) int32, packed rows only
    labels: Tensor  # (B, T) int64
    text: Tensor  # (B, T, D)
    features: Tensor  # (N, D)
    image_token_id: int | None
    image_sizes: tuple[int, ...]
    vocab_size: int
    shares: dict[str, float]  # of the tokens: image, text, padding

    @property
    def tokens(self) -> int:
        return self.input_ids.numel()

    @property
    def out_bytes(self) -> int:
        return self.text.numel() * self.text.element_size()

    def weight(self) -> Tensor:
        """An embedding table (V, D) in the dtype of the text."""
        return random_rows(self.vocab_size, self.text.shape[-1], dtype=self.text.dtype, device=self.text.device)

    def to(self, device: str) -> Batch:
        return self._replace(**{k: v.to(device) for k, v in self._asdict().items() if isinstance(v, Tensor)})


def random_rows(*shape: int, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> Tensor:
    """Normal numbers, repeated every 64 MiB."""
    rng = torch.Generator().manual_seed(seed)
    count = 1
    for size in shape:
        count *= size
    block = torch.randn(max(1, min(count, RANDOM_BYTES // dtype.itemsize)), generator=rng).to(dtype).to(device)
    out = torch.empty(count, dtype=dtype, device=device)
    for start in range(0, count, block.numel()):
        stop = min(start + block.numel(), count)
        out[start:stop] = block[: stop - start]
    return out.view(*shape)


def runs(
    name: str, rows: int, length: int, hidden: int, dtype: torch.dtype, *, share: float | None = 0.5, run: int = 64, vocab_size: int = 49152
) -> Batch:
    """A batch without padding: runs of placeholders and of text in turn, so that `share` of the tokens are image.

    share: None for one single image row in the whole batch.
    """
    ids = torch.randint(3, vocab_size, (rows, length), generator=torch.Generator().manual_seed(1))
    image, sizes = torch.zeros(length, dtype=torch.bool), ()
    if share is not None and share > 0:
        # of every period of tokens, the last `run` are image; the last period of a row may be cut short
        period = max(run, round(run / share))
        image = torch.arange(length) % period >= period - run
        rest = max(0, length % period - (period - run))
        sizes = ((run,) * (length // period) + ((rest,) if rest else ())) * rows
    image = image.repeat(rows, 1)
    if share is None:
        image[rows // 2, length // 2] = True
        sizes = (1,)
    ids[image] = vocab_size
    count = int(image.sum())
    fraction = count / ids.numel()
    return Batch(
        name,
        ids,
        None,
        None,
        ids.masked_fill(image, -100),
        random_rows(rows, length, hidden, dtype=dtype),
        random_rows(count, hidden, dtype=dtype, seed=1),
        vocab_size,
        sizes,
        vocab_size + 1,
        {"image": fraction, "text": 1 - fraction, "padding": 0.0},
    )


def with_documents(count: int, length: int = 32768, hidden: int = 960) -> Batch:
    """One packed bf16 row of `count` documents of equal length, half of it image, runs of 16."""
    batch = runs(f"D (1,{length},{hidden}) bf16, {count} documents", 1, length, hidden, torch.bfloat16, run=16)
    return batch._replace(document_ids=(torch.arange(length, dtype=torch.int32) * count // length).unsqueeze(0))


def tokens(description: Load) -> generator.TokenBatch:
    """The tokens of a load, without rows. Padded rows hold one sample each; packed rows are filled first fit decreasing.

    Padded rows are padded to the full length of the load, as training on a static shape does it.
    """
    preset = PRESETS[description.preset]
    rows, length = description.rows, description.length
    if preset.image_token_id is None:
        length -= preset.image_rows[0]  # the images come in front of these tokens
    samples = generator.draw(description.distribution, 64 * rows + 1024, seed=0, longest=description.length)
    if not description.packed:
        return generator.padded(samples[:rows], preset, length=length, seed=0, side=description.padding_side)
    index = generator.first_fit_decreasing([sample.tokens for sample in samples], length)
    middle = len(index) // 2  # the first rows hold the longest samples, the last ones what was left
    chosen = [[samples[i] for i in row] for row in index[middle : middle + rows]]
    return generator.packed(chosen, preset, length=length, seed=0)


def load(name: str, description: Load, dtype: torch.dtype = torch.bfloat16) -> Batch:
    """A batch of presets.LOADS, with rows of random numbers."""
    preset = PRESETS[description.preset]
    made = tokens(description)
    rows, length = made.input_ids.shape
    hidden, shares = preset.hidden_size, made.shares
    if preset.image_token_id is None:  # image rows have no tokens: shares of the output
        scale = made.input_ids.size / (made.input_ids.size + made.rows)
        image = 1 - scale
        shares = {"image": image, "text": (shares["text"] + shares["image"]) * scale, "padding": shares["padding"] * scale}
    return Batch(
        name,
        torch.from_numpy(made.input_ids),
        torch.from_numpy(made.attention_mask),
        None if made.document_ids is None else torch.from_numpy(made.document_ids),
        torch.from_numpy(made.labels),
        random_rows(rows, length, hidden, dtype=dtype),
        random_rows(made.rows, hidden, dtype=dtype, seed=1),
        preset.image_token_id,
        tuple(made.image_sizes.tolist()),
        preset.vocab_size,
        shares,
    )


def case_a() -> Batch:
    return runs("A (4,2048,960) fp32", 4, 2048, 960, torch.float32)


def case_b() -> Batch:
    return runs("B (8,4096,2048) bf16", 8, 4096, 2048, torch.bfloat16)


def case_c() -> Batch:
    return runs("C (2,1024,960) fp32", 2, 1024, 960, torch.float32)


def of_size(mebibytes: int) -> Batch:
    """bf16 rows of D = 4096, half of them image: 8, 64 and 512 MiB of output."""
    rows, length = {8: (1, 1024), 64: (4, 2048), 512: (8, 8192)}[mebibytes]
    return runs(f"G{mebibytes} ({rows},{length},4096) bf16", rows, length, 4096, torch.bfloat16)


def loads(*groups: str) -> dict[str, Load]:
    """Loads of some groups by name."""
    return {name: description for group in groups for name, description in LOADS[group].items()}
