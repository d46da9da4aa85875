"""M-RoPE positions against transformers' get_rope_index where that is right, and against a batch told in words elsewhere."""

import importlib
import random
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vlm_fuse
from checking import assert_bits, examples
from conftest import BACKENDS
from vlm_fuse import mrope_position_ids

TEXT, IMAGE, VIDEO = 0, 1, 2


@pytest.fixture(scope="session", params=[name for name in BACKENDS if name != "cuda"])
def backend(request) -> str:
    """CUDA C++ has no such kernel: a GPU is served by Triton."""
    return request.param


# -- batches, and what their positions are -----------------------------------------------------------------------------
# A batch is rows of (document id, parts); a part is (kind, t, h, w) in placeholders, text of n tokens (TEXT, n), or (None, n): padding.


def size(part) -> int:
    return part[1] if part[0] in (TEXT, None) else part[1] * part[2] * part[3]


def positions_of(parts, intervals, split):
    """[(time, height, width)] of a document; `intervals` gives the frames' times of each video in turn."""
    found, here = [], 0
    for kind, *sizes in parts:
        if kind == TEXT:
            found += [(here + i,) * 3 for i in range(sizes[0])]
            here += sizes[0]
            continue
        t, h, w = sizes
        times = next(intervals) if kind == VIDEO else range(t)
        for frames in [[i] for i in range(t)] if kind == VIDEO and split else [range(t)]:
            found += [(here + times[i] - times[frames[0]], here + j, here + k) for i in frames for j in range(h) for k in range(w)]
            here += max(h, w)
    return found


class Told:
    """The tensors of a batch, and the answer from its parts."""

    def __init__(self, rows, *, merge=2, split=False, interval=None, packed=False):
        interval = interval or (lambda video, frame: frame)
        self.merge, self.split = merge, split
        kinds = {IMAGE: [], VIDEO: []}
        videos = 0
        length = max([sum(size(part) for _, parts in row for part in parts) for row in rows], default=0)
        self.types, self.mask, self.ids = [], [], []
        answers, deltas = [], []
        for row in rows:
            types, mask, ids, answer = [], [], [], []
            delta = 0
            for document, parts in row:
                times = []
                for kind, *sizes in parts:
                    if kind in kinds:
                        kinds[kind].append((sizes[0], sizes[1] * merge, sizes[2] * merge))
                    if kind == VIDEO:
                        times.append([interval(videos, frame) for frame in range(sizes[0])])
                        videos += 1
                padding = parts and parts[0][0] is None
                count = sum(map(size, parts))
                types += [TEXT if part[0] is None else part[0] for part in parts for _ in range(size(part))]
                mask += [0 if padding else 1] * count
                ids += [-1 if padding else document] * count
                found = [(0, 0, 0)] * count if padding else positions_of(parts, iter(times), split)
                answer += [(0 if padding else i, *at) for i, at in enumerate(found)]
                if not padding and count:
                    delta = max(max(at) for at in found) + 1 - count
            tail = length - len(types)
            while mask and mask[-1] == 0 and packed:
                tail += 1
                types.pop(), mask.pop(), ids.pop(), answer.pop()
            answer += [(i if packed else 0,) * 4 for i in range(tail)]
            types, mask, ids = types + [TEXT] * tail, mask + [0] * tail, ids + [-1] * tail
            self.types.append(types), self.mask.append(mask), self.ids.append(ids)
            answers.append(answer), deltas.append([delta])
        shape = (len(rows), length)
        self.types, self.mask, self.ids = (torch.tensor(x, dtype=torch.int64).view(shape) for x in (self.types, self.mask, self.ids))
        wanted = torch.tensor(answers, dtype=torch.int64).view(*shape, 4).permute(2, 0, 1)
        self.wanted = (wanted if packed else wanted[1:]).contiguous()
        self.deltas = torch.tensor(deltas, dtype=torch.int64).view(len(rows), 1)
        self.grids = {kind: torch.tensor(rows_, dtype=torch.int64).view(-1, 3) for kind, rows_ in kinds.items()}

    def arguments(self, device, *, video_grid_thw=None, **more):
        grids = {"image_grid_thw": self.grids[IMAGE], "video_grid_thw": self.grids[VIDEO] if video_grid_thw is None else video_grid_thw}
        given_ = {name: grid.to(device) for name, grid in grids.items()}
        return given_ | {"spatial_merge_size": self.merge, "split_video_frames": self.split} | more


