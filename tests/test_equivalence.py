"""A packed row gives what each sample gives alone: logits, losses and every gradient of a small decoder, in float64.

Alone means without the library: embedding and features put together by hand, positions counted by hand, and attention in
plain PyTorch under the mask of plain loops (oracle.may_see). Every scheme of positions, every kind of mask, every rendering
that a CPU runs. Then the same with isolation turned off, which must not be equal; and to the bit: what is changed in one
document reaches no other.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch.nn import functional as F

import oracle
import small_decoder
import vlm_fuse
from checking import assert_bits, placed, serving
from small_decoder import AXES, RAW, SCHEMES, D, by_bool, by_loops, decoder, rendered
from vlm_fuse import Attend
from vlm_fuse import scaled_dot_product as paths

pytestmark = pytest.mark.usefixtures("one_thread")

IMAGE, PAD, IGNORE = 40, 0, -100

#: what may differ in float64, and what must at least differ where isolation is off.
EQUAL, UNEQUAL = 1e-10, 1e-3


# --- samples and masks --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """Letters are text, "I" a row of an image, "." a token under attention_mask 0. `grids`: rows and columns of each image."""

    text: str
    grids: tuple[tuple[int, int], ...] = ()

    def __post_init__(self):
        assert self.text.count("I") == sum(self.sizes)

    @property
    def sizes(self) -> list[int]:
        return [height * width for height, width in self.grids]

    @property
    def ids(self) -> list[int]:
        return [IMAGE if letter == "I" else PAD if letter == "." else 1 + ord(letter) - ord("a") for letter in self.text]

    @property
    def images(self) -> list[int]:
        """Number of the image of each token, -1 elsewhere."""
        numbers = iter([number for number, size in enumerate(self.sizes) for _ in range(size)])
        return [next(numbers) if letter == "I" else -1 for letter in self.text]

    @property
    def there(self) -> list[bool]:
        return [letter != "." for letter in self.text]

    @property
    def labels(self) -> list[int]:
        """Of every token, images too: merge is to take those out. What follows on a hole is the caller's to take out: the
        usual shift would have the hole predict it."""
        return [IGNORE if at and self.text[at - 1] == "." else token for at, token in enumerate(self.ids)]


SAMPLES = (
    Sample("IIIIabcde", ((2, 2),)),  # the row begins with an image
    Sample("f"),  # a document of one token
    Sample("abIIIIIIIIcdefghiII", ((2, 3), (1, 2), (2, 1))),  # two images side by side, and one at the end
    Sample("IIhgfedc", ((1, 2),)),  # which stands beside that of the next document
    Sample("bcIIII", ((2, 2),)),  # the row ends with an image
)
BRANCHES = (Sample("IIIIabc", ((2, 2),)), Sample("dIIeg", ((1, 2),)), Sample("fghIIIIi", ((2, 2),)), Sample("jk"), Sample("IIl", ((2, 1),)))
HOLES = (Sample("abIIII.cde", ((2, 2),)), Sample("f"), Sample("IIbIIc.def", ((1, 2), (2, 1))), Sample("gh"))


class Kind(NamedTuple):
    attend: Attend | dict[str, Attend]
    samples: tuple[Sample, ...] = SAMPLES
    prefixes: tuple[int, ...] | None = None
    parents: tuple[int, ...] | None = None

    @property
    def holes_count(self) -> bool:
        """Whether the mask depends on the rows that padding inside a document takes, which packing takes out."""
        return self.samples is HOLES and self.attend.window is not None


KINDS = {
    "causal": Kind(Attend()),
    "full": Kind(Attend("full")),
    "window": Kind(Attend(window=3)),
    "full_window": Kind(Attend("full", window=3)),
    "sinks": Kind(Attend(window=3, sinks=2)),
    "chunks": Kind(Attend(chunk_size=4)),
    "images": Kind(Attend(images="bidirectional")),
    "images_and_window": Kind(Attend(window=3, images="bidirectional")),
    "images_in_window": Kind(Attend(window=3, images="bidirectional_windowed")),
    "images_and_chunks": Kind(Attend(chunk_size=4, images="bidirectional")),
    "prefix": Kind(Attend(), prefixes=(5, 1, 4, 0, 30)),
    "prefix_and_window": Kind(Attend(window=3), prefixes=(5, 1, 4, 0, 30)),
    "parents": Kind(Attend(), BRANCHES, parents=(-1, -1, 0, 0, 1)),
    "parents_and_images": Kind(Attend(images="bidirectional"), BRANCHES, parents=(-1, -1, 0, 0, 1)),
    "layer_types": Kind({"local": Attend(window=3), "global": Attend()}),
    "gemma3": Kind({"local": Attend(window=3, images="bidirectional_windowed"), "global": Attend(images="bidirectional")}),
    "holes": Kind(Attend(), HOLES),
    "holes_full": Kind(Attend("full"), HOLES),
    "holes_and_window": Kind(Attend(window=3), HOLES),
    "holes_and_images": Kind(Attend(images="bidirectional"), HOLES),
}

every_scheme = pytest.mark.parametrize("scheme", SCHEMES)
every_kind = pytest.mark.parametrize("name", KINDS)


def raw_features(samples) -> torch.Tensor:
    """What the vision tower would give; the decoder's projector makes image_embeds of it."""
    rows = sum(sum(sample.sizes) for sample in samples)
    return torch.randn(rows, RAW, dtype=torch.float64, generator=torch.Generator().manual_seed(rows))


# --- alone --------------------------------------------------------------------------------------------------------------


