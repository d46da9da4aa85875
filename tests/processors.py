"""Real processors and tiny models of many families, built without a network: what their samples look like, and how the models take a batch."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import sys
from dataclasses import dataclass, field
from types import SimpleNamespace
from unittest import mock

import numpy as np
import tokenizers
import torch
import transformers
from PIL import Image

from vlm_fuse import Attend

WORDS = [f"w{number}" for number in range(30)]
VOCABULARY = ["<pad>", "<unk>", "<bos>", "<eos>", "\n", *WORDS]
TOKENS = 80  # size of the models' tables
TEXT = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, vocab_size=TOKENS,
    max_position_embeddings=512, initializer_range=0.2, pad_token_id=0, bos_token_id=2, eos_token_id=3, tie_word_embeddings=False,
)  # fmt: skip
TOWER = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)


@dataclass
class Family:
    """One family: a processor, a model, and what the collators are told of it."""

    processor: object
    model: torch.nn.Module
    image: str  # how an image stands in the text
    settings: dict = field(default_factory=dict)  # of the collators
    attends: dict | None = None  # layer type to Attend, where restarting positions alone do not isolate
    video: str | None = None
    nested: bool = False  # images are given as a list for each text
    suffix: str | None = None  # what the model is to answer, where the processor makes labels of it


def tokenizer(*specials: str, **named: str):
    table = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: number for number, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    table.pre_tokenizer = tokenizers.pre_tokenizers.Split(" ", "removed")
    ends = dict(pad_token="<pad>", unk_token="<unk>", bos_token="<bos>", eos_token="<eos>")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=table, extra_special_tokens=named or list(specials), **ends)


def built(processor_class: type, *parts, **settings):
    """A processor of parts that are not looked at: there may be a stand-in among them, for what torchvision alone can do."""
    lenient = type(processor_class.__name__, (processor_class,), {"check_argument_for_proper_class": lambda self, name, part: None})
    return lenient(*parts, **settings)


class Videos:
    """Stands in for Qwen's video processors, which need torchvision: frames into patches, in their form."""

    merge_size, temporal_patch_size = 2, 2
    model_input_names = ["pixel_values_videos", "video_grid_thw"]

    def __init__(self, patch: int):
        self.patch = patch

    def __call__(self, videos, return_tensors=None, **_):
        grids, patches, metadata = [], [], []
        for video in videos:
            frames, height, width, _ = video.shape
            grid = (frames // 2, height // self.patch, width // self.patch)
            pixels = video.reshape(int(np.prod(grid)), -1).astype(np.float32) / 255
            grids.append(grid)
            patches.append(pixels)
            metadata.append(SimpleNamespace(fps=2.0, sampled_fps=2.0, frames_indices=list(range(frames)), timestamps=[frame / 2 for frame in range(frames)]))
        made = {"pixel_values_videos": np.concatenate(patches), "video_grid_thw": np.asarray(grids, dtype=np.int64)}
        return {**(made if return_tensors is None else {name: torch.from_numpy(value) for name, value in made.items()}), "video_metadata": metadata}


@contextlib.contextmanager
def without_torchvision():
    """Modules that import torchvision, and whose classes do not need it, can be imported; where it is installed nothing changes."""
    if importlib.util.find_spec("torchvision") is not None:
        yield
        return
    names = ("torchvision", "torchvision.transforms", "torchvision.transforms.v2", "torchvision.transforms.v2.functional")
    sys.modules.update({name: mock.MagicMock() for name in names})
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


def pictures(count: int, seed: int, sides=((9, 17), (16, 8), (24, 24), (8, 30))) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    chosen = [sides[int(rng.integers(len(sides)))] for _ in range(count)]
    return [Image.fromarray(rng.integers(0, 255, (*side, 3), dtype=np.uint8)) for side in chosen]


def film(seed: int, frames: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (frames, 8, 16, 3), dtype=np.uint8)


QWEN = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
_QWEN_IDS = dict(zip(("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"), range(len(VOCABULARY), TOKENS)))
_IMAGE, _VIDEO = _QWEN_IDS["image_token_id"], _QWEN_IDS["video_token_id"]
_MROPE = dict(rope_type="default", rope_theta=10000.0, mrope_section=[1, 1, 2])


def _qwen(model_class: str, config_class: str, processor_class: str, text: dict, vision: dict, **settings) -> Family:
    text = {**TEXT, "rope_parameters": dict(_MROPE), **text}
    config = getattr(transformers, config_class)(
        text_config=text, vision_config=dict(patch_size=4, num_heads=2, depth=2, hidden_act="gelu", initializer_range=0.2, **vision), **_QWEN_IDS
    )
    model = getattr(transformers, model_class)(config)
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    given = dict(image_token_id=_IMAGE, video_token_id=_VIDEO, mrope=True, marks=(_VIDEO + 1, _VIDEO + 2), **settings)
    image, video = "<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>"
    if settings.get("frames_apart"):
        video = "<|video_pad|>"
    sized = Qwen2VLImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 1024}, patch_size=4)
    return Family(built(getattr(transformers, processor_class), sized, tokenizer(*QWEN), Videos(4)), model, image, given, video=video)


