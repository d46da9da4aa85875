"""Time the renderings of masks, and attention under them, against what others do.

    python -m benchmarks.bench_masks                        all of it, CPU: about ten minutes
    python -m benchmarks.bench_masks --quick                short rows, under a minute
    python -m benchmarks.bench_masks --lengths 4096,16384   rows of these lengths for BlockMask
    python -m benchmarks.bench_masks --device cuda

Rows of documents as training data has them, packed first fit decreasing. Writes masks.json (every round), masks.md
(tables), masks.png (time and memory over the length of the row) and roofline_masks.png (time over bytes written) to
benchmarks/results/<name>/ and prints which targets were reached. Contestants take turns within one process; the first call of
a turn, which finds cold caches, is reported apart. What a contestant returns is compared with the mask written out by its
rule, to the bit, before it is timed; an operation in which one differs is refused, and the exit status 1.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

import vlm_fuse
from benchmarks import batches, launches, operations, report, roofline
from benchmarks.bench_merge import RESULTS, progress_bar
from benchmarks.memory import peak_bytes, resident_bytes, transient_bytes
from benchmarks.operations import Operation
from benchmarks.presets import PRESETS, Load
from benchmarks.targets import (
    BLOCK_MASK_MIB,
    COMPILED_MASK,
    EAGER,
    FILL,
    FLEX,
    FROM_IDS,
    FULL,
    GPU_MICROSECONDS,
    GPU_WAITS,
    MASK_LIMITS,
    MASK_STATE,
    MASK_TARGETS,
    RENDERED,
    Reached,
    evaluate,
    measured,
)
from benchmarks.timing import Contestant, busy_note, environment, take_turns
from vlm_fuse import Attend, IntervalMask

try:
    import transformers
    from transformers import masking_utils

    NO_TRANSFORMERS = None
except ImportError as error:
    NO_TRANSFORMERS = f"transformers' mask functions: {error}"

LENGTHS = (4096, 16384, 32768, 65536, 131072)
DENSE_LENGTHS = (2048, 4096, 8192, 16384)
ATTENTION_LENGTHS = (2048, 8192)
MOST_DENSE_BYTES = 4 << 30  # of one contestant's masks and temporaries
BLOCK = 128
WINDOW = 1024
HEADS, HEAD_SIZE = 8, 64
BLOCK_MAP = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices")

FULL_CAUSAL = "SDPA, documents not kept apart"
TRIL = "tril and compare"
HF = "hf"
ATTENTION, NEW_MASK, DENSE_SDPA = "vlm_fuse.attention", "vlm_fuse.attention, new mask", "SDPA, dense mask"

#: the layers of Gemma 3, as transformers 5.23 reads them.
GEMMA = (Attend(images="bidirectional"), Attend(window=WINDOW, images="bidirectional_windowed"))


# --- rows -------------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """One packed row of T tokens. What is left over at its end is one more document, as it is for all contestants."""

    name: str
    document_ids: Tensor  # (1, T) int32
    position_ids: Tensor  # (1, T) int64
    image_ids: Tensor  # (1, T) int32
    shares: dict[str, float]

    @property
    def tokens(self) -> int:
        return self.document_ids.shape[1]

    @property
    def device(self) -> torch.device:
        return self.document_ids.device


def short(length: int) -> str:
    return f"{length // 1024}K" if length % 1024 == 0 else str(length)


def packed_row(length: int, device: str = "cpu", *, gemma: bool = False, one_document: bool = False) -> Row:
    """Documents of finevision_native (or finevision_gemma), first fit decreasing; or the same tokens as one document."""
    preset, distribution = ("gemma3-4b", "finevision_gemma") if gemma else ("qwen2.5-vl-7b", "finevision_native")
    made = batches.tokens(Load(preset, distribution, 1, length, packed=True))
    documents = torch.from_numpy(made.document_ids)
    documents = torch.where(documents < 0, documents.max() + 1, documents)
    documents = torch.zeros_like(documents) if one_document else documents
    plan = vlm_fuse.plan(
        torch.from_numpy(made.input_ids), image_token_id=PRESETS[preset].image_token_id, document_ids=documents, image_sizes=made.image_sizes.tolist()
    )
    count = int(documents.max()) + 1
    told = [f"{number} {what}{'' if number == 1 else 's'}" for number, what in ((count, "document"), (len(made.image_sizes), "image"))]
    name = f"{short(length)} {'Gemma 3, ' if gemma else ''}{', '.join(told)}"
    parts = (part.to(device) for part in (documents, plan.position_ids, plan.image_ids))
    return Row(name, *parts, {"image": made.shares["image"], "text": 1 - made.shares["image"]})


def rule(attend: Attend, document_ids: Tensor, image_ids: Tensor):
    """The mask of an Attend of this benchmark as a mask_mod, as one writes it by hand."""
    documents, images = document_ids[0], image_ids[0]

    def causal(b, h, q, k):
        return (k <= q) & (documents[q] == documents[k])

    def windowed(b, h, q, k):
        return causal(b, h, q, k) & (q - k < WINDOW)

    def with_images(b, h, q, k):
        same = (images[q] == images[k]) & (images[q] >= 0)
        return ((k <= q) | same) & (documents[q] == documents[k])

    def with_images_windowed(b, h, q, k):
        return with_images(b, h, q, k) & (q - k < WINDOW)

    rules = {Attend(): causal, Attend(window=WINDOW): windowed, GEMMA[0]: with_images, GEMMA[1]: with_images_windowed}
    return rules[attend]


def masks_of(row: Row, attends: tuple[Attend, ...]) -> list[IntervalMask]:
    return [IntervalMask.from_document_ids(row.document_ids, attend, image_ids=row.image_ids) for attend in attends]


class Anew:
    """Tensors of a row, made anew before each call, so that nobody has seen them: nothing is baked in or kept for them."""

    def __init__(self, row: Row):
        self.row = row

    def renew(self) -> None:
        self.row = self.row._replace(**{name: getattr(self.row, name).clone() for name in ("document_ids", "position_ids", "image_ids")})


# --- contestants ------------------------------------------------------------------------------------------------------


class Offer(NamedTuple):
    """A contestant, the longest row it is asked for, and why not for a longer one."""

    contestant: Contestant
    longest: int = 1 << 30
    why: str = ""


def admit(offers: list[Offer], row: Row, left_out: list[str]) -> list[Contestant]:
    for offer in offers:
        if row.tokens > offer.longest:
            left_out.append(f"{offer.contestant.name} above T = {offer.longest}: {offer.why}")
    return [offer.contestant for offer in offers if row.tokens <= offer.longest]


def _hf_mask(row: Row, implementation: str, attends: tuple[Attend, ...], dtype: torch.dtype = torch.float32):
    """transformers' masks for the layer types of a model, called as its models call them."""
    config = transformers.LlamaConfig(sliding_window=WINDOW)
    config._attn_implementation = implementation
    embeds = torch.empty(1, row.tokens, 1, dtype=dtype, device=row.device)

    def one(of: Row, attend: Attend):
        given = dict(config=config, inputs_embeds=embeds, attention_mask=None, past_key_values=None, position_ids=of.position_ids)
        if attend.images == "causal":
            make = masking_utils.create_sliding_window_causal_mask if attend.window else masking_utils.create_causal_mask
            return make(**given, allow_is_causal_skip=False)
        if not attend.window:
            return masking_utils.create_causal_mask(**given, block_sequence_ids=of.image_ids)
        # modeling_gemma3.create_masks_for_vision_model: the window is laid over the blocks
        overlays = dict(
            or_mask_function=masking_utils.blockwise_overlay(of.image_ids), and_mask_function=masking_utils.sliding_window_overlay(attend.window)
        )
        return masking_utils.create_causal_mask(**given, **overlays)

    return lambda of: tuple(one(of, attend) for attend in attends)


