"""transformers' Trainer and TRL's SFTTrainer on packed rows: losses, gradients, metrics, order, resuming, two ranks."""

import functools
import gc
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

transformers = pytest.importorskip("transformers", minversion="5.23")
accelerate = pytest.importorskip("accelerate")
pytest.importorskip("sklearn")
pytest.importorskip("PIL")

ROOT = Path(__file__).parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from examples.digit_chats import make_model, make_processor, make_samples  # noqa: E402
from examples.train_with_trainer import PackedTrainer, collator, pack  # noqa: E402
from ranks import run_on_ranks  # noqa: E402
from vlm_fuse import packing  # noqa: E402
from vlm_fuse.integrations.trainers import PackedTraining  # noqa: E402
from vlm_fuse.integrations.transformers import patch  # noqa: E402

LENGTH = 96


@functools.cache
def learnt() -> tuple:
    processor = make_processor()
    return processor, make_samples(processor, 60, text_only=0.3)


def arguments(folder, cls=None, **settings):
    given = dict(use_cpu=True, report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True, max_grad_norm=0.0, learning_rate=1e-3, seed=3)
    given["per_device_train_batch_size"] = 1
    return (cls or transformers.TrainingArguments)(str(folder), **{**given, **settings})


class Recorded:
    """A collator that keeps what it was given."""

    def __init__(self, collate):
        self.collate, self.rows = collate, []

    def __call__(self, rows):
        self.rows.append(rows)
        return self.collate(rows)


class Gradients(transformers.TrainerCallback):
    """The gradients of each step, as the optimizer gets them."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        self.steps.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})


def one_by_one(model, samples: list[dict]) -> tuple[float, dict]:
    """Mean loss over the labels of all samples and its gradients, each sample in a forward of its own."""
    count = sum(int((sample["labels"][:, 1:] != -100).sum()) for sample in samples)
    model.zero_grad()
    total = 0.0
    for sample in samples:
        loss = model(**sample, num_items_in_batch=count).loss
        loss.backward()
        total += float(loss.detach())
    return total, {name: parameter.grad for name, parameter in model.named_parameters()}


def packed_trainer(folder, *, length=LENGTH, collate=None, dataset=None, cls=PackedTrainer, model=None, callbacks=(), **settings):
    processor, samples = learnt()
    collate = collate or collator(processor, length=length, extras=False)
    model = make_model(processor) if model is None else model
    recorded = Recorded(collate)
    dataset = pack(samples, collate) if dataset is None else dataset
    trainer = cls(model, arguments(folder, **settings), train_dataset=dataset, data_collator=recorded, callbacks=list(callbacks))
    return trainer, recorded


@pytest.mark.parametrize("patched", [False, True], ids=["as it is", "patched"])
@pytest.mark.parametrize("how", ["packed", "padded"])
def test_losses_and_gradients_are_those_of_the_samples_one_by_one(tmp_path, patched, how):
    """Over accumulated batches too, and over rows of text alone."""
    processor, samples = learnt()
    gradients, model = Gradients(), make_model(processor)
    if patched:
        patch(model)
    settings = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=3, optim="sgd", learning_rate=0.0, callbacks=[gradients], model=model)
    if how == "packed":
        trainer, recorded = packed_trainer(tmp_path, **settings)
    else:
        collate = collator(processor, packing.PaddingCollator, extras=False)
        trainer, recorded = packed_trainer(tmp_path, collate=collate, dataset=samples, cls=transformers.Trainer, **settings)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    reference = make_model(processor).train()
    assert len(gradients.steps) == len(losses) == 3
    for step, found in enumerate(gradients.steps):
        batches = recorded.rows[2 * step : 2 * step + 2]
        members = [sample for batch in batches for item in batch for sample in (item if isinstance(item, list) else [item])]
        loss, expected = one_by_one(reference, members)
        assert losses[step] == pytest.approx(loss, abs=2e-5)
        assert found.keys() == expected.keys()
        for name in found:
            torch.testing.assert_close(found[name], expected[name], atol=2e-6, rtol=1e-4)


def test_a_batch_of_text_alone_leaves_the_tower_gradients_of_zero(tmp_path):
    processor = make_processor()
    texts = make_samples(processor, 20, text_only=1.0)
    gradients = Gradients()  # which clones the gradient of every parameter: None would raise
    collate = collator(processor, length=LENGTH, extras=False)
    trainer, _ = packed_trainer(tmp_path, collate=collate, dataset=pack(texts, collate), max_steps=1, callbacks=[gradients])
    trainer.train()
    (found,) = gradients.steps
    tower = [grad for name, grad in found.items() if "vision" in name or "connector" in name]
    assert len(tower) > 10 and not any(grad.any() for grad in tower)
    assert found["model.text_model.layers.0.mlp.up_proj.weight"].any()


class Strict(torch.nn.Module):
    """A model that takes what it knows and nothing else."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(100, 8)

    def forward(self, input_ids, position_ids, use_cache, labels, pixel_values=None, pixel_attention_mask=None):
        logits = self.embedding(input_ids) @ self.embedding.weight.T
        return {"loss": torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()), "logits": logits}