def qwen2_vl() -> Family:
    return _qwen("Qwen2VLForConditionalGeneration", "Qwen2VLConfig", "Qwen2VLProcessor", {}, dict(embed_dim=32, hidden_size=32))


def qwen2_5_vl() -> Family:
    vision = dict(hidden_size=32, intermediate_size=48, out_hidden_size=32, window_size=16, fullatt_block_indexes=[1], tokens_per_second=4)
    return _qwen("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLConfig", "Qwen2_5_VLProcessor", {}, vision, tokens_per_second=4)


def qwen3_vl() -> Family:
    vision = dict(hidden_size=32, intermediate_size=48, out_hidden_size=32, num_position_embeddings=64, deepstack_visual_indexes=[0, 1])
    return _qwen("Qwen3VLForConditionalGeneration", "Qwen3VLConfig", "Qwen3VLProcessor", {}, vision, frames_apart=True)


def qwen3_5() -> Family:
    text = dict(
        layer_types=["linear_attention", "full_attention"], linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4,
        rope_parameters={**_MROPE, "partial_rotary_factor": 1.0},
    )  # fmt: skip
    vision = dict(hidden_size=32, intermediate_size=48, out_hidden_size=32, num_position_embeddings=64)
    return _qwen("Qwen3_5ForConditionalGeneration", "Qwen3_5Config", "Qwen3VLProcessor", text, vision, frames_apart=True)


def glm4v() -> Family:
    """Images and videos have one placeholder, so that the model itself takes only one of them in a batch: here videos."""
    from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil

    words = ("<|image|>", "<|video|>", "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>")
    ids = {word: len(VOCABULARY) + number for number, word in enumerate(words)}
    names = ("image_token_id", "video_token_id", "image_start_token_id", "image_end_token_id", "video_start_token_id", "video_end_token_id")
    vision = dict(hidden_size=32, depth=2, num_heads=2, image_size=32, patch_size=4, out_hidden_size=32, intermediate_size=48, initializer_range=0.2)
    config = transformers.Glm4vConfig(text_config={**TEXT, "rope_parameters": dict(_MROPE)}, vision_config=vision, **dict(zip(names, ids.values())))
    settings = dict(image_token_id=ids["<|image|>"], video_token_id=ids["<|image|>"], mrope=True, frames_apart=True, marks=tuple(ids.values())[2:])
    sized = Glm4vImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 1024}, patch_size=4)
    processor = built(transformers.Glm4vProcessor, sized, tokenizer(*words), Videos(4))
    # the processor expands a video's placeholder to frames of image placeholders
    image, video = "<|begin_of_image|><|image|><|end_of_image|>", "<|begin_of_video|><|video|><|end_of_video|>"
    return Family(processor, transformers.Glm4vForConditionalGeneration(config), image, settings, video=video)


