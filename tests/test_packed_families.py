"""Packed rows in patched models: every document is what it is alone, whatever mask and cache stand beside it."""

import functools

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="4.57")

from transformers.masking_utils import create_causal_mask, create_chunked_causal_mask  # noqa: E402

import vlm_fuse  # noqa: E402
from families.batches import features_of  # noqa: E402
from families.registry import FAMILIES  # noqa: E402
from packed_documents import ISOLATED, LEAKING, Documents  # noqa: E402
from transformers_release import RELEASE  # noqa: E402
from vlm_fuse.integrations.transformers import attend, packed_masks, patch, patched  # noqa: E402

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.no_poison, pytest.mark.filterwarnings("ignore:vlm_fuse left as it is")]

ALWAYS = {"llava", "qwen2_5_vl", "qwen3_vl", "mistral3", "glm4v", "gemma4", "llama4", *LEAKING}
every_family = pytest.mark.parametrize(
    "name", [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.full) for name in (*ISOLATED, *LEAKING) if FAMILIES[name].installed]
)
implementations = pytest.mark.parametrize("implementation", ["sdpa", "eager"])
CLOSE = 1e-5


@functools.cache
def documents(name: str) -> Documents:
    model = FAMILIES[name].build()
    return Documents(model.train(name in ("paligemma", "molmo2")), FAMILIES[name])


def ready(name: str, implementation: str) -> Documents:
    try:
        made = documents(name)
        made.model.set_attn_implementation(implementation)
        with torch.no_grad():
            made.model(**made.alone[0])
    except Exception as error:
        if RELEASE == (5, 23):
            raise
        pytest.skip(f"does not run as it does in 5.23: {error}")
    return made


def logits(made: Documents, inputs: dict, **more) -> torch.Tensor:
    torch.manual_seed(0)
    return made.model(**(inputs | more)).logits[0]


def forms(made: Documents) -> dict[str, dict]:
    """How a packed row may be handed in."""
    ones, positions = torch.ones_like(made.packed["input_ids"]), made.packed["position_ids"]
    found = {"no mask": {}, "a cache": {"use_cache": True}, "a mask of ones": {"attention_mask": ones}, "ones and a cache": {"attention_mask": ones, "use_cache": True}}
    if positions.dim() == 3:
        found |= {"three rows": {"position_ids": positions[-3:]}, "three rows and ones": {"position_ids": positions[-3:], "attention_mask": ones}}
    return found


@every_family
@implementations
def test_every_document_is_as_alone(name, implementation):
    made = ready(name, implementation)
    with torch.no_grad():
        expected = torch.cat([logits(made, alone) for alone in made.alone])
        with patched(made.model):
            for alone, own in zip(made.alone, expected.split(made.lengths)):
                assert torch.equal(logits(made, alone), own), "one document is what it was"
                if alone["position_ids"].dim() == 2:
                    assert torch.equal(logits(made, alone, attention_mask=torch.ones_like(alone["input_ids"])), own), "and is not refused"
            for form, more in forms(made).items():
                torch.testing.assert_close(logits(made, made.packed, **more), expected, atol=CLOSE, rtol=0, msg=lambda text, form=form: f"{form}: {text}")


@every_family
@implementations
def test_another_first_document_changes_no_other(name, implementation):
    made = ready(name, implementation)
    first = made.lengths[0]
    with torch.no_grad(), patched(made.model):
        for form, more in forms(made).items():
            before, after = logits(made, made.packed, **more), logits(made, made.with_another_first(), **more)
            assert not torch.allclose(before[:first], after[:first])
            torch.testing.assert_close(after[first:], before[first:], atol=1e-6, rtol=1e-6, msg=lambda text, form=form: f"{form}: {text}")


