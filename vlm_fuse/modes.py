"""Modes of torch under which a call is not a plain one: FakeTensorMode, tracing, user-defined modes, torch.func.

Private functions of torch; where one is missing, its mode counts as active, which only costs time.
"""

from __future__ import annotations

import torch

dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
function_modes = getattr(torch._C, "_len_torch_function_stack", lambda: 1)
peek_functorch = getattr(torch._C._functorch, "peek_interpreter_stack", lambda: True)

#: each returns 0 or None outside of its modes.
MODES = (dispatch_modes, function_modes, peek_functorch)
