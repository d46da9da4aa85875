"""What rewritten code calls, by the names that call_sites.py writes."""

from __future__ import annotations

import functools
import linecache
from collections.abc import Callable

from . import call_sites, documents, merges, packed_masks
from .rewriting import NotRewritable, rewritten


def rewritten_code(function: Callable) -> Callable | None:
    """The function with its merges, checks and masks replaced; None where there are none.

    Raises:
        NotRewritable: there are some, and the source cannot be had.
    """
    return rewritten(function, call_sites.transform, call_sites.PREFIX, _called)


def _called(name: str, module: dict) -> object:
    """What a name of ours stands for in the code of a module."""
    if name == call_sites.TEXT_ROW and not _takes_text_row(module["__file__"]):
        return lambda position_ids, *_: position_ids
    if not name.startswith(call_sites.MASK):
        return _CALLED[name]
    factory = module.get(name.removeprefix(call_sites.MASK))
    if factory is None:
        raise NotRewritable(f"{name.removeprefix(call_sites.MASK)} is no function of its module")
    # a factory of masking_utils, or a helper of a model's own around them
    if getattr(factory, "__module__", "").endswith(".masking_utils"):
        return functools.partial(packed_masks.call, factory)
    try:
        return rewritten_code(factory) or factory
    except NotRewritable:
        return factory


def _takes_text_row(path: str) -> bool:
    """Whether a model's M-RoPE positions may have four rows: its text model asks for that."""
    return any("position_ids.shape[0] == 4" in line for line in linecache.getlines(path))


_CALLED = {
    call_sites.MASKED_SCATTER: merges.masked_scatter,
    call_sites.ASSIGNED: merges.assigned,
    call_sites.COUNTABLE: merges.countable,
    call_sites.COUNTED: merges.counted,
    call_sites.TEXT_ROW: documents.with_text_row,
}
