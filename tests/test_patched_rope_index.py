"""get_rope_index of patched models: their own positions to the bit wherever those are right, with fewer host reads."""

import importlib
import random
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", minversion="5.0")

from test_mrope_position_ids import IMAGE, TEXT, VIDEO, Told, parts_of  # noqa: E402
from vlm_fuse.integrations import binding  # noqa: E402
from vlm_fuse.integrations.transformers import rope_index  # noqa: E402

FAMILIES = {
    "qwen2_vl": ("Qwen2VLModel", False), "qwen2_5_vl": ("Qwen2_5_VLModel", False), "qwen3_vl": ("Qwen3VLModel", True), "qwen3_vl_moe": ("Qwen3VLMoeModel", True),
    "qwen3_5": ("Qwen3_5Model", True), "qwen3_5_moe": ("Qwen3_5MoeModel", True), "glm4v": ("Glm4vModel", True), "glm4v_moe": ("Glm4vMoeModel", True),
    "glm46v": ("Glm46VModel", True), "glm_ocr": ("GlmOcrModel", True), "paddleocr_vl": ("PaddleOCRVLModel", False), "ernie4_5_vl_moe": ("Ernie4_5_VLMoeModel", False),
    "cohere_compass": ("CohereCompassModel", True), "cosmos3_omni": ("Cosmos3OmniModel", True), "cosmos3_edge": ("Cosmos3EdgeModel", True),
}  # fmt: skip
every_family = pytest.mark.parametrize("family", FAMILIES)


def hollow(family: str, name: str | None = None) -> nn.Module:
    """The model's class with a config alone."""
    try:
        module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    except ModuleNotFoundError:
        pytest.skip(f"this transformers has no {family}")
    kind = getattr(module, name or FAMILIES[family][0])
    model = kind.__new__(kind)
    nn.Module.__init__(model)
    model.config = SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2, tokens_per_second=2, temporal_merge_size=2))
    return model


def replaced(family: str):
    """(the model's own method, ours), or skipped where only batches of images are ours."""
    model = hollow(family)
    ((module, name, instead),) = rope_index.bindings(model)
    assert module is model and callable(instead)
    binding.bind(model, [(name, instead)])
    own = binding.method(model, name)
    return (lambda **given: own(model, **given)), model.get_rope_index


def given_to(told: Told, frames: list, split: bool, mask: bool) -> dict:
    videos = torch.tensor([(t, 2 * h, 2 * w) for t, h, w in frames], dtype=torch.int64).view(-1, 3) if split else told.grids[VIDEO]
    grids = {"image_grid_thw": told.grids[IMAGE], "video_grid_thw": videos}
    made = {name: grid if len(grid) else None for name, grid in grids.items()}
    return made | dict(input_ids=told.types + 7, mm_token_type_ids=told.types, attention_mask=told.mask if mask else None)


def random_batch(rng: random.Random, split: bool, adjacent: bool = False):
    rows, frames = [], []
    for _ in range(rng.randint(1, 3)):
        parts, new = parts_of(rng, adjacent=adjacent, videos="frames" if split else "whole", most=5)
        rows.append([(0, [*parts, (TEXT, rng.randint(1, 3))])])
        frames += new
    length = max(sum(size(part) for part in row[0][1]) for row in rows)
    left = rng.random() < 0.5
    for row in rows:
        pad = (0, [(None, length - sum(size(part) for part in row[0][1]))])
        if pad[1][0][1]:
            row[:] = [pad, *row] if left else [*row, pad]
    return Told(rows, split=split), frames


def size(part) -> int:
    return part[1] if part[0] in (TEXT, None) else part[1] * part[2] * part[3]


