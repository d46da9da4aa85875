"""What is looked for in the source of a model's methods, and what stands there afterwards.

    x.masked_scatter(mask, source)             MASKED_SCATTER(x, mask, source)
    embeds[mask] = features                    embeds = ASSIGNED(embeds, mask, features)
    a check that compares a mask's count       if COUNTABLE(mask, numel, width): mask = COUNTED(mask, numel, width, lambda: message)
    with the number of features                else: the check
    create_causal_mask, and its kin            MASK + "create_causal_mask"
    self._update_causal_mask(...)              OWN_MASK(self._update_causal_mask(...), position_ids, attention_mask)
    a forward that makes M-RoPE's positions    begins with position_ids = TEXT_ROW(position_ids, cache)

The functions behind the names decide at run time, by shapes and dtypes, and leave to the original what they do not know.
"""

from __future__ import annotations

import ast
import copy
import dis
import types
from collections.abc import Iterator

from .documents import CACHES

PREFIX = "_vlm_fuse_"
MASKED_SCATTER, ASSIGNED, COUNTABLE, COUNTED, MASK, OWN_MASK, TEXT_ROW = (
    "_vlm_fuse_masked_scatter", "_vlm_fuse_assigned", "_vlm_fuse_countable", "_vlm_fuse_counted", "_vlm_fuse_mask_of_", "_vlm_fuse_own_mask", "_vlm_fuse_text_row"
)  # fmt: skip

_CHECK = "torch_compilable_check"
_MROPE = ("get_rope_index", "compute_3d_position_ids")
#: a method that makes a decoder's mask without the factories, before 5.0
_MAKES_MASK = "_update_causal_mask"


def is_mask_factory(name: str) -> bool:
    """A function that makes masks of a decoder: of transformers' masking_utils, or a model's own around those."""
    return name.startswith("create_") and ("causal_mask" in name or "masks_for" in name)


def mentioned(function: types.FunctionType) -> bool:
    """Whether the code names anything of the kind: cheap, so that most methods' sources are never read."""
    for code in codes(function.__code__):
        if not {"masked_scatter", _CHECK, _MAKES_MASK, *_MROPE}.isdisjoint(code.co_names) or any(map(is_mask_factory, code.co_names)):
            return True
        stores = any(name.endswith("embeds") for name in (*code.co_varnames, *code.co_cellvars, *code.co_freevars))
        if stores and any(instruction.opname == "STORE_SUBSCR" for instruction in dis.get_instructions(code)):
            return True
        if "numel" in code.co_names and stores:  # the check of transformers 4
            return True
    return False


def codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """A function's code and that of the functions in it."""
    yield code
    for part in code.co_consts:
        if isinstance(part, types.CodeType):
            yield from codes(part)


def transform(definition: ast.FunctionDef) -> bool:
    """Replace in place. Whether there was anything to replace."""
    calls = _Calls(definition)
    definition.body = [calls.visit(statement) for statement in definition.body]
    return calls.found > 0


def transform_with_text_row(definition: ast.FunctionDef) -> bool:
    """The same, of the forward that positions are given to, or that has them made."""
    found = transform(definition)
    arguments = _arguments(definition)
    cache = next((name for name in CACHES if name in arguments), None)
    if cache is None or "position_ids" not in arguments or not _makes_mrope(definition):
        return found
    first = definition.body[0]
    made = _call(first, TEXT_ROW, *(ast.copy_location(ast.Name(name, ast.Load()), first) for name in ("position_ids", cache)))
    definition.body.insert(0, ast.copy_location(ast.Assign([ast.copy_location(ast.Name("position_ids", ast.Store()), first)], made), first))
    return True


def _arguments(definition: ast.FunctionDef) -> set[str]:
    return {argument.arg for argument in (*definition.args.args, *definition.args.kwonlyargs)}


def _makes_mrope(definition: ast.FunctionDef) -> bool:
    called = {node.func.attr for node in ast.walk(definition) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)}
    return not called.isdisjoint(_MROPE)


