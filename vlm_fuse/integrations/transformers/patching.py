"""`patch` and `patched`: a transformers model that merges by vlm_fuse, and as it was before."""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import types
import warnings
import weakref
from collections.abc import Callable, Iterator

from torch import nn

from .. import binding
from ..rewriting import NotRewritable, innermost
from . import call_sites, deepstack, packed_layers, rope_index
from .calls import rewritten_code

#: nothing is merged in these, though some name what is looked for
_NOT_MODELS = ("torch.", "transformers.modeling_utils", "transformers.generation.")

_lock = threading.Lock()
_candidates: weakref.WeakKeyDictionary[type, tuple[str, ...]] = weakref.WeakKeyDictionary()


def patch(model: nn.Module) -> None:
    """Have a transformers model merge its images by vlm_fuse, on this instance alone.

    Every method of the model and of the modules in it that merges with ``masked_scatter`` or ``inputs_embeds[mask] = features``,
    checks placeholders against features, adds DeepStack features, works out M-RoPE positions or makes an attention mask is
    rewritten from its own source and bound to the instance. Loss, logits and gradients stay what they are, to the bit.

    Args:
        model: any `torch.nn.Module` with transformers' modules in it: bare, under PEFT, DDP, FSDP2, accelerate's hooks or
            Liger's patches. Patch before ``torch.compile``.

    Raises:
        TypeError: not a module.

    Warns:
        UserWarning: once a call, with all that was left as it is, and why.

    Calls are counted: a model that was patched twice is as before after two `unpatch`. A deepcopy of a patched model is
    patched, a pickle of it loads unpatched. Threads may patch, unpatch and run at the same time.

    Example:
        >>> import transformers
        >>> from vlm_fuse.integrations.transformers import patch
        >>> small = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1)
        >>> text, vision = transformers.LlamaConfig(**small), transformers.CLIPVisionConfig(**small)
        >>> model = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(vision_config=vision, text_config=text))
        >>> patch(model)

    Source: the merges, checks and masks that are replaced are those of huggingface/transformers, ``models/*/modeling_*.py``.
    """
    modules = list(binding.modules(model))
    left: dict[str, None] = {}
    found = False
    more: dict[nn.Module, list[tuple[str, Callable]]] = {}
    for module, name, instead in (*packed_layers.bindings(model), *rope_index.bindings(model)):
        if isinstance(instead, str):
            left[f"{type(module).__name__}.{name}: {instead}"] = None
        else:
            more.setdefault(module, []).append((name, instead))
    for module in modules:
        methods, reasons = _methods(module)
        methods += more.get(module, [])
        if methods:
            found = True
            reasons += binding.bind(module, methods)
        for name, reason in reasons:
            left[f"{type(module).__name__}.{name}: {reason}"] = None
    if not found and not left:
        left[f"{type(model).__name__} has no module that merges features into embeddings"] = None
    if left:
        warnings.warn("vlm_fuse left as it is:\n  " + "\n  ".join(left), stacklevel=2)


@contextlib.contextmanager
def patched(model: nn.Module) -> Iterator[nn.Module]:
    """`patch` for the length of a ``with`` block. A model that was patched before stays so.

    Args:
        model: as in `patch`; the value of the block.

    Example:
        >>> import transformers
        >>> from vlm_fuse.integrations.transformers import patched
        >>> small = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1)
        >>> text, vision = transformers.LlamaConfig(**small), transformers.CLIPVisionConfig(**small)
        >>> model = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(vision_config=vision, text_config=text))
        >>> with patched(model):
        ...     pass  # model(**batch)
    """
    patch(model)
    try:
        yield model
    finally:
        binding.unpatch(model)


def _methods(module: nn.Module) -> tuple[list[tuple[str, Callable]], list[tuple[str, str]]]:
    """(name, what runs in its place) of a module's methods, and (name, reason) of those left."""
    methods, left = [], []
    for name in _names(module):
        try:
            instead = _instead(name, binding.method(module, name), name == "forward" and _takes_text_row(module))
        except (NotRewritable, binding.Unreachable) as reason:
            left.append((name, str(reason)))
            continue
        if instead is not None:
            methods.append((name, instead))
    return methods, left


def _names(module: nn.Module) -> tuple[str, ...]:
    """The methods that are worth reading: those of the class, and a forward that somebody has put on the instance."""
    kind = type(module)
    with _lock:
        names = _candidates.get(kind)
        if names is None:
            names = _candidates[kind] = tuple(_names_in(kind))
    replaced = module.__dict__.get("_old_forward", module.__dict__.get("forward"))
    function = binding.original(getattr(replaced, "__func__", None))
    if "forward" not in names and isinstance(function, types.FunctionType) and call_sites.mentioned(innermost(function)):
        return (*names, "forward")
    return names


def _names_in(kind: type) -> Iterator[str]:
    seen = set()
    for owner in kind.__mro__:
        for name, function in vars(owner).items():
            if isinstance(function, types.FunctionType) and name not in seen and not f"{owner.__module__}.".startswith(_NOT_MODELS):
                if name == deepstack.NAME or call_sites.mentioned(innermost(function)):
                    yield name
            seen.add(name)


def _instead(name: str, function: Callable, text_row: bool) -> Callable | None:
    if name == deepstack.NAME:
        return deepstack.instead_of(function)
    return rewritten_code(function, text_row)


def _takes_text_row(module: nn.Module) -> bool:
    """Whether M-RoPE's positions may have four rows: a text model in it asks for that."""
    return any(child is not module and _asks_for_text_row(type(child)) for child in module.modules())


@functools.cache
def _asks_for_text_row(kind: type) -> bool:
    forward = getattr(kind, "forward", None)
    if not isinstance(forward, types.FunctionType) or "position_ids" not in innermost(forward).__code__.co_varnames:
        return False
    with contextlib.suppress(OSError):
        return "position_ids.shape[0] == 4" in inspect.getsource(innermost(forward))
    return False