def _hf_offers(row: Row, implementations: dict[str, tuple[int, str]], attends, dtype=torch.float32) -> list[Offer]:
    if NO_TRANSFORMERS:
        return []
    offers = []
    for implementation, (longest, why) in implementations.items():
        anew, make = Anew(row), _hf_mask(row, implementation, attends, dtype)
        offers.append(Offer(Contestant(f"{HF} {implementation}", lambda anew=anew, make=make: make(anew.row), anew.renew), longest, why))
    return offers


def block_map(found: tuple[BlockMask, ...]) -> tuple[Tensor, ...]:
    return tuple(getattr(mask, name) for mask in found for name in BLOCK_MAP)


def block_map_by_rule(row: Row, attends: tuple[Attend, ...]) -> tuple[Tensor, ...]:
    """The tables of the BlockMasks from their elements: a row of blocks at a time, over the keys of its own documents."""
    documents, length = row.document_ids[0], row.tokens
    blocks = -(-length // BLOCK)
    made: list[Tensor] = []
    for attend in attends:
        seen = rule(attend, row.document_ids, row.image_ids)
        counts = torch.zeros(blocks, blocks, dtype=torch.int64, device=row.device)
        for r in range(blocks):
            queries = torch.arange(r * BLOCK, min(length, (r + 1) * BLOCK), device=row.device)
            reach = ((documents >= documents[queries[0]]) & (documents <= documents[queries[-1]])).nonzero()
            first, last = int(reach[0]) // BLOCK, int(reach[-1]) // BLOCK + 1
            keys = torch.arange(first * BLOCK, min(length, last * BLOCK), device=row.device)
            elements = seen(None, None, queries[:, None], keys)
            padded = F.pad(elements, (0, (last - first) * BLOCK - len(keys)))
            counts[r, first:last] = padded.view(len(queries), last - first, BLOCK).sum((0, 2))
        full = counts == BLOCK * BLOCK
        partial = (counts > 0) & ~full
        for kind in (partial, full, partial.T, full.T):
            made += [kind.sum(-1, dtype=torch.int32)[None, None], kind.to(torch.int8).argsort(dim=-1, descending=True, stable=True).int()[None, None]]
    return tuple(made)


def block_masks(row: Row, attends: tuple[Attend, ...], left_out: list[str], *, of_torch: bool = True, compiled: bool = True) -> Operation:
    """The BlockMask of one mask, or of several layer types."""
    masks, anew, by_torch = masks_of(row, attends), Anew(row), Anew(row)
    # compiled for the length and the mask at hand; what was compiled for others would count towards dynamo's limit
    torch._dynamo.reset()
    made = [torch.compile(create_block_mask, dynamic=False) for _ in attends]

    def torchs(creates):
        of = by_torch.row
        rules = (rule(attend, of.document_ids, of.image_ids) for attend in attends)
        return tuple(create(seen, None, None, of.tokens, of.tokens, device=of.device) for create, seen in zip(creates, rules))

    offers = [
        Offer(Contestant(RENDERED, lambda: tuple(mask.block_mask() for mask in masks))),
        Offer(Contestant(FROM_IDS, lambda: tuple(mask.block_mask() for mask in masks_of(anew.row, attends)), anew.renew)),
    ]
    if of_torch:
        offers.append(Offer(Contestant(EAGER, lambda: torchs([create_block_mask] * len(made)), by_torch.renew), 16384, "more than 10 bytes for each of T x T"))
    if of_torch and compiled:
        offers.append(Offer(Contestant(COMPILED_MASK, lambda: torchs(made), by_torch.renew), 65536, "the time of a call, four times as much"))
    if row.image_ids.max() < 0 or len(attends) == 1 or row.document_ids.max() == 0:
        if compiled:
            offers += _hf_offers(row, {"flex_attention": (16384, "the time of a call, four times as much")}, attends)
    else:
        left_out.append(f"{HF}, Gemma 3's pair on rows of several documents: transformers' sliding mask is wrong there (tests/test_masks_transformers.py)")
    return Operation(
        "BlockMask" if len(attends) == 1 else "BlockMask, Gemma 3's pair",
        RENDERED,
        0,
        admit(offers, row, left_out),
        lambda: block_map_by_rule(row, attends),
        (),
        tensors=block_map,
    )


def _tril(row: Row) -> Tensor:
    ids = row.document_ids[0]
    return torch.ones(row.tokens, row.tokens, dtype=torch.bool, device=row.device).tril_() & (ids[:, None] == ids)


def _fills(shape: tuple[int, ...], dtype: torch.dtype, value: float, device) -> list[Offer]:
    there = torch.zeros(shape, dtype=dtype, device=device)
    return [
        Offer(Contestant(FILL, lambda: there.fill_(value))),
        Offer(Contestant(FULL, lambda: torch.full(shape, value, dtype=dtype, device=device))),
    ]


def _of_one(render: Callable[[IntervalMask], Tensor], row: Row) -> list[Offer]:
    (mask,), anew = masks_of(row, (Attend(),)), Anew(row)
    return [
        Offer(Contestant(RENDERED, lambda: render(mask))),
        Offer(Contestant(FROM_IDS, lambda: render(*masks_of(anew.row, (Attend(),))), anew.renew)),
    ]


def dense(row: Row, left_out: list[str]) -> Operation:
    shape = (1, 1, row.tokens, row.tokens)
    offers = [*_fills(shape, torch.bool, True, row.device), *_of_one(lambda mask: mask.dense(), row)]
    offers.append(Offer(Contestant(TRIL, lambda: _tril(row)[None, None])))
    offers += _hf_offers(row, {"sdpa": (16384, "more than 4 bytes for each of T x T")}, (Attend(),))
    return Operation("dense", FILL, row.tokens**2, admit(offers, row, left_out), lambda: (_tril(row)[None, None],), (FILL, FULL))


def additive(row: Row, dtype: torch.dtype, left_out: list[str]) -> Operation:
    shape, lowest = (1, 1, row.tokens, row.tokens), torch.finfo(dtype).min
    offers = [*_fills(shape, dtype, lowest, row.device), *_of_one(lambda mask: mask.additive(dtype), row)]

    def tril():
        return torch.zeros(shape, dtype=dtype, device=row.device).masked_fill_(~_tril(row), lowest)

    offers.append(Offer(Contestant(TRIL, tril)))
    offers += _hf_offers(row, {"eager": (16384, "more than 6 bytes for each of T x T")}, (Attend(),), dtype)
    name = f"additive {str(dtype).removeprefix('torch.')}"
    return Operation(name, FILL, row.tokens**2 * dtype.itemsize, admit(offers, row, left_out), lambda: (tril(),), (FILL, FULL))


def bits(row: Row, left_out: list[str]) -> Operation:
    shape = (1, row.tokens**2 // 8)
    offers = [*_fills(shape, torch.uint8, 3, row.device), *_of_one(lambda mask: mask.bits(), row)]

    def packed():
        return torch.from_numpy(np.packbits(_tril(row).flatten().numpy(), bitorder="little"))[None]

    if row.device.type == "cpu":
        offers.append(Offer(Contestant(f"{TRIL}, numpy.packbits", packed)))
    return Operation("bits", FILL, shape[1], admit(offers, row, left_out), lambda: (packed().to(row.device),), (FILL, FULL))


def dense_pair(row: Row, left_out: list[str]) -> Operation:
    """Both masks of Gemma 3, of a row that is one document: on several, transformers' are wrong."""
    masks, anew = masks_of(row, GEMMA), Anew(row)
    q, k = torch.arange(row.tokens, device=row.device)[:, None], torch.arange(row.tokens, device=row.device)
    offers = [
        Offer(Contestant(RENDERED, lambda: tuple(mask.dense() for mask in masks))),
        Offer(Contestant(FROM_IDS, lambda: tuple(mask.dense() for mask in masks_of(anew.row, GEMMA)), anew.renew)),
        *_hf_offers(row, {"sdpa": (16384, "more than 4 bytes for each of T x T")}, GEMMA),
    ]

    def expected():
        return tuple(rule(attend, row.document_ids, row.image_ids)(None, None, q, k)[None, None] for attend in GEMMA)

    return Operation("dense, Gemma 3's pair", RENDERED, 0, admit(offers, row, left_out), expected, ())


def attention(row: Row, attend: Attend, name: str, *, backward: bool) -> Operation:
    """Attention under a mask that is there already, as in every layer but the first; "new mask" is the first."""
    (mask,), anew = masks_of(row, (attend,)), Anew(row)
    seen = mask.dense()
    rng = torch.Generator().manual_seed(0)
    dtype = torch.float32 if row.device.type == "cpu" else torch.bfloat16
    q, k, v, grad = (torch.randn(1, HEADS, row.tokens, HEAD_SIZE, generator=rng).to(row.device, dtype) for _ in range(4))
    inputs = tuple(x.requires_grad_(backward) for x in (q, k, v))

    def run(out: Callable[[], Tensor]):
        if not backward:
            with torch.no_grad():
                return out()
        made = out()
        return (made.detach(), *torch.autograd.grad(made, inputs, grad))

    def by_sdpa():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)

    contestants = [
        Contestant(ATTENTION, lambda: run(lambda: vlm_fuse.attention(q, k, v, mask))),
        Contestant(NEW_MASK, lambda: run(lambda: vlm_fuse.attention(q, k, v, *masks_of(anew.row, (attend,)))), anew.renew),
        Contestant(DENSE_SDPA, lambda: run(by_sdpa)),
        Contestant(FULL_CAUSAL, lambda: run(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True))),
    ]
    expected = lambda: found if isinstance(found := run(by_sdpa), tuple) else (found,)
    operation = f"attention, {name}, {'forward and backward' if backward else 'forward'}"
    return Operation(operation, ATTENTION, 0, contestants, expected, (FULL_CAUSAL,), (ATTENTION, NEW_MASK, DENSE_SDPA))


