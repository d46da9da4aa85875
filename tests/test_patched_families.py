"""Models of many families, patched and as they are: equal to the bit, without masked_scatter, and with fewer host reads."""

import functools
import importlib
import pkgutil
import types
from collections import Counter

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="4.57")

from families.batches import SITUATIONS, NotPossible, batch  # noqa: E402
from families.registry import FAMILIES  # noqa: E402
from transformers_release import RELEASE  # noqa: E402
from vlm_fuse.integrations.rewriting import innermost  # noqa: E402
from vlm_fuse.integrations.transformers import patch, patched, unpatch  # noqa: E402
from vlm_fuse.integrations.transformers.call_sites import codes  # noqa: E402
from vlm_fuse.integrations.transformers.calls import rewritten_code  # noqa: E402

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.no_poison, pytest.mark.filterwarnings("ignore:vlm_fuse left as it is")]

INSTALLED = [name for name, family in FAMILIES.items() if family.installed]
#: each of another kind; the others with --full
ALWAYS = {
    "llava", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "gemma3", "idefics3", "kosmos2", "llava_onevision", "glm4v", "paligemma", "mistral3", "blip_2", "lfm2_vl", "audioflamingo3",
    "smolvlm", "llama4", "kosmos2_5",
}  # fmt: skip
every_family = pytest.mark.parametrize("name", [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.full) for name in INSTALLED])
MISMATCHES = ("more_placeholders", "more_features")
COUNTED = ("masked_scatter", "masked_scatter_backward", "nonzero", "_local_scalar_dense")


@functools.cache
def model_of(name: str):
    """The model; or why another release does not run what is written for 5.23."""
    try:
        model = FAMILIES[name].build()
        with torch.no_grad():
            model(**batch(model, FAMILIES[name], "several_images"))
        return model
    except Exception as error:
        if RELEASE == (5, 23):
            raise
        return error


def ready(name: str):
    model = model_of(name)
    if isinstance(model, Exception):
        pytest.skip(f"does not run as it does in 5.23: {model}")
    return model


def run(model, inputs: dict):
    """(everything that a step gives, counts of what it did)."""
    model.zero_grad(set_to_none=True)
    if "inputs_embeds" in inputs:
        inputs["inputs_embeds"].grad = None
    torch.manual_seed(0)
    with torch.autograd.profiler.profile() as profile:
        out = model(**inputs)
        loss = out.loss if getattr(out, "loss", None) is not None else out.logits.float().square().mean()
        loss.backward()
    names = Counter(event.name() for event in profile.kineto_results.events())  # profile.events() takes seconds
    given = {"loss": loss, "logits": out.logits}
    given |= {f"gradient of {name}": parameter.grad for name, parameter in model.named_parameters()}
    if "inputs_embeds" in inputs:
        given["gradient of inputs_embeds"] = inputs["inputs_embeds"].grad
    return {name: None if value is None else value.detach().clone() for name, value in given.items()}, {name: names[f"aten::{name}"] for name in COUNTED}


def steady(model, inputs: dict):
    """`run`, without what is another number each time: oneDNN's bfloat16 convolutions read memory that nobody has written."""
    (first, before), (second, _) = run(model, inputs), run(model, inputs)
    found = {name: value for name, value in first.items() if value is None or same(value, second[name])}
    assert len(found) > 0.9 * len(first) and {"loss", "logits"} <= set(found)
    return found, before


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))  # NaN where NaN was


def assert_equal(made: dict, expected: dict) -> None:
    assert made.keys() >= expected.keys()
    for name, value in expected.items():
        if value is None:
            assert made[name] is None, name
        else:
            assert same(made[name], value), name


def compare(name: str, situation: str) -> dict:
    """What patching changes in a step of the family: counts before and after, of equal results.

    Raises:
        NotPossible: no such batch, or the model itself does not take it.
    """
    model = ready(name)
    inputs = batch(model, FAMILIES[name], situation)
    try:
        expected, before = steady(model, inputs)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, NotImplementedError) as error:
        raise NotPossible(str(error)) from error
    with patched(model):
        made, after = run(model, inputs)
    assert_equal(made, expected)
    again, undone = run(model, inputs)
    assert_equal(again, expected)
    assert undone == before, "it is as it was"
    return {"before": before, "after": after}


def compare_all(name: str) -> dict[str, dict]:
    """`compare` of every situation that the family can be in."""
    done = {}
    for situation in SITUATIONS:
        if situation not in MISMATCHES:
            try:
                done[situation] = compare(name, situation)
            except NotPossible:
                continue
    return done


@every_family
def test_equal_to_the_bit(name):
    done = compare_all(name)
    # what no family may lack
    assert {"several_images", "left_padded", "one_image"} <= set(done)
    for situation, counts in done.items():
        before, after = counts["before"], counts["after"]
        assert after["masked_scatter"] == after["masked_scatter_backward"] == 0, situation
        assert all(after[counted] <= before[counted] for counted in COUNTED), (situation, before, after)
        if RELEASE >= (5, 23) and "masked_scatter" in FAMILIES[name].merge and situation in ("several_images", "left_padded", "one_image", "video"):
            assert before["masked_scatter"] > 0, situation
        if "DeepStack" in FAMILIES[name].merge or FAMILIES[name].one_each:
            assert after["nonzero"] < before["nonzero"] or situation in ("no_image", "video"), (situation, before, after)


