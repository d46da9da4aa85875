"""A dummy image for batches of text alone, so that the vision tower runs at every step on every rank (DDP, FSDP, ZeRO-3)."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..batch import IGNORE_INDEX
from .samples import Read, SampleFormat


class DummyImage:
    """A sample with an image whose tokens stand in the padding of a batch without images.

    They are padding for all that is counted and for the documents: no label, no document, nobody sees them. The model finds as many
    placeholders as features, and the tower's gradient is zero, not None.

    Args:
        sample: one image with its placeholders, as the processor gives it.
        form: of the samples.

    Raises:
        ValueError: a sample without an image, or whose placeholders do not agree with it.
    """

    def __init__(self, sample: Mapping, form: SampleFormat):
        self.form, self.read = form, form.read(sample, "dummy_image")
        if not self.is_needed_by([]) or not any(len(value) for value in self.read.vision.values()):
            raise ValueError("dummy_image: the sample has no image; give what the processor makes of a small one with its placeholders")

    def __len__(self) -> int:
        return len(self.read.input_ids)

    def is_needed_by(self, reads: list[Read]) -> bool:
        """Whether none of the samples has an image or a video, and the dummy does."""
        shown = [bool(self.form.kinds_of(read).any()) for read in (*reads, self.read)]
        return shown[-1] and not any(shown[:-1])

    def beside(self, reads: list[Read]) -> Read:
        """The dummy with the parts that the samples have: no labels where they have none."""
        names = {name for read in reads for name in read.by_token}
        nothing = torch.zeros_like(self.read.input_ids)
        by_token = {name: self.read.by_token.get(name, nothing) for name in names - {"mm_token_type_ids"}}
        if "mm_token_type_ids" in names or "mm_token_type_ids" in self.read.by_token:
            by_token["mm_token_type_ids"] = self.form.kinds_of(self.read)
        labels = None if any(read.labels is None for read in reads) else torch.full_like(nothing, IGNORE_INDEX)
        return self.read._replace(labels=labels, by_token=by_token, rest={})