@every_family
def test_gradients_are_the_sum_of_those_alone(name):
    made = ready(name, "sdpa")
    targets = [torch.randint(0, 100, (length,), generator=torch.Generator().manual_seed(length)) for length in made.lengths]

    def gradients(parts) -> dict[str, torch.Tensor]:
        made.model.zero_grad()
        for inputs, target in parts:
            torch.nn.functional.cross_entropy(logits(made, inputs), target, reduction="sum").backward()
        return {key: value.grad.clone() for key, value in made.model.named_parameters() if value.grad is not None}

    expected = gradients(zip(made.alone, targets))
    with patched(made.model):
        found = gradients([(made.packed | {"attention_mask": torch.ones_like(made.packed["input_ids"])}, torch.cat(targets))])
    whole = torch.stack([value.norm() for value in expected.values()]).norm()
    assert whole > 0 and found.keys() == expected.keys()
    for key, value in expected.items():
        assert (found[key] - value).norm() <= CLOSE * whole, key


@every_family
@pytest.mark.parametrize("where", ["behind", "before", "between"])
def test_padding_changes_nothing(name, where):
    """Two rows under attention_mask 0, whose positions are 0 there."""
    made = ready(name, "sdpa")
    rows, kept = in_two_rows(made, where)
    with torch.no_grad():
        expected = torch.cat([logits(made, alone) for alone in made.alone])
        with patched(made.model):
            for mask in (kept.long(), kept):
                torch.manual_seed(0)
                found = made.model(**(rows | {"attention_mask": mask})).logits
                torch.testing.assert_close(found[kept], expected, atol=CLOSE, rtol=0)


def in_two_rows(made: Documents, where: str) -> tuple[dict, torch.Tensor]:
    """The packed row's documents in two rows, the first two and the others, and which of their tokens are no padding."""
    packed, first = made.packed, sum(made.lengths[:2])
    sizes = [first, sum(made.lengths) - first]
    length = max(sizes) + 3
    source = torch.full((2, length), -1)
    for row, (begin, size, document) in enumerate(zip((0, first), sizes, (made.lengths[0], made.lengths[2]))):
        tokens = begin + torch.arange(size)
        if where == "between":  # the first document of the row, two of padding, the others
            source[row, :document], source[row, document + 2 : size + 2] = tokens[:document], tokens[document:]
        else:
            source[row, :size] = tokens
            source[row] = source[row].roll(length - size if where == "before" else 0)
    kept, padding = source >= 0, {"token_type_ids": int(made.model.config.model_type == "paligemma")}
    keys = [key for key in ("input_ids", "mm_token_type_ids", "token_type_ids", "position_ids") if key in packed]
    return packed | {key: torch.where(kept, packed[key][..., 0, source.clamp(min=0)], padding.get(key, 0)) for key in keys}, kept


@pytest.mark.parametrize(
    "name", [name for name in ("llava", "mistral3", "gemma3", "gemma4_vision", "qwen2_5_vl", "qwen3_5", "lfm2_vl") if FAMILIES[name].installed]
)
@pytest.mark.parametrize("implementation", ["sdpa", "eager", pytest.param("flex_attention", marks=pytest.mark.full)])
def test_merged_rows_with_model_kwargs(name, implementation):
    """The merge outside the model, and everything that belongs to it in one call."""
    made = ready(name, "sdpa")
    model, packed = made.model, made.packed
    inputs = {key: value for key, value in packed.items() if key not in ("input_ids", "position_ids", "use_cache", "mm_token_type_ids", "token_type_ids")}
    features = inputs["mm_encoder_outputs"]["image"].pooler_output if "mm_encoder_outputs" in inputs else features_of(model, "image", inputs)
    own = torch.repeat_interleave(torch.arange(len(made.lengths)), torch.tensor(made.lengths))[None]
    with torch.no_grad():
        expected = torch.cat([logits(made, alone) for alone in made.alone])
        try:
            model.set_attn_implementation(implementation)
        except ValueError:
            pytest.skip("the family does not support it")
        for module in model.modules():  # the tower needs no mask
            if "ision" in type(getattr(module, "config", None)).__name__:
                module.config._attn_implementation = "sdpa"
        rows = torch.cat([part.reshape(-1, part.shape[-1]) for part in features])
        ids = packed["input_ids"]
        merged = vlm_fuse.merge(ids, model.get_input_embeddings()(ids), rows, image_token_id=made.token, document_ids=own, attend=attend(model))
        given = merged.model_kwargs(implementation)
        if packed["position_ids"].dim() == 3:
            given["position_ids"] = packed["position_ids"]
        if name.startswith("gemma"):
            given.pop("mm_token_type_ids", None)  # the mask says it
        with patched(model):
            found = model(inputs_embeds=merged.inputs_embeds, use_cache=False, **given).logits[0]
    torch.testing.assert_close(found, expected, atol=CLOSE, rtol=0)


