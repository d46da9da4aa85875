"""The interval mask and its renderings, one rendering a file."""

from .interval import IntervalMask

__all__ = ["IntervalMask"]
