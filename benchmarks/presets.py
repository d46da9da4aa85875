"""Shapes of well-known vision-language models, and the batches that are measured.

Every figure carries its evidence:
``d`` default of a configuration class in transformers 5.23; ``c`` read in a config, conversion script or
training script of the project named; ``=`` computed here from ``c`` and ``d`` values; ``m`` remembered, not
verified: to be put right when a ``config.json`` is at hand.

Source: transformers ``models/*/configuration_*.py`` and ``processing_*.py``; nanoVLM ``models/config.py``; smollm
``vision/experiments/pretraining/vloom``; LLaVA and LLaVA-NeXT ``scripts``; Qwen3-VL ``qwen-vl-finetune``; InternVL
``internvl_chat/shell``; xtuner ``xtuner/v1/model``; Megatron-Bridge ``recipes/qwen_vl``; molmo2 ``launch_scripts/sft.py``;
Liger-Kernel ``test/convergence/bf16/test_mini_models_multimodal.py``.
"""

from __future__ import annotations

from typing import NamedTuple


class Preset(NamedTuple):
    """One model, as far as merging rows is concerned."""

    hidden_size: int  # D, width of a row
    vocab_size: int  # rows of the embedding table
    heads: tuple[int, int, int]  # query heads, key-value heads, head size
    image_rows: tuple[int, int]  # feature rows of an image as they reach the language model: typical, largest
    image_token_id: int | None  # the placeholder; None: images stand first, without placeholders
    video_token_id: int | None
    marks: tuple[tuple[int, ...], tuple[int, ...]]  # token ids before and after a run of placeholders (made up where m)
    length: int  # training length in tokens
    batch: int  # samples (or packed rows) per device
    evidence: dict[str, str]  # field -> letter


def _evidence(hidden_size, vocab_size, heads, image_rows, image_token_id, length):
    return dict(hidden_size=hidden_size, vocab_size=vocab_size, heads=heads, image_rows=image_rows, image_token_id=image_token_id, length=length)


_NO_MARKS = ((), ())
_TILE_TAG = ((49217,), ())  # <row_r_col_c>, one id standing for all of them
_VISION = ((151652,), (151653,))  # <|vision_start|>, <|vision_end|>
_GEMMA = ((108, 255999), (256000, 108))  # blank line, begin; end, blank line

PRESETS: dict[str, Preset] = {
    "nanovlm-222m": Preset(576, 49152, (9, 3, 64), (49, 49), None, None, _NO_MARKS, 128, 256, _evidence("c", "c", "c", "=", "c", "c")),
    "nanovlm-230m": Preset(576, 49218, (9, 3, 64), (64, 1088), 49152, None, _TILE_TAG, 8192, 2, _evidence("m", "m", "m", "m", "m", "m")),
    "nanovlm-450m": Preset(960, 49218, (15, 5, 64), (832, 1088), 49152, None, _TILE_TAG, 4096, 2, _evidence("c", "c", "c", "=", "c", "c")),
    "smolvlm2-256m": Preset(576, 49280, (9, 3, 64), (64, 1088), 49190, None, ((49189,), ()), 7000, 4, _evidence("m", "c", "m", "=", "c", "c")),
    "smolvlm2-500m": Preset(960, 49280, (15, 5, 64), (64, 1088), 49190, None, ((49189,), ()), 7000, 4, _evidence("m", "c", "m", "=", "c", "c")),
    "smolvlm2-2.2b": Preset(2048, 49280, (32, 32, 64), (81, 1377), 49190, None, ((49189,), ()), 7000, 4, _evidence("m", "c", "m", "=", "c", "c")),
    "llava-1.5-7b": Preset(4096, 32064, (32, 32, 128), (576, 576), 32000, None, _NO_MARKS, 2048, 16, _evidence("m", "m", "m", "d", "d", "c")),
    "llava-onevision-7b": Preset(
        3584, 152064, (28, 4, 128), (729, 7371), 151646, 151647, _NO_MARKS, 32768, 1, _evidence("c", "c", "c", "=", "d", "c")
    ),
    "llava-onevision-1.5-8b": Preset(
        4096, 151936, (32, 8, 128), (576, 1280), 151655, 151656, _VISION, 32768, 1, _evidence("m", "c", "c", "m", "c", "c")
    ),
    "qwen2.5-vl-3b": Preset(2048, 151936, (16, 2, 128), (576, 1280), 151655, 151656, _VISION, 8192, 4, _evidence("c", "m", "c m m", "c d", "d", "c")),
    "qwen2.5-vl-7b": Preset(3584, 152064, (28, 4, 128), (576, 1280), 151655, 151656, _VISION, 4096, 2, _evidence("c", "c", "c", "c d", "d", "c")),
    "qwen2.5-vl-72b": Preset(8192, 152064, (64, 8, 128), (576, 1280), 151655, 151656, _VISION, 4096, 2, _evidence("d", "d", "d", "c d", "d", "c")),
    "qwen3-vl-4b": Preset(2560, 151936, (32, 8, 128), (300, 1280), 151655, 151656, _VISION, 8192, 4, _evidence("c", "c", "c", "=", "d", "c")),
    "qwen3-vl-8b": Preset(4096, 151936, (32, 8, 128), (300, 1280), 151655, 151656, _VISION, 8192, 4, _evidence("c", "c", "c", "=", "d", "c")),
    "gemma3-4b": Preset(2560, 262208, (8, 4, 256), (256, 1280), 262144, None, _GEMMA, 8192, 8, _evidence("c", "d", "c", "d", "d", "m")),
    "gemma3-12b": Preset(3840, 262208, (16, 8, 256), (256, 1280), 262144, None, _GEMMA, 8192, 8, _evidence("c", "d", "c", "d", "d", "m")),
    "internvl3-8b": Preset(
        3584, 151674, (28, 4, 128), (1792, 3328), 151667, None, ((151665,), (151666,)), 16384, 4, _evidence("c", "m", "c", "=", "d", "c")
    ),
    "internvl3.5-8b": Preset(
        4096, 151936, (32, 8, 128), (1792, 3328), 151671, None, ((151669,), (151670,)), 16384, 4, _evidence("c", "c", "c", "c", "c", "c")
    ),
    # the placeholder equals the table size: it is NOT a row of the table
    "paligemma2-3b": Preset(2304, 257152, (8, 4, 256), (256, 4096), 257152, None, _NO_MARKS, 768, 8, _evidence("c", "c", "c", "=", "c", "m")),
    "pixtral-12b": Preset(5120, 131072, (32, 8, 128), (1024, 4096), 10, None, ((), (12,)), 8192, 1, _evidence("m", "m", "m", "=", "m", "m")),
    "mistral-small-3.1": Preset(5120, 131072, (32, 8, 128), (1024, 3025), 10, None, ((), (12,)), 8192, 1, _evidence("d", "d", "d", "=", "d", "m")),
    "llama4-scout": Preset(
        5120, 202048, (40, 8, 128), (144, 2448), 200092, None, ((200080,), (200081,)), 8192, 1, _evidence("d", "d", "d", "= m", "d", "m")
    ),
    "molmo2-8b": Preset(
        4096, 152064, (32, 8, 128), (1180, 1764), 151938, 151938, ((151936,), (151937,)), 16384, 2, _evidence("d", "d", "d", "d", "d", "c")
    ),
}


