"""The families: model class, what must be changed in its shrunk config, and what its towers take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import transformers

from families import towers
from families.shrinking import shrunk
from transformers_release import RELEASE


@dataclass(frozen=True)
class Family:
    """One model of transformers."""

    model: str  # name of the class
    images: Callable | None = None  # (config, numbers) -> inputs of the tower
    videos: Callable | None = None
    sounds: Callable | None = None
    changes: dict = field(default_factory=dict)  # of the shrunk config, by dotted path
    afterwards: dict = field(default_factory=dict)  # attributes of the config that its class does not name
    merge: str = "masked_scatter"
    rows: int | None = None  # of each image, where no method of the model makes its features
    frames_apart: bool = False  # text stands between the frames of a video
    one_each: bool = False  # exactly one image in each row

    def build(self) -> torch.nn.Module:
        """The model, with random weights of which none is zero, so that a wrong merge shows."""
        kind = getattr(transformers, self.model)
        config = shrunk(kind.config_class, **self.changes)
        for name, value in self.afterwards.items():
            setattr(config, name, value)
        torch.manual_seed(0)
        model = kind(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.is_floating_point() and not bool(parameter.any()):
                    parameter.normal_(std=0.2)
        return model

    @property
    def installed(self) -> bool:
        if self.images is towers.features and RELEASE < (5, 20):
            return False
        return hasattr(transformers, self.model)


_MROPE = {"text_config.rope_scaling" if RELEASE < (5, 0) else "text_config.rope_parameters": dict(rope_type="default", rope_theta=10000.0, mrope_section=[1, 1, 2], partial_rotary_factor=1.0)}
#: of configs that had none of their own before 5.0
_OLD_MROPE = _MROPE if RELEASE < (5, 0) else {}
_GEMMA4 = {
    "audio_config": None, "text_config.hidden_size_per_layer_input": 0, "text_config.num_kv_shared_layers": 0, "text_config.layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip
_PINPOINTS = {"image_grid_pinpoints": [[16, 16], [16, 32]]}
_OMNI = dict(vision_start_token_id=140, vision_end_token_id=141, audio_start_token_id=142, audio_end_token_id=143, tokens_per_second=2, position_id_per_seconds=2)


def _with_prompts(config, numbers) -> dict:
    """The Q-Former reads the question beside each image."""
    ids = torch.tensor([[3, 4, 5]] * len(numbers))
    return towers.pictures(config, numbers, qformer_input_ids=ids, qformer_attention_mask=torch.ones_like(ids))


def _with_merge_sizes(config, numbers) -> dict:
    made = towers.patches(config, numbers)
    return made | {"image_merge_sizes": torch.full((len(numbers),), 2)}


def _with_tile_mask(config, numbers) -> dict:
    return towers.in_rows(config, numbers) | {"pixel_attention_mask": torch.ones(1, len(numbers), dtype=torch.bool)}


def _flattened(config, numbers) -> dict:
    """Patches in a row, each behind the row and column where it stands."""
    places = torch.tensor([[1.0, 1], [1, 2], [2, 1], [2, 2]])
    width = config.vision_config.patch_embed_hidden_size
    pixels = torch.stack([torch.cat([places, towers.random_values(number, 4, width)], 1) for number in numbers])
    return {"flattened_patches": pixels, "width": torch.full((len(numbers),), 2.0), "height": torch.full((len(numbers),), 2.0)}


def _naflex(config, numbers) -> dict:
    """Patches of each image in a row of its own, with how they stand."""
    vision = config.vision_config
    count, width = 8, vision.num_channels * vision.patch_size**2
    pixels = torch.stack([towers.random_values(number, count, width) for number in numbers])
    return {"pixel_values": pixels, "spatial_shapes": torch.tensor([[2, 4]] * len(numbers)), "pixel_attention_mask": torch.ones(len(numbers), count, dtype=torch.int64)}


FAMILIES = {
    "aria": Family("AriaForConditionalGeneration", towers.pictures, changes={"projector_patch_to_query_dict": {4: 3}}),
    "audioflamingo3": Family("AudioFlamingo3ForConditionalGeneration", sounds=towers.sounds),
    "aya_vision": Family("AyaVisionForConditionalGeneration", towers.pictures, changes={"vision_config.image_size": 32}),
    "blip_2": Family("Blip2ForConditionalGeneration", towers.pictures, changes={"image_token_index": 150}),
    "cohere2_vision": Family("Cohere2VisionForConditionalGeneration", towers.pictures, changes={"vision_config.image_size": 32, "alignment_intermediate_size": 64}),
    "cosmos3_edge": Family("Cosmos3EdgeForConditionalGeneration", towers.patches, towers.film_patches, frames_apart=True),
    "cosmos3_omni": Family("Cosmos3OmniForConditionalGeneration", towers.patches, towers.film_patches, frames_apart=True, merge="masked_scatter, DeepStack"),
    "deepseek_vl": Family("DeepseekVLForConditionalGeneration", towers.pictures),
    "exaone4_5": Family("Exaone4_5_ForConditionalGeneration", towers.patches),
    "gemma3": Family("Gemma3ForConditionalGeneration", towers.pictures, changes={"mm_tokens_per_image": 4}),
    "gemma4": Family("Gemma4ForConditionalGeneration", towers.features, changes=_GEMMA4, rows=towers.ROWS),
    "gemma4_vision": Family(
        "Gemma4ForConditionalGeneration", towers.features, changes={**_GEMMA4, "text_config.use_bidirectional_attention": "vision"}, rows=towers.ROWS
    ),
    "glm46v": Family("Glm46VForConditionalGeneration", towers.patches, changes=_MROPE),
    "glm4v": Family("Glm4vForConditionalGeneration", towers.patches, changes=_MROPE),
    "glm4v_moe": Family("Glm4vMoeForConditionalGeneration", towers.patches, changes=_MROPE),
    "glm_ocr": Family("GlmOcrForConditionalGeneration", towers.patches, changes=_MROPE),
    "glmasr": Family("GlmAsrForConditionalGeneration", sounds=towers.sounds, changes={"audio_config.intermediate_size": 128}),
    "got_ocr2": Family("GotOcr2ForConditionalGeneration", towers.pictures),
    "granite_docling": Family("GraniteDoclingForConditionalGeneration", _with_tile_mask, changes={"vision_config.scale_factor": 2, "vision_config.image_size": 32}, merge="masked_scatter, DeepStack"),
    "hyperclovax_vision_v2": Family("HyperCLOVAXVisionV2ForConditionalGeneration", towers.patches, towers.film_patches),
    "idefics2": Family("Idefics2ForConditionalGeneration", towers.in_rows, changes={"perceiver_config.resampler_n_latents": 3}),
    "idefics3": Family("Idefics3ForConditionalGeneration", towers.in_rows, changes={"vision_config.image_size": 32}),
    "instructblip": Family("InstructBlipForConditionalGeneration", _with_prompts, changes={"image_token_index": 150}),
    "internvl": Family("InternVLForConditionalGeneration", towers.pictures, changes={"vision_config.image_size": [32, 32]}),
    "janus": Family("JanusForConditionalGeneration", towers.pictures, changes={"vq_config.base_channels": 32}),
    "kosmos2": Family("Kosmos2ForConditionalGeneration", towers.pictures, changes={"latent_query_num": 3}, rows=3, one_each=True, merge="embeds[mask] = features"),
    "kosmos2_5": Family(
        "Kosmos2_5ForConditionalGeneration", _flattened, changes={"latent_query_num": 3, "vision_config.patch_embed_hidden_size": 12}, rows=3, one_each=True,
        merge="embeds[mask] = features",
    ),
    "lfm2_vl": Family("Lfm2VlForConditionalGeneration", _naflex, changes={"text_config.layer_types": ["conv", "full_attention"]}),
    "lfm3_vl": Family("Lfm3VlForConditionalGeneration", towers.patches, towers.film_patches),
    "lighton_ocr": Family("LightOnOcrForConditionalGeneration", towers.sized, changes={"vision_config.image_size": 32}),
    "llama4": Family("Llama4ForConditionalGeneration", towers.pictures, changes={"vision_config.intermediate_size": 128, "vision_config.image_size": 32}),
    "llava": Family("LlavaForConditionalGeneration", towers.pictures),
    "llava_next": Family("LlavaNextForConditionalGeneration", towers.tiles, changes=_PINPOINTS),
    "llava_next_video": Family("LlavaNextVideoForConditionalGeneration", towers.tiles, towers.films, changes=_PINPOINTS),
    "llava_onevision": Family("LlavaOnevisionForConditionalGeneration", towers.tiles, towers.films, changes=_PINPOINTS),
    "minimax_m3_vl": Family("MiniMaxM3SparseForConditionalGeneration", towers.patches, towers.film_patches),
    "mistral3": Family("Mistral3ForConditionalGeneration", towers.sized, changes={"vision_config.image_size": 32}),
    "modernvbert": Family("ModernVBertForMaskedLM", towers.in_rows, changes={"pixel_shuffle_factor": 2, "vision_config.image_size": 32}),
    "molmo2": Family(
        "Molmo2ForConditionalGeneration", towers.features, changes={"adapter_config.vision_feature_layer": [-1, -2], "image_patch_id": 150}, rows=towers.ROWS, merge="masked_scatter of sums"
    ),
    "ovis2": Family("Ovis2ForConditionalGeneration", towers.pictures),
    "paddleocr_vl": Family("PaddleOCRVLForConditionalGeneration", towers.square_patches, changes=_MROPE),
    "paligemma": Family("PaliGemmaForConditionalGeneration", towers.pictures),
    "qianfan_ocr": Family("QianfanOCRForConditionalGeneration", towers.pictures, changes={"vision_config.image_size": [32, 32]}),
    "qwen2_5_omni": Family("Qwen2_5OmniThinkerForConditionalGeneration", towers.patches, changes=_MROPE, afterwards=_OMNI),
    "qwen2_5_vl": Family("Qwen2_5_VLForConditionalGeneration", towers.patches, towers.film_patches, changes=_MROPE),
    "qwen2_vl": Family("Qwen2VLForConditionalGeneration", towers.patches, towers.film_patches, changes=_MROPE),
    "qwen3_5": Family("Qwen3_5ForConditionalGeneration", towers.patches, towers.film_patches, frames_apart=True),
    "qwen3_5_moe": Family("Qwen3_5MoeForConditionalGeneration", towers.patches, towers.film_patches, frames_apart=True),
    "qwen3_omni_moe": Family("Qwen3OmniMoeThinkerForConditionalGeneration", towers.patches, afterwards=_OMNI, merge="masked_scatter, DeepStack"),
    "qwen3_vl": Family("Qwen3VLForConditionalGeneration", towers.patches, towers.film_patches, changes=_OLD_MROPE, frames_apart=True, merge="masked_scatter, DeepStack"),
    "qwen3_vl_moe": Family("Qwen3VLMoeForConditionalGeneration", towers.patches, towers.film_patches, changes=_OLD_MROPE, frames_apart=True, merge="masked_scatter, DeepStack"),
    "smolvlm": Family("SmolVLMForConditionalGeneration", towers.in_rows, changes={"vision_config.image_size": 32}),
    "ultravbert": Family("UltraVBertForMaskedLM", towers.in_rows, changes={"pixel_shuffle_factor": 2, "vision_config.image_size": 32}),
    "video_llama_3": Family("VideoLlama3ForConditionalGeneration", _with_merge_sizes),
    "video_llava": Family("VideoLlavaForConditionalGeneration", lambda config, numbers: {"pixel_values_images": towers.pictures(config, numbers)["pixel_values"]}),
    "vipllava": Family("VipLlavaForConditionalGeneration", towers.pictures, changes={"vision_feature_layers": [-1, -2]}),
    "voxtral": Family("VoxtralForConditionalGeneration", sounds=towers.sounds_of_one_length, changes={"audio_token_id": 150, "audio_config.intermediate_size": 128}),
}