def counted(scheme: str, samples: list[Sample]) -> torch.Tensor:
    """Positions of the tokens of samples that are one document: (L,), for M-RoPE (3, L)."""
    made, start = [], 0
    for sample in samples:
        at = 0
        images = iter(sample.grids) if scheme in AXES else None
        while at < len(sample.text):
            if sample.text[at] == "I" and images is not None:
                height, width = next(images)
                made += [(start, start + row, start + column) for row in range(height) for column in range(width)]
                start, at = start + max(height, width), at + height * width
            else:
                if sample.text[at] != ".":
                    made.append((start, start, start))
                    start += 1
                at += 1
    positions = torch.tensor(made).T
    return positions if scheme in AXES else positions[0]


def seen_alone(attend: Attend, samples: list[Sample], prefix: int) -> torch.Tensor:
    """Who sees whom among the tokens of samples that are one document."""
    there = [here for sample in samples for here in sample.there]
    images, base = [], 0
    for sample in samples:
        images += [image + base if image >= 0 else -1 for image in sample.images]
        base += len(sample.sizes)
    dense = oracle.may_see([0 if here else -1 for here in there], images, prefix_lengths=prefix, **vars(attend))
    kept = torch.tensor(there)
    return torch.tensor(dense)[kept][:, kept]


class Result(NamedTuple):
    """Of every document: hidden states and logits of its tokens, the sum of its losses; and gradients of all losses."""

    hidden: list[torch.Tensor]
    logits: list[torch.Tensor]
    losses: list[torch.Tensor]
    mean: torch.Tensor
    grads: dict[str, torch.Tensor]


def losses_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")