class Load(NamedTuple):
    """One batch to measure: a model's shapes, a distribution of `generator.DISTRIBUTIONS`, and the rows."""

    preset: str
    distribution: str
    rows: int  # B
    length: int  # T
    packed: bool = False
    padding_side: str = "right"


#: the batches to measure; a name says model, data and rows.
LOADS: dict[str, dict[str, Load]] = {
    "small": {
        "nanovlm-450m 32x512": Load("nanovlm-450m", "cauldron_64", 32, 512),
        "nanovlm-450m packed 1x4096": Load("nanovlm-450m", "cauldron_64", 1, 4096, packed=True),
    },
    "main": {
        "qwen2.5-vl-7b 4x8192": Load("qwen2.5-vl-7b", "finevision_native", 4, 8192),
        "qwen2.5-vl-7b packed 1x8192": Load("qwen2.5-vl-7b", "finevision_native", 1, 8192, packed=True),
        "qwen2.5-vl-7b packed 1x32768": Load("qwen2.5-vl-7b", "finevision_native", 1, 32768, packed=True),
        "qwen3-vl-8b 4x8192": Load("qwen3-vl-8b", "finevision_native", 4, 8192),
        "qwen3-vl-8b packed 1x8192": Load("qwen3-vl-8b", "finevision_native", 1, 8192, packed=True),
        "qwen3-vl-8b packed 1x32768": Load("qwen3-vl-8b", "finevision_native", 1, 32768, packed=True),
        "internvl3-8b packed 1x16384": Load("internvl3-8b", "finevision_internvl", 1, 16384, packed=True),
        "gemma3-4b 8x4096": Load("gemma3-4b", "finevision_gemma", 8, 4096),
        "gemma3-4b packed 1x8192": Load("gemma3-4b", "finevision_gemma", 1, 8192, packed=True),
    },
    "large": {
        "qwen2.5-vl-72b packed 1x32768": Load("qwen2.5-vl-72b", "finevision_native", 1, 32768, packed=True),
        "molmo2-8b video packed 1x16384": Load("molmo2-8b", "molmo2_video", 1, 16384, packed=True),
        "molmo2-8b video packed 1x36864": Load("molmo2-8b", "molmo2_video", 1, 36864, packed=True),
        "llama4-scout packed 1x32768": Load("llama4-scout", "m4", 1, 32768, packed=True),
    },
    "legacy": {
        # images first: 49 rows of image and at most 79 of text in each sample
        "nanovlm-222m images first 256x128": Load("nanovlm-222m", "legacy_49", 256, 128, padding_side="left"),
    },
}

#: share of image rows to sweep; None stands for one single row.
IMAGE_SHARES: tuple[float | None, ...] = (0.0, None, 0.25, 0.5, 0.81, 1.0)

#: documents in a packed row to sweep.
DOCUMENTS = (1, 4, 12, 64, 1000)
