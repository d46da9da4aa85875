"""The release of transformers that is installed, as (major, minor)."""

import transformers

RELEASE = tuple(int(part) for part in transformers.__version__.split(".")[:2])