def parts_of(rng: random.Random, *, adjacent: bool, videos="whole", most=3):
    """Text, images and videos of one document in random order; without `adjacent`, text stands between two of one kind."""
    parts, frames = [], []
    for _ in range(rng.randint(0, most)):
        kind = rng.choice((TEXT, IMAGE, VIDEO, IMAGE))
        if kind == TEXT:
            parts.append((TEXT, rng.randint(1, 6)))
            continue
        t, h, w = rng.randint(1, 3), rng.randint(1, 4), rng.randint(1, 4)
        if kind == IMAGE:
            t = rng.choice((1, 1, 2))
        if kind == VIDEO and videos == "frames":
            frames.append((t, h, w))
            new = [part for _ in range(t) for part in ((VIDEO, 1, h, w), (TEXT, rng.randint(1, 2)))]
        else:
            new = [(kind, t, h, w)]
        if not adjacent and parts and parts[-1][0] == kind:
            parts.append((TEXT, 1))
        parts += new
    return parts, frames


FAMILIES = {
    "qwen2_vl": ("Qwen2VLModel", {}),
    "qwen2_5_vl": ("Qwen2_5_VLModel", {"seconds": True}),
    "qwen3_vl": ("Qwen3VLModel", {"split": True}),
    "qwen3_vl_moe": ("Qwen3VLMoeModel", {"split": True}),
    "qwen3_5": ("Qwen3_5Model", {"split": True}),
    "qwen3_5_moe": ("Qwen3_5MoeModel", {"split": True}),
    "glm4v": ("Glm4vModel", {"split": True}),
    "glm4v_moe": ("Glm4vMoeModel", {"split": True}),
    "glm46v": ("Glm46VModel", {"split": True}),
    "glm_ocr": ("GlmOcrModel", {"split": True}),
}

#: seconds between frames as processors give them, and as `.to(dtype)` leaves them.
SECONDS = {
    "none": lambda values: None,
    "float32": torch.tensor,
    "float64": lambda values: torch.tensor(values, dtype=torch.float64),
    "bfloat16": lambda values: torch.tensor(values, dtype=torch.bfloat16),
    "float16": lambda values: torch.tensor(values, dtype=torch.float16),
    "int64": lambda values: torch.tensor(values).ceil().long(),
    "list": lambda values: values,
    "ints": lambda values: [int(value) + 1 for value in values],
}