def losses_of_rows(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(G, W), at the row of each label: the usual shift over the whole row."""
    shifted = labels[:, 1:]
    return F.pad(losses_of(logits[:, :-1].flatten(0, 1), shifted.flatten()).view(shifted.shape), (1, 0))


def gradients(model, raw: torch.Tensor, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    named = dict(model.named_parameters()) | {"image features": raw}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values()), materialize_grads=True)))


def families(kind: Kind) -> list[int]:
    """Documents of equal number may reach one another: a branch sees its parent, whose gradient hears of it."""
    parents = kind.parents or [-1] * len(kind.samples)
    return [number if parent < 0 else parent for number, parent in enumerate(parents)]


@functools.cache
def alone(scheme: str, name: str) -> Result:
    """Every sample by itself; a branch behind its parent, as one document."""
    model, kind = decoder(scheme), KINDS[name]
    raw = raw_features(kind.samples).requires_grad_()
    features = model.projector(raw).split([sum(sample.sizes) for sample in kind.samples])
    hidden, logits, losses, tokens = [], [], [], 0
    for number, sample in enumerate(kind.samples):
        parent = -1 if kind.parents is None else kind.parents[number]
        run = [parent, number] if parent >= 0 else [number]
        document = [kind.samples[one] for one in run]
        rows = []
        for one in run:
            ids = torch.tensor(kind.samples[one].ids)
            text = model.embedding(ids)
            rows.append(text.index_put((ids == IMAGE,), features[one])[kind.samples[one].there])
        prefix = 0 if kind.prefixes is None else kind.prefixes[number]
        attends = kind.attend if isinstance(kind.attend, Mapping) else {"local": kind.attend, "global": kind.attend}
        attend = {layer_type: by_loops(seen_alone(value, document, prefix)) for layer_type, value in attends.items()}
        own = slice(-sum(sample.there), None)  # what the parent gives is its own document's
        states, scores = model(torch.cat(rows)[None], counted(scheme, document).unsqueeze(-2), attend)
        hidden.append(states[0, own])
        logits.append(scores[0, own])
        labels = torch.tensor([IGNORE if token == IMAGE else label for label, token, here in zip(sample.labels, sample.ids, sample.there) if here])[1:]
        losses.append(losses_of(logits[-1][:-1], labels).sum())
        tokens += int((labels != IGNORE).sum())
    loss = sum(losses)
    assert tokens and loss > 1
    return Result(*([x.detach() for x in found] for found in (hidden, logits, losses)), loss.detach() / tokens, gradients(model, raw, loss))


# --- packed -------------------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """Arguments of merge, where each document's tokens stand in the output and in input_ids, and its number in the output."""

    arguments: dict
    rows: list[tuple[int, torch.Tensor]]
    places: list[tuple[int, torch.Tensor]]
    numbers: list[int]


def _padded(lines: list[list], filler, left: bool = False) -> torch.Tensor:
    width = max(map(len, lines))
    return torch.tensor([[filler] * (width - len(line)) + line if left else line + [filler] * (width - len(line)) for line in lines])


def _one_after_another(samples) -> list[tuple[int, torch.Tensor]]:
    ends = torch.tensor([sum(sample.there) for sample in samples]).cumsum(0).tolist()
    return [(0, torch.arange(begin, end)) for begin, end in zip([0, *ends], ends)]


def padded_batch(samples, left: bool, expand: bool = False, **options) -> Batch:
    """A sample a line, as a tokenizer gives them."""

    def shrunk(sample, values):
        """One placeholder an image."""
        images = sample.images
        return [value for at, value in enumerate(values) if not (expand and at and images[at] >= 0 and images[at - 1] == images[at])]

    ids, labels, mask = ([shrunk(sample, getattr(sample, what)) for sample in samples] for what in ("ids", "labels", "there"))
    given = dict(input_ids=_padded(ids, PAD, left), labels=_padded(labels, 7, left), attention_mask=_padded(mask, False, left).long(), **options)
    places = [(b, line.nonzero()[:, 0]) for b, line in enumerate(given["attention_mask"])]
    if options["layout"] == "packed":
        rows = _one_after_another(samples)
    else:
        # to the right; what is taken out leaves no hole there
        rows = places if options["layout"] == "keep" else [(b, torch.arange(sum(sample.there))) for b, sample in enumerate(samples)]
    return Batch(given, rows, places, list(range(len(samples))))


def packed_rows(samples, split: int, masked: bool = False, **options) -> Batch:
    """Documents packed beforehand, `split` of them in the first of two rows; ids in no order. A hole has an id below 0, or its
    document's own under an attention_mask (`masked`)."""
    numbers = [(7 * number + 3) % 11 for number in range(len(samples))]
    lines = [list(enumerate(samples))[part] for part in (slice(0, split), slice(split, None))]
    lines = [line for line in lines if line]
    ids, labels = ([[value for _, sample in line for value in getattr(sample, what)] for line in lines] for what in ("ids", "labels"))
    there = [[here for _, sample in line for here in sample.there] for line in lines]
    documents = [[numbers[number] for number, sample in line for _ in sample.ids] for line in lines]
    rows = []
    for g, line in enumerate(lines):
        at = 0
        for _, sample in line:
            rows.append((g, at + torch.tensor(sample.there).nonzero()[:, 0]))
            at += len(sample.ids)
    if not masked:
        documents = [[number if here else -1 for number, here in zip(*line)] for line in zip(documents, there)]
    given = dict(input_ids=_padded(ids, PAD), labels=_padded(labels, 7), document_ids=_padded(documents, -1), **options)
    if masked:
        given["attention_mask"] = _padded(there, False)
    if options["layout"] == "packed":
        return Batch(given, _one_after_another(samples), rows, list(range(len(samples))))
    return Batch(given, rows, rows, numbers)


#: how samples come in and go out. All but the last two put several documents into a row.
LAYOUTS = {
    "packed": lambda samples: padded_batch(samples, True, layout="packed"),
    "packed_to_a_length": lambda samples: padded_batch(samples, False, layout="packed", length=sum(sum(sample.there) for sample in samples) + 5),
    "expanded_and_packed": lambda samples: padded_batch(samples, True, True, layout="packed", scheme="expand"),
    "row_with_document_ids": lambda samples: packed_rows(samples, len(samples), True, layout="keep"),
    "rows_with_document_ids": lambda samples: packed_rows(samples, 3, layout="keep"),
    "rows_packed_again": lambda samples: packed_rows(samples, 2, layout="packed"),
    "padded": lambda samples: padded_batch(samples, True, layout="padded"),
    "kept": lambda samples: padded_batch(samples, False, layout="keep"),
}
KEEPING = ("row_with_document_ids", "rows_with_document_ids", "kept")


def layouts_of(kind: Kind) -> list[str]:
    if kind.parents is not None:  # a parent stands in the row of its branches
        return ["packed", "packed_to_a_length", "expanded_and_packed", "row_with_document_ids", "rows_packed_again"]
    return list(KEEPING) if kind.holes_count else list(LAYOUTS)


def by_document(values, numbers: list[int], filler: int) -> list[int] | None:
    if values is None:
        return None
    made = [filler] * (max(numbers) + 1)
    for number, value in zip(numbers, values):
        made[number] = value
    return made


def merged_batch(model, kind: Kind, layout: str, raw: torch.Tensor, fused: bool = False, backend: str = "auto", ids=None, leaf: bool = False):
    """(MergedBatch, Batch). By merge alone, or, where prefixes or parents say more, by plan and merge. `ids`: a change to
    input_ids. `leaf`: the text is one, and is returned too."""
    batch = LAYOUTS[layout](kind.samples)
    given = placed(batch.arguments, str(raw.device))
    if ids is not None:
        given["input_ids"] = ids(given["input_ids"])
    sizes = [size for sample in kind.samples for size in sample.sizes]
    parents = by_document(None if kind.parents is None else [p if p < 0 else batch.numbers[p] for p in kind.parents], batch.numbers, -1)
    prefixes = by_document(kind.prefixes, batch.numbers, 0)
    features = model.projector(raw)
    tokens = given["input_ids"]
    embedded = None if fused else model.embedding(tokens)
    if leaf:
        embedded = embedded.detach().requires_grad_()
    text = dict(weight=model.embedding.weight) if fused else dict(inputs_embeds=embedded)
    if parents is not None or prefixes is not None:
        plan = vlm_fuse.plan(**given, image_token_id=IMAGE, image_sizes=sizes, attend=kind.attend, prefix_lengths=prefixes, parent_ids=parents, backend=backend)
        merged = vlm_fuse.merge(tokens, image_embeds=features, image_token_id=IMAGE, plan=plan, backend=backend, **text)
    else:
        # a tensor of every image, or one of all
        images = dict(image_embeds=features.split(sizes)) if fused else dict(image_embeds=features, image_sizes=sizes)
        merged = vlm_fuse.merge(**given, **images, image_token_id=IMAGE, attend=kind.attend, backend=backend, **text)
    return (merged, batch, embedded) if leaf else (merged, batch)


def positions_of(scheme: str, kind: Kind, merged, batch: Batch) -> torch.Tensor:
    """Those of the library: (G, W), for M-RoPE (3, G, W)."""
    if scheme not in AXES:
        return merged.position_ids
    grids = torch.tensor([(1, 2 * height, 2 * width) for sample in kind.samples for height, width in sample.grids])
    types = merged.kind_ids.clamp(min=0).long()
    if "document_ids" in batch.arguments or merged.plan.layout == "packed":
        made, _ = vlm_fuse.mrope_position_ids(types, image_grid_thw=grids, document_ids=merged.document_ids)
        made = made[1:]  # the first row are those of text
    else:
        made, _ = vlm_fuse.mrope_position_ids(types, image_grid_thw=grids, attention_mask=merged.attention_mask)
    if kind.parents is not None:  # branches go on where their parent ends
        made = made.clone()
        for (g, rows), parent in zip(batch.rows, kind.parents):
            if parent >= 0:
                made[:, g, rows] += int(made[:, batch.rows[parent][0], batch.rows[parent][1]].max()) + 1
    return made


def result_of(model, batch: Batch, states, logits, labels, raw) -> Result:
    """Cut into documents. Without a graph, without gradients."""
    losses = losses_of_rows(logits, labels)
    cut = [[x[g][rows] for g, rows in batch.rows] for x in (states, logits, losses)]
    mean = losses.sum() / (labels[:, 1:] != IGNORE).sum()
    grads = gradients(model, raw, losses.sum()) if logits.requires_grad else {}
    return placed(Result(*([x.detach() for x in found] for found in cut[:2]), [x.detach().sum() for x in cut[2]], mean.detach(), grads), "cpu")


def packed(scheme: str, name: str, layout: str, rendering: str, change=None, device: str = "cpu", **more) -> Result:
    """`change`: of what the library says, a SimpleNamespace of positions, attend and labels, in place."""
    model, kind = decoder(scheme, device=device), KINDS[name]
    raw = raw_features(kind.samples).to(device).requires_grad_()
    # flex has no backward on a CPU, nor takes a tensor that wants one
    with torch.set_grad_enabled(rendering != "flex" and change is None):
        merged, batch = merged_batch(model, kind, layout, raw, **more)
        said = SimpleNamespace(positions=positions_of(scheme, kind, merged, batch), attend=rendered(rendering, merged.mask), labels=merged.labels)
        if change is not None:
            change(said, merged, kind, batch)
        states, logits = model(merged.inputs_embeds, said.positions, said.attend)
        return result_of(model, batch, states, logits, said.labels, raw)


def deviation(one: torch.Tensor, other: torch.Tensor) -> float:
    assert one.shape == other.shape and one.dtype == other.dtype == torch.float64
    return float((one - other).abs().max()) if one.numel() else 0.0


def assert_equal_to(wanted: Result, made: Result, what: str) -> None:
    def close(one, other, part):
        # NaN is not below anything
        assert deviation(one, other) <= EQUAL, f"{what}: {part} differ by {deviation(one, other)}"

    for part in ("hidden", "logits", "losses"):
        ones, others = getattr(made, part), getattr(wanted, part)
        assert len(ones) == len(others)
        for number, (one, other) in enumerate(zip(ones, others)):
            close(one, other, f"{part} of document {number}")
    close(made.mean, wanted.mean, "mean losses")
    for name, grad in made.grads.items():
        close(grad, wanted.grads[name], f"gradients of {name}")


# --- equal --------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@every_kind
@every_scheme
def test_equal_to_each_sample_alone(scheme, name):
    """In every layout, by one rendering after the other (two where positions are turned); flex, which is slow and gives no
    gradient, in one layout."""
    kind, wanted = KINDS[name], alone(scheme, name)
    renderings = ["dense", "additive"] if scheme == "alibi" else ["dense", "segments", "additive"]
    layouts = layouts_of(kind)
    turn = list(KINDS).index(name) + SCHEMES.index(scheme)
    for number, layout in enumerate(layouts):
        for step in range(2 if scheme == "rope" else 1):
            rendering = renderings[(number + turn + step) % len(renderings)]
            made = packed(scheme, name, layout, rendering, fused=bool((number + turn) % 2))
            assert len(made.grads) == len(wanted.grads)
            assert_equal_to(wanted, made, f"{layout}, {rendering}")
    made = packed(scheme, name, layouts[turn % len(layouts)], "flex")
    assert_equal_to(wanted, made, f"{layouts[turn % len(layouts)]}, flex")


@every_kind
@pytest.mark.parametrize("scheme", ["rope", *list(AXES)[:1]])
def test_positions_are_those_counted_alone(scheme, name):
    """To the number: under isolation RoPE itself would not see documents that begin elsewhere than at 0."""
    kind = KINDS[name]
    for layout in layouts_of(kind):
        merged, batch = merged_batch(decoder("rope"), kind, layout, raw_features(kind.samples))
        made = positions_of(scheme, kind, merged, batch)
        for number, (g, rows) in enumerate(batch.rows):
            parent = -1 if kind.parents is None else kind.parents[number]
            before = [kind.samples[parent]] if parent >= 0 else []
            wanted = counted(scheme, [*before, kind.samples[number]])[..., -len(rows) :]
            assert_bits(made[..., g, rows], wanted, f"{layout}, document {number}")


# --- not equal where isolation is off -------------------------------------------------------------------------------------


def one_document(said, merged, kind, batch):
    """The mask of the same kind over the row as if it were one document."""
    documents = torch.where(merged.attention_mask, 0, -1)[0].tolist()
    first = None if kind.prefixes is None else kind.prefixes[0]
    masks = merged.mask if isinstance(merged.mask, Mapping) else {"local": merged.mask, "global": merged.mask}
    attends = kind.attend if isinstance(kind.attend, Mapping) else {layer_type: kind.attend for layer_type in masks}
    said.attend = {
        layer_type: by_bool(torch.tensor(oracle.may_see(documents, merged.image_ids[0].tolist(), prefix_lengths=first, **vars(attend))))
        for layer_type, attend in attends.items()
    }


def one_triangle(said, merged, kind, batch):
    said.attend = by_bool(torch.ones(2 * merged.attention_mask.shape[1:], dtype=torch.bool).tril())


def run_on(said, merged, kind, batch):
    """Positions that count through the row, images counted as M-RoPE does."""
    if said.positions.dim() == 3:
        said.positions = torch.zeros_like(said.positions)
        said.positions[:, merged.attention_mask] = counted("mrope_chunked", list(kind.samples))
    else:
        said.positions = merged.attention_mask.long().cumsum(1) - 1


def run_on_in_one_number(said, merged, kind, batch):
    """All three numbers of M-RoPE the row's index."""
    said.positions = (merged.attention_mask.long().cumsum(1) - 1).expand(3, -1, -1)


def counted_anew(said, merged, kind, batch):
    """Branches that do not go on where their parent ends."""
    for (g, rows), sample in zip(batch.rows, kind.samples):
        said.positions[..., g, rows] = counted("mrope_chunked" if said.positions.dim() == 3 else "rope", [sample])


def one_row(kind: Kind) -> str:
    return "row_with_document_ids" if kind.holes_count else "packed"


def differences(wanted: Result, made: Result) -> list[float]:
    """The largest of each document, over hidden states and logits."""
    return [
        max(deviation(getattr(made, part)[number], getattr(wanted, part)[number]) for part in ("hidden", "logits"))
        for number in range(len(wanted.logits))
    ]


@every_kind
@every_scheme
@pytest.mark.parametrize("change", [one_document, one_triangle])
def test_unequal_where_documents_see_each_other(scheme, name, change):
    kind, wanted = KINDS[name], alone(scheme, name)
    made = packed(scheme, name, one_row(kind), "dense", change)
    found = differences(wanted, made)
    assert min(found[1:]) > UNEQUAL, found
    told = [abs(one - other) for one, other in zip(made.losses[1:], wanted.losses[1:]) if other]
    assert told and min(told) > 1e4 * EQUAL  # a sum of differences
    causal = isinstance(kind.attend, Mapping) or kind.attend.kind == "causal"
    if causal and change is one_document:
        assert found[0] <= EQUAL, "what stands before it, the first document does not see"


@every_kind
@every_scheme
def test_positions_that_run_on(scheme, name):
    """Under isolation they matter where positions are absolute; where they are relative, only to a branch and its parent."""
    if scheme == "none":
        return
    kind, wanted = KINDS[name], alone(scheme, name)
    found = differences(wanted, packed(scheme, name, one_row(kind), "dense", run_on))
    for number, difference in enumerate(found):
        branch = kind.parents is not None and kind.parents[number] >= 0
        if number and (scheme == "learned" or branch):
            assert difference > UNEQUAL, (number, found)
        else:
            assert difference <= EQUAL, (number, found)
    if scheme in AXES:
        found = differences(wanted, packed(scheme, name, one_row(kind), "dense", run_on_in_one_number))
        for number, sample in enumerate(kind.samples):
            # of an image of one row and two columns, neither matters to a causal mask of one number
            if sample.grids and sample.sizes != [2]:
                assert found[number] > UNEQUAL, (number, found)
            elif not sample.grids and (kind.parents is None or kind.parents[number] < 0):
                assert found[number] <= EQUAL, (number, found)


@pytest.mark.parametrize("name", ["parents", "parents_and_images"])
@every_scheme
def test_branches_whose_positions_do_not_go_on_from_their_parent(scheme, name):
    if scheme == "none":
        return
    found = differences(alone(scheme, name), packed(scheme, name, "packed", "dense", counted_anew))
    for number, parent in enumerate(KINDS[name].parents):
        assert found[number] > UNEQUAL if parent >= 0 else found[number] <= EQUAL, found


@pytest.mark.parametrize("layout", ["packed", "packed_to_a_length", "expanded_and_packed", "row_with_document_ids", "rows_with_document_ids", "rows_packed_again"])
def test_losses_where_a_document_is_taught_to_the_one_before(layout):
    """The labels as they were given, of text alone: each document's first token is one more loss."""

    def as_given(said, merged, kind, batch):
        labels = torch.full_like(merged.labels, IGNORE)
        for (g, rows), sample in zip(batch.rows, kind.samples):
            kept = [IGNORE if token == IMAGE else label for token, label, here in zip(sample.ids, sample.labels, sample.there) if here]
            labels[g, rows] = torch.tensor(kept)
        assert labels.ne(merged.labels).sum() == sum(sample.text[0] != "I" for sample in kind.samples)
        said.labels = labels

    for name in ("causal", "holes"):
        wanted, made = alone("rope", name), packed("rope", name, layout, "dense", as_given)
        assert max(differences(wanted, made)) <= EQUAL
        assert sum(made.losses) > sum(wanted.losses) + UNEQUAL and abs(made.mean - wanted.mean) > UNEQUAL
        firsts = [one - other for one, other in zip(made.losses, wanted.losses)]
        second_row = 3 if layout.startswith("rows_with") else 0
        for number, (first, sample) in enumerate(zip(firsts, KINDS[name].samples)):
            # at the start of a row nothing is there to be taught
            assert (first > UNEQUAL) == (sample.text[0] != "I" and number not in (0, second_row)), (name, number)


# --- to the bit -----------------------------------------------------------------------------------------------------------


class Bits(NamedTuple):
    """Of every document, all that may not move where another document is changed."""

    hidden: list[torch.Tensor]
    logits: list[torch.Tensor]
    losses: list[torch.Tensor]
    text_grads: list[torch.Tensor]  # of the rows given to merge
    image_grads: list[torch.Tensor]  # of raw features


def other_letters(sample: Sample) -> Sample:
    return Sample("".join(letter if letter in "I." else chr(ord("a") + (ord(letter) - ord("a") + 9) % 20) for letter in sample.text), sample.grids)


def bits_of(scheme: str, kind: Kind, layout: str, rendering: str, dtype: torch.dtype, raw: torch.Tensor, only: int | None = None, ids=None) -> Bits:
    """`only`: the loss of that document alone. `ids`: a change to input_ids."""
    model = decoder(scheme, dtype)
    raw = raw.to(dtype, copy=True).requires_grad_()
    merged, batch, text = merged_batch(model, kind, layout, raw, ids=ids, leaf=True)
    logits_of = model(merged.inputs_embeds, positions_of(scheme, kind, merged, batch), rendered(rendering, merged.mask))
    losses = losses_of_rows(logits_of[1], merged.labels)
    hidden, logits, each = ([x[g][rows] for g, rows in batch.rows] for x in (*logits_of, losses))
    loss = losses.sum() if only is None else each[only].sum()
    inside, text, images = torch.autograd.grad(loss, (merged.inputs_embeds, text, raw))
    if loss.isfinite():
        assert inside[~merged.attention_mask].eq(0).all(), "no gradient comes from padding"
        tokens = torch.zeros(text.shape[:2], dtype=torch.bool)
        for b, places in batch.places:
            tokens[b, places] = True
        assert text[~tokens].eq(0).all(), "nor goes to padding"
    return Bits(hidden, logits, each, [text[b][places] for b, places in batch.places], list(images.split([sum(sample.sizes) for sample in kind.samples])))


def changed_in(kind: Kind, number: int, values=None) -> tuple[Kind, torch.Tensor]:
    """Other tokens and other features in one document; or `values` for features."""
    samples = tuple(other_letters(sample) if at == number else sample for at, sample in enumerate(kind.samples))
    raw = raw_features(kind.samples)
    own = raw.split([sum(sample.sizes) for sample in kind.samples])[number]
    own.copy_(own.flip(0).flip(1) * 1.5 + 0.1 if values is None else torch.as_tensor(values, dtype=raw.dtype).expand_as(own))
    return kind._replace(samples=samples), raw


def assert_others_unmoved(before: Bits, after: Bits, reached: list[bool], what: str) -> None:
    for part in Bits._fields:
        for number, (one, other) in enumerate(zip(getattr(after, part), getattr(before, part))):
            if not reached[number]:
                assert_bits(one, other, f"{what}: {part} of document {number}")


two_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
three_renderings = pytest.mark.parametrize("rendering", ["dense", "additive", "segments"])


@every_kind
@three_renderings
@two_dtypes
def test_a_change_in_one_document_moves_no_bit_of_another(name, rendering, dtype):
    kind = KINDS[name]
    turn = list(KINDS).index(name)
    layouts = layouts_of(kind)
    for number in (0, 2):
        layout = layouts[(turn + number) % len(layouts)]
        before = bits_of("rope", kind, layout, rendering, dtype, raw_features(kind.samples))
        other, raw = changed_in(kind, number)
        after = bits_of("rope", other, layout, rendering, dtype, raw)
        family = families(kind)
        reached = [one == family[number] for one in family]
        assert_others_unmoved(before, after, reached, layout)
        for part in Bits._fields:
            assert not torch.equal(getattr(before, part)[number], getattr(after, part)[number]), "nothing was changed"


@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if scheme != "rope"])
@two_dtypes
def test_a_change_moves_no_bit_of_another_document_in_any_scheme(scheme, dtype):
    for name in ("causal", "gemma3"):
        kind = KINDS[name]
        for rendering in ("dense", "additive") if scheme == "alibi" else ("dense", "additive", "segments"):
            before = bits_of(scheme, kind, "packed_to_a_length", rendering, dtype, raw_features(kind.samples))
            other, raw = changed_in(kind, 0)
            assert_others_unmoved(before, bits_of(scheme, other, "packed_to_a_length", rendering, dtype, raw), [True, *[False] * 4], rendering)


