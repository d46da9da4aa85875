"""nanoVLM patched: samples of a row do not see each other, each is what it is alone, and everything else goes on as it did."""

import copy
import os
import pickle
import sys
import types
from contextlib import contextmanager

import pytest
import torch

from nanovlm_standin import IMAGE, PAD, ROWS, SIDE, VisionLanguageModel, packed, sample
from vlm_fuse.integrations import binding, nanovlm

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.no_poison]

SAMPLES = [sample(5, 1, 0), sample(3, 0, 1), sample(4, 2, 2), sample(6, 1, 3), sample(1, 0, 4)]
LENGTH = 40


@pytest.fixture
def model():
    torch.manual_seed(0)
    return VisionLanguageModel()


def batch() -> dict:
    """Samples 0, 1 and 2 in the first row, 3 and 4 in the second."""
    return packed([SAMPLES[:3], SAMPLES[3:]], LENGTH)


def run(model, given: dict):
    return model(given["input_ids"], given["images"], attention_mask=given["attention_mask"], targets=given["labels"])


def alone(model) -> list[torch.Tensor]:
    """Logits of each sample alone, unpatched and without a mask."""
    return [model(one["input_ids"][None], [one["images"]], attention_mask=None, targets=one["labels"][None])[0][0] for one in SAMPLES]


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def test_samples_of_a_row_do_not_see_each_other(model):
    given = batch()
    other = given | {"input_ids": given["input_ids"].clone()}
    place = (given["input_ids"][0] == SAMPLES[0]["input_ids"][-1]).nonzero()[0, 0]
    other["input_ids"][0, place] = 33
    behind = torch.arange(LENGTH) > place + 1
    with torch.no_grad():
        moved = (run(model, given)[0][0][behind] - run(model, other)[0][0][behind]).abs().max()
        assert moved > 1e-3, "unpatched they do"
        with nanovlm.patched(model):
            before, after = run(model, given)[0], run(model, other)[0]
    assert torch.equal(before[0][behind], after[0][behind]) and torch.equal(before[1], after[1])
    assert not torch.allclose(before[0][place], after[0][place])


def test_each_sample_is_what_it_is_alone(model):
    given, expected = batch(), alone(model)
    losses = [torch.nn.functional.cross_entropy(own, one["labels"], ignore_index=-100, reduction="sum") for own, one in zip(expected, SAMPLES)]
    count = sum(int((one["labels"] != -100).sum()) for one in SAMPLES)
    (sum(losses) / count).backward()
    wanted = gradients(model)
    model.zero_grad()
    with nanovlm.patched(model):
        logits, loss = run(model, given)
        loss.backward()
    torch.testing.assert_close(logits[given["attention_mask"] != 0], torch.cat(expected), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loss, sum(losses) / count)
    found = gradients(model)
    whole = torch.stack([value.norm() for value in wanted.values()]).norm()
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (found[name] - value).norm() <= 1e-5 * whole, name


def test_numbers_in_the_mask_tell_samples_that_touch(model):
    expected = torch.cat(alone(model)[:2])
    ids, labels = (torch.cat([one[name] for one in SAMPLES[:2]])[None] for name in ("input_ids", "labels"))
    mask = torch.cat([torch.full_like(one["input_ids"], number + 1) for number, one in enumerate(SAMPLES[:2])])[None]
    with nanovlm.patched(model):
        logits, _ = model(ids, [SAMPLES[0]["images"]], attention_mask=mask, targets=labels)
    torch.testing.assert_close(logits[0], expected, atol=1e-5, rtol=1e-5)


