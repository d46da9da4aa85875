"""``python -m benchmarks``: the suite, as ``python -m vlm_fuse bench`` and ``make bench`` run it."""

import sys

from benchmarks import suite

if __name__ == "__main__":
    sys.exit(suite.main())
