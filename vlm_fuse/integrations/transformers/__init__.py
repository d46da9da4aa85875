"""transformers models that merge by vlm_fuse: `patch(model)`, `unpatch(model)`, `with patched(model)`; `attend(config)`."""

from ..binding import unpatch
from .attending import attend
from .patching import patch, patched

__all__ = ["attend", "patch", "patched", "unpatch"]