@every_kind
@three_renderings
def test_the_loss_of_one_document_has_no_gradient_in_another(name, rendering):
    """Not a small one: zero."""
    kind = KINDS[name]
    layouts, family = layouts_of(kind), families(kind)
    for number in (0, 2):
        layout = layouts[(list(KINDS).index(name) + number) % len(layouts)]
        made = bits_of("rope", kind, layout, rendering, torch.float32, raw_features(kind.samples), only=number)
        for other in range(len(kind.samples)):
            reached = family[other] == family[number] and other in (number, family[number])
            for grad in (made.text_grads[other], made.image_grads[other]):
                assert grad.numel() == 0 or bool(grad.ne(0).any()) == reached, (layout, number, other)


@three_renderings
@two_dtypes
def test_what_padding_holds_moves_no_bit(rendering, dtype):
    """Other tokens behind the documents, before them and inside of them."""
    for name in ("holes", "holes_and_window"):
        kind = KINDS[name]
        for layout in KEEPING:
            before, after = (
                bits_of("rope", kind, layout, rendering, dtype, raw_features(kind.samples), ids=lambda ids: torch.where(ids == PAD, token, ids)) for token in (PAD, 5)
            )
            assert_others_unmoved(before, after, [False] * len(kind.samples), layout)


def test_what_follows_on_a_hole_is_predicted_by_it():
    """A record: merge leaves the label there (only a document's first token has none), and the usual shift then takes the
    logits of padding. Under an additive mask, where padding mixes all rows, other documents are in them. Take the label out,
    as the samples here do, or pack, which takes the hole out."""
    kind = KINDS["holes"]
    hole = kind.samples[2].text.index(".")

    def loss_behind_the_hole(kind, layout, rendering):
        model = decoder("rope")
        merged, batch = merged_batch(model, kind, layout, raw_features(kind.samples))
        g, rows = batch.rows[2]
        tokens = batch.arguments["input_ids"]
        labels = vlm_fuse.plan(**batch.arguments | {"labels": tokens}, image_token_id=IMAGE).labels
        assert labels[g, rows[hole]] == kind.samples[2].ids[hole + 1] != IMAGE
        _, logits = model(merged.inputs_embeds, merged.position_ids, rendered(rendering, merged.mask))
        return losses_of_rows(logits, labels)[g, rows[hole]]

    other, _ = changed_in(kind, 0)
    for layout, rendering, reached in (("row_with_document_ids", "dense", False), ("row_with_document_ids", "additive", True), ("rows_packed_again", "additive", False)):
        one, two = (loss_behind_the_hole(each, layout, rendering) for each in (kind, other))
        assert one > 0 and torch.equal(one, two) != reached, "good: what padding gives is in no loss; take this record out"


