"""A dummy image in batches of text alone, taken by the models of many families: loss and gradients are those without, the tower's are zero."""

import contextlib
import functools

import pytest
import torch

from vlm_fuse.packing import PackingCollator, PaddingCollator

pytest.importorskip("transformers", minversion="5.23")
pytest.importorskip("PIL")

import processors  # noqa: E402
from vlm_fuse.integrations.transformers import patched  # noqa: E402

FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v", "llava", "llava_next", "llava_onevision", "idefics3", "internvl", "gemma3", "mistral3"]


@functools.cache
def texts_and_dummy(name: str):
    torch.manual_seed(0)
    family = processors.FAMILIES[name]()
    family.model.train()
    texts = [processors.processed(family, text, 0, 0, 0, return_tensors="pt") for text in ("w1 w2 w3 w4", "w5 w6 w7")]
    texts = [{**text, "labels": text["input_ids"].clone()} for text in texts]
    return family, texts, processors.processed(family, family.image, 1, 0, 1, return_tensors="pt")


def gradients(model) -> dict[str, torch.Tensor | None]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def of_tower(name: str) -> bool:
    return any(part in name for part in ("visual", "vision", "projector", "connector", "image_newline"))


@pytest.mark.parametrize("how", ["packed", "right", "left"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_model_takes_it_and_its_loss_and_gradients_are_those_without(name, how):
    family, texts, dummy = texts_and_dummy(name)
    settings = dict(family.settings, extras=False)
    cls, settings = (PackingCollator, settings) if how == "packed" else (PaddingCollator, {**settings, "padding_side": how})
    found = []
    for given in ({}, {"dummy_image": dummy}):
        family.model.zero_grad()
        # gemma3 alone does not look for documents
        with patched(family.model) if name == "gemma3" else contextlib.nullcontext():
            loss = family.model(**cls(**settings, **given)(texts)).loss
            loss.backward()
        found.append((loss.detach(), {key: None if grad is None else grad.clone() for key, grad in gradients(family.model).items()}))
    (loss, grads), (with_it, grads_with_it) = found
    torch.testing.assert_close(with_it, loss, atol=1e-6, rtol=1e-6)
    tower = 0
    for key, grad in grads_with_it.items():
        if grads[key] is not None:
            torch.testing.assert_close(grad, grads[key], atol=1e-6, rtol=1e-5)
        elif grad is not None:
            assert of_tower(key) and not grad.any(), key
            tower += 1
    ran = {key for key, grad in gradients_of_an_image(name).items() if grad is not None}
    assert tower > 10 and ran == {key for key, grad in grads_with_it.items() if grad is not None}


@functools.cache
def gradients_of_an_image(name: str) -> dict:
    """Of a batch with a real image: what has a gradient there has one with the dummy."""
    family, _, dummy = texts_and_dummy(name)
    family.model.zero_grad()
    family.model(**PaddingCollator(**family.settings, extras=False)([{**dummy, "labels": dummy["input_ids"]}])).logits.sum().backward()
    return {key: None if grad is None else True for key, grad in gradients(family.model).items()}