def get_rope_index(family: str, types, mask, image_grid, video_grid, *, merge=2, rate=2, seconds=None):
    """transformers' own, without a model around it. A grid of no rows is as None."""
    name, settings = FAMILIES[family]
    model = getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), name)
    config = SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=merge, tokens_per_second=rate))
    of_model = SimpleNamespace(config=config, get_vision_position_ids=lambda *args, **more: model.get_vision_position_ids(None, *args, **more))
    more = {"second_per_grid_ts": seconds} if "seconds" in settings else {}
    return model.get_rope_index(
        of_model, torch.zeros_like(types), types, image_grid if len(image_grid) else None, video_grid if len(video_grid) else None, attention_mask=mask, **more
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_transformers(family, backend, device):
    pytest.importorskip("transformers")
    settings = FAMILIES[family][1]
    split, timed = "split" in settings, "seconds" in settings

    @examples(backend, 1 if timed else 0.4)
    @given(st.randoms(use_true_random=False), st.sampled_from(("left", "right", "none", "holes")), st.sampled_from([*SECONDS]), st.sampled_from((1, 2, 2.0, 25, 0.7)))
    def check(rng, side, form, rate):
        rows, frames = [], []
        for _ in range(rng.randint(1, 3)):
            parts, new = parts_of(rng, adjacent=False, videos="frames" if split else "whole")
            rows.append([(0, [*parts, (TEXT, rng.randint(1, 3))])])
            frames += new
        if side in ("left", "right", "none"):
            # all rows of one length: padding in front or behind, or text
            length = max(sum(map(size, row[0][1])) for row in rows)
            for row in rows:
                short = length - sum(map(size, row[0][1]))
                pad = (0, [(None, short)])
                if short:
                    row[:] = {"left": [pad, *row], "right": [*row, pad], "none": [(0, [*row[0][1], (TEXT, short)])]}[side]
        told = Told(rows, split=split)
        if side == "holes":
            told.mask &= (torch.rand(told.mask.shape, generator=torch.Generator().manual_seed(rng.randint(0, 99))) > 0.3) | (told.types != TEXT)
            told.mask[:, 0] = 1
        videos = torch.tensor([(t, 2 * h, 2 * w) for t, h, w in frames], dtype=torch.int64).view(-1, 3) if split else told.grids[VIDEO]
        mask = None if side == "none" else told.mask
        if side == "holes" and cut_by_holes(told):
            return
        seconds = SECONDS[form]([rng.choice((1.0, 0.5, 1.3, 0.083, 2.6666667, 7.1)) for _ in videos]) if timed and len(videos) else None
        given_ = told.arguments(device, video_grid_thw=videos)
        if timed:
            given_ |= {"tokens_per_second": rate}
            if seconds is not None:
                given_["second_per_grid_ts"] = seconds.to(device) if isinstance(seconds, torch.Tensor) else seconds
        wanted = get_rope_index(family, told.types, mask, told.grids[IMAGE], videos, rate=rate, seconds=seconds)
        made = mrope_position_ids(told.types.to(device), attention_mask=None if mask is None else mask.to(device), backend=backend, **given_)
        assert_bits(made[0], wanted[0], "position_ids")
        assert_bits(made[1], wanted[1], "rope_deltas")
        vlm_fuse.raise_errors()

    check()


def cut_by_holes(told) -> bool:
    """Whether a hole stands beside a placeholder: transformers joins what is around it, and takes two images for one."""
    vision = told.types != TEXT
    hole = told.mask == 0
    return bool((vision[:, 1:] & hole[:, :-1]).any() or (vision[:, :-1] & hole[:, 1:]).any())


@pytest.mark.thinned(3)
@pytest.mark.parametrize("form", SECONDS)
def test_fractional_seconds_are_cut_off_as_in_transformers(form, backend, device):
    """Long videos: the arithmetic of the dtype shows."""
    pytest.importorskip("transformers")
    values = [0.083, 2.6666667, 1.0]
    # Triton's interpreter is slow
    frames = 700 if backend in ("cpu", "reference") else 150
    videos = torch.tensor([[frames, 2, 2]] * len(values))
    types = torch.tensor([[VIDEO] * frames + [TEXT]] * len(values))
    for rate in (2, 25.0, 0.7) if frames == 700 else (0.7,):
        seconds = SECONDS[form](values)
        wanted = get_rope_index("qwen2_5_vl", types, None, videos[:0], videos, rate=rate, seconds=seconds)
        given_ = seconds.to(device) if isinstance(seconds, torch.Tensor) else seconds
        made = mrope_position_ids(types.to(device), video_grid_thw=videos.to(device), second_per_grid_ts=given_, tokens_per_second=rate, backend=backend)
        assert_bits(made[0], wanted[0], f"{rate}")
        assert_bits(made[1], wanted[1], f"{rate}")


# -- against the batch as it is told -----------------------------------------------------------------------------------


def rows_of(rng: random.Random, *, packed: bool, videos="whole"):
    """Rows of documents with images beside each other, and padding in front, between and behind."""
    rows = []
    for _ in range(rng.randint(0, 3)):
        row = []
        for number in range(rng.randint(1, 3) if packed else 1):
            if rng.random() < 0.3:
                row.append((0, [(None, rng.randint(1, 4))]))
            row.append((rng.choice((0, 10)) + number if packed else 0, parts_of(rng, adjacent=True, videos=videos)[0]))
        row = [entry for entry in row if entry[1]]
        # equal ids in a row would be one document
        ids = [document for document, parts in row if parts[0][0] is not None]
        rows.append(row if len(set(ids)) == len(ids) else row[:1])
    return rows


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_batches_as_they_are_told(packed, backend, device):
    forms = (torch.int64, torch.int32, torch.int8, torch.uint8, torch.int16)

    @examples(backend)
    @given(st.randoms(use_true_random=False), st.sampled_from(forms), st.sampled_from(("whole", "split")), st.sampled_from((1, 2, 3)))
    def check(rng, dtype, videos, merge):
        rate = rng.choice((1, 3))
        told = Told(rows_of(rng, packed=packed), merge=merge, packed=packed, split=videos == "split", interval=lambda video, frame: frame * rate)
        given_ = told.arguments(device, tokens_per_second=rate)
        types = told.types.to(device).to(dtype)
        beside = {"document_ids": told.ids.to(device).to(rng.choice((torch.int32, torch.int64)))} if packed else {}
        if not packed or rng.random() < 0.5:
            beside["attention_mask"] = told.mask.to(device).to(rng.choice((torch.int64, torch.bool, torch.float32, torch.int32)))
        made = mrope_position_ids(types, backend=backend, **given_, **beside)
        assert_bits(made[0], told.wanted, "position_ids")
        assert_bits(made[1], told.deltas, "rope_deltas")
        vlm_fuse.raise_errors()

    check()


def test_adjacent_images_are_kept_apart(backend, device):
    """transformers takes the two for one, with the grid of the first."""
    types = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 2, 2, 0]], device=device)
    images, videos = torch.tensor([[1, 4, 4], [1, 2, 4]], device=device), torch.tensor([[2, 2, 2]], device=device)
    positions, deltas = mrope_position_ids(types, image_grid_thw=images, video_grid_thw=videos, backend=backend)
    assert positions[:, 0].tolist() == [[0, 1, 1, 1, 1, 3, 3, 5, 6, 6], [0, 1, 1, 2, 2, 3, 3, 5, 5, 6], [0, 1, 2, 1, 2, 3, 4, 5, 5, 6]]
    assert deltas.tolist() == [[-3]]


