"""Methods put on an instance and taken off again, among others who do the same.

A method of ours is a function that runs our version while the module is patched and the original otherwise. It is bound
where the module's own attribute is found: in the instance's ``__dict__``, or in ``_old_forward`` where accelerate's hooks
have moved the real forward. Whether a module is patched is told by what is bound there, never by a mark alone: a mark
survives pickling, the binding does not.
"""

from __future__ import annotations

import functools
import threading
import types
from collections.abc import Callable, Iterable, Iterator

from torch import nn

#: in the ``__dict__`` of a patched module. Two, because torch.compile guards on the one that is read.
PATCHED, COUNT = "_vlm_fuse_patched", "_vlm_fuse_patches"
_ORIGINAL, _OURS = "_vlm_fuse_original", "_vlm_fuse_ours"
_REPLICATE = "_replicate_for_data_parallel"

_lock = threading.RLock()


class Unreachable(Exception):
    """A method that cannot be replaced on this instance, and why."""


def method(module: nn.Module, name: str) -> Callable:
    """The function that runs as ``module.<name>`` where we are not: self comes first.

    Raises:
        Unreachable: there is none, or something stands in its place that is no function of the module.
    """
    return original(_current(module, name))


def original(function: Callable) -> Callable:
    """The function behind one of ours; any other as it is."""
    return function.__dict__.get(_ORIGINAL, function) if isinstance(function, types.FunctionType) else function


def bind(module: nn.Module, methods: Iterable[tuple[str, Callable]]) -> list[tuple[str, str]]:
    """Patch a module: each (name, function taking self) runs in place of the method of that name.

    Returns:
        list: (name, reason) of those that cannot be replaced.

    A module that is patched already is counted once more, and gets what it lacks.
    """
    left, bound = [], False
    with _lock:
        count = _count(module)
        for name, instead in methods:
            try:
                function = _current(module, name)
            except Unreachable as reason:
                left.append((name, str(reason)))
                continue
            bound = True
            if function.__dict__.get(_OURS) is not instead:
                _place(module, name, _switched(original(function), instead))
        if bound:
            replicate = _current(module, _REPLICATE)
            if original(replicate) is replicate:
                _place(module, _REPLICATE, _switched(replicate, _replicated))
            module.__dict__[COUNT] = count + 1
            module.__dict__[PATCHED] = True
    return left


def unbind(module: nn.Module) -> bool:
    """Undo one `bind`; the last one leaves the module as it was. Whether it was patched."""
    with _lock:
        count = _count(module)
        if count > 1:
            module.__dict__[COUNT] = count - 1
            return True
        # where others have wrapped ours it stays, and without the mark it runs the original
        module.__dict__.pop(COUNT, None)
        module.__dict__.pop(PATCHED, None)
        for slot, value in list(module.__dict__.items()):
            if _is_ours(value, module):
                _restore(module, slot, original(value.__func__))
        return count == 1


def unpatch(model: nn.Module) -> None:
    """Undo one `patch`. A model that is not patched is left as it is.

    Args:
        model: as given to the `patch` of an integration, or anything around or in it.

    Raises:
        TypeError: not a module.

    Example:
        >>> import torch
        >>> from vlm_fuse.integrations.transformers import unpatch
        >>> unpatch(torch.nn.Linear(1, 1))  # was not patched
    """
    for module in modules(model):
        unbind(module)


def modules(model: nn.Module) -> Iterator[nn.Module]:
    """The model's modules, itself among them.

    Raises:
        TypeError: not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    return model.modules()


def is_patched(module: nn.Module) -> bool:
    """Whether methods of ours run on the module itself (not on the modules in it)."""
    return _count(module) > 0


def _count(module: nn.Module) -> int:
    """How many times the module is patched: none where a pickle has kept the mark and lost the binding."""
    return module.__dict__.get(COUNT, 0) if any(map(_ours_under, module.__dict__.values())) else 0


@functools.cache
def _switched(function: Callable, instead: Callable) -> Callable:
    """A function that runs `instead` for patched modules and `function` for all others.

    One for each pair, not one for each module: torch.compile guards on it.
    """

    @functools.wraps(function)
    def run(self, *args, **kwargs):
        if getattr(self, PATCHED, False):
            return instead(self, *args, **kwargs)
        return function(self, *args, **kwargs)

    setattr(run, _ORIGINAL, function)
    setattr(run, _OURS, instead)
    return run


def _is_ours(value, module: nn.Module) -> bool:
    return isinstance(value, types.MethodType) and value.__self__ is module and original(value.__func__) is not value.__func__


def _ours_under(value) -> Callable | None:
    """The function of ours that a value is, or says by ``__wrapped__`` that it runs."""
    while callable(value):
        function = getattr(value, "__func__", value)
        if original(function) is not function:
            return function
        value = getattr(value, "__dict__", {}).get("__wrapped__")
    return None


def _slot(module: nn.Module, name: str) -> str:
    """Where the method stands: accelerate's hooks keep the real forward as `_old_forward`."""
    return "_old_forward" if name == "forward" and "_old_forward" in module.__dict__ else name


def _current(module: nn.Module, name: str) -> Callable:
    """The function in the method's place, or ours under a wrapper that somebody has put around it."""
    slot = _slot(module, name)
    if slot not in module.__dict__:
        return _of_class(module, name)
    value = module.__dict__[slot]
    if isinstance(value, types.MethodType) and value.__self__ is module and isinstance(value.__func__, types.FunctionType):
        return value.__func__
    if (ours := _ours_under(value)) is not None:
        return ours
    raise Unreachable(f"{getattr(value, '__qualname__', type(value).__name__)} was put on the instance in its place")


def _of_class(module: nn.Module, name: str) -> Callable:
    function = _in_class(module, name)
    if isinstance(function, types.FunctionType):
        return function
    raise Unreachable("the class has no such method" if function is None else f"it is a {type(function).__name__}, not a method")


def _in_class(module: nn.Module, name: str):
    return next((vars(owner)[name] for owner in type(module).__mro__ if name in vars(owner)), None)


def _place(module: nn.Module, name: str, function: Callable) -> None:
    module.__dict__[_slot(module, name)] = types.MethodType(function, module)


def _restore(module: nn.Module, slot: str, function: Callable) -> None:
    if slot != "_old_forward" and function is _in_class(module, slot):
        del module.__dict__[slot]
    else:
        module.__dict__[slot] = types.MethodType(function, module)


def _replicated(self):
    """nn.DataParallel copies the ``__dict__``, in which methods are bound to the module and its parameters, not to the copy's."""
    replica = method(self, _REPLICATE)(self)
    for name, value in replica.__dict__.items():
        if _is_ours(value, self):
            replica.__dict__[name] = types.MethodType(value.__func__, replica)
    return replica