@pytest.mark.skipif(RELEASE != (5, 23), reason="the table is that of 5.23")
@pytest.mark.parametrize("name", [name for name in (*ISOLATED, *LEAKING) if name in ALWAYS and FAMILIES[name].installed])
def test_what_transformers_itself_isolates(name):
    """Unpatched: a line that is repaired shows here, and the page on compatibility has to say so."""
    made = ready(name, "sdpa")
    with torch.no_grad():
        expected = torch.cat([logits(made, alone) for alone in made.alone])
        off = (logits(made, made.packed) - expected).abs().max()
    assert (off < 1e-4) == (name in ISOLATED), f"{name}: off by {off:.1g}"


@pytest.mark.parametrize("name", ["gemma3", *(pytest.param(name, marks=pytest.mark.full) for name in ("llava", "llama4", "qwen2_5_vl", "paligemma"))])
def test_under_compile(name):
    made = ready(name, "sdpa")
    ones = torch.ones_like(made.packed["input_ids"])
    with torch.no_grad():
        expected = torch.cat([logits(made, alone) for alone in made.alone])
        with patched(made.model):
            torch._dynamo.reset()
            compiled = torch.compile(made.model, backend="eager")
            for more in ({}, {"attention_mask": ones}, {"use_cache": True}):
                torch.manual_seed(0)
                torch.testing.assert_close(compiled(**(made.packed | more)).logits[0], expected, atol=CLOSE, rtol=0)
            rows, kept = in_two_rows(made, "before")
            torch.manual_seed(0)
            torch.testing.assert_close(compiled(**(rows | {"attention_mask": kept.long()})).logits[kept], expected, atol=CLOSE, rtol=0)


def test_layers_that_carry_over_are_refused_under_compile():
    made = ready("lfm2_vl", "sdpa")
    with torch.no_grad(), patched(made.model):
        torch._dynamo.reset()
        compiled = torch.compile(made.model, backend="eager")
        compiled(**made.alone[0])
        with pytest.raises(RuntimeError, match="packed rows in layers of linear attention or convolution"):
            compiled(**made.packed)


def of_two_documents(name: str) -> dict:
    """What a family's mask factory is called with for a row of two documents of two tokens each."""
    config = ready(name, "sdpa").model.config.get_text_config()
    given = dict(config=config, attention_mask=None, past_key_values=None, position_ids=torch.tensor([[0, 1, 0, 1]]))
    if RELEASE < (5, 0):
        return given | {"input_embeds": torch.zeros(1, 4, 8), "cache_position": torch.arange(4)}
    return given | {"inputs_embeds": torch.zeros(1, 4, 8)}


@pytest.fixture
def flash():
    """The same where flash attention is asked for: its masks need no GPU."""
    given = of_two_documents("gemma3")
    config = given["config"]
    config._attn_implementation, before = "flash_attention_2", config._attn_implementation
    yield given
    config._attn_implementation = before


def test_flash_attention_refuses_what_it_would_drop(flash):
    assert packed_masks.call(create_causal_mask, **flash) is None
    with pytest.raises(NotImplementedError, match="flash attention takes no such mask"):
        packed_masks.call(create_causal_mask, **flash, block_sequence_ids=torch.zeros(1, 4, dtype=torch.int64))
    with pytest.raises(NotImplementedError, match="packed rows with padding"):
        packed_masks.call(create_causal_mask, **(flash | {"attention_mask": torch.tensor([[1, 1, 1, 0]]), "position_ids": torch.tensor([[0, 1, 0, 0]])}))


