"""Samples of a processor's making from the questions about digits, some without a picture, and a tiny model to learn them; nothing is downloaded."""

from __future__ import annotations

import numpy as np
import tokenizers
import torch
import transformers
from PIL import Image

from .digit_questions import ROWS, VOCABULARY, about_numbers, draw

ANSWER = "<answer>"
SIDE = 16  # pixels of a picture: 4 x 4 patches, of which 2 x 2 become one row
MARKS = ("<fake_token_around_image>", "<global-img>", "<end_of_utterance>")


def make_processor() -> transformers.ProcessorMixin:
    """Idefics 3's, which SmolVLM has too, with a tokenizer that knows the words of the questions."""
    try:
        from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil as ImageProcessor
    except ImportError:  # transformers 4
        from transformers import Idefics3ImageProcessor as ImageProcessor
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: number for number, word in enumerate([*VOCABULARY, "<eos>", *MARKS])}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="?", eos_token="<eos>", additional_special_tokens=["<image>", *MARKS]
    )
    pictures = ImageProcessor(size={"longest_edge": SIDE}, max_image_size={"longest_edge": SIDE}, do_image_splitting=False)
    return transformers.Idefics3Processor(pictures, tokenizer, image_seq_len=ROWS)


def make_model(processor, *, seed: int = 0) -> transformers.PreTrainedModel:
    """A random vision-language model of SmolVLM's shape with 108 000 parameters."""
    torch.manual_seed(seed)
    tokenizer = processor.tokenizer
    ids = dict(pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id)
    text = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=len(tokenizer), **ids
    )
    vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE, patch_size=4)
    image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    config = transformers.Idefics3Config(text_config=text, vision_config=vision, image_token_id=image_token_id, scale_factor=2, pad_token_id=ids["pad_token_id"])
    return transformers.Idefics3ForConditionalGeneration(config)


def make_samples(processor, count: int, *, seed: int = 0, text_only: float = 0.2, held_out: bool = False) -> list[dict]:
    """What the processor makes of each question and its picture, with labels on the answer alone; some are text alone."""
    rng = np.random.default_rng([seed, held_out, 1])
    samples = []
    for drawn in draw(count, seed, held_out=held_out):
        if rng.random() < text_only:
            text, pictures = " ".join(about_numbers(rng)), None
        else:
            text, pictures = "<image> " + " ".join(VOCABULARY[word] for word in drawn.text), [_picture(drawn.image)]
        sample = dict(processor(text=text, images=pictures, return_tensors="pt"))
        labels = sample["input_ids"].clone()
        answer = int((labels[0] == processor.tokenizer.convert_tokens_to_ids(ANSWER)).nonzero())
        labels[:, : answer + 1] = -100
        samples.append({**sample, "labels": labels})
    return samples


def make_dummy(processor) -> dict:
    """A picture for batches without one. It is not black: Idefics 3 takes pictures of zeros for padding and leaves them out."""
    return dict(processor(text="<image>", images=[Image.new("RGB", (SIDE, SIDE), "white")], return_tensors="pt"))


def _picture(patches: torch.Tensor) -> Image.Image:
    pixels = patches.view(2, 2, 4, 4).transpose(1, 2).reshape(8, 8).numpy()
    return Image.fromarray((pixels * 255).astype(np.uint8)).convert("RGB").resize((SIDE, SIDE))