def llava() -> Family:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    token = len(VOCABULARY)
    vision = transformers.CLIPVisionConfig(image_size=16, patch_size=8, initializer_range=0.2, **TOWER)
    config = transformers.LlavaConfig(vision_config=vision, text_config=transformers.LlamaConfig(**TEXT), image_token_index=token, vision_feature_layer=-2)
    sized = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    settings = dict(patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1)
    processor = built(transformers.LlavaProcessor, sized, tokenizer("<image>"), **settings)
    return Family(processor, transformers.LlavaForConditionalGeneration(config), "<image>", dict(image_token_id=token, rows_per_image=4))


PINPOINTS = [[16, 16], [16, 32], [32, 16], [32, 32]]


def llava_next() -> Family:
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    token = len(VOCABULARY)
    vision = transformers.CLIPVisionConfig(image_size=16, patch_size=8, initializer_range=0.2, **TOWER)
    config = transformers.LlavaNextConfig(
        vision_config=vision, text_config=transformers.LlamaConfig(**TEXT), image_token_index=token, image_grid_pinpoints=PINPOINTS, image_seq_length=4
    )
    sized = LlavaNextImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, image_grid_pinpoints=PINPOINTS)
    settings = dict(patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1)
    processor = built(transformers.LlavaNextProcessor, sized, tokenizer("<image>"), **settings)


    def rows_per_image(sample) -> list[int]:
        sizes = torch.as_tensor(sample.get("image_sizes", [])).tolist()
        return [processor._get_number_of_features(*size, 16, 16) - 1 for size in sizes]

    settings = dict(image_token_id=token, rows_per_image=rows_per_image)
    return Family(processor, transformers.LlavaNextForConditionalGeneration(config), "<image>", settings)


def llava_onevision() -> Family:
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

    token = len(VOCABULARY)
    vision = transformers.SiglipVisionConfig(image_size=16, patch_size=8, vision_use_head=False, **TOWER)
    config = transformers.LlavaOnevisionConfig(
        vision_config=vision, text_config=transformers.Qwen2Config(**TEXT), image_token_index=token, video_token_index=token + 1,
        image_grid_pinpoints=PINPOINTS, vision_aspect_ratio="anyres_max_9",
    )  # fmt: skip
    sized = LlavaOnevisionImageProcessorPil(size={"height": 16, "width": 16}, image_grid_pinpoints=PINPOINTS)
    processor = built(
        transformers.LlavaOnevisionProcessor, sized, tokenizer("<image>", "<video>"), None, num_image_tokens=4, vision_feature_select_strategy="full"
    )
    model = transformers.LlavaOnevisionForConditionalGeneration(config)
    return Family(processor, model, "<image>", dict(image_token_id=token, video_token_id=token + 1), nested=True)


