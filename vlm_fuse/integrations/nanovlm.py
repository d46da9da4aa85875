"""nanoVLM with a fused merge, positions that begin anew in each sample, and samples of a packed row that do not see each other.

    from vlm_fuse.integrations import nanovlm
    nanovlm.patch(model)  # before torch.compile and DDP, or after

nanoVLM's packer ends each sample with one masked pad and hands on no boundaries: they are where attention_mask is 0. Its own
forward, data sets, collators and training step stay as they are. Its labels are shifted in the data set and are not touched.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import torch
from torch import Tensor, nn

import vlm_fuse

from . import binding
from .binding import unpatch
from .rewriting import rewritten

_MERGE = "_replace_img_tokens_with_embd"
#: of the forward of a decoder that is under way: (B, L), for its rotary embedding
_positions: ContextVar[Tensor | None] = ContextVar("positions", default=None)
_mask: ContextVar[vlm_fuse.IntervalMask | None] = ContextVar("mask", default=None)
_SDPA = "_vlm_fuse_sdpa"


def patch(model: nn.Module) -> None:
    """Have a nanoVLM merge by vlm_fuse and keep its samples apart, on this instance alone.

    Args:
        model: nanoVLM's ``VisionLanguageModel``, bare or under DDP or torch.compile.

    Raises:
        TypeError: not a nanoVLM, or v0.1, which has no placeholders.

    With ``attention_mask=None`` a row is one sample and nothing but the merge changes. With a mask every run of tokens between
    zeros is a sample: its positions count from 0 and it sees itself alone. Where samples stand side by side, number them in the
    mask: 1, 1, 2, 2, 2, 0. Calls are counted, as those of `vlm_fuse.integrations.transformers.patch`.

    Source: huggingface/nanoVLM, ``models/vision_language_model.py``, ``models/language_model.py``, ``data/advanced_datasets.py``.
    """
    found = _parts(model)
    for module, name, wrapper in found:
        function = binding.method(module, name)
        binding.bind(module, [(name, wrapper(function))])


@contextlib.contextmanager
def patched(model: nn.Module) -> Iterator[nn.Module]:
    """`patch` for the length of a ``with`` block. A model that was patched before stays so.

    Args:
        model: as in `patch`; the value of the block.
    """
    patch(model)
    try:
        yield model
    finally:
        unpatch(model)


def _parts(model: nn.Module) -> list[tuple[nn.Module, str, Callable]]:
    """(module, method, what makes ours of it) of every nanoVLM in the model."""
    found = []
    for module in binding.modules(model):
        if not all(hasattr(module, name) for name in ("vision_encoder", "MP", "decoder")):
            continue
        if not hasattr(module, _MERGE):
            raise TypeError(
                f"model: {type(module).__name__} is nanoVLM without image placeholders (v0.1), which concatenates images and padded text; "
                'take a newer one, or merge by vlm_fuse.merge(..., scheme="images_first")'
            )
        decoder = module.decoder
        found += [(module, _MERGE, _merging), (decoder, "forward", _by_sample), (decoder.rotary_embd, "forward", _rotating)]
        found += [(block.attn, "forward", _attending) for block in decoder.blocks]
    if not found:
        raise TypeError(f"model: {type(model).__name__} is no nanoVLM: it has no vision_encoder, MP and decoder")
    return found


@functools.cache
def _merging(replace: Callable) -> Callable:
    @functools.wraps(replace)
    def replace_img_tokens_with_embd(self, input_ids, token_embd, image_embd):
        rows = image_embd.reshape(-1, image_embd.size(-1))
        return vlm_fuse.merge(input_ids, token_embd, rows, image_token_id=self.tokenizer.image_token_id).inputs_embeds

    return replace_img_tokens_with_embd


@functools.cache
def _by_sample(forward: Callable) -> Callable:
    """The decoder, with positions by sample, and a mask that its attention finds in place of the mask of keys."""
    parameters = inspect.signature(forward)

    @functools.wraps(forward)
    def decoder(self, *args, **kwargs):
        given = parameters.bind(self, *args, **kwargs).arguments
        kept, cache, x = given.get("attention_mask"), given.get("kv_cache"), given["x"]
        if not isinstance(kept, Tensor):
            return forward(self, *args, **kwargs)
        if x.device.type == "mps":
            raise NotImplementedError("attention_mask: on MPS nanoVLM computes attention without SDPA, which is what is replaced; leave the model unpatched there")
        length = x.shape[1]
        kept = kept[:, : given.get("start_pos", 0) + length]
        if cache is None:
            plan = vlm_fuse.plan(kept.long(), document_ids=document_ids(kept))
            mask, positions = plan.mask(vlm_fuse.Attend()), plan.position_ids
            given["attention_mask"] = None
        else:  # one sample a row: the tokens that the cache holds, padding left out, and the new ones
            mask, positions = None, ((kept != 0).cumsum(-1) - 1).clamp(min=0)[:, -length:]
        tokens = _positions.set(positions), _mask.set(mask)
        try:
            return forward(**given)
        finally:
            _positions.reset(tokens[0])
            _mask.reset(tokens[1])

    return decoder


@functools.cache
def _rotating(forward: Callable) -> Callable:
    @functools.wraps(forward)
    def rotary_embedding(self, position_ids):
        positions = _positions.get()
        return forward(self, position_ids if positions is None else positions)

    return rotary_embedding


def _attending(forward: Callable) -> Callable:
    """Its attention with the one call of SDPA replaced."""
    made = rewritten(forward, _replace_sdpa, _SDPA, lambda name, module: _sdpa)
    if made is None:
        raise TypeError(f"model: {forward.__qualname__} does not call scaled_dot_product_attention, which is what is replaced")
    return made


def _replace_sdpa(definition: ast.FunctionDef) -> bool:
    calls = [node for node in ast.walk(definition) if isinstance(node, ast.Call) and getattr(node.func, "attr", None) == "scaled_dot_product_attention"]
    for call in calls:
        call.func = ast.copy_location(ast.Name(_SDPA, ast.Load()), call)
    return bool(calls)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, *, dropout_p: float = 0.0, **other) -> Tensor:
    mask = _mask.get()
    if mask is None:
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, dropout_p=dropout_p, **other)
    if dropout_p:
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask.dense(), dropout_p=dropout_p)
    return vlm_fuse.attention(query, key, value, mask)


def document_ids(attention_mask: Tensor) -> Tensor:
    """``(B, L)`` the samples of all rows, numbered, -1 at padding: a run of one number other than 0 is a sample.

    Args:
        attention_mask: ``(B, L)``, 0 = padding; 1 everywhere else, or a number for each sample.

    Example:
        >>> import torch
        >>> from vlm_fuse.integrations.nanovlm import document_ids
        >>> document_ids(torch.tensor([[1, 1, 0, 1, 1, 1, 0], [0, 0, 1, 1, 2, 2, 2]]))
        tensor([[ 0,  0, -1,  1,  1,  1, -1],
                [-1, -1,  2,  2,  3,  3,  3]])
    """
    kept = attention_mask != 0
    starts = kept & (attention_mask != torch.nn.functional.pad(attention_mask[:, :-1], (1, 0)))
    numbers = starts.flatten().cumsum(0).view(starts.shape) - 1
    return torch.where(kept, numbers, -1)