# --- NaN and infinity -----------------------------------------------------------------------------------------------------

NOT_FINITE = (float("nan"), float("inf"), -float("inf"))


def assert_not_finite_is_kept_in(kind: Kind, number: int, layout: str, rendering: str, dtype: torch.dtype, values: float) -> None:
    before = bits_of("rope", changed_in(kind, number)[0], layout, rendering, dtype, raw_features(kind.samples))
    other, raw = changed_in(kind, number, values)
    after = bits_of("rope", other, layout, rendering, dtype, raw)
    assert not after.logits[number].isfinite().any(-1).all()
    assert_others_unmoved(before, after, [one == number for one in range(len(kind.samples))], f"{layout}, {values}")


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.parents is None])
def test_nan_in_the_features_of_one_document_reaches_no_other(name, monkeypatch):
    """By vlm_fuse.attention on a CPU, forward and backward, where documents are computed apart: here also short ones, which
    it would join. Not those that stand between a parent and its branch: they are computed with both."""
    monkeypatch.setattr(paths, "_SMALL_ROWS", 0)
    monkeypatch.setattr(paths, "_SMALL_MASKED_ROWS", 0)
    layouts = layouts_of(KINDS[name])
    for number, values in zip((0, 2, 2), NOT_FINITE):
        for dtype in (torch.float32, torch.bfloat16):
            assert_not_finite_is_kept_in(KINDS[name], number, layouts[(list(KINDS).index(name) + number) % len(layouts)], "segments", dtype, values)


