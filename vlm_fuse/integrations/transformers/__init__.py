"""transformers models that merge by vlm_fuse: `patch(model)`, `unpatch(model)`, `with patched(model)`."""

from .patching import patch, patched, unpatch

__all__ = ["patch", "patched", "unpatch"]
