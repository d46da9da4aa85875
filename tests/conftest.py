"""Backends present, poisoned allocations, and what hypothesis may spend.

Without a GPU the GPU's backends run here all the same, on CPU tensors: Triton on its interpreter, CUDA on the emulator of
tests/emulator. A CUDA kernel that does not compile ends the session.
"""

import os

import torch

# Triton decides between its interpreter and a GPU when it is imported, so the choice stands before anything imports it.
# Tests that compile ahead of time start a process of their own without it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import hypothesis
import pytest

from emulator import build

EMULATOR_MISSING = build.missing()
if not torch.cuda.is_available() and EMULATOR_MISSING is None:
    build.install()  # before vlm_fuse looks for its backends

import vlm_fuse  # noqa: E402
from vlm_fuse.kernels import cuda_module  # noqa: E402

hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, print_blob=True, suppress_health_check=list(hypothesis.HealthCheck))
hypothesis.settings.register_profile("search", parent=hypothesis.settings.get_profile("suite"), derandomize=False, max_examples=2000)
hypothesis.settings.load_profile("suite")

BACKENDS = [name for name, info in vlm_fuse.backends().items() if info.available]


def _devices(name: str) -> list[str]:
    served = vlm_fuse.backends()[name].devices
    if name == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
        return ["cpu"]
    there = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    return [device for device in there if not served or device in served]


def _on_the_cpu(item) -> bool:
    """Whether a test of every backend asks for no device."""
    names = getattr(item, "fixturenames", ())
    return "backend" in names and "device" not in names and hasattr(item, "callspec") and not item.get_closest_marker("own_process")


def pytest_report_header(config):
    lines = [f"vlm_fuse backend {name}: {'yes' if info.available else 'no'}: {info.reason}" for name, info in vlm_fuse.backends().items()]
    return lines + ([f"CUDA kernels are not emulated: {EMULATOR_MISSING}"] if EMULATOR_MISSING else [])


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="everything: all cases under Triton's interpreter, not every nth of the long lists, and the tests marked full")


#: the files with the longest tests, so that no process is left with one of them at the end.
FIRST = [f"test_{name}.py" for name in ("install", "triton_compile", "cuda_sanitized", "cuda_compile", "registration", "bounds", "large")]


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))
    interpreted = os.environ.get("TRITON_INTERPRET") == "1" and not config.getoption("--full")
    kept, left_out, seen = [], [], {}
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no GPU"))
        if _on_the_cpu(item) and "cpu" not in _devices(item.callspec.params["backend"]):
            item.add_marker(pytest.mark.skip(reason="takes tensors of the CPU"))
        if item.get_closest_marker("full") and not config.getoption("--full"):
            left_out.append(item)
            continue
        thinned = item.get_closest_marker("thinned")
        if interpreted and thinned and hasattr(item, "callspec") and item.callspec.params.get("backend") == "triton":
            number = seen[item.function] = seen.get(item.function, -1) + 1
            if number % thinned.args[0]:
                left_out.append(item)
                continue
        kept.append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept


@pytest.fixture(scope="session", params=BACKENDS)
def backend(request) -> str:
    """Every backend that is here, by name."""
    return request.param


@pytest.fixture(scope="session")
def device(backend) -> str:
    """A device that the backend serves: its GPU where there is one."""
    return _devices(backend)[-1] if backend != "reference" else "cpu"


def through_new_empty(yes: bool) -> None:
    """How the emulated CUDA module has torch make tensors."""
    if cuda_module.module is not None and cuda_module.module.emulated:
        cuda_module.attach_allocation(cuda_module.module, through_functions=not yes)


@pytest.fixture(autouse=True)
def poisoned_allocations(request):
    """Memory that nobody has written holds NaN (the largest number for integers), so that an unwritten row shows."""
    if request.node.get_closest_marker("no_poison"):
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    through_new_empty(True)  # what torch's C functions make on a CPU is not filled
    yield
    through_new_empty(False)
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture(scope="module")
def one_thread():
    """For models so small that they only wait for their threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_flag_left_behind():
    """An error flagged asynchronously in one test must not reach the next."""
    yield
    try:
        vlm_fuse.raise_errors()
    except (ValueError, IndexError):
        pass
