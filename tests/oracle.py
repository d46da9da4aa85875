"""What merge means, in plain loops over tokens, written from the words of the design and from nothing else in the package.

`answer(given)` walks the batch token by token with Python lists. Nothing here is fast, shared with the library or
clever: it exists so that every backend, the reference included, has something independent to be wrong against.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace

import torch

PAD = -(2**31)
IGNORE = -100


@dataclass(frozen=True)
class Kind:
    """One kind of placeholder with its features: `rows` in all, `sizes` of its images and `counts` by sample where known."""

    token: int
    rows: int
    sizes: tuple[int, ...] | None = None
    counts: tuple[int, ...] | None = None

    @property
    def numbered(self) -> int:
        """Rows that the plan gives numbers to: what sizes or counts say, else all that there are."""
        told = self.sizes if self.sizes is not None else self.counts
        return self.rows if told is None else sum(told)


@dataclass(frozen=True)
class Given:
    """A batch in lists: what a caller gives, without the tensors of rows."""

    tokens: tuple[tuple[int, ...], ...]
    kinds: tuple[Kind, ...] = ()
    attention_mask: tuple[tuple[int, ...], ...] | None = None
    document_ids: tuple[tuple[int, ...], ...] | None = None
    labels: tuple[tuple[int, ...], ...] | None = None
    scheme: str = "placeholders"
    layout: str = "keep"
    padding_side: str = "right"
    length: int | None = None
    unused: bool = False
    width: int = 0  # T where there is no sample to tell it

    @property
    def T(self) -> int:
        return len(self.tokens[0]) if self.tokens else self.width

    def kept(self, b: int, t: int) -> bool:
        """Neither under attention_mask 0 nor under a document id below 0."""
        masked = self.attention_mask is not None and not self.attention_mask[b][t]
        outside = self.document_ids is not None and self.document_ids[b][t] < 0
        return not masked and not outside

    def kind_of(self, token: int) -> int | None:
        """Index of the kind whose placeholder the token is."""
        if self.scheme == "images_first":
            return None
        return next((c for c, kind in enumerate(self.kinds) if kind.token == token), None)


@dataclass
class Row:
    """One output row. `source`: ("feature", k), ("token", j) or None for a row of zeros."""

    source: tuple[str, int] | None = None
    token: int = -1
    kept: bool = False
    kind: int = -1
    image: int = -1
    document: int = -1
    position: int = 0
    label: int = IGNORE

    @property
    def source_index(self) -> int:
        if self.source is None:
            return PAD
        what, number = self.source
        return number if what == "feature" else -1 - number


@dataclass
class Error:
    """The first thing wrong with a batch; `sample` -1 where only totals tell."""

    what: str  # "too few", "too many", "counts", "cut", "returns", "too long"
    sample: int
    kind: int = 0
    placeholders: int = 0
    rows: int = 0
    extra: int = 0


@dataclass
class Answer:
    rows: list[list[Row]] = field(default_factory=list)  # [output row][position]
    width: int = 0
    longest: int = 0
    cu_seqlens: list[int] = field(default_factory=list)
    sample_rows: list[list[Row]] = field(default_factory=list)  # the rows of every sample, before any layout

    @property
    def max_seqlen(self) -> int:
        return max((b - a for a, b in zip(self.cu_seqlens, self.cu_seqlens[1:])), default=0)

    def fact(self, name: str) -> list[list[int]]:
        return [[getattr(row, name) for row in line] for line in self.rows]

    def flat(self) -> list[Row]:
        return [row for line in self.rows for row in line]


def _runs(given: Given, c: int) -> dict[tuple[int, int], int]:
    """Number of the run that each placeholder of kind c stands in: neighbours in one sample under one given document id."""
    number, runs = -1, {}
    for b, tokens in enumerate(given.tokens):
        before = None
        for t, token in enumerate(tokens):
            here = given.document_ids[b][t] if given.document_ids is not None else 0
            if given.kind_of(token) != c:
                before = None
                continue
            if before is None or before != here:
                number += 1
            runs[b, t] = number
            before = here
    return runs


def _image_of_row(sizes, local: int) -> int:
    """The image that holds row `local` of its kind."""
    begin = 0
    for number, size in enumerate(sizes):
        if begin <= local < begin + size:
            return number
        begin += size
    return -1


def _image_at(sizes, local: int) -> int:
    """The image that begins at row `local` of its kind."""
    begin = 0
    for number, size in enumerate(sizes):
        if begin == local:
            return number
        begin += size
    return len(sizes)


def _images_in_front(given: Given, b: int, c: int) -> list[int]:
    """images_first: the images of kind c that belong to sample b."""
    kind = given.kinds[c]
    if kind.counts is None:
        return [b] if b < len(kind.sizes) else []
    first = _image_at(kind.sizes, sum(kind.counts[:b]))
    images, rows = [], 0
    while rows < kind.counts[b] and first < len(kind.sizes):
        images.append(first)
        rows += kind.sizes[first]
        first += 1
    return images


def _document_of(given: Given, b: int) -> list[int]:
    """Index within the sample of the document of every token, -1 where it is not kept."""
    if given.document_ids is None:
        return [0 if given.kept(b, t) else -1 for t in range(given.T)]
    number, before, out = -1, None, []
    for t in range(given.T):
        if not given.kept(b, t):
            out.append(-1)
            continue
        here = given.document_ids[b][t]
        if here != before:
            number += 1
        before = here
        out.append(number)
    return out


@functools.lru_cache(maxsize=1000)
def answer(given: Given) -> Answer:
    """Every output row with its source and its facts; features that do not exist leave rows of zeros (or no rows)."""
    kinds, T = given.kinds, given.T
    first_row = [sum(kind.numbered for kind in kinds[:c]) for c in range(len(kinds))]
    runs = [_runs(given, c) if kinds[c].sizes is None else None for c in range(len(kinds))]
    images_of = [len(k.sizes) if k.sizes is not None else len(set(r.values())) for k, r in zip(kinds, runs)]
    first_image = [sum(images_of[:c]) for c in range(len(kinds))]
    start_of = [[sum(kind.sizes[:i]) for i in range(len(kind.sizes))] if kind.sizes is not None else None for kind in kinds]

    taken = [0] * len(kinds)  # feature rows (expand: images) taken so far
    samples: list[list[Row]] = []
    lengths: list[int] = []  # kept rows of every document, in order
    document_offset = 0
    for b, tokens in enumerate(given.tokens):
        rows: list[Row] = []
        documents = _document_of(given, b)
        limit = [None] * len(kinds)
        for c, kind in enumerate(kinds):
            if kind.counts is None:
                continue
            begin = sum(kind.counts[:b])
            if given.scheme == "expand":
                taken[c], limit[c] = _image_at(kind.sizes, begin), _image_at(kind.sizes, begin + kind.counts[b])
            else:
                taken[c], limit[c] = begin, begin + kind.counts[b]
        if given.scheme == "images_first":
            for c, kind in enumerate(kinds):
                for image in _images_in_front(given, b, c):
                    for p in range(kind.sizes[image]):
                        k = first_row[c] + start_of[c][image] + p
                        rows.append(Row(("feature", k), -1, True, c + 1, first_image[c] + image, 0))
        for t, token in enumerate(tokens):
            j, kept, c = b * T + t, given.kept(b, t), given.kind_of(token)
            if c is None:
                label = given.labels[b][t] if given.labels is not None and kept else IGNORE
                row = Row(("token", j), j, kept, 0, -1, documents[t], 0, label)
                if kept or given.layout == "keep":
                    rows.append(row)
                continue
            kind = kinds[c]
            there = kind.numbered if given.scheme != "expand" else len(kind.sizes)
            end = there if limit[c] is None else min(there, limit[c])
            n = taken[c] if taken[c] < end else None
            taken[c] += 1
            if given.scheme == "placeholders":
                if kind.sizes is None:
                    image = first_image[c] + runs[c][b, t]
                else:
                    image = -1 if n is None else first_image[c] + _image_of_row(kind.sizes, n)
                row = Row(None if n is None else ("feature", first_row[c] + n), j, kept, c + 1, image, documents[t])
                if kept or given.layout == "keep":
                    rows.append(row)
            elif n is not None and kept:
                for p in range(kind.sizes[n]):
                    k = first_row[c] + start_of[c][n] + p
                    rows.append(Row(("feature", k), j, True, c + 1, first_image[c] + n, documents[t]))
        # facts that depend on the neighbours
        counts: dict[int, int] = {}
        for row in rows:
            if not row.kept:
                row.kind, row.image, row.document = -1, -1, -1
                continue
            row.position = counts.get(row.document, 0)
            counts[row.document] = row.position + 1
            if row.position == 0 and (given.layout == "packed" or given.document_ids is not None):
                row.label = IGNORE
        if given.document_ids is None:
            lengths.append(sum(row.kept for row in rows))
            for row in rows:
                row.document = b if row.kept else -1
        else:
            there = max(documents, default=-1) + 1
            lengths += [counts.get(d, 0) for d in range(there)]
            given_id = {d: given.document_ids[b][t] for t, d in enumerate(documents) if d >= 0}
            for row in rows:
                if row.kept:
                    row.document = document_offset + row.document if given.layout == "packed" else given_id[row.document]
            document_offset += there
        samples.append(rows)

    out = Answer(sample_rows=samples)
    out.longest = max((sum(row.kept for row in rows) for rows in samples), default=0)
    out.cu_seqlens = [0]
    for length in lengths:
        out.cu_seqlens.append(out.cu_seqlens[-1] + length)
    if given.layout == "packed":
        lines = [[row for rows in samples for row in rows]]
        out.width = len(lines[0])
    else:
        lines = samples
        out.width = T if given.layout == "keep" else out.longest
    if given.length is not None and given.layout != "keep":
        out.width = given.length
    for line in lines:
        line = [replace(row) for row in line]
        padding = [Row() for _ in range(out.width - len(line))]
        line = padding + line if given.layout == "padded" and given.padding_side == "left" else line + padding
        line = line[: out.width]
        if given.layout == "packed" or given.document_ids is not None:
            after = 0
            for row in reversed(line):
                if row.kept:
                    break
                after += 1
            for number, row in enumerate(line[len(line) - after :]):
                row.position = number
        out.rows.append(line)
    return out


def error(given: Given) -> Error | None:
    """The first error of a batch, by sample and then by kind."""
    taken = [0] * len(given.kinds)
    totals = [sum(given.kind_of(token) == c for line in given.tokens for token in line) for c in range(len(given.kinds))]
    for b, tokens in enumerate(given.tokens):
        for c, kind in enumerate(given.kinds):
            here = sum(given.kind_of(token) == c for token in tokens)
            if given.scheme == "images_first":
                if kind.counts is None:
                    if kind.sizes and b >= len(kind.sizes):  # no image at all: a batch of text
                        return Error("too few", b, c, 1, 0)
                    continue
                borders = {sum(kind.sizes[:i]) for i in range(len(kind.sizes) + 1)}
                if sum(kind.counts[: b + 1]) not in borders and sum(kind.counts[: b + 1]) <= kind.rows:
                    return Error("cut", b, c)
                continue
            if kind.counts is not None:
                if given.scheme == "expand":
                    borders = {sum(kind.sizes[:i]) for i in range(len(kind.sizes) + 1)}
                    if sum(kind.counts[: b + 1]) not in borders and sum(kind.counts[: b + 1]) <= kind.rows:
                        return Error("cut", b, c)
                    first = _image_at(kind.sizes, sum(kind.counts[:b]))
                    rows = sum(kind.sizes[first : first + here])
                    if rows > kind.counts[b] or (rows < kind.counts[b] and not given.unused):
                        return Error("counts", b, c, here, kind.counts[b])
                elif here > kind.counts[b] or (here < kind.counts[b] and not given.unused):
                    return Error("counts", b, c, here, kind.counts[b])
                continue
            there = kind.rows if given.scheme == "placeholders" else len(kind.sizes)
            before, taken[c] = taken[c], taken[c] + here
            if given.scheme == "placeholders" and kind.sizes is not None:
                borders = {sum(kind.sizes[:i]) for i in range(len(kind.sizes) + 1)}
                last = taken[c] == totals[c]
                if taken[c] < there and taken[c] not in borders and not (given.unused and last):
                    begun = sum(s for i, s in enumerate(kind.sizes) if before <= sum(kind.sizes[:i]) < taken[c])
                    return Error("cut", b, c, here, begun)
            if taken[c] > there:
                return Error("too few", b, c, here, there - before)
        if given.document_ids is not None:
            seen, before = set(), None
            for t in range(given.T):
                if given.kept(b, t):
                    here = given.document_ids[b][t]
                    if here != before and here in seen:
                        return Error("returns", b, extra=here)
                    seen.add(here)
                    before = here
    for c, kind in enumerate(given.kinds):
        if kind.counts is not None:
            if sum(kind.counts) > kind.rows or (sum(kind.counts) < kind.rows and not given.unused):
                return Error("counts", -1, c, sum(kind.counts), kind.rows)
            continue
        if given.scheme == "images_first":
            used, there = len(given.tokens), len(kind.sizes)
        else:
            used, there = totals[c], kind.rows if given.scheme == "placeholders" else len(kind.sizes)
        if there > used and not given.unused:
            return Error("too many", -1, c, used, there)
    if given.length is not None and given.layout != "keep":
        out = answer(replace(given, length=None))
        if out.width > given.length:
            return Error("too long", -1, extra=out.width)
    return None


def may_see(
    document_ids, image_ids=None, *, kind="causal", window=None, sinks=0, chunk_size=None, images="causal", prefix_lengths=None, parent_ids=None
):
    """Dense mask of one output row from first principles: a list of lists of bool, [query][key].

    prefix_lengths: an int or a list by document id; parent_ids: a list by document id, -1 none.
    """
    L = len(document_ids)
    first, length = {}, {}
    for r, d in enumerate(document_ids):
        if d >= 0:
            first.setdefault(d, r)
            length[d] = r - first[d] + 1

    def same_image(q, k):
        if image_ids is None or image_ids[q] < 0:
            return False
        low, high = min(q, k), max(q, k)
        return all((image_ids[r], document_ids[r]) == (image_ids[q], document_ids[q]) for r in range(low, high + 1))

    def sees(q, k):
        if document_ids[q] < 0 or document_ids[k] < 0:
            return False
        d = document_ids[q]
        if document_ids[k] != d:
            return parent_ids is not None and parent_ids[d] == document_ids[k]
        s = first[d]
        causal = k <= q
        inside = window is None or (q - k < window if kind == "causal" else abs(q - k) < window)
        allowed = inside and (kind == "full" or causal)
        if chunk_size is not None:
            allowed = allowed and (q - s) // chunk_size == (k - s) // chunk_size
        if images != "causal" and same_image(q, k):
            # windowed: an image is cut at the window's begin, not at a chunk's
            allowed = allowed or images == "bidirectional" or window is None or q - k < window
        if k - s < sinks and causal:
            allowed = True
        if prefix_lengths is not None:
            prefix = prefix_lengths if isinstance(prefix_lengths, int) else prefix_lengths[d]
            allowed = allowed or k - s < prefix
        return allowed

    return [[sees(q, k) for k in range(L)] for q in range(L)]


def runs_of_keys(line) -> int:
    """Number of unbroken runs of keys that one query row sees."""
    return sum(here and not before for before, here in zip([False, *line], line))


def accumulator(*dtypes) -> torch.dtype:
    return torch.float64 if torch.float64 in dtypes else torch.float32


def merged_rows(out: Answer, dtype, *, text=None, weight=None, tokens=None, scale=None, features=None, combine="replace"):
    """The output (G, W, D) row by row with torch operations on single rows, so that plain autograd gives the gradients.

    text: (N, D). weight: (V, D) with tokens, a flat list of ids. features: rows (D,), every kind after the other.
    """
    source = text if text is not None else weight
    D = source.shape[-1]

    def text_row(j):
        if text is not None:
            return text[j]
        row = weight[tokens[j]]
        return row if scale is None else row * torch.tensor(scale, dtype=weight.dtype)

    rows = []
    for row in out.flat():
        if row.source is None:
            rows.append(torch.zeros(D, dtype=dtype))
        elif row.source[0] == "token":
            rows.append(text_row(row.source[1]).to(dtype))
        elif combine == "replace":
            rows.append(features[row.source[1]].to(dtype))
        else:
            wide = accumulator(source.dtype, features[row.source[1]].dtype)
            rows.append((text_row(row.token).to(wide) + features[row.source[1]].to(wide)).to(dtype))
    flat = torch.stack(rows) if rows else source.new_zeros((0, D), dtype=dtype) + 0 * source.sum().to(dtype)
    return flat.view(len(out.rows), out.width, D)


def weight_gradient(out: Answer, grad, weight, tokens, scale=None, combine="replace"):
    """Gradient of the embedding weight: rows of one id added in ascending order in fp32 (fp64), scaled, rounded once."""
    wide = accumulator(weight.dtype)
    total = torch.zeros(weight.shape, dtype=wide)
    for row, g in zip(out.flat(), grad.flatten(0, 1)):
        if row.source is None or (row.source[0] == "feature" and combine == "replace"):
            continue
        total[tokens[row.token]] += g.to(wide)
    if scale is not None:
        total = total * torch.tensor(scale, dtype=weight.dtype).to(wide)
    return total.to(weight.dtype)


def unpacked(given: Given, out: Answer, rows):
    """Rows (G, W, ...) back at their tokens' places in input_ids; expand and images_first: the samples, padded."""
    line_of = {}
    if given.layout == "packed":
        position = 0
        for b, sample in enumerate(out.sample_rows):
            for i in range(len(sample)):
                line_of[b, i] = (0, position)
                position += 1
    else:
        left = given.layout == "padded" and given.padding_side == "left"
        for b, sample in enumerate(out.sample_rows):
            for i in range(len(sample)):
                line_of[b, i] = (b, out.width - len(sample) + i if left else i)
    B = len(given.tokens)
    width = given.T if given.scheme == "placeholders" else out.longest
    result = rows.new_zeros((B, width, *rows.shape[2:]))
    for b, sample in enumerate(out.sample_rows):
        for i, row in enumerate(sample):
            if given.scheme == "placeholders":
                place = row.token - b * given.T
            else:
                place = width - len(sample) + i if given.padding_side == "left" else i
            result[b, place] = rows[line_of[b, i]]
    return result


def text_gradient(out: Answer, grad, N: int, dtype, combine="replace"):
    """Gradient of the text (N, D): the rows that a token went to, added in ascending order, rounded once; else zero."""
    wide = accumulator(dtype, grad.dtype)
    total = torch.zeros(N, grad.shape[-1], dtype=wide)
    for row, g in zip(out.flat(), grad.flatten(0, 1)):
        if row.source is not None and (row.source[0] == "token" or (combine == "add" and row.token >= 0)):
            total[row.token] += g.to(wide)
    return total.to(dtype)


def feature_gradient(out: Answer, grad, first: int, rows: int, numbered: int, dtype):
    """Gradient of the feature rows first .. first + rows - 1: the row of grad that each went to; zero where it went nowhere."""
    result = torch.zeros(rows, grad.shape[-1], dtype=dtype)
    for row, g in zip(out.flat(), grad.flatten(0, 1)):
        if row.source is not None and row.source[0] == "feature" and first <= row.source[1] < first + min(rows, numbered):
            result[row.source[1] - first] = g.to(dtype)
    return result
