"""Every Python example of README and docs/ runs, a page from top to bottom in one namespace."""

import re
from pathlib import Path

import pytest

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
