"""Every Python example of README, docs/ and the docstrings runs, a page from top to bottom in one namespace."""

import doctest
import importlib
import re
from pathlib import Path

import pytest

import vlm_fuse

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#:]+)\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_examples_run(page):
    text = page.read_text()
    blocks = list(BLOCK.finditer(text))
    assert blocks, f"{page.name} has no example"
    namespace = {}
    for block in blocks:
        # blank lines before the code, so that a traceback names the line of the page
        source = "\n" * (text[: block.start()].count("\n") + 1) + block.group(1)
        exec(compile(source, str(page), "exec"), namespace)


MODULES = sorted(path for path in (ROOT / "vlm_fuse").rglob("*.py") if ">>> " in path.read_text())


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_examples_of_docstrings_run(path):
    module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    failed, tried = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert tried and not failed


def test_every_public_function_has_an_example():
    for name in vlm_fuse.__all__:
        public = getattr(vlm_fuse, name)
        methods = [value for key, value in vars(public).items() if callable(value) and not key.startswith("_")] if isinstance(public, type) else []
        for documented in [public, *methods] if name not in ("MergedBatch", "TokenPlan") else methods:
            if documented.__doc__ and documented.__name__ not in ("pin_memory", "with_labels"):
                assert ">>> " in documented.__doc__, f"{name}: {documented.__name__}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for target in LINK.findall(page.read_text()):
        assert (page.parent / target).exists(), target


def test_variables_of_the_readme_are_those_of_the_code():
    """One table lists them all: nothing in the code is missing from it, nothing in it is gone from the code."""
    name = re.compile(r"VLM_FUSE_[A-Z_]+[A-Z]")
    code = [ROOT / "setup.py", *(ROOT / "vlm_fuse").rglob("*.py"), *(ROOT / "csrc").rglob("*.[ch]*")]
    quoted = re.compile(r"[\"'](VLM_FUSE_[A-Z_]+[A-Z])[\"']")
    used = {found for path in code for found in quoted.findall(path.read_text())}
    table = {found for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| `VLM") for found in name.findall(line)}
    assert used == table