def beside_flex_attention(row: Row) -> Operation:
    """The BlockMask beside the compiled FlexAttention that it serves: heads of qwen2.5-vl-7b, bf16, forward. A GPU only."""
    (mask,), (heads, kv_heads, size) = masks_of(row, (Attend(),)), PRESETS["qwen2.5-vl-7b"].heads
    q, k, v = (torch.randn(1, count, row.tokens, size, device=row.device, dtype=torch.bfloat16) for count in (heads, kv_heads, kv_heads))
    ready, compiled = mask.block_mask(), torch.compile(flex_attention)
    contestants = [
        Contestant(RENDERED, mask.block_mask),
        Contestant(FLEX, lambda: compiled(q, k, v, block_mask=ready, enable_gqa=True)),
    ]
    return Operation("beside FlexAttention", FLEX, 0, contestants, lambda: (), (RENDERED, FLEX))


# --- what is measured -------------------------------------------------------------------------------------------------

Made = tuple[Row, Operation]


def jobs(arguments: argparse.Namespace, left_out: list[str]) -> Iterator[tuple[str, Callable[[], Made]]]:
    """(what it is, how to make it), each made when its turn comes, and dropped after it."""
    device, quick = arguments.device, arguments.quick

    def job(name: str, length: int, make: Callable[[Row], Operation], **row) -> tuple[str, Callable[[], Made]]:
        def made():
            of = packed_row(length, device, **row)
            return of, make(of)

        return f"{name}, {short(length)}", made

    if device == "cuda":
        yield job("beside FlexAttention", 32768, beside_flex_attention)
    for length in arguments.lengths:
        yield job("BlockMask", length, lambda row: block_masks(row, (Attend(),), left_out))
    for length in arguments.lengths:
        # of the others' time, one length tells
        alone = length > 16384
        yield job("BlockMask, Gemma 3's pair", length, lambda row, alone=alone: block_masks(row, GEMMA, left_out, of_torch=not alone), gemma=True)
    one = dict(gemma=True, one_document=True)
    for length in [length for length in arguments.lengths if length <= 16384]:
        if not quick:
            yield job("BlockMask, Gemma 3's pair", length, lambda row: block_masks(row, GEMMA, left_out, of_torch=False), **one)
        yield job("dense, Gemma 3's pair", length, lambda row: dense_pair(row, left_out), **one)
    for length in (2048,) if quick else DENSE_LENGTHS:
        # the dense forms of a row need up to 6 bytes an element
        if 6 * length**2 > MOST_DENSE_BYTES:
            left_out.append(f"dense forms at T = {length}: more than {MOST_DENSE_BYTES >> 30} GiB")
            continue
        yield job("dense", length, lambda row: dense(row, left_out))
        for dtype in (torch.float32, torch.bfloat16):
            yield job(f"additive {dtype}", length, lambda row, dtype=dtype: additive(row, dtype, left_out))
        yield job("bits", length, lambda row: bits(row, left_out))
    for length in (512,) if quick else ATTENTION_LENGTHS:
        for name, attend in (("packed", Attend()), (f"window {WINDOW}", Attend(window=WINDOW)), ("Gemma's images", GEMMA[0])):
            for backward in (False, True):
                yield job(
                    f"attention, {name}",
                    length,
                    lambda row, attend=attend, name=name, backward=backward: attention(row, attend, name, backward=backward),
                    gemma=attend is GEMMA[0],
                )


