"""Benchmarks of vlm_fuse: run them from the root of the repository, ``python -m benchmarks.bench_merge``."""
