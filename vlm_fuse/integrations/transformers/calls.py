"""What rewritten code calls, by the names that call_sites.py writes."""

from __future__ import annotations

import functools
from collections.abc import Callable

from ..rewriting import NotRewritable, rewritten
from . import call_sites, documents, merges, packed_masks


def rewritten_code(function: Callable, text_row: bool = False) -> Callable | None:
    """The function with its merges, checks and masks replaced; None where there are none.

    Args:
        text_row: a forward that has M-RoPE's positions made takes them with three rows as with four.

    Raises:
        NotRewritable: there are some, and the source cannot be had.
    """
    return rewritten(function, call_sites.transform_with_text_row if text_row else call_sites.transform, call_sites.PREFIX, _called)


def _called(name: str, module: dict) -> object:
    """What a name of ours stands for in the code of a module."""
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


_CALLED = {
    call_sites.MASKED_SCATTER: merges.masked_scatter,
    call_sites.ASSIGNED: merges.assigned,
    call_sites.COUNTABLE: merges.countable,
    call_sites.COUNTED: merges.counted,
    call_sites.OWN_MASK: packed_masks.of_its_own,
    call_sites.TEXT_ROW: documents.with_text_row,
}
