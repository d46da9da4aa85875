"""A method rewritten from its source: the innermost function behind its decorators, its calls replaced, everything else kept.

The rewritten function has the file and lines, the globals, the defaults and the closure of the original, so that tracebacks,
debuggers and torch.compile read it as they read the original. What it calls in place of the replaced calls comes in as
closure variables: nothing is written into the module's globals.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
import threading
import types
from collections.abc import Callable

_lock = threading.RLock()
_rewritten: dict[tuple[Callable, Callable], Callable | None] = {}


class NotRewritable(Exception):
    """Why the source of a method cannot be rewritten."""


def rewritten(function: Callable, transform: Callable[[ast.FunctionDef], bool], prefix: str, called: Callable[[str, dict], object]) -> Callable | None:
    """The function with its source transformed; None where `transform` changes nothing. Made once for each pair.

    Args:
        function: a method of a class, with or without decorators.
        transform: changes the tree in place and says whether it did.
        prefix: how the names begin that the transformed source calls.
        called: what such a name stands for, in the globals of the function's module.

    Raises:
        NotRewritable: there is no source, or a decorator that hides the function.
    """
    with _lock:
        key = function, transform
        if key not in _rewritten:
            layers = _layers(function)
            inner = _recompiled(layers[-1], transform, prefix, called)
            _rewritten[key] = None if inner is None else _wrapped_again(layers, inner)
        return _rewritten[key]


def inside(function: Callable, wrapper: Callable[[Callable], types.FunctionType]) -> Callable:
    """The function with a wrapper around the innermost, under all decorators: among those is gradient checkpointing.

    Raises:
        NotRewritable: a decorator that hides the function.
    """
    layers = _layers(function)
    return _wrapped_again(layers, wrapper(layers[-1]))


def innermost(function: Callable) -> Callable:
    """The function behind all decorators that say so by ``__wrapped__``."""
    return _layers(function)[-1]


def _layers(function: Callable) -> list[Callable]:
    layers = [function]
    while isinstance(getattr(layers[-1], "__wrapped__", None), types.FunctionType):
        layers.append(layers[-1].__wrapped__)
    return layers


def _recompiled(function: types.FunctionType, transform, prefix: str, called) -> types.FunctionType | None:
    definition, line = _definition(function)
    if not transform(definition):
        return None
    definition.decorator_list = []
    _without_annotations(definition)
    used = {node.id for node in ast.walk(definition) if isinstance(node, ast.Name) and node.id.startswith(prefix)}
    names = {name: called(name, function.__globals__) for name in sorted(used)}
    free = function.__code__.co_freevars
    # a function around it makes free variables of what is one, and of the names that come in
    around = ast.parse(f"def around({', '.join((*free, *names))}):\n    pass")
    around.body[0].body = [definition]
    ast.fix_missing_locations(around)
    ast.increment_lineno(around, line - 1)
    module = compile(around, function.__code__.co_filename, "exec", dont_inherit=True)
    code = _code_named(_code_named(module, "around"), definition.name)
    cells = dict(zip(free, function.__closure__ or ())) | {name: types.CellType(value) for name, value in names.items()}
    made = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__, tuple(cells[name] for name in code.co_freevars))
    return _like(made, function)


def _definition(function: types.FunctionType) -> tuple[ast.FunctionDef, int]:
    try:
        lines, line = inspect.getsourcelines(function)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, TypeError, SyntaxError) as error:
        raise NotRewritable(f"its source cannot be read ({error})") from None
    if len(tree.body) != 1 or not isinstance(tree.body[0], ast.FunctionDef) or tree.body[0].name != function.__code__.co_name:
        raise NotRewritable("its source is not that of a plain function")
    private = [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr.startswith("__") and not node.attr.endswith("__")]
    if private:
        raise NotRewritable(f"its source has the private name {private[0]}, which means something else outside of its class")
    return tree.body[0], line


def _without_annotations(definition: ast.FunctionDef) -> None:
    """They would be evaluated again; the function keeps those of the original."""
    definition.returns = None
    arguments = definition.args
    for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg):
        if argument is not None:
            argument.annotation = None
    arguments.defaults = [ast.Constant(None) for _ in arguments.defaults]
    arguments.kw_defaults = [default and ast.Constant(None) for default in arguments.kw_defaults]


def _code_named(code: types.CodeType, name: str) -> types.CodeType:
    return next(part for part in code.co_consts if isinstance(part, types.CodeType) and part.co_name == name)


def _like(made: types.FunctionType, function: types.FunctionType) -> types.FunctionType:
    made.__kwdefaults__ = function.__kwdefaults__
    made.__annotations__ = function.__annotations__
    made.__qualname__, made.__module__, made.__doc__ = function.__qualname__, function.__module__, function.__doc__
    made.__dict__.update(function.__dict__)
    return made


def _wrapped_again(layers: list[Callable], inner: types.FunctionType) -> types.FunctionType:
    """The decorators' own wrappers once more, each with the one cell replaced that holds what it wraps."""
    for wrapper, wrapped in zip(reversed(layers[:-1]), reversed(layers[1:])):
        cells = list(wrapper.__closure__ or ())
        at = [index for index, cell in enumerate(cells) if _contents(cell) is wrapped]
        if not at:
            raise NotRewritable(f"its decorator in {wrapper.__module__} hides it")
        for index in at:
            cells[index] = types.CellType(inner)
        again = types.FunctionType(wrapper.__code__, wrapper.__globals__, wrapper.__name__, wrapper.__defaults__, tuple(cells))
        inner = _like(again, wrapper)
        inner.__wrapped__ = cells[at[0]].cell_contents
    return inner


def _contents(cell: types.CellType):
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return None
