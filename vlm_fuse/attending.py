"""`Attend`: who sees whom, in words. The intervals that follow from it are made by `plan` and `IntervalMask`."""

from __future__ import annotations

from dataclasses import dataclass

KINDS = ("causal", "full")
IMAGES = ("causal", "bidirectional", "bidirectional_windowed")

#: a size that no row reaches, as int32.
NO_LIMIT = 2**31 - 1


def _whole(name: str, value, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"Attend: {name} must be a whole number of at least {least}, got {value!r}")


@dataclass(frozen=True)
class Attend:
    """Who sees whom, a frozen and hashable constant. Every row sees rows of its own document only.

    Args:
        kind: "causal", or "full" (every row of the document; with a window: ``|q - k| < window``).
        window: a token sees itself and ``window - 1`` tokens before it (transformers' ``sliding_window``).
        sinks: with a window, also those of the first ``sinks`` tokens of the document that do not lie ahead.
        chunk_size: rows see those of their own chunk only, counted from the start of the document (Llama 4); not with a window.
        images: "causal": an image is read like text. "bidirectional": ``(window & causal) | same image`` (Gemma 3: global
            layers; sliding layers up to transformers 5.12). "bidirectional_windowed": ``window & (causal | same image)``, where a
            key ahead is always inside the window (Gemma 3 and 4: sliding layers from transformers 5.13 on). With chunks both
            are ``(chunk & causal) | same image``.

    Windows, chunks and sinks count output rows from the document's first row, padding inside included.

    Raises:
        ValueError: an unknown word, a number below its least, or a window together with chunk_size.

    Example:
        >>> Attend(window=1024, images="bidirectional").window
        1024
        >>> hash(Attend()) == hash(Attend("causal"))
        True

    Source: the readings of a window with images: huggingface/transformers PR 46850.
    """

    kind: str = "causal"
    window: int | None = None
    sinks: int = 0
    chunk_size: int | None = None
    images: str = "causal"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"Attend: kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.images not in IMAGES:
            raise ValueError(f"Attend: images must be one of {', '.join(IMAGES)}, got {self.images!r}")
        if self.window is not None:
            _whole("window", self.window, 1)
        if self.chunk_size is not None:
            _whole("chunk_size", self.chunk_size, 1)
        _whole("sinks", self.sinks, 0)
        if self.window is not None and self.chunk_size is not None:
            raise ValueError("Attend: window and chunk_size exclude each other; describe each layer type by an Attend of its own")

    @property
    def codes(self) -> tuple[int, int, int, int, int]:
        """(kind, window, sinks, chunk_size, images) as the kernels take them, 0 for none."""
        images = "bidirectional" if self.chunk_size and self.images != "causal" else self.images
        sizes = [min(size or 0, NO_LIMIT) for size in (self.window, self.sinks, self.chunk_size)]
        return KINDS.index(self.kind), *sizes, IMAGES.index(images)


#: the default, one object: a call that leaves `attend` out is known by identity.
CAUSAL = Attend()
