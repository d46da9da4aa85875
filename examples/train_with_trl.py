"""TRL's SFTTrainer on packed rows of pictures and text, with LoRA: TRL itself packs text alone.

    python -m examples.train_with_trl [--steps 60] [--lora]
"""

from __future__ import annotations

import argparse
import tempfile

import trl

from vlm_fuse.integrations.trainers import PackedTraining
from vlm_fuse.integrations.transformers import patch

from .digit_chats import make_model, make_processor, make_samples
from .train_with_trainer import LENGTH, collator, pack, saved


class PackedSFTTrainer(PackedTraining, trl.SFTTrainer):
    """TRL's trainer, with rows in the order of RankSampler and its tokens counted by the plan."""


def main(arguments: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--samples", type=int, default=600)
    parser.add_argument("--lora", action="store_true", help="train adapters of rank 8 alone")
    given = parser.parse_args(arguments)

    processor = make_processor()
    samples = make_samples(processor, given.samples)
    collate = collator(processor, length=LENGTH, extras=("plan",))  # the plan for the number of tokens
    rows = pack(samples, collate)
    print(saved(samples, rows.rows))
    model = make_model(processor)
    patch(model)
    adapters = None
    if given.lora:
        from peft import LoraConfig

        adapters = LoraConfig(r=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], task_type="CAUSAL_LM")
    with tempfile.TemporaryDirectory() as folder:
        args = trl.SFTConfig(
            folder, max_steps=given.steps, per_device_train_batch_size=1, learning_rate=3e-2 if given.lora else 3e-3, lr_scheduler_type="cosine",
            logging_steps=max(given.steps // 6, 1), use_cpu=True, bf16=False, report_to="none", save_strategy="no", gradient_checkpointing=False,
            max_length=None, dataset_kwargs={"skip_prepare_dataset": True}, remove_unused_columns=False,
        )  # fmt: skip
        trainer = PackedSFTTrainer(model, args, train_dataset=rows, data_collator=collate, processing_class=processor, peft_config=adapters)
        trainer.train()
    history = [entry for entry in trainer.state.log_history if "mean_token_accuracy" in entry and "loss" in entry]
    last = history[-1]
    print(f"loss {history[0]['loss']:.2f}, then {last['loss']:.2f}; {last['mean_token_accuracy']:.0%} of the answers right; {last['num_tokens']:.0f} tokens seen")
    return history


if __name__ == "__main__":
    main()