def measure(row: Row, operation: Operation, arguments: argparse.Namespace) -> dict[str, Any]:
    """One operation on one row, checked, timed, its memory taken."""
    result = operations.described(operation, row)
    try:
        operations.verify(operation)
    except operations.WrongResult as error:
        return {**result, "refused": str(error)}
    turn, least = (0.005, 2) if arguments.quick else (0.02, 5 if operation.name == "BlockMask" and row.tokens <= 16384 else 3)
    turns = take_turns(operation.contestants, budget=arguments.budget, turn=turn, least=least, device=arguments.device)
    peak = {c.name: peak_bytes(c.run, arguments.device, warm=True) for c in operation.contestants}
    resident = {}
    if arguments.device == "cpu" and not arguments.quick:
        resident = {c.name: resident_bytes(c.run, warm=True) for c in operation.contestants}
    return {**result, "times": turns.times.times, "first": turns.first, "faults": turns.times.faults, "peak": peak, "resident": resident}


def worker(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure one job after the other; what failed or was left out is a result too."""
    stop = time.monotonic() + arguments.limit
    left_out: list[str] = [NO_TRANSFORMERS] if NO_TRANSFORMERS else []
    everything = list(jobs(arguments, left_out))
    progress = progress_bar(len(everything))
    for name, make in everything:
        progress(name)
        if time.monotonic() > stop:
            left_out.append(f"{name}: the time limit was reached")
            continue
        started = time.monotonic()
        try:
            result = measure(*make(), arguments)
        except Exception as error:  # one operation that fails must not cost the others
            yield {"failed": f"{name}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}
            continue
        yield {"pages": "gpu" if arguments.device == "cuda" else "default", **result, "seconds": round(time.monotonic() - started, 1)}
    progress(None)
    yield from ({"left_out": reason} for reason in dict.fromkeys(left_out))


# --- figures that are not ratios --------------------------------------------------------------------------------------


def growth(length: int) -> int | None:
    """Bytes that a process grows by at most while it makes the BlockMask of a row of this length for the first time."""
    documents = packed_row(length).document_ids
    masks_of(packed_row(1024), (Attend(),))[0].block_mask()  # the code is loaded
    return resident_bytes(lambda: IntervalMask.from_document_ids(documents).block_mask(), warm=True)


def figures(results: list[dict[str, Any]], arguments: argparse.Namespace) -> list[Reached]:
    """The targets on memory, state, and the GPU's time and waits."""
    found = []
    pages = "gpu" if arguments.device == "cuda" else "default"

    def add(text: str, batch: str, value: float, most: float | None = None) -> None:
        found.append(measured(text, batch, pages, MASK_LIMITS[text] if most is None else most, value))

    for result in results:
        if result.get("operation") == "BlockMask" and "times" in result and result["tokens"] == 131072:
            grown = [result["peak"][FROM_IDS]]
            if arguments.device == "cpu":
                # in a process of its own, where malloc has nothing at hand
                command = [sys.executable, "-m", "benchmarks.bench_masks", "--growth", "131072"]
                told = subprocess.run(command, cwd=RESULTS.parent.parent, capture_output=True, text=True, check=True).stdout.strip()
                grown += [int(told)] if told != "None" else []
            add(BLOCK_MASK_MIB, "128K", max(grown) / 2**20)
        if arguments.device == "cuda" and result.get("operation") == "BlockMask" and "times" in result:
            length = result["batch"].split()[0]
            if length in GPU_MICROSECONDS:
                value = 1e6 * sorted(result["times"][RENDERED])[len(result["times"][RENDERED]) // 2]
                add("BlockMask of a mask: microseconds", length, value, GPU_MICROSECONDS[length])
    row = packed_row(max(1024, min(arguments.lengths)), arguments.device, gemma=True)
    for attend in (Attend(), *GEMMA, Attend(window=256, sinks=4)):
        (mask,) = masks_of(row, (attend,))
        state = [part for part in (mask.kv_lo, mask.kv_hi, mask.kv_lo2, mask.kv_hi2) if part is not None]
        pairs = len(state) // 2
        bytes_a_pair = sum(part.numel() * part.element_size() for part in state) / row.tokens / pairs
        extra = transient_bytes(lambda attend=attend: masks_of(row, (attend,)), arguments.device)
        add(MASK_STATE, f"{attend.images}, window {attend.window}, {pairs} of 2 pairs, {extra / row.tokens:.1f} B a token transient", bytes_a_pair)
    if arguments.device == "cuda":
        mask = IntervalMask.from_document_ids(packed_row(16384, "cuda").document_ids)
        add(GPU_WAITS, "16K", launches.count(mask.block_mask)[2])
    return found


# --- report -----------------------------------------------------------------------------------------------------------


def tables(results: list[dict[str, Any]]) -> str:
    """Markdown: for each operation one table of times, one of memory, over the rows."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault(result["operation"], []).append(result)
    lines: list[str] = []
    for operation, members in groups.items():
        lines += ["", f"## {operation}", ""]
        lines += [f"**Refused**, {result['batch']}: {result['refused']}" for result in members if "refused" in result]
        shown = [(result, {row["contestant"]: row for row in report.cells(result)}) for result in members if "times" in result]
        if not shown:
            continue
        names = list(dict.fromkeys(name for _, rows in shown for name in rows))
        head = "| contestant |" + "".join(f" {result['batch']} |" for result, _ in shown)
        rule_ = "| --- |" + " --- |" * len(shown)
        lines += [f"Milliseconds, and in brackets the ratio to {shown[0][0]['base']}.", "", head, rule_]
        for name in names:
            lines.append(f"| {name} |" + "".join(f" {_time(rows.get(name))} |" for _, rows in shown))
            if name in (RENDERED, FROM_IDS):
                first = (sorted(result["first"][name]) for result, _ in shown)
                lines.append(f"| {name}, first call of a turn |" + "".join(f" {_ms(1e3 * values[len(values) // 2])} |" for values in first))
        lines += ["", "MiB held at the highest point, result included: counted by the allocators / growth of the process.", "", head, rule_]
        for name in names:
            lines.append(f"| {name} |" + "".join(f" {_memory(result, name)} |" for result, _ in shown))
    return "\n".join(lines)


def _ms(value: float) -> str:
    return f"{value:.4f}" if value < 0.1 else f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 10 else f"{value:.0f}"


def _time(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    ratio = row["ratio"]
    return f"{_ms(row['ms'])} ({ratio:.0f})" if ratio >= 100 else f"{_ms(row['ms'])} ({ratio:.3g})"


def _memory(result: dict[str, Any], name: str) -> str:
    if name not in result["peak"]:
        return ""
    told = f"{result['peak'][name] / 2**20:.2f}"
    resident = result["resident"].get(name)
    return told if resident is None else f"{told} / {max(resident, 0) / 2**20:.0f}"


PANELS = ("BlockMask", "BlockMask, Gemma 3's pair", "dense", "additive float32")
LINES = {RENDERED: "#b23a1e", FROM_IDS: "#e8997f", EAGER: "#1f4e79", COMPILED_MASK: "#5b9bd5", FILL: "#000000", FULL: "#9aa5b1", TRIL: "#4a7c59"}


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Time, and peak memory below it, over the length of the row, on logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {name: [r for r in results if r["operation"] == name and "times" in r and "1 document," not in r["batch"]] for name in PANELS}
    panels = {name: members for name, members in panels.items() if members}
    if not panels:
        return
    figure, axes = plt.subplots(2, len(panels), figsize=(4.6 * len(panels), 7.4), squeeze=False, sharex="col")
    for column, (name, members) in enumerate(panels.items()):
        for contestant in dict.fromkeys(c for result in members for c in result["times"]):
            there = sorted((r["tokens"], sorted(r["times"][contestant]), r["peak"][contestant]) for r in members if contestant in r["times"])
            tokens = [length for length, _, _ in there]
            style = dict(marker="o", markersize=4, color=LINES.get(contestant, "#8e6bb0"), label=contestant)
            axes[0, column].plot(tokens, [1e3 * times[len(times) // 2] for _, times, _ in there], **style)
            held = [(length, peak / 2**20) for length, _, peak in there if peak]
            axes[1, column].plot([length for length, _ in held], [mib for _, mib in held], **style)
        ticks = sorted({result["tokens"] for result in members})
        for axis, what in ((axes[0, column], "ms"), (axes[1, column], "MiB at the highest point")):
            axis.set(xscale="log", yscale="log", ylabel=what)
            axis.set_xticks(ticks, [short(tick) for tick in ticks])
            axis.minorticks_off()
            axis.grid(color="#e4e7eb", linewidth=0.6)
            axis.tick_params(labelsize=8)
        axes[0, column].set_title(name, fontsize=10)
        axes[1, column].set_xlabel("T", fontsize=9)
        axes[0, column].legend(fontsize=7, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def measured_operations(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without what failed or was left out."""
    return [result for result in results if "operation" in result]


def write_report(folder: Path, about: dict[str, Any], busy: str | None, results: list[dict[str, Any]], reached: list[Reached]) -> tuple[str, bool]:
    """Files of a run; returns the text to print and whether all went well: nothing refused, nothing failed."""
    done = measured_operations(results)
    notes = [busy] if busy else []
    notes += [f"failed: {result['failed']}" for result in results if "failed" in result]
    notes += [f"left out: {result['left_out']}" for result in results if "left_out" in result]
    summary = report.targets_table(reached)
    text = ["# Masks, measured", "", *(f"- {note}" for note in notes), "", report.environment_table(about), ""]
    text += ["Medians of interleaved turns; a ratio is the median of the ratios within a round, times faster where the target says >=.", ""]
    text += ["## Targets", "", summary, tables(done), ""]
    folder.mkdir(parents=True, exist_ok=True)
    judged = [
        dict(target=r.target.text, batch=r.target.batch, must=r.target.must, at_least=r.target.at_least, value=r.value, reached=r.verdict) for r in reached
    ]
    report.write_json(folder / "masks.json", {"environment": about, "busy": busy, "targets": judged, "results": results})
    (folder / "masks.md").write_text("\n".join(text))
    refused = [result["refused"] for result in done if "refused" in result]
    printed = [*notes, *(f"REFUSED: {reason}" for reason in refused), summary, f"\nWritten to {folder}"]
    return "\n".join(printed), bool(done) and not refused and not any("failed" in result for result in results)


def _lengths(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks.bench_masks", description=__doc__.splitlines()[0])
    made.add_argument("--quick", action="store_true", help="short rows, under a minute")
    made.add_argument("--lengths", type=_lengths, default=None, help="of the rows of BlockMask; default " + ",".join(map(str, LENGTHS)))
    made.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    made.add_argument("--threads", type=int, default=0, help="of torch; default its own choice")
    made.add_argument("--budget", type=float, default=None, help="seconds for the rounds of one operation")
    made.add_argument("--limit", type=float, default=1e9, help="seconds for everything; what is left then is left out")
    made.add_argument("--name", default=None, help="folder below benchmarks/results")
    made.add_argument("--out", default=None, help="folder, instead of one below benchmarks/results")
    made.add_argument("--growth", type=int, default=None, help=argparse.SUPPRESS)
    return made


def main() -> int:
    arguments = parser().parse_args()
    if arguments.growth:
        print(growth(arguments.growth))
        return 0
    arguments.lengths = arguments.lengths or ((4096,) if arguments.quick else LENGTHS)
    arguments.budget = arguments.budget or (0.3 if arguments.quick else 3.0)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    # more shapes than dynamo compiles would fall back to eager, and be timed as compiled
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    busy, about = busy_note(), environment(arguments.device)
    about["transformers"] = None if NO_TRANSFORMERS else transformers.__version__
    folder = Path(arguments.out) if arguments.out else RESULTS / (arguments.name or f"{arguments.device}-{time.strftime('%Y-%m-%d')}")
    results: list[dict[str, Any]] = []
    for result in worker(arguments):
        results.append(result)
        write_report(folder, about, busy, results, evaluate(measured_operations(results), MASK_TARGETS))  # for who stops it here
    reached = [*evaluate(measured_operations(results), MASK_TARGETS), *figures(results, arguments)]
    printed, fine = write_report(folder, about, busy, results, reached)
    plot(measured_operations(results), folder / "masks.png")
    roofline.write(measured_operations(results), folder)
    print(printed)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
