"""Tensors that end (or begin) at a page nobody may touch, and a run of every kernel on them.

`python fenced.py BACKEND` hands each kernel inputs and outputs that lie flush against such pages: one byte read or
written beyond them ends the process. test_bounds.py starts it; the last line printed names what ran.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from dataclasses import replace

import torch

PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)


def fenced_empty(shape, dtype, side: str = "end") -> torch.Tensor:
    """A contiguous tensor filled with bytes 0xff (NaN, -1), flush with a forbidden page at one side."""
    count = 1
    for size in shape:
        count *= size
    size = count * torch.empty((), dtype=dtype).element_size()
    if not size:
        return torch.empty(shape, dtype=dtype)
    pages = -(-size // PAGE)
    memory = mmap.mmap(-1, (pages + 2) * PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for forbidden in (address, address + (pages + 1) * PAGE):
        if _libc.mprotect(ctypes.c_void_p(forbidden), ctypes.c_size_t(PAGE), 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = PAGE if side == "begin" else (pages + 1) * PAGE - size
    tensor = torch.frombuffer(memory, dtype=dtype, count=count, offset=offset)
    tensor.view(torch.uint8).fill_(0xFF if dtype != torch.bool else 1)
    return tensor.view(shape)


def fenced(tensor: torch.Tensor | None, side: str = "end") -> torch.Tensor | None:
    """A copy behind the fence."""
    if tensor is None:
        return None
    return fenced_empty(tensor.shape, tensor.dtype, side).copy_(tensor)


def fence_allocations(side: str) -> None:
    """What the library allocates lies behind the fence too."""

    def new_empty(self, *size, dtype=None, device=None, **_):
        if len(size) == 1 and not isinstance(size[0], int):
            size = tuple(size[0])
        return fenced_empty(size, dtype or self.dtype, side)

    torch.Tensor.new_empty = new_empty
    torch.empty_like = lambda tensor, dtype=None, **_: fenced_empty(tensor.shape, dtype or tensor.dtype, side)


def hostile(tensor: torch.Tensor, generator, sums: bool = False) -> torch.Tensor:
    """The same tensor with a third of its numbers replaced by the worst there are."""
    if tensor.dtype == torch.bool or not tensor.numel():
        return tensor
    info = torch.iinfo(tensor.dtype)
    # sums of sizes and of counts stay within 64 bits, as those of anything that fits a memory do
    low, high = (-(2**40), 2**40) if sums else (info.min, info.max)
    worst = torch.tensor([low, high, -1, 0, 1, 2, 7, 1000, high // 2, low // 2, 33, 34], dtype=torch.int64)
    chosen = worst[torch.randint(len(worst), tensor.shape, generator=generator)].clamp(info.min, info.max).to(tensor.dtype)
    return torch.where(torch.rand(tensor.shape, generator=generator) < 0.34, chosen, tensor)


FACTS = ("text_index", "position_ids", "document_ids", "image_ids", "kind_ids", "attention_mask", "cu_seqlens")


def check_source_index(source_index, batch) -> None:
    """Every entry names a row that exists, whatever the tokens said. (Sizes that lie name rows that the row kernel finds missing.)"""
    if batch.image_rows is not None or batch.feature_counts is not None:
        return
    rows = sum(max(batch.kind(c)[2], 0) for c in range(batch.kind_count))
    named = source_index[source_index >= 0]
    assert not named.numel() or int(named.max()) < max(rows, 1), f"feature row {int(named.max())} of {rows}"
    tokens = source_index[(source_index < 0) & (source_index != -(2**31))]
    assert not tokens.numel() or int(-1 - tokens.min()) < batch.tokens.numel(), "a token that does not exist"


def run_plan(kernels, batch, width: int) -> None:
    from vlm_fuse.batch import RAISE, RecordedError

    names = FACTS + (("labels",) if batch.labels is not None else ())
    for status in (None, torch.zeros(8, dtype=torch.int64), RAISE):
        try:
            check_source_index(kernels.plan(batch, width, status), batch)
        except RecordedError:
            assert status is RAISE
    documents = 0 if batch.document_ids is None else 3
    kernels.facts(batch, width, names, documents)
    kernels.count(batch)


def fence_batch(batch, side):
    return batch._replace(**{name: fenced(getattr(batch, name), side) for name in ("tokens", "attention_mask", "document_ids", "labels", "image_rows", "feature_counts")})


def run_rows(kernels, tensors, plan, source_index, side: str) -> torch.Tensor:
    """Forward and backward of the row kernel with everything behind the fence; the output."""
    case = tensors.case
    add = case.combine == "add"
    features, starts, first = [], [], 0
    for kind, entry in zip(case.given.kinds, tensors.features):
        begin = first
        for feature in entry if isinstance(entry, list) else [entry]:
            features.append(fenced(feature, side))
            starts.append(begin)
            begin += feature.reshape(-1, case.D).shape[0] if feature.numel() else 0
        first += kind.numbered
    text, weight = fenced(tensors.text, side), fenced(tensors.weight, side)
    tokens = None if weight is None else fenced(plan._batch.tokens, side)
    text_index = fenced(plan.text_index, side) if add else None
    source_index = fenced(source_index, side)
    out = fenced_empty((*source_index.shape, case.D), case.dtype, side)
    kernels.rows(out, text, weight, tokens, case.scale, features, starts, source_index, text_index, add, False, None)
    assert not out.isnan().any(), "a row that nobody wrote"
    if case.text == "embeds" and plan.layout == "keep":
        kernels.rows(text, text, None, None, None, features, starts, source_index, None, add, True, None)
    grad = fenced(torch.ones_like(out), side)
    grad_table = fenced_empty((text if weight is None else weight).shape, case.dtype, side)
    grad_features = [fenced_empty(feature.shape, feature.dtype, side) for feature in features]
    kernels.rows_backward(
        grad, source_index, text_index, tokens, case.scale, starts, add,
        grad_table if weight is None else None, grad_table if weight is not None else None, grad_features,
    )  # fmt: skip
    assert not any(made.isnan().any() for made in (grad_table, *grad_features)), "a gradient row that nobody wrote"
    return out


def run_renderings(kernels, parts, keys: int) -> None:
    kernels.dense(*parts, keys, torch.bool)
    kernels.dense(*parts, keys, torch.bfloat16)
    kernels.bits(*parts, keys)
    kernels.block_map(*parts, keys, 4, 3)


def run_one_launch(backend: str, generator, side: str) -> None:
    """merge from token ids, where rows and plan are made by one kernel."""
    import vlm_fuse

    text, features = torch.randn(3, 11, 7, generator=generator), torch.randn(13, 7, generator=generator)
    for options in (dict(), dict(layout="packed", length=33), dict(layout="packed", length=5), dict(combine="add"), dict(attend=vlm_fuse.Attend(window=2))):
        ids = torch.randint(0, 3, (3, 11), generator=generator)
        for tokens in (ids, hostile(ids, generator)):
            kept = torch.rand(3, 11, generator=generator) < 0.8
            given = [fenced(tensor, side) for tensor in (tokens, text, features)]
            rest = dict(image_token_id=2, labels=fenced(tokens, side), attention_mask=fenced(kept, side), validate="off", **options)
            got, wanted = (vlm_fuse.merge(*given, backend=name, **rest) for name in (backend, "reference"))
            for name in ("inputs_embeds", "source_index", "position_ids", "labels", "cu_seqlens", "kv_lo", "kv_hi"):
                assert torch.equal(getattr(got, name), getattr(wanted, name)), f"{name} differs from the reference: {options}"


def main(backend: str) -> None:
    import faulthandler

    faulthandler.enable()
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:0] = [here, os.path.dirname(here)]
    os.environ["TRITON_INTERPRET"] = "1"  # kernels of a GPU run on the host here, also where there is one
    if backend == "cuda":
        from emulator import build

        build.install()
    import vlm_fuse
    from cases import BY_NAME, SPECIAL
    from checking import merge
    from vlm_fuse import backend as choice
    from vlm_fuse import reference

    kernels = choice.choose(backend, "cpu")
    if backend == "cuda":
        from vlm_fuse.kernels import cuda_module

        cuda_module.attach_allocation(cuda_module.module, through_functions=False)  # what the module makes comes from the new_empty above
    generator = torch.Generator().manual_seed(1)
    chosen = SPECIAL[:: {"cpu": 1, "triton": 12}.get(backend, 6)]
    for case in chosen:
        plan = merge(case.tensors(), "reference").plan
        batch, width = plan._batch, plan.source_index.shape[1]
        shape = plan.source_index.shape
        for side in ("end", "begin") if backend != "triton" else ("end",):
            fence_allocations(side)
            print(case.name, side, "plan", flush=True)
            run_plan(kernels, fence_batch(batch, side), width)
            # plain PyTorch checks its own bounds
            for attempt in range({"reference": 0, "triton": 1}.get(backend, 2)):
                print(case.name, side, "hostile plan", attempt, flush=True)
                worse = batch._replace(**{name: hostile(value, generator, name in ("image_rows", "feature_counts")) for name in ("tokens", "attention_mask", "document_ids", "image_rows", "feature_counts") if (value := getattr(batch, name)) is not None})
                other = width if batch.layout == 0 else max(0, width + (-1, 3)[attempt])
                run_plan(kernels, fence_batch(worse, side), other)
            print(case.name, side, "rows", flush=True)
            run_rows(kernels, case.tensors(), plan, plan.source_index, side)
            if plan.layout == "keep" and case.combine == "add":
                continue  # source_index and text_index go together
            print(case.name, side, "hostile rows", flush=True)
            far = torch.tensor([-(2**31), 2**31 - 1, 2**30, -(2**30), 1000, -1000, 12345678, -1], dtype=torch.int32)
            source_index = far[torch.randint(len(far), shape, generator=generator)]
            if backend != "reference":
                got = run_rows(kernels, case.tensors(), plan, source_index, side)
                wanted = run_rows(reference, case.tensors(), plan, source_index, side)
                assert case.combine == "add" or torch.equal(got, wanted), "hostile rows differ from the reference"
            print(case.name, side, "intervals", flush=True)
            for attend in (vlm_fuse.Attend(), vlm_fuse.Attend("full", window=2, images="bidirectional"), vlm_fuse.Attend(window=1, sinks=3)):
                for ids, images in ((plan.document_ids, plan.image_ids), (hostile(plan.document_ids, generator), hostile(plan.image_ids, generator))):
                    kernels.intervals(fenced(ids, side), fenced(images, side), attend.codes, None, None, True, None)
            print(case.name, side, "renderings", flush=True)
            mask = plan.mask(vlm_fuse.Attend(window=2))
            for parts in ((mask.kv_lo, mask.kv_hi, None, None), [hostile(part, generator) for part in (mask.kv_lo, mask.kv_hi, mask.kv_lo, mask.kv_hi)]):
                run_renderings(kernels, [fenced(part, side) for part in parts], width)
    for side in ("end", "begin") if backend == "cuda" else ():
        fence_allocations(side)
        print(side, "one launch", flush=True)
        for _ in range(5):
            run_one_launch(backend, generator, side)
    if backend == "cpu":
        # past the cache: stores that bypass it, rows spread over threads
        for side in ("end", "begin"):
            fence_allocations(side)
            for dtype in (torch.float32, torch.bfloat16):
                case = replace(BY_NAME["two_images_left_padded"], D=1_000_003, dtype=dtype, feature_dtypes=(torch.float32,))
                print(case.name, side, "large", flush=True)
                plan = merge(case.tensors(), backend).plan
                run_rows(kernels, case.tensors(), plan, plan.source_index, side)
    print("done", len(chosen), "cases", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