class _Calls(ast.NodeTransformer):
    def __init__(self, definition: ast.FunctionDef):
        self.found = 0
        assignments = [node for node in ast.walk(definition) if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)]
        self.knows_positions = {"position_ids", "attention_mask"} <= _arguments(definition)
        self.assigned = {node.targets[0].id for node in assignments}
        #: the mask whose sum a name is: n = mask.sum()
        self.sums = {node.targets[0].id: summed for node in assignments if (summed := _summed(node.value)) is not None}

    def visit_Call(self, node: ast.Call):
        self.generic_visit(node)
        if isinstance(node.func, ast.Attribute) and node.func.attr == "masked_scatter" and len(node.args) == 2 and not node.keywords:
            self.found += 1
            return _call(node, MASKED_SCATTER, node.func.value, *node.args)
        if isinstance(node.func, ast.Attribute) and node.func.attr == _MAKES_MASK and self.knows_positions:
            self.found += 1
            return _call(node, OWN_MASK, node, *(ast.copy_location(ast.Name(name, ast.Load()), node) for name in ("position_ids", "attention_mask")))
        return node

    def visit_Name(self, node: ast.Name):
        """Called on the spot, or chosen from first."""
        if isinstance(node.ctx, ast.Load) and is_mask_factory(node.id):
            self.found += 1
            return ast.copy_location(ast.Name(MASK + node.id, ast.Load()), node)
        return node

    def visit_Assign(self, node: ast.Assign):
        self.generic_visit(node)
        target = node.targets[0]
        if len(node.targets) == 1 and isinstance(target, ast.Subscript) and isinstance(target.value, ast.Name) and _may_be_mask(target.slice):
            name = target.value.id
            if name.endswith("embeds") and name in self.assigned:
                self.found += 1
                value = _call(node, ASSIGNED, ast.Name(name, ast.Load()), target.slice, node.value)
                return ast.copy_location(ast.Assign([ast.copy_location(ast.Name(name, ast.Store()), node)], value), node)
        return node

    def visit_Expr(self, node: ast.Expr):
        """transformers 5: torch_compilable_check(condition, message)."""
        call = node.value
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == _CHECK and len(call.args) >= 2:
            made = self._counted(call.args[0], ast.Eq, call.args[1], node)
            if made is not None:
                return made
        return self.generic_visit(node)

    def visit_If(self, node: ast.If):
        """transformers 4: if a is not None and condition: raise ValueError(message)."""
        self.generic_visit(node)
        *preparations, last_statement = node.body
        if isinstance(last_statement, ast.Raise) and all(isinstance(statement, ast.Assign) for statement in preparations) and not node.orelse:
            *before, last = node.test.values if isinstance(node.test, ast.BoolOp) and isinstance(node.test.op, ast.And) else [node.test]
            error = last_statement.exc
            # what is prepared for the message is not there when ours is made
            message = error.args[0] if isinstance(error, ast.Call) and error.args and not preparations else ast.Constant("")
            made = self._counted(last, ast.NotEq, message, ast.copy_location(ast.If(last, node.body, []), node))
            if made is not None and before:
                test = before[0] if len(before) == 1 else ast.copy_location(ast.BoolOp(ast.And(), before), node)
                return ast.copy_location(ast.If(test, [made], []), node)
            if made is not None:
                return made
        return node

    def _counted(self, condition: ast.expr, operator: type, message: ast.expr, otherwise: ast.stmt) -> ast.stmt | None:
        """The check in our form, where the condition is one of

            count * embeds.shape[-1] == features.numel()     count = mask.sum(), here or before
            embeds[mask].numel() == features.numel()
            count == rows
        """
        if not isinstance(condition, ast.Compare) or len(condition.ops) != 1 or not isinstance(condition.ops[0], operator):
            return None
        left, right = condition.left, condition.comparators[0]
        mask, width = None, ast.Constant(1)
        if isinstance(left, ast.BinOp) and isinstance(left.op, ast.Mult) and _is_width(left.right):
            mask, width = self._mask_of_count(left.left), left.right
        elif (indexed := _method(left, "numel")) is not None and isinstance(indexed, ast.Subscript) and isinstance(indexed.slice, ast.Name):
            mask = indexed.slice
            width = ast.Subscript(ast.Attribute(indexed.value, "shape", ast.Load()), ast.UnaryOp(ast.USub(), ast.Constant(1)), ast.Load())
        else:
            mask = self._mask_of_count(left)
        if not isinstance(mask, ast.Name):
            return None
        self.found += 1
        numbers = [mask, right, width]
        nothing = ast.arguments(posonlyargs=[], args=[], kwonlyargs=[], kw_defaults=[], defaults=[])
        counted = _call(otherwise, COUNTED, *numbers, ast.Lambda(nothing, message))
        rebound = ast.Assign([ast.Name(mask.id, ast.Store())], counted)
        made = ast.If(_call(otherwise, COUNTABLE, *numbers), [rebound], [otherwise])
        for node in ast.walk(made.test):
            ast.copy_location(node, otherwise)
        for node in ast.walk(rebound):
            ast.copy_location(node, otherwise)
        return ast.copy_location(made, otherwise)

    def _mask_of_count(self, node: ast.expr) -> ast.expr | None:
        if isinstance(node, ast.Name):
            return self.sums.get(node.id)
        return _summed(node)


def _summed(node: ast.expr) -> ast.Name | None:
    """`mask` of ``mask.sum()``."""
    found = _method(node, "sum")
    return found if isinstance(found, ast.Name) else None


def _method(node: ast.expr, name: str) -> ast.expr | None:
    """`x` of ``x.name()``."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == name and not node.args and not node.keywords:
        return node.func.value
    return None


def _is_width(node: ast.expr) -> bool:
    """``x.shape[-1]``."""
    return isinstance(node, ast.Subscript) and isinstance(node.value, ast.Attribute) and node.value.attr == "shape" and ast.unparse(node.slice) == "-1"


def _may_be_mask(node: ast.expr) -> bool:
    return not isinstance(node, (ast.Slice, ast.Constant, ast.Tuple, ast.UnaryOp))


def _call(at: ast.AST, name: str, *arguments: ast.expr) -> ast.Call:
    made = ast.Call(ast.Name(name, ast.Load()), [copy.deepcopy(argument) for argument in arguments], [])
    ast.copy_location(made.func, at)
    return ast.copy_location(made, at)
