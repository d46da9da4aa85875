"""`attend`: who sees whom in a transformers model, read off its config."""

from __future__ import annotations

import transformers

from vlm_fuse import Attend

_RELEASE = tuple(int(part) for part in transformers.__version__.split(".")[:2])
#: since 5.13 a window limits what images see of themselves; before, images came after the window (huggingface/transformers PR 46850)
_WINDOWED = "bidirectional_windowed" if _RELEASE >= (5, 13) else "bidirectional"
#: layers without attention, which need no mask
_WITHOUT = ("linear_attention", "conv", "recurrent", "mamba", "moe", "mlp")


def attend(config) -> Attend | dict[str, Attend]:
    """Who sees whom in a model's language layers, as `merge`, `plan` and the collators take it.

    Args:
        config: a transformers config, or a model that has one.

    Returns:
        Attend | dict: one Attend where all layers have the same, else one for each layer type, as
        ``merge(..., attend=...)`` takes it and `MergedBatch.model_kwargs` hands it on. Of the installed release: the
        meaning of windows with images changed in 5.13.

    Raises:
        ValueError: a mask that no Attend expresses (layer types that are not known; Molmo 2, whose images see each other).

    What depends on the batch is not in the config: PaliGemma's prompts see themselves both ways, which is
    ``plan(..., prefix_lengths=...)``.

    Example:
        >>> import transformers
        >>> from vlm_fuse.integrations.transformers import attend
        >>> attend(transformers.LlamaConfig())
        Attend(kind='causal', window=None, sinks=0, chunk_size=None, images='causal')
        >>> attend(transformers.Gemma3Config())["full_attention"].images
        'bidirectional'

    Source: ``create_masks_for_generate`` in transformers' ``masking_utils.py``, and the masks of ``modeling_gemma3.py``,
    ``modeling_gemma4.py`` and ``modeling_molmo2.py``.
    """
    config = getattr(config, "config", config)
    if config.model_type.startswith("molmo2"):
        raise ValueError("config: all images of a Molmo 2 document see each other, which no Attend expresses; leave the masks to the model, patched")
    text = config.get_text_config()
    both_ways = getattr(text, "use_bidirectional_attention", None)
    kind = "full" if both_ways in (True, "all") or getattr(text, "is_causal", True) is False else "causal"
    sees = {"full_attention": "causal", "sliding_attention": "causal"}
    if config.model_type == "gemma3":
        sees = {"full_attention": "bidirectional", "sliding_attention": _WINDOWED}
    elif both_ways == "vision":  # Gemma 4: its global layers read images like text
        sees["sliding_attention"] = _WINDOWED
    window, chunk = getattr(text, "sliding_window", None), getattr(text, "attention_chunk_size", None)
    made = {
        "full_attention": Attend(kind, images=sees["full_attention"]),
        "sliding_attention": None if window is None else Attend(kind, window=window, images=sees["sliding_attention"]),
        "chunked_attention": None if chunk is None else Attend(kind, chunk_size=chunk),
    }
    types = getattr(text, "layer_types", None)
    if not types:
        return made["sliding_attention"] or made["chunked_attention"] or made["full_attention"]
    found = {}
    for layer_type in dict.fromkeys(types):
        if layer_type not in _WITHOUT:
            if made.get(layer_type) is None:
                raise ValueError(f"config: no Attend is known for layers of type {layer_type!r}; leave the masks to the model, patched")
            found[layer_type] = made[layer_type]
    return next(iter(found.values())) if len(set(found.values())) == 1 else found