LONG = tuple(Sample("IIIIab" + "cdefghij" * ((rows - 6) // 8), ((2, 2),)) for rows in (38, 38, 134, 134, 38))


@pytest.mark.parametrize("name", ["causal", "full", "window", "images", "sinks"])
@pytest.mark.parametrize("values", NOT_FINITE)
def test_nan_in_the_features_of_a_long_document(name, values):
    """As the library comes: causal and full documents of more than 32 rows are computed apart, others of more than 128."""
    kind = KINDS[name]._replace(samples=LONG)
    long = (0, 1, 4) if name in ("causal", "full") else (2,)
    for number in long:
        assert_not_finite_is_kept_in(kind, number, "packed", "segments", torch.float32, values)


def test_where_nan_passes_on_to_other_documents():
    """A record of what does not hold: a product with a weight of zero is NaN all the same. Under a mask over the whole row
    (additive, and SDPA's too in torch 2.13), and where vlm_fuse.attention joins short documents to save calls."""
    kind = KINDS["causal"]
    for rendering in ("additive", "segments"):
        other, raw = changed_in(kind, 0, float("nan"))
        made = bits_of("rope", other, "packed", rendering, torch.float32, raw)
        assert not any(logits.isfinite().any() for logits in made.logits), "good: NaN stays in its document; take this record out"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_merge_puts_nan_into_its_own_rows_only(layout):
    kind = KINDS["causal"]
    other, raw = changed_in(kind, 2, float("nan"))
    merged, batch = merged_batch(decoder("rope"), other, layout, raw)
    for number, ((g, rows), sample) in enumerate(zip(batch.rows, kind.samples)):
        nan = merged.inputs_embeds[g][rows].isnan()
        is_image = torch.tensor([token == IMAGE for token in sample.ids])
        assert torch.equal(nan, (is_image if number == 2 else is_image & False)[:, None].expand(nan.shape))


# --- backends -------------------------------------------------------------------------------------------------------------


def test_equal_by_every_backend(backend, device):
    """Plan, rows, masks and their gradients; which one "auto" takes is tested above with everything else."""
    names = ["gemma3"] if backend == "triton" and device == "cpu" else ["gemma3", "parents", "holes", "prefix_and_window", "sinks"]
    with serving(backend):
        for name in names:
            layouts = ["packed"] if len(names) == 1 else layouts_of(KINDS[name])
            for layout in layouts:
                made = packed("learned", name, layout, "dense", backend=backend, device=device, fused=layout in KEEPING)
                assert_equal_to(alone("learned", name), made, f"{name}, {layout}")


# --- models of transformers -----------------------------------------------------------------------------------------------

TINY = dict(
    hidden_size=D, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16, vocab_size=small_decoder.VOCABULARY,
    max_position_embeddings=64, initializer_range=0.2, tie_word_embeddings=False,
)  # fmt: skip


@functools.cache
def tiny_model(family: str):
    """A language model of transformers in float64: (what it is called, the module below its head, its head)."""
    transformers = pytest.importorskip("transformers", minversion="5.13")
    torch.manual_seed(0)
    if family == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY)).double().eval()
        return model, model.model, model.lm_head
    ids = dict(image_token_id=IMAGE, video_token_id=39, vision_start_token_id=38, vision_end_token_id=37)
    if family == "qwen2_5_vl":
        text = dict(TINY, rope_parameters=dict(rope_type="default", rope_theta=1e2, mrope_section=[2, 3, 3]))
        vision = dict(depth=1, hidden_size=16, out_hidden_size=D, intermediate_size=16, num_heads=2, fullatt_block_indexes=[0])
        config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **ids)
        model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    else:
        text = dict(TINY, rope_parameters=dict(rope_type="default", rope_theta=1e2, mrope_section=[4, 2, 2], mrope_interleaved=True))
        vision = dict(depth=1, hidden_size=16, out_hidden_size=D, intermediate_size=16, num_heads=2, deepstack_visual_indexes=[0])
        config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **ids)
        model = transformers.Qwen3VLForConditionalGeneration(config)
    model = model.double().eval()
    return model, model.model.language_model, model.lm_head


