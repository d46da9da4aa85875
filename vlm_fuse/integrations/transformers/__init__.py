"""transformers models that merge by vlm_fuse: `patch(model)`, `unpatch(model)`, `with patched(model)`; `attend(config)`."""

from .attending import attend
from .patching import patch, patched, unpatch

__all__ = ["attend", "patch", "patched", "unpatch"]