def test_padding_of_packed_rows(backend, device):
    """At the end it counts in all rows, elsewhere it is 0, as position_ids of a plan."""
    ids = torch.tensor([[-1, 4, 4, -7, 4, 2, -1, -1, -5], [-1] * 9], device=device)
    positions, deltas = mrope_position_ids(torch.zeros_like(ids), document_ids=ids, backend=backend)
    wanted = [[0, 0, 1, 0, 2, 0, 0, 1, 2], [*range(9)]]
    assert positions.tolist() == [wanted] * 4 and deltas.tolist() == [[0], [0]]
    assert torch.equal(positions[0].cpu(), vlm_fuse.plan(torch.zeros_like(ids), image_token_id=9, document_ids=ids, backend=backend).position_ids.cpu())


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (3, 0), (2, 5)], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_nothing_there(shape, packed, backend, device):
    types = torch.zeros(shape, dtype=torch.int64, device=device)
    none = torch.zeros(0, 3, dtype=torch.int64, device=device)
    beside = {"document_ids": types - 1} if packed else {"attention_mask": types}
    for grids in ({}, {"image_grid_thw": none, "video_grid_thw": none, "second_per_grid_ts": []}):
        positions, deltas = mrope_position_ids(types, **grids, **beside, backend=backend)
        assert positions.shape == (3 + packed, *shape) and deltas.shape == (shape[0], 1)
        assert positions.dtype == deltas.dtype == torch.int64
        assert torch.equal(positions.cpu(), torch.arange(shape[1]).expand(positions.shape) * packed) and not deltas.any()


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_long_rows(packed, backend, device):
    """Rows of many blocks of a GPU's kernel; enough of them for several threads on a CPU."""
    rng = random.Random(0)
    samples, documents = (1, 10) if backend == "triton" else (40, 20)
    rows = [[(0, [(None, 40)])] + [(d if packed else 0, [(TEXT, rng.randint(1, 60)), *parts_of(rng, adjacent=True)[0]]) for d in range(documents)] for _ in range(samples)]
    if not packed:
        rows = [[row[0], (0, [part for _, parts in row[1:] for part in parts])] for row in rows]
    told = Told(rows, packed=packed)
    beside = {"document_ids": told.ids.to(device)} if packed else {"attention_mask": told.mask.to(device)}
    made = mrope_position_ids(told.types.to(device), backend=backend, **told.arguments(device), **beside)
    assert_bits(made[0], told.wanted, "position_ids")
    assert_bits(made[1], told.deltas, "rope_deltas")