def in_float64(model, monkeypatch) -> None:
    """What transformers computes in float32 whatever the model's dtype: norms, and the softmax of eager attention."""

    def normed(norm):
        return lambda x: norm.weight * F.rms_norm(x, x.shape[-1:], eps=norm.variance_epsilon)

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            monkeypatch.setitem(module.__dict__, "forward", normed(module))
    softmax = F.softmax
    monkeypatch.setattr(F, "softmax", lambda x, dim=None, dtype=None: softmax(x, dim=dim, dtype=None if x.dtype == torch.float64 else dtype))


@pytest.mark.parametrize("name, scheme", [("qwen2_5_vl", "mrope_chunked"), ("qwen3_vl", "mrope_interleaved")])
def test_the_small_decoder_turns_as_the_models_do(name, scheme):
    """Which of the three numbers turns which pair; angles are of float32 there."""
    positions = torch.randint(0, 60, (3, 2, 7), generator=torch.Generator().manual_seed(0))
    theirs = tiny_model(name)[1].rotary_emb(torch.zeros(1, dtype=torch.float64), positions)
    for ours, other in zip(small_decoder.rope(positions, scheme, torch.float64), theirs):
        assert deviation(ours[:, 0], other) <= 1e-5


class Family:
    """A model of transformers on rows, as the small decoder takes them. Qwen3-VL's features come in once more behind the first
    layer (DeepStack)."""

    def __init__(self, name: str, implementation: str):
        self.name, (self.model, self.decoder, self.head) = name, tiny_model(name)
        self.model.set_attn_implementation(implementation)
        self.mrope = name != "llama"
        self.parameters = dict(self.decoder.named_parameters()) | {"head": self.head.weight}

    def __call__(self, rows, positions, images, features, **kwargs):
        if self.name == "qwen3_vl":
            kwargs.update(visual_pos_masks=images, deepstack_visual_embeds=[features * 0.5])
        kwargs.pop("mm_token_type_ids", None)
        return self.head(self.decoder(inputs_embeds=rows, position_ids=positions, use_cache=False, **kwargs).last_hidden_state)

    def gradients(self, features, loss):
        named = self.parameters | {"image features": features}
        return dict(zip(named, torch.autograd.grad(loss, list(named.values()), materialize_grads=True)))


