"""A tiny LLaVA, a batch for it, and what a training step makes of both."""

import torch
import transformers
from torch import nn

IMAGE = 60
TEXT = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=64, max_position_embeddings=128,
    initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


def llava() -> nn.Module:
    """Four rows an image of 16 x 16 pixels."""
    torch.manual_seed(0)
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8, initializer_range=0.2
    )
    config = transformers.LlavaConfig(vision_config=vision, text_config=transformers.LlamaConfig(**TEXT), image_token_index=IMAGE, vision_feature_layer=-2)
    return transformers.LlavaForConditionalGeneration(config)


def batch(rows=4, images=2) -> dict:
    """Two rows, of which the second has padding; `rows` placeholders an image."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.full((2, 4 + 4 * images), 7)
    ids[0, 1 : 1 + rows] = IMAGE
    ids[1, 1 : 1 + 4 * (images - 1)] = IMAGE
    kept = torch.ones_like(ids)
    kept[1, -3:], ids[1, -3:] = 0, 0
    pixels = torch.randn(images, 3, 16, 16, generator=generator)
    labels = ids.masked_fill((ids == IMAGE) | (kept == 0), -100)
    return dict(input_ids=ids, attention_mask=kept, pixel_values=pixels, labels=labels)


def step(model, **inputs):
    """Loss, logits and gradients of a training step."""
    model.zero_grad()
    torch.manual_seed(0)
    out = model(**(inputs or batch()))
    out.loss.backward()
    return [out.loss.detach(), out.logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def same(one, other) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def scatters(call) -> int:
    """How often masked_scatter runs in it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return sum(event.name == "aten::masked_scatter" for event in profile.events())
