"""`PackedTraining`: transformers' Trainer, TRL's SFTTrainer and their kin on packed rows."""

from __future__ import annotations

from torch.utils.data import IterableDataset
from transformers import TrainerCallback

from ..packing import PackedDataset, PackedRows, PackedStream, RankSampler

#: keys of a batch for the trainer; the model has no use for them.
_FOR_THE_TRAINER = ("plan", "token_counts", "loss_weights", "cu_seqlens_padded")


class PackedTraining:
    """To stand before a trainer among the bases of a class: ``class PackedTrainer(PackedTraining, Trainer): pass``.

    Takes a `PackedDataset` as train_dataset: its rows come in the order of `RankSampler`, so that at each step every rank has rows of
    like vision work, in each epoch other ones, and after ``resume_from_checkpoint`` those that would have come. Takes a `PackedStream`
    made with ``rank=0, world_size=1`` too, of which every rank reads all and keeps its share. TRL, which wants a dataset of Hugging Face's to look at, is given one of row numbers, and
    counts the tokens of packed rows by the batch's plan where the collator leaves it in the batch (``extras=("plan",)``). What the batch has for the
    trainer does not reach the model: a ``compute_loss`` of your own may take it out of `inputs` first.

    Args: as of the trainer, all but model and args by name.

    Raises:
        ValueError: a stream that is shared out already; a trainer of TRL that is to prepare the dataset itself.

    Example:
        >>> import transformers
        >>> from vlm_fuse.integrations.trainers import PackedTraining
        >>> class PackedTrainer(PackedTraining, transformers.Trainer):
        ...     pass
        >>> [base.__name__ for base in PackedTrainer.__mro__[1:3]]
        ['PackedTraining', 'Trainer']
    """

    def __init__(self, model=None, args=None, *, train_dataset=None, **settings):
        self._epochs: _Epochs | None = None
        seen = train_dataset
        if isinstance(train_dataset, PackedStream):
            if (train_dataset.rank, train_dataset.world_size) != (0, 1):
                raise ValueError("train_dataset: the trainer shares the rows of a PackedStream out among the ranks; make it with rank=0, world_size=1")
            if args is not None and args.accelerator_config.dispatch_batches is None:
                args.accelerator_config.dispatch_batches = False  # else rank 0 reads for all and joins batches, which pictures do not allow; as TRL
        if self._is_of_trl() and isinstance(train_dataset, (PackedDataset, PackedStream)):
            if not (getattr(args, "dataset_kwargs", None) or {}).get("skip_prepare_dataset"):
                raise ValueError('args: the samples are made ready by the processor and the collator; give SFTConfig(dataset_kwargs={"skip_prepare_dataset": True})')
            seen = _row_numbers(train_dataset)
        super().__init__(model, args, train_dataset=seen, **settings)
        self.train_dataset = train_dataset

    @classmethod
    def _is_of_trl(cls) -> bool:
        return any(base.__module__.partition(".")[0] == "trl" for base in cls.__mro__)

    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not isinstance(dataset, PackedDataset) or not isinstance(dataset.rows, PackedRows):
            return super()._get_train_sampler(dataset)
        alike = 1  # ranks that get the same rows, as of tensor and context parallelism
        for size in ("get_tp_size", "get_cp_size"):
            alike *= getattr(self, size, lambda: 1)()
        ranks = self.accelerator.num_processes // alike
        batch_size = getattr(self, "_train_batch_size", None) or self.args.train_batch_size
        if self.accelerator.split_batches:
            batch_size //= ranks
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        sampler = RankSampler(dataset.rows, shared_by=ranks, batch_size=batch_size, seed=seed, drop_last=self.args.dataloader_drop_last)
        if self._epochs is None:
            self._epochs = _Epochs()
            self.add_callback(self._epochs)
        self._epochs.sampler = sampler
        return sampler

    def compute_loss(self, model, inputs, *args, **settings):
        """As the trainer's; batches keep what is not for the model to themselves."""
        plan = inputs.get("plan")
        inputs = {name: value for name, value in inputs.items() if name not in _FOR_THE_TRAINER}
        if plan is None or "attention_mask" in inputs or not self._is_of_trl():
            return super().compute_loss(model, inputs, *args, **settings)
        # TRL counts the tokens of a batch by its mask; without one it takes the second size of the positions, padding and all
        inputs["attention_mask"] = plan.attention_mask.long()

        def without_mask(*given, attention_mask=None, **more):
            return model(*given, **more)

        return super().compute_loss(without_mask, inputs, *args, **settings)


class _Epochs(TrainerCallback):
    """Tells the sampler the epoch: accelerate does not where it has skipped batches of a resumed epoch on several ranks."""

    sampler: RankSampler | None = None

    def on_epoch_begin(self, args, state, control, **_):
        self.sampler.set_epoch(int(state.epoch or 0))


def _row_numbers(dataset: PackedDataset | PackedStream):
    """A dataset of Hugging Face's of as many rows, for what only looks at its kind."""
    import datasets

    if isinstance(dataset, IterableDataset):
        return datasets.Dataset.from_dict({"row": [0]}).to_iterable_dataset()
    return datasets.Dataset.from_dict({"row": list(range(len(dataset)))})