def test_flash_attention_refuses_packed_rows_beside_a_mask_under_compile(flash):
    torch._dynamo.reset()
    compiled = torch.compile(lambda **given: packed_masks.call(create_causal_mask, **(flash | given)), backend="eager")
    compiled(position_ids=torch.tensor([[0, 0, 1, 2]]), attention_mask=torch.tensor([[0, 1, 1, 1]]))
    compiled(position_ids=flash["position_ids"])
    with pytest.raises(RuntimeError, match="packed rows beside an attention_mask are not supported with flash attention"):
        compiled(position_ids=flash["position_ids"], attention_mask=torch.ones(1, 4, dtype=torch.int64))


def test_masks_of_a_models_own_code():
    """Those of transformers 4's PaliGemma, by what of_its_own is given: what it does to them is the same in every release."""
    ones, packed, single = torch.ones(1, 4, dtype=torch.int64), torch.tensor([[1, 2, 1, 2]]), torch.tensor([[1, 2, 3, 4]])
    seen = torch.zeros(1, 1, 4, 6)  # a cache of six places
    for positions, given, documents in ((packed, ones, [[0, 0, 1, 1]]), (packed, None, [[0, 0, 1, 1]]), (single, ones, [[0] * 4]), (None, ones, [[0] * 4])):
        own = torch.tensor(documents)
        found = packed_masks.of_its_own(seen, positions, given)
        assert torch.equal(found[..., :4] == 0, own[:, None, :, None] == own[:, None, None, :])
        assert (found[..., 4:] == 0).all() and (found.min() in (0, torch.finfo(torch.float32).min))
    assert packed_masks.of_its_own(None, packed, None) is None, "flash attention, which looks for documents itself"
    assert packed_masks.of_its_own(ones, packed, ones) is None, "it would be taken for padding alone"
    holes, cut = torch.tensor([[1, 1, 1, 0]]), torch.tensor([[1, 2, 1, 1]])
    assert packed_masks.of_its_own(holes, single, holes) is holes
    with pytest.raises(NotImplementedError, match="packed rows with padding"):
        packed_masks.of_its_own(holes, cut, holes)
    torch._dynamo.reset()
    compiled = torch.compile(packed_masks.of_its_own, backend="eager", fullgraph=True)
    assert compiled(holes, single, holes) is holes
    with pytest.raises(RuntimeError, match="packed rows beside an attention_mask are not supported with flash attention"):
        compiled(holes, cut, holes)


def test_chunks_beside_a_mask_function_of_the_models_own_are_refused():
    with pytest.raises(NotImplementedError, match="create_chunked_causal_mask: packed rows with an or_mask_function"):
        packed_masks.call(create_chunked_causal_mask, **of_two_documents("llama4"), or_mask_function=lambda batch, head, q, kv: q == kv)


def test_checkpointed_layers_run_by_document_again():
    made = ready("lfm2_vl", "sdpa")
    model = made.model.train()
    with patched(model):
        expected = _gradient(made)
        model.gradient_checkpointing_enable()
        found = _gradient(made)
        model.gradient_checkpointing_disable()
    torch.testing.assert_close(found, expected)


def _gradient(made: Documents) -> torch.Tensor:
    made.model.zero_grad()
    logits(made, made.packed).square().mean().backward()
    return torch.cat([value.grad.flatten() for value in made.model.parameters() if value.grad is not None])


def test_layers_that_cannot_be_reached_are_listed():
    model = FAMILIES["lfm2_vl"].build()
    layer = model.model.language_model.layers[0]
    layer.forward = lambda *args, **kwargs: None
    with pytest.warns(UserWarning, match=r"Lfm2DecoderLayer.forward: .*lambda.* was put on the instance in its place"):
        patch(model)
