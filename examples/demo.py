"""The main job on real input: photographs and chats, merged by every backend, checked, timed, trained on and drawn.

    make demo                      or:  python -m examples.demo [--hidden 1024] [--rounds 5] [--out out/demo.png]

Pictures come from scikit-learn and scikit-image, the tokenizer from mistral-common; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch

if not torch.cuda.is_available():
    # the Triton kernels then run on its interpreter: slow, so only for a small crop. Triton reads it at import
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler measures memory; its notes are no part of the table

from tqdm import tqdm  # noqa: E402

import vlm_fuse  # noqa: E402

from . import checking, measuring, picture  # noqa: E402
from .chat_batch import CHATS, ChatBatch, load_chats  # noqa: E402
from .train import train  # noqa: E402

TRAINED_ON = slice(5, 7)  # two chats with small pictures
STEPS = 12


def main() -> None:
    options = parse()
    title("The batch")
    batch = load_chats(progress=bar("reading pictures and chats"))
    describe(batch)

    title("Backends")
    for name, found in vlm_fuse.backends().items():
        print(f"  {name:10} {'yes' if found.available else 'no ':4} {found.reason}")

    title("Checks: the same to the last bit")
    print("\n".join(f"  ok  {line}" for line in checking.check_all(batch, options.hidden, progress=bar("checking"))))

    title(f"Times: medians, hidden size {options.hidden}, {torch.get_num_threads()} threads")
    tables = measuring.tables()
    with tqdm(total=measuring.ticks(options.rounds), desc="  timing", leave=False, disable=None) as progress:
        texts = [measuring.table(batch, options.hidden, options.rounds, *which, progress.update) for which in tables]
    print("\n\n".join(texts))
    print("\n  x copy: time over that of a copy of as many rows, round by round. transient MB: the most that is allocated")
    print("  on the way, without what is returned; with backward the merged rows are on the way.")

    title("Training: a decoder of two layers learns the answers of two chats")
    losses = train(load_chats(CHATS[TRAINED_ON]), STEPS, progress=bar("training"))
    print("  loss " + " ".join(f"{loss:.2f}" for loss in losses))
    if losses[-1] >= losses[0]:
        raise SystemExit("the loss did not fall")

    title("Picture")
    print(f"  saved as {draw(batch, options.out)}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=1024, help="hidden size (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="how often each contestant is timed (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out/demo.png"), help="the picture (default: %(default)s)")
    return parser.parse_args()


def title(text: str) -> None:
    print(f"\n{text}", flush=True)


def bar(what: str):
    """A progress bar as a wrapper of an iterable; it leaves no trace, and there is none where nobody looks."""
    return lambda steps: tqdm(steps, desc=f"  {what}", leave=False, delay=0.5, disable=None)


def describe(batch: ChatBatch) -> None:
    places, kept = batch.input_ids.numel(), int(batch.attention_mask.sum())
    samples, length = batch.input_ids.shape
    learnt = int((batch.labels >= 0).sum())
    print(f"  {samples} chats of {', '.join(map(str, batch.attention_mask.sum(1).tolist()))} tokens, {len(batch.patches)} pictures")
    print(f"  padded on the left to {samples} x {length} = {places} places:")
    print(f"  {kept - batch.image_rows} text, {batch.image_rows} image, {places - kept} padding "
          f"({100 * (places - kept) / places:.0f} %); {learnt} tokens are to be learnt")  # fmt: skip


def draw(batch: ChatBatch, path: Path) -> Path:
    given = dict(image_token_id=batch.image_token_id, attention_mask=batch.attention_mask)
    sizes = [len(patches) for patches in batch.patches]
    padded = vlm_fuse.plan(batch.input_ids, image_sizes=sizes, layout="padded", padding_side="right", **given)
    packed = vlm_fuse.plan(batch.input_ids, image_sizes=sizes, layout="packed", **given)
    plans = {
        'layout="padded", padding_side="right": {} x {}'.format(*padded.source_index.shape): padded,
        'layout="packed": {} x {}, drawn in lines'.format(*packed.source_index.shape): packed,
    }
    mask = packed.mask(vlm_fuse.Attend()).dense()
    return picture.draw(path, batch, plans, mask, "who sees whom in the packed row: causal, one document a chat")


if __name__ == "__main__":
    main()