def usual(device, length=40, samples=3, packed=True):
    """A batch of everything: (types, arguments)."""
    rng = random.Random(length)
    rows = [[(i, parts_of(rng, adjacent=True, most=4)[0] + [(TEXT, 2)]) for i in range(2)] for _ in range(samples)]
    told = Told([[*row, (0, [(None, length)])] for row in rows], packed=packed)
    assert told.grids[IMAGE].numel() and told.grids[VIDEO].numel()
    more = {"document_ids": told.ids.to(device)} if packed else {}
    seconds = torch.linspace(0.3, 1.7, len(told.grids[VIDEO])).to(device)
    return told.types.to(device), told.arguments(device, attention_mask=told.mask.to(device), second_per_grid_ts=seconds, tokens_per_second=2, **more)


@pytest.mark.skipif("cuda" not in BACKENDS, reason="no backend without the kernel here")
def test_a_backend_without_the_kernel_says_so():
    types = torch.zeros(1, 4, dtype=torch.int64, device="cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(RuntimeError, match="mrope_position_ids: backend 'cuda' has no kernel.*'triton' or 'reference'"):
        mrope_position_ids(types, backend="cuda")
    assert mrope_position_ids(types)[0].tolist() == [[[0, 1, 2, 3]]] * 3


def test_views_and_two_runs(backend, device):
    types, arguments = usual(device, *((40, 3) if backend in ("cpu", "reference") else (6, 2)))
    wanted = mrope_position_ids(types, backend=backend, **arguments)
    spread = {name: torch.stack([value, value], -1)[..., 0] if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
    for given_types, given_ in ((types, arguments), (types.T.contiguous().T, spread)):
        made = mrope_position_ids(given_types, backend=backend, **given_)
        assert_bits(made[0], wanted[0])
        assert_bits(made[1], wanted[1])
    on_host = {name: value.cpu() if name.endswith(("thw", "ts")) else value for name, value in arguments.items()}
    assert_bits(mrope_position_ids(types, backend=backend, **on_host)[0], wanted[0])
    images = torch.zeros(1, 4, dtype=torch.bool, device=device)
    assert mrope_position_ids(~images, image_grid_thw=torch.tensor([[1, 4, 4]]), backend=backend)[0][1].tolist() == [[0, 0, 1, 1]]


@pytest.mark.parametrize("packed", [False, True])
def test_operator(packed, backend, device):
    types, given_ = usual(device, samples=2, length=3, packed=packed)
    given_["second_per_grid_ts"] = given_["second_per_grid_ts"] * 2
    args = (types, given_["image_grid_thw"], given_["video_grid_thw"], given_["second_per_grid_ts"], given_["attention_mask"], given_.get("document_ids"), 2, 1, False, "off", backend)
    torch.library.opcheck(torch.ops.vlm_fuse.mrope_position_ids.default, args)


def test_compiled_once_for_all_sizes():
    def positions(types, given_):
        return mrope_position_ids(types, **given_)

    torch._dynamo.reset()
    compiled = torch.compile(positions, backend="aot_eager", fullgraph=True, dynamic=True)
    # as many samples as a grid has columns would be taken for the same size
    first, *others = [usual("cpu", length, samples) for length, samples in ((40, 4), (17, 2), (99, 5))]
    for a, b in zip(compiled(*first), positions(*first)):
        assert_bits(a, b)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for other in others:
            for a, b in zip(compiled(*other), positions(*other)):
                assert_bits(a, b)
    types, given_ = others[0]
    with pytest.raises(ValueError, match="video_grid_thw"):
        compiled(types, given_ | {"video_grid_thw": given_["video_grid_thw"] + 1})
    seconds = [0.5] * len(given_["video_grid_thw"])
    for a, b in zip(compiled(types, given_ | {"second_per_grid_ts": seconds}), positions(types, given_ | {"second_per_grid_ts": seconds})):
        assert_bits(a, b)
    torch._dynamo.reset()


# -- in a model --------------------------------------------------------------------------------------------------------


def text_model(family: str):
    """A tiny random text model of the family that takes embeddings."""
    pytest.importorskip("transformers")
    configs, models = (importlib.import_module(f"transformers.models.{family}.{kind}_{family}") for kind in ("configuration", "modeling"))
    name = {"qwen2_5_vl": "Qwen2_5_VLText", "qwen3_vl": "Qwen3VLText"}[family]
    rope = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 3, 3]}
    config = getattr(configs, f"{name}Config")(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        initializer_range=0.2, rope_parameters=rope, max_position_embeddings=128, use_sliding_window=False, attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(0)
    return getattr(models, f"{name}Model")(config).double().eval()


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_packed_documents_are_as_each_alone(family):
    from transformers.masking_utils import find_packed_sequence_indices

    documents = [[(TEXT, 3), (IMAGE, 1, 3, 2), (IMAGE, 1, 2, 2), (TEXT, 2)], [(IMAGE, 1, 1, 4)], [(VIDEO, 2, 2, 2), (TEXT, 4)], [(TEXT, 1)]]
    packed = Told([[*enumerate(documents), (9, [(None, 5)])]], packed=True)
    positions, _ = mrope_position_ids(packed.types, document_ids=packed.ids, **packed.arguments("cpu"))
    assert_bits(positions, packed.wanted)
    isolated = find_packed_sequence_indices(positions[0])
    assert torch.equal(isolated[0], torch.where(packed.ids[0] < 0, len(documents), packed.ids[0])), "the padding is one more document"
    model = text_model(family)
    embeds = torch.randn(1, packed.types.shape[1], 32, dtype=torch.float64)
    with torch.no_grad():
        rows = model(inputs_embeds=embeds, position_ids=positions, attention_mask=None, use_cache=False).last_hidden_state
        leaking = model(inputs_embeds=embeds, position_ids=positions[1:], attention_mask=None, use_cache=False).last_hidden_state
        begin = 0
        for parts in documents:
            alone = Told([[(0, parts)]])
            end = begin + alone.types.shape[1]
            single, _ = mrope_position_ids(alone.types, **alone.arguments("cpu"))
            wanted = model(inputs_embeds=embeds[:, begin:end], position_ids=single, attention_mask=None, use_cache=False).last_hidden_state
            torch.testing.assert_close(rows[:, begin:end], wanted, rtol=0, atol=1e-10)
            assert begin == 0 or (leaking[:, begin:end] - wanted).abs().max() > 1e-3, "a test that could not fail"
            begin = end


# -- what is wrong -----------------------------------------------------------------------------------------------------

SQUARE = [1, 4, 4]  # four placeholders
ERRORS = {
    "too_few_grids": ([[1, 1, 1, 1, 0], [0, 1, 1, 1, 1]], dict(image=[SQUARE]), r"image_grid_thw: sample 1 has 4 image placeholders .*have 0 left.* 8 placeholders, and its 1 grids need 4"),
    "no_grids": ([[0, 2]], {}, r"video_grid_thw: sample 0 has 1 video placeholders .*mm_token_type_ids 2.*have 0 left .* 0 grids need 0"),
    "too_many_grids": ([[1, 1, 1, 1, 0]], dict(image=[SQUARE, [1, 2, 2]]), r"image_grid_thw: the grids need 5 placeholders, but the batch has 4 .* row 1 on"),
    "no_placeholders": ([[0, 0]], dict(video=[[3, 2, 2]]), r"video_grid_thw: the grids need 3 placeholders, but the batch has 0 .*row 0 on.*truncation"),
    "cut_by_truncation": ([[0, 1, 1], [1, 1, 1, ][:3]], dict(image=[SQUARE, [1, 2, 2]]), r"image_grid_thw: in sample 0 .* row 0 has 2 placeholders, but its grid needs 4 .* 5 placeholders, and its grids need 5.*truncation"),
    "cut_by_text": ([[1, 1, 0, 1, 1]], dict(image=[SQUARE]), r"in sample 0 .* row 0 has 2 placeholders, but its grid needs 4"),
    "cut_by_another_kind": ([[1, 1, 1, 2, 1]], dict(image=[SQUARE], video=[[1, 2, 2]]), r"in sample 0 .* row 0 has 3 placeholders"),
    "cut_by_a_document": ([[0, 1, 1, 1, 1]], dict(image=[SQUARE], ids=[[0, 0, 0, 1, 1]]), r"in sample 0 .* row 0 has 2 .*document boundary"),
    "cut_by_padding": ([[0, 1, 1, 1, 1]], dict(image=[SQUARE], mask=[[1, 1, 1, 1, 0]]), r"in sample 0 .* row 0 has 3 .*holds padding"),
    "video_cut": ([[0] * 6, [2, 2, 2, 0, 0, 0]], dict(video=[[1, 2, 2], [3, 2, 2]]), r"video_grid_thw: in sample 1 .* row 1 has 2 placeholders, but its grid needs 3"),
    "frame_cut": ([[2, 2, 0, 2]], dict(video=[[2, 2, 4]], split=True), r"video_grid_thw: in sample 0 .* row 0 has 1 placeholders, but its grid needs 2"),
    "frames_apart_not_told": ([[2, 2, 0, 2, 2]], dict(video=[[2, 2, 4]]), r"row 0 has 2 placeholders, but its grid needs 4 .* give split_video_frames=True"),
    "frames_left": ([[2, 2, 0, 2, 2]], dict(video=[[1, 2, 4], [3, 2, 4]], split=True), r"video_grid_thw: the grids need 8 placeholders, but the batch has 4 .*row 1 on"),
    "not_divisible": ([[1]], dict(image=[[1, 2, 2], [1, 3, 2]]), r"image_grid_thw: row 1 is \(1, 3, 2\).*multiples of spatial_merge_size \(2\)"),
    "nothing_in_a_grid": ([[2]], dict(video=[[0, 2, 2]]), r"video_grid_thw: row 0 is \(0, 2, 2\); t, h and w are at least 1"),
    "far_too_large": ([[1, 1]], dict(image=[[2**31 - 1, 2**31 - 2, 2**31 - 2]]), r"in sample 0 .* row 0 has 2 placeholders, but its grid needs 2147483648"),
    "beyond_int32": ([[1, 1]], dict(image=[[1, 2**31, 2]]), r"image_grid_thw: row 0 is \(1, 2147483648, 2\)"),
    "unknown_type": ([[0, 0], [0, 3]], {}, r"mm_token_type_ids: sample 1 has type 3 \(token 1\)"),
    "first_of_two": ([[3, 1, 1, 0], [1, 0, 0, 0]], dict(image=[[1, 2, 4]]), r"sample 0 has type 3"),
    "document_returns": ([[0] * 5, [0] * 5], dict(ids=[[0, 1, 2, 3, 4], [3, 1, -1, 3, 0]]), r"document_ids: in sample 1 id 3 returns"),
    "returns_behind_another_error": ([[0, 3, 0], [0, 0, 0]], dict(ids=[[0, 0, 1], [4, 3, 4]]), r"sample 0 has type 3"),
    "returns_before_another_error": ([[0, 0, 0], [0, 0, 1]], dict(ids=[[4, 3, 4], [0, 0, 0]]), r"document_ids: in sample 0 id 4 returns"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_is_wrong_is_named(name, backend, device):
    types, settings, told = ERRORS[name]
    given_ = {f"{kind}_grid_thw": torch.tensor(settings[kind], device=device) for kind in ("image", "video") if kind in settings}
    for argument, key in (("attention_mask", "mask"), ("document_ids", "ids")):
        if key in settings:
            given_[argument] = torch.tensor(settings[key], device=device)
    types = torch.tensor(types, device=device)
    made = []
    for validate in ("sync", "async"):
        with pytest.raises(ValueError, match=told):
            made.append(mrope_position_ids(types, split_video_frames="split" in settings, validate=validate, backend=backend, **given_))
            vlm_fuse.raise_errors()
    made.append(mrope_position_ids(types, split_video_frames="split" in settings, validate="off", backend=backend, **given_))
    wanted = mrope_position_ids(types, split_video_frames="split" in settings, validate="off", backend="reference", **given_)
    for positions, deltas in made:
        assert_bits(positions, wanted[0])
        assert_bits(deltas, wanted[1])


def test_arguments_that_are_refused():
    types, grid = torch.zeros(2, 3, dtype=torch.int64), torch.tensor([[1, 2, 2]])
    for error, told, given_ in (
        (TypeError, "mm_token_type_ids", dict(mm_token_type_ids=types.float())),
        (ValueError, r"mm_token_type_ids: expected \(B, L\).*unsqueeze", dict(mm_token_type_ids=types[0])),
        (TypeError, "image_grid_thw", dict(image_grid_thw=grid.float())),
        (TypeError, "video_grid_thw: expected a tensor", dict(video_grid_thw=[[1, 2, 2]])),
        (ValueError, r"video_grid_thw: expected \(n, 3\).*\(3,\)", dict(video_grid_thw=grid[0])),
        (ValueError, r"attention_mask: expected the shape of mm_token_type_ids", dict(attention_mask=torch.ones(2, 4))),
        (TypeError, "document_ids", dict(document_ids=types.float())),
        (ValueError, r"second_per_grid_ts: has 2 entries, but video_grid_thw has 1 rows", dict(video_grid_thw=grid, second_per_grid_ts=torch.ones(2))),
        (ValueError, r"second_per_grid_ts: has 1 entries, but video_grid_thw has 0 rows", dict(second_per_grid_ts=[1.0])),
        (ValueError, r"second_per_grid_ts: video 0 has nan", dict(video_grid_thw=grid, second_per_grid_ts=[float("nan")])),
        (TypeError, r"second_per_grid_ts", dict(video_grid_thw=grid, second_per_grid_ts=["1"])),
        (ValueError, r"second_per_grid_ts: has no effect.*split_video_frames", dict(video_grid_thw=grid, second_per_grid_ts=[1.0], split_video_frames=True)),
        (ValueError, "spatial_merge_size", dict(spatial_merge_size=0)),
        (ValueError, "spatial_merge_size", dict(spatial_merge_size=2.0)),
        (TypeError, "tokens_per_second", dict(tokens_per_second="2")),
        (ValueError, "tokens_per_second", dict(tokens_per_second=-1)),
        (ValueError, "validate", dict(validate="never")),
        (ValueError, "backend", dict(backend="gpu")),
    ):
        with pytest.raises(error, match=told):
            mrope_position_ids(**({"mm_token_type_ids": types} | given_))


def test_whatever_the_numbers_say(backend, device):
    """Nothing is read or written beyond a tensor, and every backend makes the same of it."""
    from fenced import fenced, hostile

    @examples(backend, 0.6 if backend == "triton" else 1)
    @given(st.integers(0, 2**32))
    def check(seed):
        generator = torch.Generator().manual_seed(seed)

        def numbers(low, high, *shape):
            return torch.randint(low, high, shape, generator=generator)

        shape = tuple(numbers(1, 20, 2).tolist())
        grids = [numbers(1, 4, int(numbers(0, 4, 1)), 3) * torch.tensor([1, 2, 2]) for _ in range(2)]
        tensors = [numbers(0, 3, *shape), numbers(0, 2, *shape), numbers(-1, 3, *shape), *grids]
        if seed % 2:
            tensors = [hostile(tensor, generator) for tensor in tensors]
            tensors[2] = tensors[2].clamp(max=2**31 - 1)
        # a page that nobody may touch before or behind each of them
        fence = (lambda tensor: fenced(tensor, ("begin", "end")[seed % 2])) if device == "cpu" else (lambda tensor: tensor.to(device))
        types, mask, ids, images, videos = map(fence, tensors)
        given_ = dict(image_grid_thw=images, video_grid_thw=videos, attention_mask=mask if seed % 3 else None, document_ids=ids if seed % 5 > 1 else None, split_video_frames=seed % 7 > 3)
        if seed % 7 < 3:
            given_["second_per_grid_ts"] = torch.rand(len(videos), generator=generator).to(device)
        made, wanted = (mrope_position_ids(types, validate="off", backend=name, **given_) for name in (backend, "reference"))
        assert_bits(made[0], wanted[0], "position_ids")
        assert_bits(made[1], wanted[1], "rope_deltas")
        errors = []
        for name in (backend, "reference"):
            try:
                mrope_position_ids(types, validate="sync", backend=name, **given_)
                errors.append(None)
            except ValueError as error:
                errors.append(str(error))
        assert errors[0] == errors[1]

    check()
