"""transformers' Trainer on packed rows: a tiny vision-language model learns to answer questions about handwritten digits.

    python -m examples.train_with_trainer [--steps 60] [--padded]
"""

from __future__ import annotations

import argparse
import tempfile

import transformers

from vlm_fuse import packing
from vlm_fuse.integrations.trainers import PackedTraining
from vlm_fuse.integrations.transformers import patch

from .digit_chats import make_dummy, make_model, make_processor, make_samples
from .digit_questions import ROWS

LENGTH = 192  # tokens of a row
PADDED = 8  # samples of a padded batch


class PackedTrainer(PackedTraining, transformers.Trainer):
    """The Trainer, with rows in the order of RankSampler."""


def collator(processor, cls=packing.PackingCollator, **settings):
    """What makes the batches, packed or padded; a batch of text alone gets a dummy picture."""
    placeholder = processor.tokenizer.convert_tokens_to_ids("<image>")
    known = dict(image_token_id=placeholder, rows_per_image=ROWS, pad_token_id=processor.tokenizer.pad_token_id)
    return cls(**known, dummy_image=make_dummy(processor), **settings)


def pack(samples: list[dict], collate: packing.PackingCollator, **settings) -> packing.PackedDataset:
    """Rows of the samples, no longer than the collator has room for."""
    sizes = [collate.sample_format.size(sample) for sample in samples]
    counts = dict(image_counts=[size.images for size in sizes], patch_counts=[size.patches for size in sizes])
    return packing.PackedDataset(samples, packing.pack_lengths([size.tokens for size in sizes], collate.capacity, seed=0, **counts, **settings))


def saved(samples: list[dict], rows: packing.PackedRows) -> str:
    """What packing does to the padding, in words."""
    lengths = [sample["input_ids"].shape[1] for sample in samples]
    batches = [lengths[start : start + PADDED] for start in range(0, len(lengths), PADDED)]
    padded = 1 - sum(lengths) / sum(len(batch) * max(batch) for batch in batches)
    packed = 1 - sum(lengths) / (len(rows) * LENGTH)
    return f"{len(samples)} samples in {len(rows)} rows: {packed:.1%} of the tokens are padding, {padded:.1%} in padded batches of {PADDED}"


def main(arguments: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--samples", type=int, default=600)
    parser.add_argument("--padded", action="store_true", help="padded batches instead of packed rows, by the Trainer as it is")
    given = parser.parse_args(arguments)

    processor = make_processor()
    samples, asked = (make_samples(processor, count, held_out=held_out) for count, held_out in ((given.samples, False), (100, True)))
    model = make_model(processor)
    patch(model)
    with tempfile.TemporaryDirectory() as folder:
        args = transformers.TrainingArguments(
            folder, max_steps=given.steps, per_device_train_batch_size=PADDED if given.padded else 1, per_device_eval_batch_size=PADDED if given.padded else 1,
            learning_rate=3e-3, lr_scheduler_type="cosine", logging_steps=max(given.steps // 6, 1), use_cpu=True, report_to="none", save_strategy="no",
            prediction_loss_only=True,
        )  # fmt: skip
        if given.padded:
            collate = collator(processor, packing.PaddingCollator, extras=False)
            trainer = transformers.Trainer(model, args, train_dataset=samples, eval_dataset=asked, data_collator=collate)
        else:
            collate = collator(processor, length=LENGTH, extras=False)
            rows = pack(samples, collate)
            print(saved(samples, rows.rows))
            trainer = PackedTrainer(model, args, train_dataset=rows, eval_dataset=pack(asked, collate), data_collator=collate)
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        after = trainer.evaluate()["eval_loss"]
    print(f"loss on digits that it has not seen: {before:.2f} before, {after:.2f} after {given.steps} steps")
    return [before, *(entry["loss"] for entry in trainer.state.log_history if "loss" in entry), after]


if __name__ == "__main__":
    main()