def test_without_a_mask_all_is_equal_to_the_bit(model):
    one = SAMPLES[2]
    given = one["input_ids"][None], [one["images"]], None, one["labels"][None]
    expected, loss = model(*given)
    loss.backward()
    wanted = gradients(model)
    model.zero_grad()
    with nanovlm.patched(model):
        logits, loss = model(*given)
        loss.backward()
    assert torch.equal(logits, expected)
    found = gradients(model)
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_a_batch_of_one_sample_a_row_padded_on_the_left(model):
    given = packed([[one] for one in SAMPLES], 20)
    with torch.no_grad():
        expected = torch.cat(alone(model))
        stock = run(model, given)[1]
        with nanovlm.patched(model):
            logits, loss = run(model, given)
    torch.testing.assert_close(logits[given["attention_mask"] != 0], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loss, stock)


@pytest.mark.parametrize("rows", [ROWS - 1, ROWS + 1], ids=["more_features", "more_placeholders"])
def test_a_mismatch_names_the_sample(model, rows):
    ids = torch.tensor([[5, 6], [7, 8]]).repeat(1, 4)
    ids[1, :rows] = IMAGE
    with nanovlm.patched(model), pytest.raises(ValueError, match=f"sample 1 has {rows} placeholders|{ROWS} feature rows but {rows} placeholders"):
        model(ids, [SAMPLES[0]["images"]], attention_mask=torch.ones_like(ids))


def test_generate_with_its_cache(model):
    ids = torch.tensor([[PAD, PAD, 5, *[IMAGE] * ROWS, 7, 8], [5, *[IMAGE] * ROWS, 9, 10, 11, 12]])
    images = [SAMPLES[0]["images"], SAMPLES[3]["images"]]
    for mask in (None, (ids != PAD).long()):
        expected = model.generate(ids, images, mask, max_new_tokens=8)
        with nanovlm.patched(model):
            assert torch.equal(model.generate(ids, images, mask, max_new_tokens=8), expected)
    assert len(expected.unique()) > 1


def test_dropout_of_attention_still_drops():
    torch.manual_seed(0)
    model = VisionLanguageModel(dropout=0.5).train()
    with torch.no_grad(), nanovlm.patched(model):
        torch.manual_seed(1)
        first = run(model, batch())[0]
        torch.manual_seed(2)
        assert not torch.allclose(run(model, batch())[0], first)
        model.eval()
        torch.testing.assert_close(run(model, batch())[0], run(model, batch())[0])


def test_autocast_and_accumulated_gradients(model):
    with nanovlm.patched(model):
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                _, loss = run(model, batch())
            loss.backward()
    assert torch.isfinite(loss) and all(torch.isfinite(value.grad).all() for value in model.parameters())


def test_under_compile(model):
    given = batch()
    with torch.no_grad(), nanovlm.patched(model):
        expected = run(model, given)[0]
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager")
        torch.testing.assert_close(run(compiled, given)[0], expected)


def test_patches_are_counted_copied_and_lost_in_a_pickle(model):
    names = [set(module.__dict__) for module in model.modules()]
    nanovlm.patch(model)
    with nanovlm.patched(model):
        pass
    assert binding.is_patched(model) and binding.is_patched(model.decoder.blocks[0].attn)
    twin, loaded = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    assert binding.is_patched(twin) and not binding.is_patched(loaded)
    with torch.no_grad():
        assert torch.equal(run(twin, batch())[0], run(model, batch())[0])
        assert not torch.allclose(run(loaded, batch())[0], run(model, batch())[0])
    nanovlm.unpatch(model)
    assert [set(module.__dict__) for module in model.modules()] == names
    nanovlm.unpatch(model)
    assert not any(map(binding.is_patched, model.modules()))


def test_under_other_modules(model):
    wrapped = torch.nn.Sequential(model)
    nanovlm.patch(wrapped)
    assert binding.is_patched(model)
    nanovlm.unpatch(wrapped)
    assert not binding.is_patched(model)


