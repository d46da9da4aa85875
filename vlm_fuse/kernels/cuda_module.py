"""The compiled module vlm_fuse._cuda (csrc/cuda), where it is there and there is a GPU to run it on.

Tensors reach it through torch's DLPack exchange table; it launches on the stream that torch works on. Nothing is compiled
at import.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import torch
from torch import Tensor

from ..batch import RAISE, ROW_DTYPES, RecordedError
from ..modes import MODES
from .torch_library import address, constant


def _why_missing() -> str:
    """What the build left behind; it says nothing of a module that was built for another Python."""
    try:
        found = json.loads((Path(__file__).parent.parent / "_build_info.json").read_text())["cuda"]
    except (OSError, ValueError, KeyError):
        return "never built: run pip install -e . where nvcc is"
    return f"compiled, but not for this Python: run pip install -e . ({found['reason']})" if found["compiled"] else found["reason"]


def attach_allocation(module, through_functions: bool = True) -> None:
    """Tell the module how torch makes tensors: by the functions that compiled models use (torch/csrc/inductor/aoti_torch/c/shim.h,
    kept stable), and the one that wraps a tensor for Python (torch/csrc/autograd/python_variable.h) under the name that C++
    compilers give it. Where this torch lacks one of them the module calls new_empty, at twice the cost.
    """
    dtypes = torch.int32, torch.int64, torch.bool, torch.uint8, *ROW_DTYPES
    codes = tuple(constant(f"dtype_{str(dtype).removeprefix('torch.')}") for dtype in dtypes)
    device = constant("device_type_cpu" if module.emulated else "device_type_cuda")
    functions = (
        address("libtorch_cpu", "aoti_torch_empty_strided"), address("libtorch_cpu", "aoti_torch_delete_tensor_object"),
        address("libtorch_python", "_Z16THPVariable_WrapRKN2at10TensorBaseE"),
    )  # fmt: skip
    known = through_functions and min(*codes, device) >= 0 and all(functions)
    module.attach_allocation(dtypes, codes, device, functions if known else (0, 0, 0))


def _load():
    """(the module, where it runs), or (None, why it cannot be used)."""
    try:
        module = importlib.import_module("vlm_fuse._cuda")
    except ModuleNotFoundError:
        return None, _why_missing()
    except ImportError as error:
        return None, f"does not load: {error}"
    count, reason = module.devices()
    if not count:
        return None, f"compiled, but no GPU: {reason}"
    if not module.emulated and not torch.cuda.is_available():
        return None, "compiled, but no GPU that torch can use"
    if not module.emulated and torch.cuda.get_device_capability() < (8, 0):
        return None, f"compiled for sm_80 and later, and this is {torch.cuda.get_device_name()}"
    table = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if table is None:
        return None, f"torch {torch.__version__} has no DLPack exchange table: torch >= 2.10 is needed"
    try:
        attached = module.attach(table, RAISE, RecordedError, Tensor, torch.nn.Parameter, ROW_DTYPES, MODES)
        attach_allocation(module)
    except (TypeError, AttributeError):
        return None, "the compiled module is older than the Python code: run pip install -e . (or make native) again"
    if not attached:
        return None, f"the DLPack exchange table of torch {torch.__version__} is of another major version"
    return module, "emulated on the CPU, for tests" if module.emulated else f"CUDA C++ for {torch.cuda.get_device_name()}"


#: the module, or None, and where it runs, or why it cannot be used.
module, reason = _load()
