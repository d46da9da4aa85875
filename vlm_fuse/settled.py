"""What a call with a ready plan may still say: everything that the plan settles comes from it and must agree."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from . import checks
from . import features as forms
from .attending import CAUSAL
from .batch import KIND_FIELDS
from .token_plan import TokenPlan

if TYPE_CHECKING:
    from .sharding import OverBatch

_NAMES = ("scheme", "combine", "layout", "padding_side", "length", "attend", "unused_features")
_DEFAULTS = ("placeholders", "replace", "keep", "right", None, CAUSAL, "error")


def is_plan(plan) -> None:
    if not isinstance(plan, TokenPlan):
        raise TypeError(f"plan: expected a TokenPlan, got {type(plan).__name__}")


def usual(plan: TokenPlan, kernels, options: tuple, input_ids, inputs_embeds, weight, image_embeds, image_token_id, out) -> bool:
    """A call of the usual form, in which one native call finds that everything fits the plan; else `agree` looks closer."""
    if options != _DEFAULTS or not hasattr(kernels, "rows_of"):
        return False
    batch = plan._batch
    if input_ids is None:
        input_ids = batch.tokens if weight is None else None
    elif input_ids is not batch.tokens and input_ids.shape != batch.tokens.shape:
        return False
    kinds = batch.kinds
    if len(kinds) != KIND_FIELDS or plan._is_ambiguous or plan._settings.masked_by_tensor or plan._target is not None or image_token_id not in (None, kinds[0]):
        return False
    return kernels.rows_of(input_ids, inputs_embeds, weight, image_embeds, out, plan.source_index) == kinds[2]


def agree(
    plan: TokenPlan, settings: tuple, input_ids, image_embeds, image_token_id, placeholder_mask, labels
) -> tuple[TokenPlan, tuple[forms.Kind, ...]]:
    """The plan (with labels where it had none), and the kinds of a call in the plan's order."""
    if settings != _DEFAULTS:
        for name, value, default in zip(_NAMES, settings, _DEFAULTS):
            own = getattr(plan, name)
            if value != default and value != own:
                raise ValueError(f"{name}: {value!r} contradicts the plan, which was made with {name}={own!r}; leave it out or make another plan")
    if input_ids is not None and input_ids.shape != plan._numbering(input_ids.shape, input_ids).token_shape:
        checks.same_shape("input_ids", input_ids, plan.token_shape, plan._tokens_are)
    if placeholder_mask is not None and not plan._settings.masked_by_tensor:
        raise ValueError(f"placeholder_mask: contradicts the plan, which was made with image_token_id={plan.kind_tokens}; leave it out")
    if labels is not None and plan._batch.labels is None:
        checks.dtype_of("labels", labels, checks.ID_DTYPES)
        checks.same_shape("labels", labels, plan.token_shape, "the tokens that the plan was made from")
        plan = plan.with_labels(labels)
    return plan, kinds_of(plan, image_embeds, image_token_id, whole=True)


def kinds_of(plan: TokenPlan, image_embeds, image_token_id, whole: bool) -> tuple[forms.Kind, ...]:
    """The kinds of a call in the plan's order; `whole`: all of them must be there."""
    tokens = plan.kind_tokens
    if (
        type(image_embeds) is Tensor
        and len(tokens) == 1
        and (image_token_id is None or image_token_id == tokens[0])
        and not plan._settings.masked_by_tensor
    ):
        kind = forms.describe(image_embeds, tokens[0], None, None, plan.scheme)[0]
        _check_rows(plan, kind, 0)
        return (kind,)
    if image_token_id is not None and (plan._settings.masked_by_tensor or (image_token_id != tokens and image_token_id not in tokens)):
        made = "a placeholder_mask" if plan._settings.masked_by_tensor else f"image_token_id={tokens}"
        raise ValueError(f"image_token_id: {image_token_id!r} contradicts the plan, which was made with {made}; leave it out or make another plan")
    if image_embeds is None or (isinstance(image_embeds, (list, tuple)) and not image_embeds):
        found: tuple[forms.Kind, ...] = ()
    elif isinstance(image_embeds, dict):
        if plan._settings.masked_by_tensor and len(image_embeds) == 1:
            image_embeds = {tokens[0]: rows for rows in image_embeds.values()}
        found = forms.describe(image_embeds, None, None, None, plan.scheme)
    else:
        if len(tokens) != 1:
            raise ValueError(f"image_embeds: the plan has {len(tokens)} kinds of placeholder, {tokens}; give a dict {{placeholder id: rows}}")
        found = forms.describe(image_embeds, tokens[0], None, None, plan.scheme)
    by_token = {kind.token: kind for kind in found}
    unknown = [token for token in by_token if token not in tokens]
    if unknown:
        raise ValueError(f"image_embeds: {unknown[0]} is no kind of the plan, which has {tokens}")
    ordered = []
    for index, token in enumerate(tokens):
        kind = by_token.get(token)
        if kind is None:
            kind = forms.Kind(token, (), 0, -1, -1, None)
            if not whole:
                ordered.append(kind)
                continue
        _check_rows(plan, kind, index)
        ordered.append(kind)
    return tuple(ordered)


def _check_rows(plan: TokenPlan, kind: forms.Kind, index: int) -> None:
    wanted = plan._batch.kind(index)[2]
    if kind.rows != wanted and not (kind.rows > wanted and plan.unused_features == "allow"):
        raise ValueError(
            f"image_embeds: {kind.rows} feature rows for placeholder id {kind.token}, but the plan was made for {wanted}; "
            "give the rows of the plan's batch, or make another plan"
        )


def sources(plan: TokenPlan, kinds, input_ids: Tensor | None, inputs_embeds, weight, embed_scale, text) -> TokenPlan | OverBatch:
    """What numbers the rows of the text: the plan, or its shard's numbering of the whole batch. Text and features fit it: shape, device, D."""
    device = plan.source_index.device
    tokens = inputs_embeds if weight is None else input_ids
    if tokens is not None:
        plan = plan._numbering(tokens.shape[:2], input_ids)
    if (inputs_embeds is None) != (weight is None):
        if weight is not None and input_ids is None:
            raise ValueError("input_ids: needed with weight, also with a plan, to look up the rows")
        if weight is not None:
            checks.dtype_of("input_ids", input_ids, checks.ID_DTYPES)
            checks.same_device("input_ids", input_ids, device, "the plan")
    checks.text_source(inputs_embeds, weight, input_ids, embed_scale, plan.token_shape, device, "the plan")
    for kind in kinds:
        checks.feature_tensors(kind.tensors, text.shape[-1], device)
    return plan