def _idefics(model_class, config_class, vision_class, processor, image_processor) -> Family:
    token = len(VOCABULARY)
    words = ("<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>", *(f"<row_{row}_col_{col}>" for row in (1, 2, 3) for col in (1, 2, 3)))
    vision = vision_class(image_size=16, patch_size=4, initializer_range=0.2, **TOWER)
    config = config_class(vision_config=vision, text_config=transformers.LlamaConfig(**TEXT), image_token_id=token, scale_factor=2, pad_token_id=0)
    sized = image_processor(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    made = built(processor, sized, tokenizer(*words), image_seq_len=4)
    return Family(made, model_class(config), "<image>", dict(image_token_id=token, rows_per_image=4), nested=True)


def idefics3() -> Family:
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    return _idefics(
        transformers.Idefics3ForConditionalGeneration, transformers.Idefics3Config, transformers.models.idefics3.configuration_idefics3.Idefics3VisionConfig,
        transformers.Idefics3Processor, Idefics3ImageProcessorPil,
    )  # fmt: skip


def internvl() -> Family:
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    named = dict(start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>", video_token="<video>")
    words = tokenizer(**named)
    token = words.context_image_token_id
    vision = transformers.InternVLVisionConfig(image_size=[16, 16], patch_size=[4, 4], initializer_range=0.2, **TOWER)
    config = transformers.InternVLConfig(
        vision_config=vision, text_config=transformers.Qwen2Config(**TEXT), image_token_id=token, image_seq_length=4, vision_feature_layer=-1, tie_word_embeddings=False
    )
    sized = GotOcr2ImageProcessorPil(size={"height": 16, "width": 16}, max_patches=3)
    processor = built(transformers.InternVLProcessor, sized, words, Videos(4), image_seq_length=4)
    return Family(processor, transformers.InternVLForConditionalGeneration(config), "<IMG_CONTEXT>", dict(image_token_id=token, rows_per_image=4))


def gemma3() -> Family:
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    words = tokenizer(image_token="<image_soft_token>", boi_token="<start_of_image>", eoi_token="<end_of_image>")
    token, window = words.image_token_id, 5
    text = dict(layer_types=["sliding_attention", "full_attention"], sliding_window=window, query_pre_attn_scalar=8)
    vision = transformers.SiglipVisionConfig(image_size=16, patch_size=4, vision_use_head=False, **TOWER)
    config = transformers.Gemma3Config(
        text_config={**TEXT, **text}, vision_config=vision.to_dict(), mm_tokens_per_image=4, image_token_index=token, boi_token_index=words.boi_token_id,
        eoi_token_index=words.eoi_token_id, initializer_range=0.2, tie_word_embeddings=False,
    )  # fmt: skip
    processor = built(transformers.Gemma3Processor, Gemma3ImageProcessorPil(size={"height": 16, "width": 16}), words, image_seq_length=4)
    attends = {"full_attention": Attend(images="bidirectional"), "sliding_attention": Attend(window=window, images="bidirectional_windowed")}
    settings = dict(image_token_id=token, rows_per_image=4, attend=attends)
    return Family(processor, transformers.Gemma3ForConditionalGeneration(config), "<start_of_image>", settings, attends, nested=True)


def mistral3() -> Family:
    from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

    with without_torchvision():
        from transformers.models.pixtral.processing_pixtral import PixtralProcessor

    words = tokenizer("[IMG]", "[IMG_BREAK]", "[IMG_END]")
    token = words.convert_tokens_to_ids("[IMG]")
    vision = transformers.PixtralVisionConfig(image_size=32, patch_size=4, head_dim=16, initializer_range=0.2, **TOWER)
    config = transformers.Mistral3Config(
        vision_config=vision, text_config=transformers.MistralConfig(sliding_window=None, **TEXT), image_token_index=token, spatial_merge_size=2, tie_word_embeddings=False
    )
    sized = PixtralImageProcessorPil(size={"longest_edge": 32}, patch_size={"height": 8, "width": 8})
    processor = built(PixtralProcessor, sized, words, patch_size=4, spatial_merge_size=2)
    settings = dict(image_token_id=token, rows_per_image=lambda sample: [height // 8 * (width // 8) for height, width in sample.get("image_sizes", [])])
    return Family(processor, transformers.Mistral3ForConditionalGeneration(config), "[IMG]", settings)


def paligemma() -> Family:
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    words = tokenizer("<image>")
    token = words.convert_tokens_to_ids("<image>")
    sized = SiglipImageProcessorPil(size={"height": 16, "width": 16})
    sized.image_seq_length = 4
    processor = built(transformers.PaliGemmaProcessor, sized, words)
    vision = transformers.SiglipVisionConfig(image_size=16, patch_size=8, vision_use_head=False, projection_dim=32, **TOWER)
    size = 2000  # its processor adds 1152 tokens
    text = transformers.GemmaConfig(**{**TEXT, "vocab_size": size})
    config = transformers.PaliGemmaConfig(vision_config=vision, text_config=text, image_token_index=token, vocab_size=size, projection_dim=32, hidden_size=32)
    model = transformers.PaliGemmaForConditionalGeneration(config)
    return Family(processor, model, "<image>", dict(image_token_id=token, rows_per_image=4), nested=True, suffix="w3 w4 w5")


FAMILIES = {
    made.__name__: made
    for made in (qwen2_vl, qwen2_5_vl, qwen3_vl, qwen3_5, glm4v, llava, llava_next, llava_onevision, idefics3, internvl, gemma3, mistral3, paligemma)
}


@dataclass
class Ready:
    """A family's model, its samples, and what the model makes of each alone."""

    family: Family
    samples: list[dict]
    logits: torch.Tensor  # of all tokens of all samples, one after another
    losses: list[float]  # summed over each sample's tokens
    counts: list[int]


def made_ready(name: str) -> Ready:
    torch.manual_seed(0)
    family = FAMILIES[name]()
    model = family.model.train(family.suffix is not None)  # paligemma tells prompt from answer in training alone
    with torch.no_grad():
        for parameter in model.parameters():
            if not bool(parameter.any()):
                parameter.normal_(std=0.2)  # nothing is zero, or a wrong merge would go unseen
    image, video = family.image, family.video
    texts = [("w1 w2 w3", 0, 0), (f"{image} w1 w4", 1, 0), (f"w5 {image} w2 {image}{image} w7 w8 w9", 3, 0), ("w2", 0, 0), (f"w3 w4 {image}", 1, 0)]
    if video and name == "glm4v":
        texts = [("w1 w2 w3", 0, 0), (f"{video} w1 w4", 0, 1), (f"w5 {video} w2 {video}{video} w7", 0, 3)]
    elif video:
        texts += [(f"w1 {video} w3", 0, 1), (f"{video}{image} w1 {video} w9 {image}", 2, 2)]
    if family.suffix:
        texts = [text for text in texts if text[1]]
    ready = Ready(family, [], torch.empty(0), [], [])
    logits = []
    for number, text in enumerate(texts):
        sample = processed(family, *text, number, return_tensors="pt")
        labels = sample.pop("labels", None)
        if labels is None:
            labels = sample["input_ids"].clone()
            labels[:, 1:3] = -100
            for token in ("image_token_id", "video_token_id"):
                labels[labels == family.settings.get(token)] = -100
        with torch.no_grad():
            logits.append(model(**sample, labels=labels).logits[0])
        ready.losses.append(float(summed_loss(logits[-1][None], labels)))
        ready.counts.append(int((labels[:, 1:] != -100).sum()))
        # every other sample with lists and arrays, as without return_tensors
        given = sample if number % 2 else processed(family, *text, number)
        ready.samples.append({**given, "labels": labels if number % 2 else labels[0].tolist()})
    ready.logits = torch.cat(logits)
    return ready


def processed(family: Family, text: str, images: int, videos: int, seed: int, **settings) -> dict:
    if images:
        given = pictures(images, seed)
        settings["images"] = [given] if family.nested else given
    if videos:
        settings["videos"] = [film(10 * seed + number, 4 + 2 * number) for number in range(videos)]
    if family.suffix:
        settings["suffix"] = family.suffix
    return dict(family.processor(text=text, **settings))


def summed_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


def tower_rows(family: Family, batch: dict) -> dict[int, torch.Tensor]:
    """What the model's towers make of a batch: {placeholder id: rows}."""
    rows = {}
    for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if pixels in batch:
            features = getattr(family.model.model, f"get_{kind}_features")
            taken = inspect.signature(features).parameters
            made = features(**{name: batch[name] for name in taken if name in batch}).pooler_output
            parts = made if isinstance(made, (list, tuple)) else [made]
            rows[family.settings[f"{kind}_token_id"]] = torch.cat([part.flatten(0, -2) for part in parts])
    return rows
