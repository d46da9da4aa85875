"""The demo runs, and its batch is what it says: real pictures and text in the layout of a real tokenizer."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

for package in ("mistral_common", "skimage", "sklearn", "matplotlib", "tqdm"):
    pytest.importorskip(package, reason="the demo's packages are in the extra [demo]")

from examples.chat_batch import CHATS, PATCH, answers, cut, embed, load_chats, load_tokenizer, special_token  # noqa: E402
from examples.train import train  # noqa: E402

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def batch():
    return load_chats()


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


def test_every_picture_has_its_lines_of_placeholders(batch, tokenizer):
    """h lines of w [IMG], each closed by [IMG_BREAK], the last by [IMG_END]; a patch for every placeholder."""
    line_end, image_end = (special_token(tokenizer, name) for name in ("[IMG_BREAK]", "[IMG_END]"))
    tokens = batch.input_ids[batch.attention_mask.bool()].tolist()
    marks = {batch.image_token_id, line_end, image_end}
    pictures, line, lines = [], 0, []
    for token in (token for token in tokens if token in marks):
        if token == batch.image_token_id:
            line += 1
            continue
        lines, line = [*lines, line], 0
        if token == image_end:
            pictures, lines = [*pictures, lines], []
    sizes = [(-(-photo.shape[0] // PATCH), -(-photo.shape[1] // PATCH)) for photo in batch.photos]
    assert pictures == [[w] * h for h, w in sizes]
    assert [len(patches) for patches in batch.patches] == [h * w for h, w in sizes]
    assert all(8 <= max(size) <= 40 for size in sizes)


def test_labels_are_the_words_of_the_assistant(batch, tokenizer):
    for labels, chat in zip(batch.labels, CHATS):
        learnt = labels[labels >= 0].tolist()
        assert tokenizer.decode(learnt) == "".join(answer for _, answer in chat)
        assert learnt.count(special_token(tokenizer, "</s>")) == len(chat)


def test_padding_stands_on_the_left(batch):
    assert (batch.attention_mask.diff(dim=1) >= 0).all()
    assert (batch.attention_mask[:, -1] == 1).all()


def test_answers_of_two_turns():
    begin, end = 4, 2
    row = torch.tensor([1, 3, 7, begin, 8, 9, end, 3, 7, begin, 8, end])
    assert answers(row, begin, end).nonzero().flatten().tolist() == [4, 5, 6, 10, 11]


def test_patches_are_cut_line_by_line():
    pixels = torch.arange(3 * 32 * 48, dtype=torch.float32).view(3, 32, 48)
    patches = cut(pixels)
    assert patches.shape == (6, 3 * PATCH * PATCH)
    assert torch.equal(patches[4].view(3, PATCH, PATCH), pixels[:, 16:32, 16:32])


def test_features_of_the_pictures_are_views_of_one_tensor(batch):
    _, features = embed(batch, 16, torch.float32)
    assert len({rows.untyped_storage().data_ptr() for rows in features}) == 1
    assert [len(rows) for rows in features] == [len(patches) for patches in batch.patches]


def test_loss_falls():
    losses = train(load_chats(CHATS[2:3] + CHATS[6:7]), steps=4)
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.1


def test_demo_runs_and_draws(tmp_path):
    picture = tmp_path / "new folder" / "demo.png"
    done = subprocess.run(
        [sys.executable, "-m", "examples.demo", "--hidden", "48", "--rounds", "1", "--out", str(picture)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    triton = "triton on cuda =" if torch.cuda.is_available() else "ok  triton on its interpreter"
    for part in ("padding (5", "ok  bf16", "ok  fp32", triton, "refused", "nanoVLM", "cpu: packed", "loss"):
        assert part in done.stdout, f"{part!r} is missing from\n{done.stdout}"
    assert str(picture) in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