def features_for(samples) -> torch.Tensor:
    raw = raw_features(samples)
    return (raw @ torch.randn(RAW, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) / 4).requires_grad_()


def alone_in(family: Family, samples) -> Result:
    """No mask, no document_ids: the model's own way with a single sample."""
    features = features_for(samples)
    logits, losses, tokens = [], [], 0
    for sample, own in zip(samples, features.split([sum(sample.sizes) for sample in samples])):
        ids = torch.tensor(sample.ids)
        rows = family.model.get_input_embeddings()(ids).index_put((ids == IMAGE,), own)
        positions = counted("mrope_chunked" if family.mrope else "rope", [sample]).unsqueeze(-2)
        logits.append(family(rows[None], positions, (ids == IMAGE)[None], own)[0])
        labels = torch.where(ids == IMAGE, IGNORE, torch.tensor(sample.labels))[1:]
        losses.append(losses_of(logits[-1][:-1], labels).sum())
        tokens += int((labels != IGNORE).sum())
    loss = sum(losses)
    return Result([], [x.detach() for x in logits], [x.detach() for x in losses], loss.detach() / tokens, family.gradients(features, loss))


def packed_in(family: Family, implementation: str, samples, layout: str, isolated: bool = True) -> tuple[Result, torch.Tensor]:
    """The result, and the mean loss that the model itself gives for merge's labels."""
    features = features_for(samples)
    batch = LAYOUTS[layout](samples)
    sizes = [size for sample in samples for size in sample.sizes]
    merged = vlm_fuse.merge(
        **batch.arguments, weight=family.model.get_input_embeddings().weight, image_embeds=features, image_token_id=IMAGE, image_sizes=sizes
    )  # fmt: skip
    given = merged.model_kwargs(implementation)
    positions = given.pop("position_ids")
    if family.mrope:
        positions = positions_of("mrope_chunked", KINDS["causal"]._replace(samples=samples), merged, batch)
    if not isolated:
        given["attention_mask"] = torch.ones_like(merged.attention_mask)
    logits = family(merged.inputs_embeds, positions, merged.kind_ids == 1, features, **given)
    losses = losses_of_rows(logits, merged.labels)
    cut = [[x[g][rows].detach() for g, rows in batch.rows] for x in (logits, losses)]
    mean = losses.sum().detach() / (merged.labels[:, 1:] != IGNORE).sum()
    own = family.model.loss_function(logits=logits, labels=merged.labels, vocab_size=logits.shape[-1]).detach()
    return Result([], cut[0], [x.sum() for x in cut[1]], mean, family.gradients(features, losses.sum())), own


@pytest.mark.parametrize("layout", ["packed", "packed_to_a_length", "rows_with_document_ids"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "qwen2_5_vl", "qwen3_vl"])
def test_transformers_models_on_packed_rows(name, implementation, layout, monkeypatch):
    """Logits, losses and every gradient, of merge's rows and model_kwargs. Where transformers takes norms and the softmax in
    float32, equality ends at what float32 rounds; told to take them in float64, it is that of the small decoder."""
    family = Family(name, implementation)
    wanted, (made, own) = alone_in(family, SAMPLES), packed_in(family, implementation, SAMPLES, layout)
    for part in ("logits", "losses"):
        for number, (one, other) in enumerate(zip(getattr(made, part), getattr(wanted, part))):
            assert deviation(one, other) <= 1e-5, (part, number)
    for parameter, grad in made.grads.items():
        assert deviation(grad, wanted.grads[parameter]) <= 1e-5 * max(1, float(grad.abs().max())), parameter
    # logits are cast to float32 for the model's own loss
    assert abs(float(own) - float(wanted.mean)) <= 1e-5
    with monkeypatch.context() as patch:
        in_float64(family.model, patch)
        wanted, (made, _) = alone_in(family, SAMPLES), packed_in(family, implementation, SAMPLES, layout)
        assert_equal_to(wanted, made, f"{name}, {implementation}, {layout}")
        leaking, _ = packed_in(family, implementation, SAMPLES, layout, isolated=False)
        in_row = [g for g, _ in LAYOUTS[layout](SAMPLES).rows]
        for number, (one, other) in enumerate(zip(leaking.logits, wanted.logits)):
            first = number == in_row.index(in_row[number])
            assert deviation(one, other) <= EQUAL if first else deviation(one, other) > UNEQUAL, number
