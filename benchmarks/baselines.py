"""What vlm_fuse is measured against: the ways in which others merge image features into token embeddings.

Every function here is the plain formulation of one project, without its surroundings; tests/test_baselines.py checks
each against a loop over the tokens. All are functional and differentiable unless the name says ``_in_place``.

Args of every merge:
    input_ids: ``(B, T)`` int64. Token ids; `image_token_id` marks a placeholder.
    inputs_embeds: ``(B, T, D)``. Text embeddings.
    image_embeds: ``(N, D)``. Feature rows, one per placeholder, in reading order.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def hf_masked_scatter(input_ids: Tensor, inputs_embeds: Tensor, image_embeds: Tensor, image_token_id: int) -> Tensor:
    """masked_scatter on the broadcast mask, without any check.

    Source: transformers 5.23, ``models/qwen2_5_vl/modeling_qwen2_5_vl.py``; 103 modules do the same.
    """
    mask = (input_ids == image_token_id).unsqueeze(-1)
    return inputs_embeds.masked_scatter(mask, image_embeds.to(inputs_embeds.dtype))


def hf_masked_scatter_expanded(input_ids: Tensor, inputs_embeds: Tensor, image_embeds: Tensor, image_token_id: int) -> Tensor:
    """The same with the mask expanded to the hidden size, as about 24 modules have it."""
    mask = (input_ids == image_token_id).unsqueeze(-1).expand_as(inputs_embeds)
    return inputs_embeds.masked_scatter(mask, image_embeds.to(inputs_embeds.dtype))


def hf_placeholder_check(input_ids: Tensor, inputs_embeds: Tensor, image_embeds: Tensor, image_token_id: int) -> Tensor:
    """Mask of the placeholders, (B, T, 1), and the check of their number: two reads by the host.

    The message is an f-string that formats a tensor before the check is called, then the condition is read.

    Source: transformers 5.23, ``get_placeholder_mask`` and ``torch_compilable_check``.
    """
    mask = input_ids == image_token_id
    count = mask.sum()
    message = f"Image features and image tokens do not match, tokens: {count}, features: {image_embeds.shape[0]}"
    if not bool(count * inputs_embeds.shape[-1] == image_embeds.numel()):
        raise ValueError(message)
    return mask.unsqueeze(-1)


def hf_checked(input_ids: Tensor, inputs_embeds: Tensor, image_embeds: Tensor, image_token_id: int) -> Tensor:
    """masked_scatter behind the check: the whole of what a forward of transformers runs."""
    image_embeds = image_embeds.to(inputs_embeds.dtype)
    mask = hf_placeholder_check(input_ids, inputs_embeds, image_embeds, image_token_id)
    return inputs_embeds.masked_scatter(mask, image_embeds)


def nanovlm(input_ids: Tensor, inputs_embeds: Tensor, image_embeds: Tensor, image_token_id: int) -> Tensor:
    """Clone, then write by boolean index.

    Source: nanoVLM, ``models/vision_language_model.py``.
    """
    merged = inputs_embeds.clone()
    merged[input_ids == image_token_id] = image_embeds.to(merged.dtype)
    return merged


def cumsum_index_copy(input_ids: Tensor, inputs_embeds: Tensor, image_embeds: Tensor, image_token_id: int) -> Tensor:
    """Rows of the placeholders by a running count, then index_copy: nothing of the embeddings' size but the output.

    Tokens that are no placeholder all write into one slot behind the last feature row.

    Source: sglang pull request 37070.
    """
    mask = (input_ids == image_token_id).flatten()
    count = image_embeds.shape[0]
    slot = torch.where(mask, mask.cumsum(0) - 1, count)
    rows = torch.zeros(count + 1, dtype=torch.int64, device=mask.device)
    rows.scatter_(0, slot, torch.arange(mask.shape[0], device=mask.device))
    flat = inputs_embeds.flatten(0, 1)
    return flat.index_copy(0, rows[:count], image_embeds.to(flat.dtype)).view_as(inputs_embeds)


def nonzero_static_index_copy(input_ids: Tensor, inputs_embeds: Tensor, image_embeds: Tensor, image_token_id: int) -> Tensor:
    """Rows of the placeholders by nonzero_static, whose size the features tell, then index_copy; no host read.

    Source: NVIDIA-NeMo Automodel pull request 3751.
    """
    rows = torch.nonzero_static((input_ids == image_token_id).flatten(), size=image_embeds.shape[0]).squeeze(1)
    flat = inputs_embeds.flatten(0, 1)
    return flat.index_copy(0, rows, image_embeds.to(flat.dtype)).view_as(inputs_embeds)


def gather_where(input_ids: Tensor, inputs_embeds: Tensor, image_embeds: Tensor, image_token_id: int) -> Tensor:
    """Running count, gather and where: the formulation that a compiler fuses into one kernel."""
    mask = input_ids == image_token_id
    index = (mask.flatten().cumsum(0) - 1).clamp(0, max(image_embeds.shape[0] - 1, 0)).view_as(mask)
    if image_embeds.shape[0] == 0:
        return inputs_embeds.clone()
    return torch.where(mask.unsqueeze(-1), image_embeds.to(inputs_embeds.dtype)[index], inputs_embeds)


#: name in tables -> merge of ready embeddings, eager.
MERGES = {
    "hf": hf_masked_scatter,
    "hf checked": hf_checked,
    "hf expanded": hf_masked_scatter_expanded,
    "nanovlm": nanovlm,
    "cumsum+index_copy": cumsum_index_copy,
    "nonzero_static+index_copy": nonzero_static_index_copy,
}


def compiled(formulation=gather_where):
    """torch.compile of a plain formulation with dynamic shapes; the first call compiles (seconds)."""
    return torch.compile(formulation, fullgraph=True, dynamic=True)


def nanovlm_in_place(input_ids: Tensor, inputs_embeds: Tensor, image_embeds: Tensor, image_token_id: int) -> Tensor:
    """Boolean index assignment into the given embeddings."""
    inputs_embeds[input_ids == image_token_id] = image_embeds.to(inputs_embeds.dtype)
    return inputs_embeds


def hf_in_place(input_ids: Tensor, inputs_embeds: Tensor, image_embeds: Tensor, image_token_id: int) -> Tensor:
    """masked_scatter_ into the given embeddings, as vLLM does it."""
    return inputs_embeds.masked_scatter_((input_ids == image_token_id).unsqueeze(-1), image_embeds.to(inputs_embeds.dtype))


IN_PLACE = {"hf": hf_in_place, "nanovlm": nanovlm_in_place}


def text_ids(input_ids: Tensor, image_token_id: int, vocab_size: int) -> Tensor:
    """Ids that an embedding table can look up: a placeholder outside the table becomes 0, as transformers does it."""
    if 0 <= image_token_id < vocab_size:
        return input_ids
    return input_ids.masked_fill(input_ids == image_token_id, 0)


def embed_then(merge, input_ids: Tensor, weight: Tensor, image_embeds: Tensor, image_token_id: int) -> Tensor:
    """F.embedding, then one of the merges above: the text embeddings are written, and read again.

    weight: ``(V, D)``. The embedding table.
    """
    embeds = F.embedding(text_ids(input_ids, image_token_id, weight.shape[0]), weight)
    return merge(input_ids, embeds, image_embeds, image_token_id)


def remove_padding(
    merge, input_ids: Tensor, inputs_embeds: Tensor, image_embeds: Tensor, image_token_id: int, attention_mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Merge, then drop the padding by boolean index: packed rows (1, L, D), position_ids (1, L), cu_seqlens (B + 1,).

    Source: the unpad path of flash attention in transformers, ``modeling_flash_attention_utils.py``.
    """
    merged = merge(input_ids, inputs_embeds, image_embeds, image_token_id)
    mask = attention_mask.bool()
    positions = (mask.cumsum(1) - 1)[mask]
    cu_seqlens = F.pad(mask.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    return merged[mask].unsqueeze(0), positions.unsqueeze(0), cu_seqlens


def images_first_concat(inputs_embeds: Tensor, image_embeds: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Legacy: torch.cat of image and padded text; with left padding the pad tokens stand between the two.

    image_embeds: ``(B, P, D)``. Returns (B, P + T, D) and its attention mask.

    Source: nanoVLM v0.1, ``models/vision_language_model.py``.
    """
    merged = torch.cat([image_embeds, inputs_embeds], dim=1)
    ones = attention_mask.new_ones(image_embeds.shape[:2])
    return merged, torch.cat([ones, attention_mask], dim=1)