@every_family
def test_equal_to_the_models_own(family):
    split = FAMILIES[family][1]
    own, ours = replaced(family)
    rng, kinds = random.Random(3), set()
    for _ in range(120):
        told, frames = random_batch(rng, split)
        masked = bool((told.mask == 0).any()) or rng.random() < 0.5
        given = given_to(told, frames, split, masked)
        if family == "ernie4_5_vl_moe" and given["video_grid_thw"] is not None:
            continue  # frames are merged there, two by two
        if family == "qwen2_5_vl" and given["video_grid_thw"] is not None:
            given["second_per_grid_ts"] = torch.tensor([rng.choice((0.5, 1.0, 1.3)) for _ in given["video_grid_thw"]])
        try:
            expected = own(**given)
        except Exception as error:  # what it does not get along with, ours need not
            kinds.add(type(error).__name__)
            continue
        for one, other in zip(ours(**given), expected):
            assert one.dtype == other.dtype and torch.equal(one, other)
        kinds.update(name for name in ("image_grid_thw", "video_grid_thw") if given[name] is not None)
    assert {"image_grid_thw"} <= kinds and kinds <= {"image_grid_thw", "video_grid_thw"}


def test_another_dtype_of_ids_is_that_of_the_positions():
    own, ours = replaced("qwen2_vl")
    told, frames = random_batch(random.Random(1), False)
    given = given_to(told, frames, False, False) | {"input_ids": told.types.int()}  # under a mask its own fails
    assert ours(**given)[0].dtype == own(**given)[0].dtype == torch.int32


def test_arguments_by_position_and_unknown_ones():
    own, ours = replaced("qwen3_vl")
    told, frames = random_batch(random.Random(5), True)
    given = given_to(told, frames, True, True)
    for one, other in zip(ours(given["input_ids"], given["mm_token_type_ids"], given["image_grid_thw"], given["video_grid_thw"], given["attention_mask"]), own(**given)):
        assert torch.equal(one, other)
    for one, other in zip(ours(**given, something="else"), own(**given)):
        assert torch.equal(one, other)


def test_grids_that_are_not_used_are_taken_as_before():
    own, ours = replaced("qwen2_vl")
    types = torch.tensor([[0, 1, 1, 0]])
    given = dict(input_ids=types, mm_token_type_ids=types, image_grid_thw=torch.tensor([[1, 2, 4], [1, 4, 4]]))
    for one, other in zip(ours(**given), own(**given)):
        assert torch.equal(one, other)


def test_adjacent_images_are_kept_apart_by_their_grids():
    own, ours = replaced("qwen2_vl")
    types = torch.tensor([[0, 1, 1, 1, 1, 0]])
    given = dict(input_ids=types, mm_token_type_ids=types, image_grid_thw=torch.tensor([[1, 2, 4], [1, 4, 2]]))
    assert ours(**given)[0][:, 0].tolist() == [[0, 1, 1, 3, 3, 5], [0, 1, 1, 3, 4, 5], [0, 1, 2, 3, 3, 5]]
    with pytest.raises(RuntimeError):  # it reads them as one image of the first grid
        own(**given)


def test_a_grid_that_does_not_fit_is_named():
    _, ours = replaced("qwen2_vl")
    types = torch.tensor([[0, 1, 1, 0]])
    with pytest.raises(ValueError, match="sample 0"):
        ours(input_ids=types, mm_token_type_ids=types, image_grid_thw=torch.tensor([[1, 4, 4]]))


def test_positions_of_another_kind_are_left():
    model = hollow("qwen2_5_omni", "Qwen2_5OmniThinkerForConditionalGeneration")
    ((_, _, reason),) = rope_index.bindings(model)
    assert reason == "its positions are of another kind than vlm_fuse.mrope_position_ids makes"


def test_no_read_for_each_image_and_no_graph_break():
    own, ours = replaced("qwen2_vl")
    types = torch.tensor([[0, 1, 1, 0, 1, 1, 0] * 3])
    given = dict(input_ids=types, mm_token_type_ids=types, image_grid_thw=torch.tensor([[1, 2, 4]] * 6), attention_mask=torch.ones_like(types))

    def reads(call):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            call(**given)
        return sum(event.name in ("aten::_local_scalar_dense", "aten::nonzero") for event in profile.events())

    assert reads(ours) == 0 < reads(own)
    torch._dynamo.reset()
    compiled = torch.compile(lambda **given: ours(**given), backend="eager", fullgraph=True)
    for one, other in zip(compiled(**given), own(**given)):
        assert torch.equal(one, other)
