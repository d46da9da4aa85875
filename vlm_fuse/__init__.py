"""vlm_fuse: the step between the vision tower and the language model, as one fused op."""

from .adding import add_features
from .attending import Attend
from .backend import backends
from .masks import IntervalMask
from .merging import MergedBatch, merge
from .planning import plan
from .positions import mrope_position_ids
from .scaled_dot_product import attention
from .status import raise_errors
from .token_plan import TokenPlan

__version__ = "0.1.0"

__all__ = ["Attend", "IntervalMask", "MergedBatch", "TokenPlan", "add_features", "attention", "backends", "merge", "mrope_position_ids", "plan", "raise_errors"]


def __getattr__(name: str):
    """`packing` is imported when it is first asked for: who merges alone needs neither it nor numpy."""
    if name == "packing":
        import importlib

        return importlib.import_module(".packing", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
