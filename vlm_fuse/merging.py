"""`merge`: text and image rows in one pass, with everything about the rows that attention and the loss need."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.compiler import is_compiling

from . import checks, ops, planning, settled, status
from . import features as forms
from .attending import CAUSAL, Attend
from .autograd import RowCall, merge_rows, row_call
from .backend import choose, name_from
from .batch import RAISE, Batch, RecordedError
from .masks import IntervalMask, hf
from .token_plan import TokenPlan

_CPU = torch.device("cpu")
_new = tuple.__new__  # of a NamedTuple: half the time of its own


class MergedBatch:
    """What `merge` returns: the rows, and through the plan every fact about them.

    Attributes:
        inputs_embeds: ``(G, W, D)`` the merged rows.
        plan: the TokenPlan; its fields (position_ids, document_ids, cu_seqlens, ...) can be read here too.
        labels: ``(G, W)`` or None.
    """

    __slots__ = ("inputs_embeds", "plan")

    def __init__(self, inputs_embeds: Tensor, plan: TokenPlan):
        self.inputs_embeds = inputs_embeds
        self.plan = plan

    def __repr__(self) -> str:
        return f"MergedBatch(inputs_embeds={tuple(self.inputs_embeds.shape)}, dtype={self.inputs_embeds.dtype}, plan={self.plan!r})"

    @property
    def mask(self) -> IntervalMask | dict[str, IntervalMask]:
        """The mask for ``plan.attend``; where that is a dict of layer types, a dict of masks."""
        attend = self.plan.attend
        if isinstance(attend, Mapping):
            return {layer_type: self.plan.mask(value) for layer_type, value in attend.items()}
        return self.plan.mask(attend)

    def model_kwargs(self, attn_implementation: str) -> dict:
        """What a Hugging Face model is called with beside ``inputs_embeds`` and ``labels``, so that it isolates the documents.

        Args:
            attn_implementation: the model's: "sdpa", "eager", "flex_attention", or one of flash attention.

        Returns:
            dict: of `IntervalMask.hf`; where ``plan.attend`` is a dict of layer types, attention_mask is one too. Besides
            position_ids ``(G, W)``, mm_token_type_ids int64 ``(G, W)`` where there are placeholders (the kind, 0 = text),
            and, where rows hold several documents (layout "packed", or document_ids given), seq_idx int32 ``(G, W)`` for
            linear-attention and convolution layers, in one row also cu_seq_lens_q for those that go by it.

        Raises:
            ValueError: an unknown implementation; flash attention for a mask that it cannot express.

        position_ids count tokens; a model with M-RoPE needs its own, of three or four rows, in their place. Of the families
        that transformers 5.23 has, qwen2_vl, qwen2_5_vl, qwen3_vl and glm4v refuse flex_attention.

        Example:
            >>> import torch, vlm_fuse
            >>> ids, kept = torch.tensor([[1, 2, 3], [0, 0, 4]]), torch.tensor([[1, 1, 1], [0, 0, 1]])
            >>> out = vlm_fuse.merge(ids, torch.zeros(2, 3, 8), attention_mask=kept, layout="packed")
            >>> sorted(out.model_kwargs("sdpa"))
            ['attention_mask', 'cu_seq_lens_q', 'position_ids', 'seq_idx']

        Source: huggingface/transformers, ``masking_utils.py`` and ``modeling_flash_attention_utils.py``.
        """
        return hf.model_kwargs(self.plan, self.mask, attn_implementation, self.inputs_embeds.dtype)

    def unpack(self, rows: Tensor) -> Tensor:
        """Rows of the output's layout, each back at its token's place; zero elsewhere. Differentiable.

        Args:
            rows: ``(G, W)`` or ``(G, W, ...)``: hidden states, logits, losses a token, in the layout of inputs_embeds.

        Returns:
            Tensor: ``(B, T, ...)`` as input_ids; with "expand" and "images_first" ``(B, longest sample, ...)``, padded on
            padding_side.

        Raises:
            ValueError: rows that are not of this batch's layout.

        Example:
            >>> import torch, vlm_fuse
            >>> ids, mask = torch.tensor([[1, 2, 3], [0, 0, 4]]), torch.tensor([[1, 1, 1], [0, 0, 1]])
            >>> out = vlm_fuse.merge(ids, torch.zeros(2, 3, 8), attention_mask=mask, layout="packed")
            >>> out.unpack(torch.tensor([[10., 20., 30., 40.]]))
            tensor([[10., 20., 30.],
                    [ 0.,  0., 40.]])
        """
        checks.tensor("rows", rows)
        shape = self.plan.source_index.shape
        if rows.dim() < 2 or rows.shape[:2] != shape:
            raise ValueError(f"rows: expected {tuple(shape)} and any further dimensions, as inputs_embeds, got {tuple(rows.shape)}")
        checks.same_device("rows", rows, self.plan.device, "the plan")
        index, rest = self.plan.unpack_index, rows.shape[2:]
        flat = rows.reshape(*shape, rest.numel())
        if rows.dtype in checks.ROW_DTYPES:
            backend = self.plan._settings.backend
            call = RowCall(None, None, (), index, None, False, rows.dtype, "off", backend)
            made = merge_rows(ops.direct(backend, flat), flat, None, (), call)
        else:
            source = -1 - index.long()
            inside = (source >= 0) & (source < shape.numel())
            padded = torch.cat([flat.view(shape.numel(), rest.numel()), flat.new_zeros(1, rest.numel())])
            made = padded[torch.where(inside, source, shape.numel())]
        return made.view(*index.shape, *rest)


def _of_plan(name: str) -> property:
    return property(lambda self: getattr(self.plan, name), doc=f"TokenPlan.{name}")


for _name in (
    "labels", "source_index", "text_index", "position_ids", "document_ids", "image_ids", "kind_ids", "attention_mask",
    "kv_lo", "kv_hi", "kv_lo2", "kv_hi2", "cu_seqlens", "max_seqlen", "feature_starts",
):  # fmt: skip
    setattr(MergedBatch, _name, _of_plan(_name))


def merge(
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None = None,
    image_embeds=None,
    *,
    image_token_id: int | None = None,
    placeholder_mask: Tensor | None = None,
    image_sizes=None,
    feature_counts=None,
    weight: Tensor | None = None,
    embed_scale: float | None = None,
    weight_grad: Tensor | None = None,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    document_ids: Tensor | None = None,
    scheme: str = "placeholders",
    combine: str = "replace",
    layout: str = "keep",
    padding_side: str = "right",
    length: int | None = None,
    attend: Attend | Mapping[str, Attend] = CAUSAL,
    unused_features: str = "error",
    out: Tensor | None = None,
    plan: TokenPlan | None = None,
    validate: str = "auto",
    backend: str = "auto",
) -> MergedBatch:
    """Put image rows where their placeholders stand, drop or move padding, and say for every row where it belongs.

    Every output row is copied from exactly one source row, once, and converted to the output's dtype on the way; nothing of
    the size of the output is allocated but the output.

    Args:
        input_ids: ``(B, T)`` int32 or int64 token ids. May be None with `placeholder_mask` and `inputs_embeds`.
        inputs_embeds: ``(B, T, D)`` float32, bfloat16, float16 or float64 text embeddings, any strides. Or `weight`.
        image_embeds: feature rows in reading order: ``(N, D)``, ``(images, P, D)``, a list of ``(P_i, D)``, or a dict
            {placeholder id: any of these} for several kinds. Another dtype than the text's is converted. None: no rows.
        image_token_id: the id that marks a placeholder; any of int64, also negative or past the table. Not with a dict.
        placeholder_mask: ``(B, T)`` bool instead of an id, one kind only.
        image_sizes: rows of each image where image_embeds does not tell: ints, an int tensor (on the CPU: one on a GPU is
            read back), or a dict by placeholder id.
        feature_counts: ``(B,)`` rows that each sample owns, or a dict by placeholder id.
        weight: ``(V, D)`` embedding table: the lookup is fused, text embeddings are never materialised.
        embed_scale: factor of the looked-up rows, rounded to the weight's dtype (Gemma). Image rows are not scaled.
        weight_grad: ``(V, D)`` an existing gradient of `weight`, contiguous, of any dtype of rows (fp32 for a bf16 weight): the backward
            adds to it in place, without a dense gradient of its own, and ``weight.grad`` stays as it is. Eager calls only.
        attention_mask: ``(B, T)``, nonzero = token.
        labels: ``(B, T)`` int32 or int64.
        document_ids: ``(B, T)`` ids of the documents of rows that are packed already, below 0 = padding.
        scheme: "placeholders": one placeholder per feature row. "expand": one per image. "images_first": no placeholders,
            the sample's images in one block before its text (image i belongs to sample i, or feature_counts says).
        combine: "replace" the placeholder's row, or "add" the feature row to it (in float32, rounded once).
        layout: "keep": as input_ids. "padded": padding moved to padding_side, zero rows. "packed": one row, no padding.
        padding_side: "right" or "left", of layout "padded" and of `MergedBatch.unpack`.
        length: static width of "padded" and "packed"; without it the width is read back on a GPU.
        attend: who sees whom, an Attend, or a dict {layer type: Attend}.
        unused_features: "error", or "allow" feature rows beyond the placeholders: they get a zero gradient, never None.
        out: written in place and returned as inputs_embeds; ``out is inputs_embeds`` writes the image rows alone.
        plan: made ahead by `plan`; what it settles comes from it, arguments given again must agree.
        validate: "sync" raises before anything is written (default on a CPU); "async" flags errors on the device for
            `raise_errors` (default on a GPU); "off" reports nothing. Nothing is ever read or written out of bounds.
        backend: "auto", or one of `backends()`.

    Returns:
        MergedBatch: inputs_embeds ``(G, W, D)``: ``(B, T, D)`` with "keep", ``(B, W, D)`` "padded", ``(1, L, D)`` "packed".

    Raises:
        ValueError: rows and placeholders that do not agree (names the first bad sample and both counts), shapes, devices,
            unknown words, a length too small, a document id that returns, arguments that a plan contradicts.
        TypeError: dtypes.
        IndexError: with `weight`, an id outside the table where its row is read.

    Example:
        >>> import torch, vlm_fuse
        >>> input_ids = torch.tensor([[1, 9, 9, 2], [0, 0, 3, 4]])
        >>> out = vlm_fuse.merge(input_ids, torch.zeros(2, 4, 3), torch.ones(2, 3), image_token_id=9,
        ...                      attention_mask=torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]]), layout="packed")
        >>> out.inputs_embeds[0, :, 0]
        tensor([0., 1., 1., 0., 0., 0.])
        >>> out.position_ids, out.cu_seqlens, out.max_seqlen
        (tensor([[0, 1, 2, 3, 0, 1]]), tensor([0, 4, 6], dtype=torch.int32), 4)

    Adding to a gradient that is there is what Megatron-LM's ``gradient_accumulation_fusion`` does for linear layers.

    Source: the merges it replaces are ``masked_scatter`` in huggingface/transformers and boolean indexing in
    huggingface/nanoVLM.
    """
    text = inputs_embeds if weight is None else weight
    asked, quick = name_from(backend), False  # quick: recognised in one native call, which leaves nothing to look at
    numbering = None  # of a shard's rows, where the text of the whole batch is given
    if plan is None:
        try:
            chosen = planning.known.get((scheme, combine, layout, padding_side, unused_features, validate, asked))
        except TypeError:
            chosen = None
        if chosen is not None and document_ids is None:
            if length is not None or attend is not CAUSAL:
                chosen = planning.chosen_for(chosen, length, attend)
        else:
            chosen = planning.choices(scheme, combine, layout, padding_side, length, attend, unused_features, validate, asked, document_ids)
        if (
            type(image_token_id) is int
            and scheme == "placeholders"
            and placeholder_mask is None is image_sizes is feature_counts
            and (embed_scale is None or (weight is not None and type(embed_scale) is float))
        ):
            plan, kernels = _usual(asked, chosen, input_ids, inputs_embeds, weight, image_embeds, attention_mask, labels, document_ids, image_token_id, out)
        if plan is not None:
            quick = True
            features, starts = ((), ()) if image_embeds is None else ((image_embeds,), (0,))
        else:
            tokens = checks.batch_tensors(input_ids, placeholder_mask, attention_mask, labels, document_ids)
            kinds = forms.describe(() if image_embeds is None else image_embeds, image_token_id, image_sizes, placeholder_mask, scheme)
            checks.text_source(inputs_embeds, weight, input_ids, embed_scale, tokens.shape, tokens.device, "input_ids")
            for kind in kinds:
                checks.feature_tensors(kind.tensors, text.shape[-1], text.device)
            if placeholder_mask is not None:
                chosen = chosen._replace(settings=chosen.settings._replace(masked_by_tensor=True))
            plan = planning.make(tokens, attention_mask, labels, document_ids, kinds, feature_counts, chosen)
            features, starts = forms.tables(kinds, plan.feature_starts)
            kernels = ops.direct(asked, text, features)
    else:
        options = (scheme, combine, layout, padding_side, length, attend, unused_features)
        settled.is_plan(plan)
        if asked == "auto":
            asked = plan._settings.backend
        kernels = None
        if placeholder_mask is None is labels is embed_scale and not is_compiling():
            kernels, _ = _usual_kernels(asked, plan.source_index)
            if kernels is None:
                kernels = ops.direct(asked, plan.source_index)
        if settled.usual(plan, kernels, options, input_ids, inputs_embeds, weight, image_embeds, image_token_id, out):
            quick = True
            features, starts = ((), ()) if image_embeds is None else ((image_embeds,), (0,))
        else:
            plan, kinds = settled.agree(plan, options, input_ids, image_embeds, image_token_id, placeholder_mask, labels)
            numbering = settled.sources(plan, kinds, input_ids, inputs_embeds, weight, embed_scale, text)
            features, starts = forms.tables(kinds, plan.feature_starts)
            kernels = ops.direct(asked, text, features)
        if validate == "auto":
            validate = plan._settings.validate
    if out is not None:
        if not quick:
            _check_memory(out, plan, text, features)
        if out is inputs_embeds or torch.is_grad_enabled():
            records = torch.is_grad_enabled() and (text.requires_grad or any([rows.requires_grad for rows in features]))
            checks.output(out, inputs_embeds, plan.layout == "keep", records)
    if weight_grad is not None:
        checks.weight_gradient(weight_grad, weight)
    if validate == "auto":
        validate = "sync" if text.is_cpu else "async"
    add = plan._settings.combine == "add"
    numbering = plan if numbering is None else numbering
    call = row_call(
        None if weight is None else ops.unwrapped(input_ids).contiguous(), embed_scale, starts, numbering.source_index, numbering.text_index if add else None, add,
        text.dtype if out is None else out.dtype, validate, asked, weight_grad,
    )  # fmt: skip
    return MergedBatch(merge_rows(kernels, inputs_embeds, weight, features, call, out), plan)


def _usual_kernels(asked: str, tensor: Tensor) -> tuple:
    """(the kernels, whether they plan in the call that writes the rows), or (None, False): they recognise no usual call."""
    if tensor.is_cpu:
        return _recognising(asked, "cpu")
    return _recognising(asked, "cuda") if tensor.is_cuda else (None, False)


@functools.cache
def _recognising(asked: str, device: str) -> tuple:
    kernels = choose(asked, device)
    if hasattr(kernels, "merge_usual"):
        return kernels, True
    return (kernels if hasattr(kernels, "usual_plan") else None), False


def _usual(asked: str, chosen, input_ids, inputs_embeds, weight, image_embeds, attention_mask, labels, document_ids, image_token_id, out):
    """(TokenPlan, kernels) of a batch of the usual form, recognised in one native call; (None, None): look at it piece by piece.

    On the CPU the plan is made in that call. The CUDA kernels make it together with the rows: its tensors are not filled
    before `kernels.rows` has run.
    """
    if is_compiling() or type(input_ids) is not Tensor:
        return None, None
    given = input_ids, inputs_embeds, weight, image_embeds, attention_mask, labels, document_ids, image_token_id
    kernels, plans_with_rows = _usual_kernels(asked, input_ids)
    if plans_with_rows:
        return _usual_on_device(kernels, chosen, given, out)
    if kernels is None:
        return None, None
    scheme, layout, left, unused, settings = chosen
    validate = settings.validate
    try:
        made = kernels.usual_plan(
            *given, layout, left, unused, settings.length, RAISE if validate == "auto" or validate == "sync" else status.for_mode(validate, _CPU), out
        )
    except RecordedError:  # found again on the long way, which knows the words for it
        return None, None
    if made is None:
        return None, None
    source_index, kinds, versions, facts = made
    batch = _new(Batch, (input_ids, attention_mask, document_ids, labels, kinds, None, None, scheme, layout, left, unused))
    if facts is not None:
        return TokenPlan(batch, settings, source_index, versions=versions, step_facts=facts), kernels
    return TokenPlan(batch, settings, source_index, kernels.step_facts if document_ids is None else None, versions), kernels


def _usual_on_device(kernels, chosen, given: tuple, out):
    if out is not None and ops.mode_of(chosen.settings.validate, given[0]) == "sync":  # nothing may be written before the check
        return None, None
    made = kernels.merge_usual(chosen, given, out)
    if made is None:
        return None, None
    call, batch, versions, (source_index, text_index, position_ids, document_ids, attention_mask, labels, cu_seqlens, intervals) = made
    facts = labels, position_ids, document_ids, attention_mask, cu_seqlens
    plan = TokenPlan(batch, chosen.settings, source_index, versions=versions, step_facts=facts)
    if text_index is not None:
        plan.text_index = text_index
    plan._own_intervals = intervals
    return plan, call


def _check_memory(out: Tensor, plan: TokenPlan, text: Tensor, features: tuple[Tensor, ...]) -> None:
    checks.dtype_of("out", out, checks.ROW_DTYPES)
    if is_compiling():
        raise ValueError("out: refused under torch.compile, which places outputs itself; leave it out")
    checks.output_memory(out, plan.source_index.shape, text.shape[-1], (text, *features))
