"""What is left when something is missing: a fresh process without triton, without the compiled module, without both."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

WITHOUT = """
import sys
class Forbidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r} or name in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Forbidden())
"""

WORK = """
import torch, vlm_fuse
ids = torch.tensor([[1, 9, 9, 2], [0, 0, 3, 9]])
text, rows = torch.randn(2, 4, 8, requires_grad=True), torch.randn(3, 8, requires_grad=True)
out = vlm_fuse.merge(ids, text, rows, image_token_id=9, attention_mask=ids != 0, layout="packed", labels=ids)
expected = torch.stack([text[0, 0], rows[0], rows[1], text[0, 3], text[1, 2], rows[2]])
assert torch.equal(out.inputs_embeds[0], expected)
assert out.position_ids.tolist() == [[0, 1, 2, 3, 0, 1]] and out.mask.dense().sum() == 13
out.inputs_embeds.sum().backward()
assert rows.grad.eq(1).all() and text.grad.sum() == 24
weight = torch.randn(10, 8, requires_grad=True)
vlm_fuse.merge(ids, None, rows, weight=weight, image_token_id=9).inputs_embeds.sum().backward()
vlm_fuse.add_features(out.inputs_embeds, rows, out.plan).sum().backward()
print(sorted(name for name, info in vlm_fuse.backends().items() if info.available))
for name, info in vlm_fuse.backends().items():
    print(name, info.reason)
    assert info.available or info.reason
"""


def fresh(code, **environment):
    import os

    kept = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "VLM_FUSE_BACKEND")}
    return subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, cwd=ROOT, env=kept | environment, timeout=120)


@pytest.mark.parametrize("blocked", [["triton"], ["vlm_fuse._native"], ["triton", "vlm_fuse._native"], ["triton", "vlm_fuse._native", "numpy"]], ids=["no_triton", "no_native", "neither", "torch_alone"])
def test_it_works_without(blocked):
    run = fresh(WITHOUT.format(blocked=tuple(blocked)) + WORK)
    assert run.returncode == 0, run.stderr[-2000:]
    there = run.stdout.splitlines()[0]
    assert "reference" in there
    assert "vlm_fuse._native" not in blocked or "cpu" not in there
    assert "triton" not in blocked or "triton" not in there


def test_a_missing_module_is_said_once():
    code = WITHOUT.format(blocked=("triton", "vlm_fuse._native")) + (
        "import warnings, torch, vlm_fuse\n"
        "ids = torch.tensor([[1, 9]])\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    for _ in range(3): vlm_fuse.merge(ids, torch.zeros(1, 2, 4), torch.ones(1, 4), image_token_id=9)\n"
        "told = [str(w.message) for w in caught if 'vlm_fuse' in str(w.message)]\n"
        "assert len(told) == 1 and 'reference' in told[0] and 'cpu' in told[0], told\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    vlm_fuse.merge(ids, torch.zeros(1, 2, 4), torch.ones(1, 4), image_token_id=9, backend='reference')\n"
        "assert not caught, caught\n"
        "try: vlm_fuse.merge(ids, torch.zeros(1, 2, 4), torch.ones(1, 4), image_token_id=9, backend='cpu')\n"
        "except RuntimeError as error: assert 'cpu' in str(error)\n"
        "else: raise AssertionError('a named backend fell back')\n"
    )
    run = fresh(code)
    assert run.returncode == 0, run.stderr[-2000:]


def test_import_loads_nothing_heavy():
    """triton, dynamo and the compiler stay out until somebody asks for them."""
    code = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import vlm_fuse\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "heavy = new & {'triton', 'transformers', 'matplotlib', 'numpy', 'sklearn', 'PIL', 'hypothesis'}\n"
        "assert not heavy, heavy\n"
        "late = {name for name in set(sys.modules) - before if name.startswith(('torch._dynamo', 'torch._inductor'))}\n"
        "assert not late, sorted(late)[:5]\n"
    )
    run = fresh(code)
    assert run.returncode == 0, run.stderr[-2000:]


def test_the_public_names():
    import vlm_fuse

    wanted = {"merge", "plan", "Attend", "add_features", "raise_errors", "MergedBatch", "TokenPlan", "IntervalMask", "backends"}
    assert wanted <= set(vlm_fuse.__all__)
    assert all(getattr(vlm_fuse, name).__doc__ for name in vlm_fuse.__all__ if not name.startswith("__"))
    assert callable(vlm_fuse.merge) and callable(vlm_fuse.plan), "no module may take the place of a function"
    import vlm_fuse.masks
    import vlm_fuse.merging
    import vlm_fuse.planning  # noqa: F401

    assert callable(vlm_fuse.merge) and callable(vlm_fuse.plan) and callable(vlm_fuse.backends)


REFERENCE = sorted(path.stem for path in (ROOT / "vlm_fuse").glob("reference*.py"))


@pytest.mark.parametrize("module", REFERENCE)
def test_the_reference_imports_nothing_but_torch(module):
    """The definition stands on the batch alone."""
    import ast

    for node in ast.walk(ast.parse((ROOT / "vlm_fuse" / f"{module}.py").read_text())):
        if isinstance(node, ast.Import):
            assert all(alias.name.split(".")[0] in ("torch",) for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            assert node.module.split(".")[0] in ("torch", "typing", "__future__"), node.module
        if isinstance(node, ast.ImportFrom) and node.level:
            names = [node.module] if node.module else [alias.name for alias in node.names]
            assert set(names) <= {"batch", *REFERENCE}, names


@pytest.mark.parametrize("module", sorted(path.stem for path in (ROOT / "vlm_fuse" / "kernels").glob("*.py") if path.stem != "__init__"))
def test_backends_import_no_other_backend(module):
    import ast

    for node in ast.walk(ast.parse((ROOT / "vlm_fuse" / "kernels" / f"{module}.py").read_text())):
        if isinstance(node, ast.ImportFrom):
            names = {node.module or "", *(alias.name for alias in node.names)}
            others = {"triton", "cuda", "native"} - {module.partition("_")[0]}
            assert not any(name.split(".")[-1].partition("_")[0] in others for name in names if name != "triton"), names
            assert "reference" not in names
