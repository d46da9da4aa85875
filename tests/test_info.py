"""``python -m vlm_fuse info`` tells what is there and why not."""

import os
import shutil
import subprocess
import sys
from importlib.metadata import version

import pytest

import vlm_fuse


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "vlm_fuse", *arguments],
        capture_output=True, text=True, env={**os.environ, **environment},
    )  # fmt: skip


def test_info_names_versions_and_every_backend():
    done = run("info")
    assert done.returncode == 0, done.stderr
    versions, listed = done.stdout.split("\n\n")
    versions = dict(line.split(maxsplit=1) for line in versions.splitlines())
    assert versions["torch"] == version("torch")
    assert versions["vlm_fuse"] == vlm_fuse.__version__
    listed = {line.split()[0]: line for line in listed.splitlines()}
    for name in vlm_fuse.backends():
        there, *reason = listed[name].split()[1:]
        assert there in ("yes", "no") and reason


def test_info_shows_the_variable_that_overrides():
    assert "reference" in run("info", VLM_FUSE_BACKEND="reference").stdout.split("VLM_FUSE_BACKEND", 1)[1].splitlines()[0]


def test_without_a_command_the_usage_is_shown():
    done = run()
    assert done.returncode == 2
    assert "info" in done.stderr


def test_reference_is_always_there():
    assert vlm_fuse.backends()["reference"].available


@pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")) or os.environ.get("VLM_FUSE_NATIVE") == "0",
    reason="no C++ compiler",
)
def test_with_a_compiler_the_native_backend_is_there():
    found = vlm_fuse.backends()["cpu"]
    assert found.available, found.reason
