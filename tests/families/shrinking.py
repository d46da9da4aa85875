"""A family's own default config, made so small that its model has some thousand parameters."""

from __future__ import annotations

VOCABULARY = 160
#: ids below are words, those from here on mean something to some model
FIRST_SPECIAL = 120
PAD = 0

_SMALL = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=512,
    d_model=32, embed_dim=32, depth=2, num_heads=4, out_hidden_size=32, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=48, decoder_layers=2,
    decoder_attention_heads=4, decoder_ffn_dim=48, n_layer=2, layers=2, num_layers=2, ffn_dim=48, mlp_dim=48, intermediate_size_mlp=48,
    moe_intermediate_size=16, shared_expert_intermediate_size=16, num_experts=4, num_local_experts=4, n_routed_experts=4, num_experts_per_tok=2,
    encoder_hidden_size=32, decoder_hidden_size=32, projection_dim=32, vision_output_dim=32, projector_hidden_size=32, projector_input_dim=32,
    projector_output_dim=32, aligner_projection_size=32, text_hidden_size=32, output_dim=32, initializer_range=0.2, init_std=0.2,
    word_embed_proj_dim=32, max_source_positions=16, query_pre_attn_scalar=8, global_head_dim=8, num_global_key_value_heads=1, attention_chunk_size=8, sliding_window=6, q_lora_rank=16, kv_lora_rank=16,
    qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4,
)  # fmt: skip
_SMALL_TOWER = dict(image_size=16, patch_size=8, num_key_value_heads=4)
_LEFT_OUT = ("transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype", "model_type")
_SPECIAL = ("_token_id", "_token_index")


def shrunk(config_class: type, **changes):
    """A small config of the class. `changes` are by dotted path: ``{"vision_config.depth": 3}``; None takes an entry out."""
    entries = _shrunk(config_class().to_dict())
    special = FIRST_SPECIAL
    for name in sorted(entries):
        if name.endswith(_SPECIAL) and isinstance(entries[name], int):
            entries[name] = special
            special += 1
    for path, value in changes.items():
        *parents, last = path.split(".")
        place = entries
        for parent in parents:
            place = place[parent]
        place[last] = value
        if value is None:
            del place[last]
    return config_class(**{name: value for name, value in entries.items() if name not in _LEFT_OUT})


def _shrunk(entries: dict, tower: bool = False) -> dict:
    made = {}
    for name, value in entries.items():
        if name == "per_layer_config":
            pass  # of layers that are not there
        elif isinstance(value, dict) and name.endswith("_config"):
            made[name] = _shrunk(value, tower or not name.startswith("text"))
        elif name == "vocab_size" and isinstance(value, int):
            made[name] = VOCABULARY
        elif name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            made[name] = None if value is None else PAD if name == "pad_token_id" else 1
        elif tower and name in _SMALL_TOWER and value is not None:
            made[name] = [_SMALL_TOWER[name]] * len(value) if isinstance(value, (list, tuple)) else _SMALL_TOWER[name]
        elif name in _SMALL and isinstance(value, (int, float)) and not isinstance(value, bool):
            made[name] = _SMALL[name]
        elif name in ("layer_types", "mlp_layer_types") and value:
            made[name] = [*dict.fromkeys(value)][:2] if len(set(value)) > 1 else [value[0]] * 2
        elif name == "deepstack_visual_indexes":
            made[name] = [0, 1]
        elif name == "fullatt_block_indexes":
            made[name] = [1]
        elif name in ("rope_parameters", "rope_scaling") and isinstance(value, dict) and "mrope_section" in value:
            made[name] = {**value, "mrope_section": [1, 1, 2]}
        elif name not in _LEFT_OUT or name == "model_type":
            made[name] = value
    return made
