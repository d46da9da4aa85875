"""The cases, made once and run by every backend: hand-written ones with ids in words, and strategies for random batches.

A sample is written as a string: letters are text, ``I V A`` are placeholders of the first, second and third kind, ``.`` is
padding, ``_`` is text under attention_mask 0 and ``i v a`` would be text, so ``! ? ;`` are placeholders of the three kinds
under attention_mask 0.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st

from oracle import Given, Kind, answer

VOCABULARY = 40
PAD_TOKEN = 0
TOKENS = (33, 34, 35)
PLACEHOLDERS, MASKED_PLACEHOLDERS = "IVA", "!?;"


def written(*samples, sizes=(), rows=(), counts=(), tokens=TOKENS, documents=None, labels=True, **options) -> Given:
    """The batch that strings describe. `sizes`, `rows`, `counts`: one entry a kind, None where not known."""
    width = max(map(len, samples), default=options.pop("width", 0))
    ids, mask = [], []
    for sample in samples:
        assert len(sample) == width, f"{sample!r} is not {width} long"
        line = []
        for letter in sample:
            if letter in PLACEHOLDERS:
                line.append(tokens[PLACEHOLDERS.index(letter)])
            elif letter in MASKED_PLACEHOLDERS:
                line.append(tokens[MASKED_PLACEHOLDERS.index(letter)])
            else:
                line.append(PAD_TOKEN if letter == "." else 1 if letter == "_" else 2 + ord(letter) - ord("a"))
        ids.append(tuple(line))
        mask.append(tuple(int(letter not in "._!?;") for letter in sample))
    letters = set("".join(samples))
    kinds_seen = [c + 1 for c in range(3) if {PLACEHOLDERS[c], MASKED_PLACEHOLDERS[c]} & letters]
    used = max(len(sizes), len(rows), len(counts), *kinds_seen, 1)
    total = [sum(line.count(tokens[c]) for line in ids) for c in range(used)]
    kinds = []
    for c in range(used):
        size = sizes[c] if c < len(sizes) else None
        count = counts[c] if c < len(counts) else None
        row = rows[c] if c < len(rows) and rows[c] is not None else sum(size) if size is not None else sum(count) if count is not None else total[c]
        kinds.append(Kind(tokens[c], row, None if size is None else tuple(size), None if count is None else tuple(count)))
    masked = any(0 in line for line in mask)
    return Given(
        tuple(ids),
        tuple(kinds),
        attention_mask=tuple(mask) if masked else None,
        document_ids=None if documents is None else tuple(tuple(-1 if d == "-" else int(d) for d in line) for line in documents),
        labels=tuple(tuple(100 * b + t for t in range(width)) for b in range(len(ids))) if labels else None,
        width=width,
        **options,
    )


@dataclass(frozen=True)
class Case:
    """A batch and how its tensors are written down."""

    name: str
    given: Given
    forms: tuple[str, ...] = ()  # of each kind: "rows" (N, D), "images" (images, P, D), "list" of (P_i, D)
    D: int = 8
    text: str = "embeds"  # or "weight"
    scale: float | None = None
    combine: str = "replace"
    mask_instead_of_id: bool = False
    dtype: torch.dtype = torch.float32
    feature_dtypes: tuple[torch.dtype, ...] = ()
    id_dtype: torch.dtype = torch.int64
    document_dtype: torch.dtype = torch.int32
    mask_dtype: torch.dtype = torch.int64
    label_dtype: torch.dtype = torch.int64

    def form(self, c: int) -> str:
        return self.forms[c] if c < len(self.forms) else "rows"

    def feature_dtype(self, c: int) -> torch.dtype:
        return self.feature_dtypes[c] if c < len(self.feature_dtypes) else self.dtype

    @property
    def flat_tokens(self) -> list[int]:
        return [token for line in self.given.tokens for token in line]

    def answer(self):
        return answer(self.given)

    def integers(self, lines, dtype, device="cpu"):
        B = len(self.given.tokens)
        return None if lines is None else torch.tensor(lines, dtype=dtype, device=device).view(B, self.given.T)

    def input_ids(self, device="cpu"):
        return self.integers(self.given.tokens, self.id_dtype, device)

    def settings(self, device="cpu") -> dict:
        """The arguments that merge and plan share, without image_token_id, image_sizes and feature_counts."""
        given = self.given
        return dict(
            attention_mask=self.integers(given.attention_mask, self.mask_dtype, device),
            document_ids=self.integers(given.document_ids, self.document_dtype, device),
            labels=self.integers(given.labels, self.label_dtype, device),
            scheme=given.scheme,
            layout=given.layout,
            padding_side=given.padding_side,
            length=given.length,
            unused_features="allow" if given.unused else "error",
        )

    def kinds_for_plan(self, device="cpu") -> dict:
        """image_token_id (or placeholder_mask), image_sizes and feature_counts as plan() takes them."""
        given, kinds = self.given, self.given.kinds
        out = {}
        if self.mask_instead_of_id:
            out["placeholder_mask"] = self.integers(given.tokens, torch.int64, device) == kinds[0].token
        elif len(kinds) == 1:
            out["image_token_id"] = kinds[0].token
        elif kinds:
            out["image_token_id"] = tuple(kind.token for kind in kinds)
        sizes = {kind.token: list(kind.sizes) for kind in kinds if kind.sizes is not None}
        counts = {kind.token: torch.tensor(kind.counts, dtype=torch.int64, device=device) for kind in kinds if kind.counts is not None}
        if sizes:
            out["image_sizes"] = sizes if len(kinds) > 1 else sizes[kinds[0].token]
        if counts:
            out["feature_counts"] = counts if len(kinds) > 1 else counts[kinds[0].token]
        return out

    def kinds_for_merge(self, features, device="cpu") -> dict:
        """image_embeds with what tells its images, as merge() takes them; `features`: one entry a kind, in its form."""
        out = self.kinds_for_plan(device)
        kinds = self.given.kinds
        if len(kinds) > 1:
            out.pop("image_token_id")
            out["image_embeds"] = {kind.token: feature for kind, feature in zip(kinds, features)}
        elif kinds:
            out["image_embeds"] = features[0]
        sizes = {kind.token: list(kind.sizes) for c, kind in enumerate(kinds) if kind.sizes is not None and self.form(c) == "rows"}
        out.pop("image_sizes", None)
        if sizes:
            out["image_sizes"] = sizes if len(kinds) > 1 else sizes[kinds[0].token]
        return out

    def tensors(self, seed: int = 0, device="cpu") -> Tensors:
        return Tensors(self, seed, device)


class Tensors:
    """Random rows of a case: text (B, T, D) or weight (V, D), and the features of every kind in its form."""

    def __init__(self, case: Case, seed: int, device: str):
        generator = torch.Generator().manual_seed(seed)

        def rows(*shape, dtype):
            wide = torch.randn(*shape, generator=generator, dtype=torch.float64) * 3
            return wide.to(torch.float32).to(dtype).to(device)

        self.case = case
        given = case.given
        self.text = rows(len(given.tokens), given.T, case.D, dtype=case.dtype) if case.text == "embeds" else None
        self.weight = rows(VOCABULARY, case.D, dtype=case.dtype) if case.text == "weight" else None
        self.features = []
        for c, kind in enumerate(given.kinds):
            dtype = case.feature_dtype(c)
            if case.form(c) == "list":
                self.features.append([rows(size, case.D, dtype=dtype) for size in kind.sizes])
            elif case.form(c) == "images":
                self.features.append(rows(len(kind.sizes), kind.sizes[0] if kind.sizes else 3, case.D, dtype=dtype))
            else:
                self.features.append(rows(kind.rows, case.D, dtype=dtype))

    @property
    def leaves(self) -> list:
        """Every tensor that can take a gradient: text or weight first."""
        first = self.text if self.text is not None else self.weight
        return [first] + [leaf for entry in self.features for leaf in (entry if isinstance(entry, list) else [entry])]

    def require_grad(self) -> Tensors:
        for leaf in self.leaves:
            leaf.requires_grad_()
        return self

    def merge_arguments(self) -> dict:
        case = self.case
        device = self.leaves[0].device
        out = case.settings(device) | case.kinds_for_merge(self.features, device) | dict(combine=case.combine)
        if self.text is not None:
            out["inputs_embeds"] = self.text
        else:
            out["weight"] = self.weight
        if case.scale is not None:
            out["embed_scale"] = case.scale
        return out

    def feature_rows(self) -> list:
        """The feature rows that the plan numbers, kinds one after another, as single (D,) tensors."""
        flat = []
        for kind, entry in zip(self.case.given.kinds, self.features):
            rows = []
            for tensor in entry if isinstance(entry, list) else [entry]:
                rows += list(tensor.flatten(0, -2))
            flat += rows[: kind.numbered]
        return flat

    def oracle_arguments(self) -> dict:
        return dict(
            text=None if self.text is None else self.text.flatten(0, 1),
            weight=self.weight,
            tokens=self.case.flat_tokens,
            scale=self.case.scale,
            features=self.feature_rows(),
            combine=self.case.combine,
        )


def _case(name, *samples, D=8, forms=(), text="embeds", scale=None, combine="replace", mask_instead_of_id=False, kind_options=None, **options) -> Case:
    return Case(name, written(*samples, **options), forms, D, text, scale, combine, mask_instead_of_id, **(kind_options or {}))


def _special() -> list[Case]:
    c = _case
    cases = [
        # layout keep, one kind
        c("one_image", "abIIIcd"),
        c("one_image_mask_instead_of_id", "abIIIcd", mask_instead_of_id=True),
        c("one_row", "aIb"),
        c("only_text", "abcdef"),
        c("only_image", "IIII"),
        c("image_at_first_token", "IIIab", "IIabc"),
        c("image_at_last_token", "abIII", "abcII"),
        c("two_images_left_padded", "..aIIbIIIc", "aIIIIbcIIf"),
        c("two_images_right_padded", "aIIbIIIc..", "aIIIIbcIIf"),
        c("two_adjacent_images_by_sizes", "aIIIIIb", sizes=[(2, 3)]),
        c("two_adjacent_images_as_list", "aIIIIIb", sizes=[(2, 3)], forms=("list",)),
        c("two_adjacent_images_as_tensor", "aIIIIb", sizes=[(2, 2)], forms=("images",)),
        c("two_adjacent_images_without_sizes", "aIIIIIb"),
        c("run_broken_by_marks", "aIIrIIrIIe", "IIrIIeabcd", sizes=[(6, 4)]),
        c("run_broken_by_marks_without_sizes", "aIIrIIrIIe", "IIrIIeabcd"),
        c("image_of_no_rows_in_the_list", "aIIbIIc", sizes=[(2, 0, 2)], forms=("list",)),
        c("placeholder_under_the_mask", "ab!!cII", "aIIb!!c"),
        c("all_of_an_image_masked", "!!aIIb", sizes=[(2, 2)]),
        c("sample_all_padding", "aIIb", "....", "cIdI"),
        c("counts_by_sample", "aIIb", "cdef", "IaIb", counts=[(2, 0, 2)]),
        c("counts_zero_for_most", "abcd", "efgh", "aIIb", "ijkl", "mnop", counts=[(0, 0, 2, 0, 0)]),
        c("counts_and_sizes", "aIIIb", "cIIde", counts=[(3, 2)], sizes=[(3, 2)], forms=("list",)),
        c("features_but_no_placeholder", "abc", "def", rows=[4], unused=True),
        c("dummy_image_in_a_list_but_no_placeholder", "abc", "def", sizes=[(4,)], forms=("list",), unused=True),
        c("truncation_through_an_image", "abIII", sizes=[(5,)], unused=True),
        c("truncation_through_an_image_with_counts", "abIII", "cIdII", rows=[8], counts=[(5, 3)], unused=True),
        c("three_kinds", "aIVVbA", "IIVaAA"),
        c("three_kinds_mixed_forms", "aIVVbA", "IIVaAA", sizes=[(1, 2), None, (1, 2)], forms=("list", "rows", "rows")),
        c("two_kinds_counts_for_one", "aIVVb", "IIVab", counts=[None, (2, 1)]),
        c("two_kinds_one_without_placeholder", "aIIb", rows=[2, 3], unused=True),
        c("kinds_with_adjacent_runs", "IIVVIIVV"),
        c("interleaved_kinds", "IVIVIV"),
        # ids
        c("placeholder_id_equal_to_the_table", "abIIc", tokens=(VOCABULARY,), text="weight"),
        c("placeholder_id_above_the_table", "abIIc", tokens=(10**6,), text="weight"),
        c("placeholder_id_above_int32", "abIIc", tokens=(2**31 + 5,), text="weight"),
        c("negative_placeholder_id", "abIIc", tokens=(-200,), text="weight"),
        c("negative_placeholder_id_with_embeds", "abIIc", tokens=(-200,)),
        c("int32_ids", "abIIc", text="weight", kind_options=dict(id_dtype=torch.int32)),
        c("int32_negative_placeholder_id", "abIIc", tokens=(-(2**31),), kind_options=dict(id_dtype=torch.int32)),
        # weight
        c("fused_embedding", "abIIIcdab", "IIabcdcda", text="weight"),
        c("fused_embedding_scaled", "abIIIcdab", "IIabcdcda", text="weight", scale=27.712812921102035),
        c("fused_embedding_by_mask", "abIIIcd", text="weight", mask_instead_of_id=True),
        c("one_token_many_times", "aaaaaaaIa", "aaaaIIaaa", text="weight", D=5),
        # add
        c("added", "abIIIcd", "IIabcde", combine="add"),
        c("added_to_weight", "abIIIcd", "IIabcde", combine="add", text="weight"),
        c("added_to_scaled_weight", "abIIIcd", "IIabcde", combine="add", text="weight", scale=1.7),
        c("added_expanded_packed", "abIcd", "IabcI", combine="add", scheme="expand", layout="packed", sizes=[(3, 2, 2)]),
        c("added_expanded_weight_padded", "abIcd", "IabcI", combine="add", scheme="expand", layout="padded", sizes=[(3, 2, 2)], text="weight", scale=0.3),
        # documents
        c("documents_in_one_row", "abIIcdIIe", documents=["000011112"]),
        c("document_of_one_token", "abcIId", documents=["011112"]),
        c("row_with_one_document", "abIIc", documents=["00000"]),
        c("documents_with_padding_between", "abII.cdI.", documents=["5555-999-"]),
        c("nanovlm_pad_after_every_sample", "abII.cdI.", documents=["000011111"]),
        c("tail_of_a_fixed_length_row", "abIIc.....", documents=["00111-----"]),
        c("run_split_by_documents", "aIIIIb", documents=["000111"]),
        c("documents_equal_ids_in_other_rows", "abII", "abII", documents=["0011", "0011"]),
        c("documents_with_any_ids", "abIIcd", documents=["773399"]),
        c("documents_packed_again", "abII.", "..cII", documents=["7733-", "--333"], layout="packed"),
        c("documents_padded", "abII.", "..cII", documents=["7733-", "--333"], layout="padded", padding_side="left"),
        c("documents_padded_right", "ab.II.", "..cII.", documents=["77-77-", "--333-"], layout="padded"),
        c("documents_packed_hole_inside", "ab.II.", documents=["77-77-"], layout="packed"),
        c("documents_expanded", "abI.I", documents=["001-1"], scheme="expand", layout="packed", sizes=[(3, 2)]),
        c("document_of_an_empty_image", "abIc", documents=["0012"], scheme="expand", layout="packed", sizes=[(0,)]),
        c("document_that_is_all_image_of_no_rows", "abIc", documents=["0012"], scheme="expand", layout="padded", sizes=[(0,)]),
        # padded and packed
        c("left_to_right_padded", "..abII", "abcIId", layout="padded"),
        c("right_to_left_padded", "abII..", "abcIId", layout="padded", padding_side="left"),
        c("padded_with_length", "..abII", "abcIId", layout="padded", length=9),
        c("padded_left_with_length", "..abII", "abcIId", layout="padded", padding_side="left", length=9),
        c("packed", "..abII", "abcIId", "......", "IIII.."),
        c("packed_layout", "..abII", "abcIId", "......", "IIII..", layout="packed"),
        c("packed_with_length", "..abII", "abcIId", layout="packed", length=14),
        c("packed_dropped_placeholders", "a!!bII", "I!I!cd", layout="packed"),
        c("packed_three_kinds", "aIVVbA", "!IVaAA", layout="packed"),
        c("packed_holes", "a._.bI", "..I..c", layout="packed"),
        # expand
        c("expanded", "aIbIc", "dIefg", scheme="expand", layout="padded", sizes=[(3, 1, 2)]),
        c("expanded_left", "aIbIc", "dIefg", scheme="expand", layout="padded", padding_side="left", sizes=[(3, 1, 2)], forms=("list",)),
        c("expanded_packed_tensor", "aIbIc", "dIefg", scheme="expand", layout="packed", sizes=[(2, 2, 2)], forms=("images",)),
        c("expanded_empty_image", "aIbIc", "dIefg", scheme="expand", layout="packed", sizes=[(3, 0, 2)], forms=("list",)),
        c("expanded_dropped_image", "aIb!c", "dIefg", scheme="expand", layout="packed", sizes=[(3, 4, 2)]),
        c("expanded_adjacent", "IIaI", scheme="expand", layout="packed", sizes=[(2, 2, 1)]),
        c("expanded_counts", "aIbI", "cdef", "Iabc", scheme="expand", layout="padded", sizes=[(2, 1, 3)], counts=[(3, 0, 3)]),
        c("expanded_two_kinds", "aIVI", "VbcV", scheme="expand", layout="packed", sizes=[(2, 3), (1, 2, 1)], forms=("list", "rows")),
        c("expanded_unused", "aIbc", scheme="expand", layout="padded", sizes=[(2, 3)], unused=True),
        c("expanded_weight", "aIbIc", "dIefg", scheme="expand", layout="packed", sizes=[(3, 1, 2)], text="weight"),
        c("expanded_to_nothing", "I", scheme="expand", layout="packed", sizes=[(0,)]),
        # images first
        c("legacy_left_padding", "..abc", "defgh", scheme="images_first", layout="padded", padding_side="left", sizes=[(3, 3)], forms=("images",)),
        c("legacy_right_padding", "abc..", "defgh", scheme="images_first", layout="padded", sizes=[(3, 2)], forms=("list",)),
        c("legacy_packed", "..abc", "defgh", scheme="images_first", layout="packed", sizes=[(3, 2)]),
        c("legacy_text_like_placeholder", "aIIbc", scheme="images_first", layout="packed", sizes=[(3,)]),
        c("legacy_counts", "abc", "d..", "efg", scheme="images_first", layout="padded", sizes=[(2, 1, 3)], counts=[(3, 0, 3)], forms=("list",)),
        c("legacy_sample_without_text", "...", "abc", scheme="images_first", layout="packed", sizes=[(2, 2)], forms=("images",)),
        c("legacy_two_kinds", "ab.", "cde", scheme="images_first", layout="padded", sizes=[(2, 1), (1, 1)], forms=("list", "images")),
        c("legacy_weight", "..abc", "defgh", scheme="images_first", layout="padded", sizes=[(3, 2)], text="weight", scale=2.5),
        c("legacy_unused", "abc", scheme="images_first", layout="padded", sizes=[(2, 2)], forms=("images",), unused=True),
        # empty everything
        c("no_samples", width=5),
        c("no_samples_packed", width=5, layout="packed"),
        c("no_samples_padded", width=5, layout="padded"),
        c("no_tokens", "", ""),
        c("no_tokens_packed", "", "", layout="packed"),
        c("no_tokens_padded", "", "", layout="padded"),
        c("no_tokens_images_first", "", "", layout="packed", scheme="images_first", sizes=[(2, 1)]),
        c("only_padding_packed", "...", "...", layout="packed"),
        c("only_padding_padded_with_length", "...", "...", layout="padded", length=2),
        c("no_samples_weight", width=3, text="weight"),
        c("hidden_size_zero", "aIIb", D=0),
        c("hidden_size_one", "aIIb", D=1),
        c("hidden_size_odd", "aIIb", "cdII", D=7),
        c("hidden_size_thirteen_weight", "aIIb", "cdII", D=13, text="weight"),
        c("hidden_size_large", "aIIb", "cdII", D=257),
        c("hidden_size_vector", "aIIb", "cdII", D=64),
    ]
    return cases


SPECIAL = _special()
BY_NAME = {case.name: case for case in SPECIAL}
assert len(BY_NAME) == len(SPECIAL), "two cases of one name"


def long_batch(seed: int, scheme="placeholders", layout="packed", B=3, T=5000, kinds=2, with_sizes=True, with_documents=False, runs=40, smaller=1) -> Given:
    """Thousands of tokens a sample: what kernels split over blocks. Long runs of text, images and padding, and short ones.

    `smaller`: everything that many times shorter, for Triton's interpreter, whose blocks are.
    """
    import random

    rng = random.Random(seed)
    T, B, runs = (T // smaller, B, max(1, runs // smaller)) if T > smaller else (T, B // smaller, runs)
    tokens_of = [100 + c for c in range(kinds)]
    lines, mask, documents = [], [], []
    for _ in range(B):
        line, kept, ids, document = [], [], [], 0
        while len(line) < T:
            n = min(rng.choice((1, 1, 2, 3, runs, 10 * runs, 40 * runs)), T - len(line))
            what = rng.choice(["text", "text", *tokens_of])
            line += [rng.randrange(1, 90) for _ in range(n)] if what == "text" else [what] * n
            kept += [int(rng.random() > 0.1)] * n
            ids += [document] * n
            document += rng.randrange(2)
        lines.append(tuple(line))
        mask.append(tuple(kept))
        documents.append(tuple(ids))
    kinds_made = []
    for token in tokens_of:
        here = [line.count(token) for line in lines]
        if scheme == "expand":
            sizes = [rng.choice((0, 1, 1, 2, 3)) for _ in range(sum(here))]
            if sizes:
                sizes[len(sizes) // 2] = 3000 // smaller
        elif with_sizes:
            sizes = []
            for n in here:
                while n:
                    sizes.append(min(n, rng.choice((1, 2, 5, 64, 1500 // smaller))))
                    n -= sizes[-1]
        else:
            sizes = None
        rows = sum(here) if sizes is None else sum(sizes)
        kinds_made.append(Kind(token, rows, None if sizes is None else tuple(sizes)))
    labels = tuple(tuple(range(b * T, b * T + T)) for b in range(B))
    return Given(tuple(lines), tuple(kinds_made), tuple(mask), tuple(documents) if with_documents else None, labels, scheme, layout, width=T)


# -- random batches ----------------------------------------------------------------------------------------------------


@st.composite
def givens(draw, broken: bool = False, schemes=("placeholders", "expand", "images_first")) -> Given:
    """A random batch that fits its features (or, if `broken`, one whose sizes, counts or rows were touched)."""
    B, T = draw(st.integers(0, 4)), draw(st.integers(0, 9))
    scheme = draw(st.sampled_from(schemes))
    layout = draw(st.sampled_from(("keep", "padded", "packed") if scheme == "placeholders" else ("padded", "packed")))
    number = draw(st.sampled_from((1, 1, 1, 2, 3)))
    tokens_of = draw(st.sampled_from((TOKENS, (-200, 7, 10**6), (5, 6, 39))))[:number]
    letters = st.one_of(st.integers(0, 39), st.sampled_from(tokens_of), st.sampled_from(tokens_of))
    lines = []
    for _ in range(B):
        line = []
        while len(line) < T:
            line += [draw(letters)] * draw(st.sampled_from((1, 1, 2, 3)))
        lines.append(tuple(line[:T]))
    grid = lambda elements: tuple(tuple(draw(elements) for _ in range(T)) for _ in range(B))  # noqa: E731
    mask = grid(st.sampled_from((0, 1, 1, 1))) if draw(st.booleans()) else None
    labels = grid(st.integers(-100, 50)) if draw(st.booleans()) else None
    documents = None
    if scheme != "images_first" and draw(st.booleans()):
        documents = []
        for _ in range(B):
            ids, line = draw(st.permutations(range(12))), []
            for d in ids:
                line += [d] * draw(st.integers(1, 4))
            line = [draw(st.sampled_from((d, d, d, d, -1))) for d in line[:T]]
            documents.append(tuple(line))
        documents = tuple(documents)
    unused = draw(st.booleans())
    padding_side = draw(st.sampled_from(("right", "left")))
    if layout != "padded":
        padding_side = "right"
    kinds = []
    for token in tokens_of:
        sizes = counts = None
        if scheme == "placeholders":
            here = [line.count(token) for line in lines]
            if draw(st.booleans()):
                sizes = []
                for n in here:
                    while n > 0:
                        size = draw(st.integers(0, n))
                        sizes.append(size)
                        n -= size
                    if draw(st.integers(0, 5)) == 0:
                        sizes.append(0)
                if unused:
                    sizes += draw(st.lists(st.integers(0, 3), max_size=2))
            extra = draw(st.integers(0, 3)) if unused and sizes is None else 0
            rows = sum(here) + extra if sizes is None else sum(sizes)
            if draw(st.booleans()):
                counts = list(here)
                if unused:
                    for b in range(B):
                        more = draw(st.integers(0, rows - sum(counts)))
                        counts[b] += more
        elif scheme == "expand":
            here = [line.count(token) for line in lines]
            with_counts = draw(st.booleans())
            sizes = [draw(st.integers(1 if with_counts else 0, 3)) for _ in range(sum(here))]
            if with_counts:
                counts = [sum(sizes[sum(here[:b]) : sum(here[: b + 1])]) for b in range(B)]
            if unused:
                sizes += draw(st.lists(st.integers(1, 3), max_size=2))
            rows = sum(sizes)
        else:
            if draw(st.booleans()):
                sizes = [draw(st.integers(0, 3)) for _ in range(B + (draw(st.integers(0, 2)) if unused else 0))]
            else:
                groups = [draw(st.lists(st.integers(1, 3), max_size=3)) for _ in range(B)]
                sizes, counts = [s for g in groups for s in g], [sum(g) for g in groups]
                if unused:
                    sizes += draw(st.lists(st.integers(1, 3), max_size=2))
            rows = sum(sizes)
        kinds.append([token, rows, sizes, counts])
    if broken:
        kind = draw(st.sampled_from(kinds))
        what = draw(st.sampled_from([name for name, there in (("rows", kind[2] is None), ("sizes", kind[2]), ("counts", kind[3])) if there] or ["none"]))
        if what == "rows":
            kind[1] = max(0, kind[1] + draw(st.sampled_from((-3, -2, -1, 1, 2, 3))))
        elif what in ("sizes", "counts"):
            listed = kind[2] if what == "sizes" else kind[3]
            at = draw(st.integers(0, len(listed) - 1))
            how = draw(st.sampled_from(("change", "drop", "add") if what == "sizes" else ("change", "swap")))
            if how == "change":
                listed[at] = max(0, listed[at] + draw(st.sampled_from((-2, -1, 1, 2))))
            elif how == "drop":
                listed.pop(at)
            elif how == "add":
                listed.insert(at, draw(st.integers(1, 3)))
            else:
                listed.reverse()
            if what == "sizes":
                kind[1] = sum(listed)
    kinds = tuple(Kind(t, r, None if s is None else tuple(s), None if n is None else tuple(n)) for t, r, s, n in kinds)
    given = Given(tuple(lines), kinds, mask, documents, labels, scheme, layout, padding_side, None, unused, T)
    if layout != "keep" and draw(st.integers(0, 3)) == 0:
        given = replace(given, length=answer(given).width + draw(st.integers(0, 4)))
    return given


@st.composite
def cases(draw, broken: bool = False, dtypes=(torch.float32,), schemes=("placeholders", "expand", "images_first")) -> Case:
    """A random case: a random batch with random forms of its tensors."""
    given = draw(givens(broken, schemes))
    forms = []
    for kind in given.kinds:
        possible = ["rows"]
        if kind.sizes is not None:
            possible.append("list")
            if kind.sizes and len(set(kind.sizes)) == 1:
                possible.append("images")
        forms.append(draw(st.sampled_from(possible)))
    inside = all(0 <= kind.token < VOCABULARY for kind in given.kinds) or given.scheme == "images_first"
    text = draw(st.sampled_from(("embeds", "weight")))
    if given.scheme == "images_first" and text == "weight":
        inside = all(0 <= token < VOCABULARY for line in given.tokens for token in line)
        text = "weight" if inside else "embeds"
    combine = "replace" if given.scheme == "images_first" or (text == "weight" and not inside) else draw(st.sampled_from(("replace", "replace", "add")))
    return Case(
        "random",
        given,
        tuple(forms),
        D=draw(st.sampled_from((1, 3, 8, 16))),
        text=text,
        scale=draw(st.sampled_from((None, 1.7, -0.25))) if text == "weight" else None,
        combine=combine,
        dtype=draw(st.sampled_from(dtypes)),
        feature_dtypes=tuple(draw(st.sampled_from(dtypes)) for _ in given.kinds),
        id_dtype=draw(st.sampled_from((torch.int64, torch.int32))),
        document_dtype=draw(st.sampled_from((torch.int64, torch.int32))),
        mask_dtype=draw(st.sampled_from((torch.int64, torch.int32, torch.bool, torch.uint8))),
        label_dtype=draw(st.sampled_from((torch.int64, torch.int32))),
    )
