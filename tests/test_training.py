"""A small VLM decoder trained with merge and with plain PyTorch: the same losses, in every scheme and layout."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import vlm_fuse
from checking import placed
from vlm_fuse import Attend

pytestmark = pytest.mark.usefixtures("one_thread")

IMAGE, PAD, VOCABULARY, D, HEADS, STEPS = 40, 0, 41, 32, 2, 5


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(D), nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.mlp = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D))

    def forward(self, x, mask):
        B, L, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).view(B, L, 3, HEADS, D // HEADS).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(attended.transpose(1, 2).reshape(B, L, D))
        return x + self.mlp(x)


class Decoder(nn.Module):
    """Vision tower, projector, embedding, two blocks and a tied head; in fp64, so that order of sums does not matter."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, D)
        self.tower = nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.Linear(24, D))
        self.positions = nn.Embedding(128, D)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def decode(self, rows, positions, mask):
        x = rows + self.positions(positions)
        for block in self.blocks:
            x = block(x, mask)
        return x @ self.embedding.weight.t()


def samples(generator, number=5):
    """Lists of tokens and of images, some of neither; every sample learns to copy its text."""
    made = []
    for b in range(number):
        text = torch.randint(1, IMAGE, (int(torch.randint(2, 9, (), generator=generator)),), generator=generator).tolist()
        images = [torch.randn(int(torch.randint(1, 5, (), generator=generator)), 12, generator=generator, dtype=torch.float64) for _ in range(b % 3)]
        made.append((text, images))
    return made


def next_token_loss(logits, labels):
    return F.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum") if len(labels) > 1 else logits.sum() * 0


def plain_step(model, batch, images_first):
    """One sample after another, nothing padded, nothing merged: concatenation and indexing."""
    total = torch.zeros((), dtype=torch.float64)
    tokens = 0
    for text, images in batch:
        rows = [model.tower(image) for image in images]
        words = model.embedding(torch.tensor(text))
        pieces, labels = [], []
        if images_first:
            pieces, labels = [*rows, words], [-100] * sum(len(r) for r in rows) + text
        else:
            # an image after the first word, the others at the end
            pieces, labels = [words[:1]], text[:1]
            for row in rows[:1]:
                pieces.append(row)
                labels += [-100] * len(row)
            pieces.append(words[1:])
            labels += text[1:]
            for row in rows[1:]:
                pieces.append(row)
                labels += [-100] * len(row)
        x = torch.cat(pieces)[None]
        L = x.shape[1]
        mask = torch.ones(L, L, dtype=torch.bool).tril()
        logits = model.decode(x, torch.arange(L)[None], mask)[0]
        total = total + next_token_loss(logits, torch.tensor(labels))
        tokens += sum(label != -100 for label in labels[1:])
    return total / tokens


def laid_out(batch, scheme, left):
    """input_ids, attention_mask and labels, padded on one side."""
    lines, labels = [], []
    for text, images in batch:
        sizes = [len(image) for image in images]
        marks = {"placeholders": sizes, "expand": [1] * len(sizes), "images_first": [0] * len(sizes)}[scheme]
        line = [*text[:1], *([IMAGE] * sum(marks[:1])), *text[1:], *([IMAGE] * sum(marks[1:]))]
        lines.append(line)
        labels.append([-100 if token == IMAGE else token for token in line])
        if scheme != "images_first" or not images:
            labels[-1][0] = -100  # nothing stands before it but padding, which predicts nothing
    width = max(map(len, lines))

    def pad(line, filler):
        more = [filler] * (width - len(line))
        return more + list(line) if left else list(line) + more

    ids = torch.tensor([pad(line, PAD) for line in lines])
    mask = torch.tensor([pad([1] * len(line), 0) for line in lines])
    return ids, mask, torch.tensor([pad(line, -100) for line in labels])


def merged_step(model, batch, backend, device, scheme, layout, left, fused, ready):
    ids, mask, labels = placed(laid_out(batch, scheme, left), device)
    images = [model.tower(image.to(device)) for _, given in batch for image in given]
    counts = torch.tensor([sum(len(image) for image in given) for _, given in batch], device=device)
    options = dict(attention_mask=mask, labels=labels, scheme=scheme, layout=layout, padding_side="left" if left else "right", feature_counts=counts)
    if scheme != "images_first":
        options["image_token_id"] = IMAGE
    if ready:
        sizes = [len(image) for image in images]
        options = dict(plan=vlm_fuse.plan(ids, image_sizes=sizes, backend=backend, **options))
        options["image_token_id"] = IMAGE if scheme != "images_first" else None
    if fused:
        options["weight"] = model.embedding.weight
    else:
        options["inputs_embeds"] = model.embedding(ids)
    merged = vlm_fuse.merge(ids, image_embeds=images, backend=backend, **options)
    logits = model.decode(merged.inputs_embeds, merged.position_ids, merged.mask.dense())
    # the labels of merge need nothing but the usual shift, also across documents of a packed row
    shifted = merged.labels[:, 1:]
    loss = F.cross_entropy(logits[:, :-1].reshape(-1, VOCABULARY), shifted.reshape(-1), ignore_index=-100, reduction="sum")
    return loss / shifted.ne(-100).sum()


