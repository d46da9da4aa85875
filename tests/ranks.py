"""A test file's own work on several ranks: run as a script under torchrun, with gloo."""

import os
import subprocess
import sys

import pytest
import torch


def run_on_ranks(file: str, folder, ranks: int = 2) -> None:
    """`file` as a script on every rank, with `folder` as its argument; skipped without gloo.

    Raises:
        AssertionError: a rank failed, with the end of what was said.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("no gloo")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), file, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}) as running:
        try:
            _, errors = running.communicate(timeout=240)
        except subprocess.TimeoutExpired:
            running.terminate()  # torchrun then ends the ranks, which killing it would leave behind
            raise
    assert running.returncode == 0, errors[-3000:]