@every_family
def test_images_matter(name):
    """What is compared depends on every image: else nothing would be seen of a wrong merge."""
    model, family = ready(name), FAMILIES[name]
    inputs = batch(model, family, "several_images")
    pixels = next(key for key in inputs if key.startswith(("pixel_values", "flattened_patches", "input_features", "mm_encoder_outputs")))
    model.eval()
    with torch.no_grad():
        before = model(**inputs).logits
        for values in inputs[pixels]["image"].pooler_output if pixels == "mm_encoder_outputs" else [inputs[pixels]]:
            values += torch.randn(values.shape, generator=torch.Generator().manual_seed(5))
        after = model(**inputs).logits
    model.train()
    assert not torch.allclose(before[0], after[0]) and not torch.allclose(before[1], after[1])


@every_family
def test_a_mismatch_is_refused(name):
    model, family = ready(name), FAMILIES[name]
    for situation in MISMATCHES:
        try:
            inputs = batch(model, family, situation)
            model(**inputs)
        except NotPossible:
            continue
        except Exception as error:
            with patched(model), pytest.raises(Exception) as refused:
                model(**inputs)
            if isinstance(error, ValueError):
                assert isinstance(refused.value, ValueError)
            if "do not match" in str(error) or family.merge.startswith("embeds"):
                token = 150 if family.one_each else None
                placeholders = int((inputs["input_ids"] == (token or _placeholder(model, family))).sum())
                numbers = {word.strip(",.()") for word in str(refused.value).split()}
                assert {str(placeholders), str(placeholders + (1 if situation == "more_features" else -1))} <= numbers, str(refused.value)
        else:
            with patched(model):  # taken before, taken now
                assert torch.isfinite(model(**inputs).logits).any()


def _placeholder(model, family) -> int:
    from families.batches import placeholder

    return placeholder(model, "image" if family.images else "audio")


@every_family
def test_other_ways_to_run(name):
    """bfloat16, evaluation and gradient checkpointing."""
    model, family = ready(name), FAMILIES[name]
    inputs = batch(model, family, "several_images")
    model.eval()
    with torch.no_grad():
        expected = model(**inputs).logits
        with patched(model):
            assert torch.equal(model(**inputs).logits, expected)
    model.train()
    if model.supports_gradient_checkpointing:
        model.gradient_checkpointing_enable()
        try:
            expected, before = steady(model, inputs)
        except (RuntimeError, TypeError, ValueError):
            expected = None
        if expected is not None:
            with patched(model):
                made, after = run(model, inputs)
            assert_equal(made, expected)
            assert after["masked_scatter"] == 0
        model.gradient_checkpointing_disable()
    inputs = {key: value.bfloat16() if isinstance(value, torch.Tensor) and value.is_floating_point() else value for key, value in inputs.items()}
    state = {key: value.clone() for key, value in model.state_dict().items()}
    model.bfloat16()
    try:
        expected, _ = steady(model, inputs)
    except RuntimeError:
        expected = None
    if expected is not None:
        with patched(model):
            made, after = run(model, inputs)
        assert_equal(made, expected)
        assert after["masked_scatter"] == 0
    model.float().load_state_dict(state)


@every_family
def test_generate(name):
    model, family = ready(name), FAMILIES[name]
    if not model.can_generate():
        pytest.skip("it generates nothing")
    model.eval()
    try:
        inputs = batch(model, family, "left_padded")
        inputs = {key: value for key, value in inputs.items() if key not in ("labels", "mm_encoder_outputs")}
        torch.manual_seed(0)
        expected = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        model.train()
        pytest.skip(f"unpatched it does not: {type(error).__name__}: {error}")
    patch(model)
    try:
        torch.manual_seed(0)
        assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), expected)
    finally:
        unpatch(model)
        model.train()


@pytest.mark.full
@pytest.mark.skipif(RELEASE < (5, 23), reason="the scan was written for 5.23")
def test_no_function_that_names_masked_scatter_is_left():
    """Of all models, also those that none is made of here."""
    found, left = 0, []
    for package in pkgutil.iter_modules(transformers.models.__path__):
        try:
            module = importlib.import_module(f"transformers.models.{package.name}.modeling_{package.name}")
        except (ImportError, RuntimeError):  # without a model, or of a package that is not here
            continue
        for kind in vars(module).values():
            if not (isinstance(kind, type) and kind.__module__ == module.__name__):
                continue
            for function in vars(kind).values():
                if isinstance(function, types.FunctionType) and names_masked_scatter(function):
                    found += 1
                    made = rewritten_code(function)  # or raises the reason
                    if made is None or names_masked_scatter(made):
                        left.append(function.__qualname__)
    assert found >= 100 and not left


def names_masked_scatter(function) -> bool:
    return any("masked_scatter" in code.co_names for code in codes(innermost(function).__code__))


def test_there_are_many():
    if RELEASE >= (5, 23):
        assert len(INSTALLED) >= 45
