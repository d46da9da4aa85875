"""attend(config) against the masks that transformers makes from the same config, padded and packed."""

import pytest
import torch

import vlm_fuse
from vlm_fuse import Attend

transformers = pytest.importorskip("transformers", minversion="5.0")

from transformers import masking_utils  # noqa: E402

from transformers_release import RELEASE  # noqa: E402
from vlm_fuse.integrations.transformers import attend  # noqa: E402

WINDOWED = "bidirectional_windowed" if RELEASE >= (5, 13) else "bidirectional"
SMALL = dict(hidden_size=8, num_hidden_layers=4, num_attention_heads=1, num_key_value_heads=1, head_dim=8, intermediate_size=8, vocab_size=32)

TEXT = {
    "llama": lambda: transformers.LlamaConfig(**SMALL),
    "mistral": lambda: transformers.MistralConfig(sliding_window=3, **SMALL),
    "mistral without a window": lambda: transformers.MistralConfig(sliding_window=None, **SMALL),
    "qwen2 with windows above": lambda: transformers.Qwen2Config(use_sliding_window=True, sliding_window=3, max_window_layers=2, **SMALL),
    "qwen2": lambda: transformers.Qwen2Config(**SMALL),
    "gemma2": lambda: transformers.Gemma2Config(sliding_window=4, **SMALL),
    "gemma3 text": lambda: transformers.Gemma3TextConfig(sliding_window=3, layer_types=["sliding_attention", "full_attention"] * 2, **SMALL),
    "llama4": lambda: transformers.Llama4TextConfig(attention_chunk_size=4, **SMALL),
    "qwen3_next": lambda: transformers.Qwen3NextConfig(layer_types=["linear_attention", "full_attention"] * 2, **SMALL),
    "lfm2": lambda: transformers.Lfm2Config(layer_types=["conv", "full_attention"] * 2, **SMALL),
}


def rows(config, packed: bool) -> tuple[dict, vlm_fuse.TokenPlan]:
    """What transformers makes its masks of, and the plan of the same rows."""
    ids = torch.ones(2, 11, dtype=torch.int64)
    embeds = torch.zeros(2, 11, 8)
    if packed:
        documents = torch.tensor([[0] * 5 + [1] * 6, [2] * 2 + [3] * 9])
        plan = vlm_fuse.plan(ids, document_ids=documents, attend=attend(config))
        return dict(inputs_embeds=embeds, attention_mask=None, position_ids=plan.position_ids), plan
    kept = torch.ones_like(ids)
    kept[0, :4] = 0
    return dict(inputs_embeds=embeds, attention_mask=kept, position_ids=None), vlm_fuse.plan(ids, attention_mask=kept, attend=attend(config))


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name", TEXT)
def test_masks_are_those_of_transformers(name, packed):
    config = TEXT[name]()
    if name == "llama4" and RELEASE < (5, 23):
        pytest.skip("chunks were made in another way")
    config._attn_implementation = "eager"
    given, plan = rows(config, packed)
    theirs = masking_utils.create_masks_for_generate(config, past_key_values=None, **given)
    ours = attend(config)
    if not isinstance(theirs, dict):
        theirs = {"all": theirs}
    if not isinstance(ours, dict):
        ours = dict.fromkeys([layer for layer in theirs if layer not in ("linear_attention", "conv")], ours)
    assert set(ours) == set(theirs) - {"linear_attention", "conv"}
    for layer, own in ours.items():
        made, expected = plan.mask(own).dense(), theirs[layer] == 0
        tokens = plan.attention_mask[:, None, :, None].expand_as(made)
        assert torch.equal(made[tokens], expected.expand_as(made)[tokens]), layer


def test_families_whose_images_see_themselves():
    text = dict(SMALL, sliding_window=3, layer_types=["sliding_attention", "full_attention"] * 2)
    gemma3 = attend(transformers.Gemma3Config(text_config=text))
    assert gemma3 == {"sliding_attention": Attend(window=3, images=WINDOWED), "full_attention": Attend(images="bidirectional")}
    more = dict(global_head_dim=8, num_global_key_value_heads=1, hidden_size_per_layer_input=0, vocab_size_per_layer_input=32, num_kv_shared_layers=0)
    vision = transformers.Gemma4Config(text_config=dict(text, use_bidirectional_attention="vision", **more), vision_config=None, audio_config=None)
    assert attend(vision) == {"sliding_attention": Attend(window=3, images=WINDOWED), "full_attention": Attend()}
    causal = transformers.Gemma4Config(text_config=dict(text, use_bidirectional_attention=None, **more), vision_config=None, audio_config=None)
    assert attend(causal) == {"sliding_attention": Attend(window=3), "full_attention": Attend()}


def test_a_model_stands_for_its_config():
    model = transformers.LlamaModel(transformers.LlamaConfig(**SMALL))
    assert attend(model) == attend(model.config) == Attend()


def test_what_no_attend_expresses_is_refused():
    config = transformers.LlamaConfig(**SMALL)
    config.layer_types = ["compressed_sparse_attention"] * 4
    with pytest.raises(ValueError, match="no Attend is known for layers of type 'compressed_sparse_attention'"):
        attend(config)
