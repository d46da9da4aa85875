"""DeepStack: visual features added to hidden states, in place of a clone, two boolean indexings and their backward."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

from .merges import added

NAME = "_deepstack_process"
_PARAMETERS = ["self", "hidden_states", "visual_pos_masks", "visual_embeds"]


@functools.cache
def instead_of(process: Callable) -> Callable | None:
    """What runs in place of a model's own method; None: its arguments are not the ones we know."""
    if list(inspect.signature(process).parameters) != _PARAMETERS:
        return None

    @functools.wraps(process)
    def deepstack_process(self, hidden_states, visual_pos_masks, visual_embeds):
        mask = visual_pos_masks.to(hidden_states.device)
        made = added(hidden_states, mask, visual_embeds.to(hidden_states.device, hidden_states.dtype))
        return process(self, hidden_states, visual_pos_masks, visual_embeds) if made is None else made

    return deepstack_process