def train(step, seed=0, device="cpu"):
    torch.manual_seed(seed)
    model = Decoder().double().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for number in range(STEPS):
        optimizer.zero_grad()
        # two batches in turn, so that there is something to learn
        loss = step(model, samples(torch.Generator().manual_seed(seed + number % 2)))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, model


@pytest.fixture(scope="module")
def plain():
    return {first: train(lambda model, batch: plain_step(model, batch, first)) for first in (False, True)}


WAYS = [
    ("placeholders", "keep", True),
    ("placeholders", "keep", False),
    ("placeholders", "padded", True),
    ("placeholders", "padded", False),
    ("placeholders", "packed", True),
    ("expand", "padded", False),
    ("expand", "padded", True),
    ("expand", "packed", False),
    ("images_first", "padded", True),
    ("images_first", "padded", False),
    ("images_first", "packed", True),
]


@pytest.mark.parametrize("number", range(len(WAYS)), ids=["-".join([s, la, "left" if left else "right", "embeds" if n % 2 else "weight"]) for n, (s, la, left) in enumerate(WAYS)])
def test_same_losses_as_plain_pytorch(number, backend, device, plain):
    scheme, layout, left = WAYS[number]
    fused = number % 2 == 0
    if backend == "triton" and device == "cpu" and (layout != "packed" or scheme == "images_first"):
        pytest.skip("the interpreter is slow; packed stands for the others")
    ready = layout == "packed" and fused
    losses, model = train(lambda model, batch: merged_step(model, batch, backend, device, scheme, layout, left, fused, ready), device=device)
    expected, other = plain[scheme == "images_first"]
    torch.testing.assert_close(losses, expected, rtol=1e-10, atol=1e-10)
    assert losses[-2] < losses[0], "nothing was learnt, so nothing was compared"
    for (name, a), b in zip(model.named_parameters(), other.parameters()):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-6, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}")


def test_a_sample_alone_gives_what_it_gives_in_company(backend, device):
    """G1 to G3: packing and padding must not change what a token sees."""
    torch.manual_seed(1)
    model = Decoder().double().to(device)
    batch = samples(torch.Generator().manual_seed(3))
    for scheme, layout, left in WAYS:
        if backend == "triton" and device == "cpu" and (scheme, layout) != ("expand", "packed"):
            continue
        together = hidden(model, batch, backend, device, scheme, layout, left)
        for b, one in enumerate(batch):
            alone = hidden(model, [one], backend, device, scheme, layout, left)[0]
            mine = together[b]
            length = min(len(alone), len(mine))
            side = slice(-length, None) if left else slice(None, length)
            torch.testing.assert_close(mine[side], alone[side])


def hidden(model, batch, backend, device, scheme, layout, left):
    ids, mask, _ = placed(laid_out(batch, scheme, left), device)
    images = [model.tower(image.to(device)) for _, given in batch for image in given]
    counts = [sum(len(image) for image in given) for _, given in batch]
    merged = vlm_fuse.merge(
        ids, model.embedding(ids), images, image_token_id=IMAGE if scheme != "images_first" else None, attention_mask=mask, scheme=scheme, layout=layout,
        padding_side="left" if left else "right", feature_counts=counts, backend=backend,
    )  # fmt: skip
    logits = model.decode(merged.inputs_embeds, merged.position_ids, merged.mask.dense())
    back = merged.unpack(logits * merged.attention_mask[..., None])
    return back


def test_images_are_seen_by_the_words_about_them(backend, device):
    """A changed image changes what its own sample predicts, and no other sample."""
    torch.manual_seed(1)
    model = Decoder().double().to(device)
    batch = samples(torch.Generator().manual_seed(3))
    changed = [(text, [image + 1 for image in images] if b == 2 else images) for b, (text, images) in enumerate(batch)]
    for scheme, layout, left in WAYS[4:5] + WAYS[10:]:
        before, after = (hidden(model, given, backend, device, scheme, layout, left) for given in (batch, changed))
        for b in range(len(batch)):
            assert torch.equal(before[b], after[b]) == (b != 2)


def test_bidirectional_images_train(backend, device):
    """Gemma's mask: an image's first row sees its last."""
    batch = [([3, 4, 5], [torch.randn(4, 12, dtype=torch.float64)])]
    torch.manual_seed(1)
    model = Decoder().double().to(device)
    ids, mask, _ = placed(laid_out(batch, "placeholders", False), device)
    image = model.tower(batch[0][1][0].to(device))
    merged = vlm_fuse.merge(ids, model.embedding(ids), [image], image_token_id=IMAGE, attend=Attend(images="bidirectional"), backend=backend)
    dense = merged.mask.dense()[0, 0]
    first, last = 1, 4
    assert dense[first, last] and not dense[0, first] and not dense[last, last + 1]
    model.decode(merged.inputs_embeds, merged.position_ids, merged.mask.dense()).sum().backward()
    assert model.tower[0].weight.grad.ne(0).any()