def test_what_is_no_nanovlm_is_refused(model):
    with pytest.raises(TypeError, match="Linear is no nanoVLM"):
        nanovlm.patch(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="expected a torch.nn.Module, got str"):
        nanovlm.patch("lusxvr/nanoVLM-222M")

    class First(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.vision_encoder, self.MP, self.decoder = model.vision_encoder, model.MP, model.decoder

    with pytest.raises(TypeError, match=r"v0.1.*images_first"):
        nanovlm.patch(First())


# -- the real one ---------------------------------------------------------------------------------------------------------


@contextmanager
def checkout():
    """Its modules, from the folder that NANOVLM_PATH names; what it would download or transform pictures with is not needed."""
    path = os.environ.get("NANOVLM_PATH")
    if not path:
        pytest.skip("NANOVLM_PATH does not say where a checkout of huggingface/nanoVLM is")
    before, replaced = {*sys.modules}, {"data.processors": types.ModuleType("data.processors"), "data.custom_transforms": types.ModuleType("data.custom_transforms")}
    tokenizer = VisionLanguageModel().tokenizer
    replaced["data.processors"].get_tokenizer = lambda *args, **kwargs: tokenizer
    sys.path.insert(0, path)
    sys.modules.update(replaced)
    try:
        yield
    finally:
        sys.path.remove(path)
        for name in {*sys.modules} - before:
            if name.partition(".")[0] in ("data", "models"):
                del sys.modules[name]


def test_the_real_one():
    """Its model, packer, collator and the arithmetic of its training step."""
    with checkout():
        from data.advanced_datasets import ConstantLengthDataset
        from data.collators import VQACollator
        from models.config import VLMConfig
        from models.vision_language_model import VisionLanguageModel as Real

        config = VLMConfig(
            vit_hidden_dim=32, vit_inter_dim=64, vit_patch_size=SIDE // 2, vit_img_size=SIDE * 2, vit_n_heads=2, vit_n_blocks=1, lm_hidden_dim=32, lm_inter_dim=64,
            lm_base_vocab_size=34, lm_vocab_size=100, lm_n_heads=4, lm_n_kv_heads=2, lm_n_blocks=2, lm_max_length=64, mp_pixel_shuffle_factor=2,
            mp_image_token_length=ROWS, vlm_load_backbone_weights=False,
        )  # fmt: skip
        torch.manual_seed(0)
        model = Real(config, load_backbone=False)
        with torch.no_grad():
            for value in model.parameters():
                value.mul_(5 if value.dim() > 1 else 1)

        class Samples:
            tokenizer, mp_image_token_length = model.tokenizer, ROWS
            dataset = [sample(3 + index % 9, index % 3, index) for index in range(30)]

            def __len__(self):
                return len(self.dataset)

            def __getitem__(self, index):
                one = self.dataset[index]
                return {**one, "images": [torch.nn.functional.interpolate(image, scale_factor=2) for image in one["images"]]}

        rows = list(ConstantLengthDataset(Samples(), max_sample_length=60, seq_length=64, num_of_sequences=8))
        given = VQACollator(model.tokenizer, 64)(rows[:3])
        documents = nanovlm.document_ids(given["attention_mask"])
        assert documents.max() > 5
        model.eval()
        images, at = [image for row in given["images"] for image in row], 0
        with torch.no_grad():
            with nanovlm.patched(model):
                logits, loss = run(model, given)
            total = count = 0
            for number in range(int(documents.max()) + 1):
                own = documents == number
                ids, labels = given["input_ids"][own][None], given["labels"][own]
                taken = int((ids == IMAGE).sum()) // ROWS
                expected = model(ids, [images[at : at + taken]], attention_mask=None, targets=labels[None])[0][0]
                at += taken
                torch.testing.assert_close(logits[own], expected, atol=1e-5, rtol=1e-5)
                total += torch.nn.functional.cross_entropy(expected, labels, ignore_index=-100, reduction="sum")
                count += int((labels != -100).sum())
            torch.testing.assert_close(loss, total / count)
        optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-3)
        nanovlm.patch(model)
        losses = []
        for _ in range(6):
            with torch.autocast("cpu", torch.bfloat16):
                _, loss = run(model, given)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0]