@pytest.mark.parametrize("extras, cls", [(False, transformers.Trainer), ((), transformers.Trainer), (("plan", "loss_weights"), PackedTrainer)])
def test_a_forward_without_kwargs_gets_what_it_takes(tmp_path, extras, cls):
    collate = collator(learnt()[0], length=LENGTH, loss_weights=True, extras=extras)
    trainer, _ = packed_trainer(tmp_path, collate=collate, cls=cls, model=Strict(), max_steps=2)
    trainer.train()
    assert trainer.state.global_step == 2


def test_the_trainer_of_ones_own_has_the_weights(tmp_path):
    """A mean over samples instead of tokens: `compute_loss` sees all that the collator leaves in the batch."""
    seen = []

    class BySample(PackedTraining, transformers.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            weights = inputs.pop("loss_weights")
            outputs = model(**{name: value for name, value in inputs.items() if name != "plan"})
            losses = torch.nn.functional.cross_entropy(outputs.logits[:, :-1].transpose(1, 2), inputs["labels"][:, 1:], reduction="none", ignore_index=-100)
            seen.append((float((losses * weights[:, 1:]).sum()), inputs["plan"].document_ids))
            return (losses * weights[:, 1:]).sum()

    processor = learnt()[0]
    collate = collator(processor, length=LENGTH, loss_weights=True, extras=("plan", "loss_weights"))
    trainer, recorded = packed_trainer(tmp_path, collate=collate, cls=BySample, max_steps=1, learning_rate=0.0)
    trainer.train()
    (members,) = recorded.rows[0]
    model = make_model(processor).train()
    means = [float(model(**sample).loss) for sample in members]
    assert seen[0][0] == pytest.approx(np.mean(means), abs=1e-5)
    assert int(seen[0][1].max()) == len(members) - 1


def test_evaluation_has_the_losses_and_answers_of_the_samples_alone(tmp_path):
    """Rows of different widths too, whose logits are filled up."""
    processor, samples = learnt()
    model = make_model(processor)

    def answers(predicted):
        labels = predicted.label_ids[:, 1:]
        counted = labels != -100
        return {"right": int((predicted.predictions[:, :-1].argmax(-1)[counted] == labels[counted]).sum()), "answers": int(counted.sum())}

    sized = collator(processor, length=LENGTH, extras=False)
    rows = pack(samples, sized)
    for collate in (sized, collator(processor, extras=False)):
        args = arguments(tmp_path, per_device_eval_batch_size=2)
        first = lambda logits, labels: logits[0] if isinstance(logits, tuple) else logits
        trainer = PackedTrainer(model, args, eval_dataset=rows, data_collator=collate, compute_metrics=answers, preprocess_logits_for_metrics=first)
        found = trainer.evaluate()
        alone, losses = 0, []
        with torch.no_grad():
            for start in range(0, len(rows), 2):
                members = [sample for row in range(start, min(start + 2, len(rows))) for sample in rows[row]]
                own = [model(**sample) for sample in members]
                alone += sum(int((out.logits[0, :-1].argmax(-1) == sample["labels"][0, 1:])[sample["labels"][0, 1:] != -100].sum()) for out, sample in zip(own, members))
                # the Trainer repeats each batch's loss as often as a batch has rows, the last one's too, then cuts at the number of rows
                losses += [float(sum(out.loss for out in own)) / len(members)] * min(2, len(rows) - start)
        assert found["eval_answers"] == len(samples) and found["eval_right"] == alone
        assert found["eval_loss"] == pytest.approx(np.mean(losses), abs=1e-5)


def test_a_resumed_training_goes_on_with_the_rows_that_would_have_come(tmp_path):
    """In the middle of the second epoch, whose order is another one."""
    settings = dict(num_train_epochs=2, per_device_train_batch_size=1, save_strategy="steps")
    whole, rows_of_whole = packed_trainer(tmp_path / "whole", **settings)
    steps = len(whole.get_train_dataloader())
    settings["save_steps"] = steps + steps // 2
    whole, rows_of_whole = packed_trainer(tmp_path / "whole", **settings)
    whole.train()
    resumed, rows_of_resumed = packed_trainer(tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{settings['save_steps']}"))
    left = 2 * steps - settings["save_steps"]
    assert 0 < left < steps and len(rows_of_whole.rows) == 2 * steps
    first, second = rows_of_whole.rows[:steps], rows_of_whole.rows[steps:]
    number = {id(sample): place for place, sample in enumerate(learnt()[1])}
    numbers = lambda batches: [[number[id(sample)] for sample in row] for (row,) in batches]
    assert sorted(numbers(first)) == sorted(numbers(second)) and numbers(first) != numbers(second)
    # accelerate skips by the sampler, before anything is fetched
    assert numbers(rows_of_resumed.rows) == numbers(second[-left:])
    for (name, one), (_, other) in zip(whole.model.named_parameters(), resumed.model.named_parameters()):
        torch.testing.assert_close(one, other, atol=0, rtol=0, msg=name)


def test_a_stream_is_a_dataset(tmp_path):
    processor, samples = learnt()
    collate = collator(processor, length=LENGTH, extras=False)
    stream = packing.PackedStream(samples, collate.capacity, sample_format=collate.sample_format, buffer_size=20, repeat=True, rank=0, world_size=1)
    trainer, recorded = packed_trainer(tmp_path, collate=collate, dataset=stream, max_steps=4, per_device_train_batch_size=2)
    trainer.train()
    expected = iter(stream)
    wanted = [[next(expected) for _ in range(2)] for _ in range(4)]
    assert [[[id(s) for s in row] for row in batch] for batch in recorded.rows[:4]] == [[[id(s) for s in row] for row in batch] for batch in wanted]
    other = packing.PackedStream(samples, collate.capacity, rank=0, world_size=2)
    with pytest.raises(ValueError, match="rank=0, world_size=1"):
        PackedTrainer(make_model(processor), arguments(tmp_path, max_steps=1), train_dataset=other, data_collator=collate)


# --- TRL


@functools.cache
def sft():
    trl = pytest.importorskip("trl", minversion="1.16")
    from examples.train_with_trl import PackedSFTTrainer

    return trl, PackedSFTTrainer


def sft_trainer(folder, *, length=LENGTH, **settings):
    trl, cls = sft()
    processor, samples = learnt()
    collate = collator(processor, length=length, extras=("plan",))
    recorded = Recorded(collate)
    given = dict(bf16=False, gradient_checkpointing=False, max_length=None, dataset_kwargs={"skip_prepare_dataset": True}, remove_unused_columns=False)
    args = arguments(folder, trl.SFTConfig, **{**given, **settings})
    model = make_model(processor)
    rows = pack(samples, collate)
    return cls(model, args, train_dataset=rows, eval_dataset=rows, data_collator=recorded, processing_class=processor), recorded


def test_trl_counts_and_learns_as_from_the_samples_one_by_one(tmp_path):
    trainer, recorded = sft_trainer(tmp_path, max_steps=3, per_device_train_batch_size=2, optim="sgd", learning_rate=0.0)
    gradients = Gradients()
    trainer.add_callback(gradients)
    trainer.train()
    model = make_model(learnt()[0]).train()
    tokens = 0
    history = [entry for entry in trainer.state.log_history if "mean_token_accuracy" in entry and "loss" in entry]
    assert len(history) == len(gradients.steps) == 3
    for entry, found, batch in zip(history, gradients.steps, recorded.rows):
        members = [sample for row in batch for sample in row]
        loss, expected = one_by_one(model, members)
        right = []
        for sample in members:
            counted = sample["labels"][0, 1:] != -100
            right += (model(**sample).logits[0, :-1].argmax(-1) == sample["labels"][0, 1:])[counted].tolist()
        tokens += sum(sample["input_ids"].shape[1] for sample in members)
        assert entry["loss"] == pytest.approx(loss, abs=2e-5)
        assert entry["mean_token_accuracy"] == pytest.approx(np.mean(right), abs=1e-6)
        assert entry["num_tokens"] == tokens
        for name in found:
            torch.testing.assert_close(found[name], expected[name], atol=2e-6, rtol=1e-4)
    assert trainer.evaluate()["eval_loss"] > 0


def test_trl_with_positions_of_four_rows(tmp_path):
    """M-RoPE: TRL would take the second size of the positions, rows instead of tokens."""
    import processors

    trl, cls = sft()
    torch.manual_seed(0)
    family = processors.qwen2_5_vl()
    samples = []
    for number, images in enumerate((1, 0, 2, 0, 1)):
        sample = processors.processed(family, f"w1 {family.image * images} w2 w{number + 3} w4", images, 0, number, return_tensors="pt")
        samples.append({**sample, "labels": sample["input_ids"].masked_fill(sample["input_ids"] > 34, -100)})
    dummy = processors.processed(family, family.image, 1, 0, 9, return_tensors="pt")
    collate = Recorded(packing.PackingCollator(**family.settings, dummy_image=dummy, extras=("plan",)))
    rows = packing.PackedDataset(samples, packing.pack_lengths([sample["input_ids"].shape[1] for sample in samples], 48))
    given = dict(bf16=False, gradient_checkpointing=False, max_length=None, dataset_kwargs={"skip_prepare_dataset": True}, max_steps=2, optim="sgd")
    args = arguments(tmp_path, trl.SFTConfig, **{**given, "learning_rate": 0.0})
    trainer = cls(family.model, args, train_dataset=rows, data_collator=collate, processing_class=family.processor)
    trainer.train()
    tokens = 0
    for entry, (row,) in zip([entry for entry in trainer.state.log_history if "num_tokens" in entry], collate.rows):
        tokens += sum(sample["input_ids"].shape[1] for sample in row)
        assert entry["num_tokens"] == tokens
        assert entry["loss"] == pytest.approx(one_by_one(family.model, row)[0], abs=5e-5)


def test_trl_is_told_to_leave_the_samples_as_they_are(tmp_path):
    with pytest.raises(ValueError, match="skip_prepare_dataset"):
        sft_trainer(tmp_path, max_steps=1, dataset_kwargs=None)


# --- accelerate on one rank and on several


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("ranks, batch_size, drop_last", [(1, 2, False), (2, 1, False), (2, 3, False), (3, 2, True), (4, 2, False)])
def test_shared_out_by_accelerate_every_rank_has_its_own_rows(ranks, batch_size, drop_last, split):
    from accelerate.data_loader import BatchSamplerShard

    rng = np.random.default_rng(0)
    rows = packing.pack_lengths(rng.integers(1, 100, 90), 128, patch_counts=rng.integers(0, 50, 90))
    settings = dict(batch_size=batch_size, drop_last=drop_last, seed=5)
    counts = []
    for rank in range(ranks):
        own, shared = packing.RankSampler(rows, rank=rank, world_size=ranks, **settings), packing.RankSampler(rows, shared_by=ranks, **settings)
        for sampler in (own, shared):
            sampler.set_epoch(2)
        wanted = list(torch.utils.data.BatchSampler(own, batch_size, drop_last))
        of_all = torch.utils.data.BatchSampler(shared, batch_size * ranks if split else batch_size, drop_last)
        found = list(BatchSamplerShard(of_all, ranks, rank, split_batches=split))
        assert found == wanted and {len(batch) for batch in found} == {batch_size}
        assert len(own) * ranks == len(shared) == len(list(shared)) and len(own) == len(list(own))
        counts.append(len(found))
    assert len(set(counts)) == 1 and counts[0] > 2


def test_a_state_of_a_shared_sampler_is_no_state_of_one_rank():
    rows = packing.pack_lengths([3, 4, 5, 6], 8)
    state = packing.RankSampler(rows, shared_by=2).state_dict()
    with pytest.raises(ValueError, match="shared=True"):
        packing.RankSampler(rows, rank=0, world_size=2).load_state_dict(state)
    packing.RankSampler(rows, shared_by=2).load_state_dict(state)
    for wrong in (dict(shared_by=2, rank=0, world_size=2), dict(shared_by=0), dict(batch_size=0, rank=0, world_size=1)):
        with pytest.raises(ValueError):
            packing.RankSampler(rows, **wrong)


def work(folder: str) -> None:
    """What one of two ranks sees; the parent compares."""
    processor, samples = learnt()
    text = [sample for sample in samples if "pixel_values" not in sample]
    images = [sample for sample in samples if "pixel_values" in sample]
    found: dict = {}

    # the loop of one's own
    accelerator = accelerate.Accelerator(cpu=True)
    rank = accelerator.process_index
    collate = collator(processor, length=LENGTH, extras=False)
    rows = packing.PackedDataset(samples, pack(samples, collate).rows)
    recorded = Recorded(collate)
    sampler = packing.RankSampler(rows.rows, shared_by=accelerator.num_processes, batch_size=2, seed=4)
    loader = accelerator.prepare(DataLoader(rows, batch_size=2, sampler=sampler, collate_fn=recorded))
    number = {id(sample): place for place, sample in enumerate(samples)}
    numbers = lambda batches: [[[number[id(sample)] for sample in row] for row in batch] for batch in batches]
    for epoch in range(2):
        loader.set_epoch(epoch)
        for batch in loader:
            assert type(batch) is packing.CollatedBatch and batch["input_ids"].shape == (2, LENGTH)
    found["loop"] = numbers(recorded.rows)

    # the Trainer under DDP, in which every parameter has to have a gradient: one rank's rows are text alone
    settings = dict(ddp_find_unused_parameters=False, optim="sgd", learning_rate=0.0, max_steps=2)
    few = packing.pack_lengths([sample["input_ids"].shape[1] for sample in text + images], collate.capacity, max_documents=1)
    gradients = Gradients()
    alone = packing.PackedRows([[0], [len(text)], [1], [len(text) + 1]], few.capacity, (), np.ones((4, 3), dtype=np.int64), few.statistics)
    dataset = packing.PackedDataset(text + images, alone)
    trainer, recorded = packed_trainer(f"{folder}/ddp", collate=collate, dataset=dataset, callbacks=[gradients], seed=3, **settings)
    trainer.train()
    found["ddp"] = numbers(recorded.rows)
    found["losses"] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    torch.save(gradients.steps, f"{folder}/gradients{rank}.pt")

    stream = packing.PackedStream(samples, collate.capacity, sample_format=collate.sample_format, buffer_size=20, repeat=True, rank=0, world_size=1)
    trainer, recorded = packed_trainer(f"{folder}/stream", collate=collate, dataset=stream, max_steps=3, ddp_find_unused_parameters=False)
    trainer.train()
    found["stream"] = numbers(recorded.rows)[:3]

    # resumed in the middle of the second epoch
    settings = dict(num_train_epochs=2, save_strategy="steps", ddp_find_unused_parameters=False)
    whole, _ = packed_trainer(f"{folder}/whole", collate=collate, **settings)
    steps = len(whole.get_train_dataloader())
    settings["save_steps"] = steps + steps // 2
    whole, of_whole = packed_trainer(f"{folder}/whole", collate=collate, **settings)
    whole.train()
    resumed, of_resumed = packed_trainer(f"{folder}/resumed", collate=collate, **settings)
    resumed.train(resume_from_checkpoint=f"{folder}/whole/checkpoint-{settings['save_steps']}")
    found["steps"], found["whole"], found["resumed"] = steps, numbers(of_whole.rows), numbers(of_resumed.rows)
    Path(f"{folder}/found{rank}.json").write_text(json.dumps(found))


def work_and_end(folder: str) -> None:
    """The models under DDP are gone before their group is: one that outlives it may wait for ever for the other rank."""
    work(folder)
    gc.collect()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.full  # 14 s; sharing out is looked at without processes too
def test_two_ranks(tmp_path):
    run_on_ranks(__file__, tmp_path)
    found = [json.loads((tmp_path / f"found{rank}.json").read_text()) for rank in range(2)]
    processor, samples = learnt()

    collate = collator(processor, length=LENGTH)
    rows = pack(samples, collate).rows
    for rank, own in enumerate(found):
        sampler = packing.RankSampler(rows, rank=rank, world_size=2, batch_size=2, seed=4)
        wanted = []
        for epoch in range(2):
            sampler.set_epoch(epoch)
            wanted += [[list(rows[number]) for number in batch] for batch in torch.utils.data.BatchSampler(sampler, 2, False)]
        assert own["loop"] == wanted

    gradients = [torch.load(tmp_path / f"gradients{rank}.pt") for rank in range(2)]
    model = make_model(processor).train()
    for step in range(2):
        members = [[samples[number] for number in own["ddp"][step][0]] for own in found]
        assert sorted("pixel_values" in sample for (sample,) in members) == [False, True]
        loss, expected = one_by_one(model, [*members[0], *members[1]])
        assert found[0]["losses"][step] == pytest.approx(loss, abs=2e-5)
        for name in expected:
            torch.testing.assert_close(gradients[0][step][name], expected[name], atol=2e-6, rtol=1e-4)
            assert torch.equal(gradients[0][step][name], gradients[1][step][name])

    of_all = iter(packing.PackedStream(samples, collate.capacity, sample_format=collate.sample_format, buffer_size=20, repeat=True, rank=0, world_size=1))
    number = {id(sample): place for place, sample in enumerate(samples)}
    for step in range(3):
        for own in found:
            assert own["stream"][step] == [[number[id(sample)] for sample in next(of_all)]]

    for rank, own in enumerate(found):
        sampler = packing.RankSampler(rows, rank=rank, world_size=2, seed=3)  # the Trainer's seed
        wanted = []
        for epoch in range(2):
            sampler.set_epoch(epoch)
            wanted += [[list(rows[number])] for number in sampler]
        assert own["whole"] == wanted

    for own in found:
        steps = own["steps"]
        left = 2 * steps - (steps + steps // 2)
        assert len(own["whole"]) == 2 * steps and own["resumed"] == own["whole"][-left:] and own["whole"][:steps] != own["whole"][steps:]


# --- the examples


def test_the_trainer_learns(capsys):
    from examples import train_with_trainer

    before, *_, after = train_with_trainer.main(["--steps", "40", "--samples", "200"])
    assert after < 0.7 * before
    assert "of the tokens are padding" in capsys.readouterr().out
    before, *_, after = train_with_trainer.main(["--steps", "20", "--samples", "200", "--padded"])
    assert after < 0.8 * before


@pytest.mark.parametrize("given, share", [([], 0.8), (["--lora"], 0.95)])  # the adapters of a random model learn less
def test_trl_learns(given, share, capsys):
    sft()
    from examples import train_with_trl

    history = train_with_trl.main(["--steps", "42", "--samples", "200", *given])
    assert history[-1]["loss"] < share * history[0]["loss"]


if __name__ == "__main__":
    work_and_end(sys.argv[1])
