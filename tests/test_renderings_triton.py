"""What is special to Triton's renderings: programs far behind the first, run alone, and rows of every length in 16-byte units."""

import os

import numpy
import pytest
import torch

from vlm_fuse import reference_renderings as reference
from vlm_fuse.batch import ROW_DTYPES

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip("neither a GPU nor Triton's interpreter", allow_module_level=True)

from vlm_fuse.kernels import triton_block_map, triton_dense  # noqa: E402
from vlm_fuse.kernels.triton_launch import INTERPRETED  # noqa: E402

DEVICE = "cpu" if INTERPRETED.value else "cuda"


def bounds(shape, width: int, seed: int, pair: bool) -> list[torch.Tensor | None]:
    """Any numbers from below 0 to beyond the keys, in any order; the last row sees the last key."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randint(-2, width + 3, shape, generator=generator, dtype=torch.int32) for _ in range(4)]
    made[0][:, -1], made[1][:, -1] = width // 2, width + 1
    made = [bound.to(DEVICE) for bound in made]
    return made if pair else [*made[:2], None, None]


def reaching(device_tensors, row: int, width: int) -> torch.Tensor:
    """What a row of a single sample sees."""
    part = [None if bound is None else bound[:, row : row + 1].cpu() for bound in device_tensors]
    return reference.dense(*part, width, torch.bool)[0, 0, 0]


# -- every place at which a row can begin in a unit --------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 15, 16, 17, 127, 128, 129, 300])
def test_rows_that_begin_and_end_anywhere_in_a_unit(width):
    parts = bounds((3, 5), width, width, width not in (16, 128))
    host = [None if bound is None else bound.cpu() for bound in parts]
    for dtype in (torch.bool, *ROW_DTYPES) if width < 128 else (torch.bool, torch.float64):
        made = triton_dense.dense(*parts, width, dtype)
        expected = reference.dense(*host, width, dtype)
        assert made.dtype == dtype and made.shape == expected.shape
        assert torch.equal(made.cpu().view(torch.uint8), expected.view(torch.uint8)), dtype
    assert torch.equal(triton_dense.bits(*parts, width).cpu(), reference.bits(*host, width))


def test_two_intervals_that_meet_cover_a_block_together():
    lo = torch.tensor([[0, 4, 0, 9]], dtype=torch.int32, device=DEVICE)
    hi = torch.tensor([[6, 16, 6, 16]], dtype=torch.int32, device=DEVICE)
    # behind the first, before it, within it, and with one key between them
    lo2 = torch.tensor([[6, 0, 2, 0]], dtype=torch.int32, device=DEVICE)
    hi2 = torch.tensor([[16, 4, 16, 8]], dtype=torch.int32, device=DEVICE)
    made = triton_block_map.block_map(lo, hi, lo2, hi2, 16, 1, 16)
    assert made[2].tolist() == [[[1, 1, 1, 0]]] and made[0].tolist() == [[[0, 0, 0, 1]]]


# -- offsets beyond 2**31 ----------------------------------------------------------------------------------------------


@pytest.fixture
def programs(monkeypatch):
    """Runs only the programs of these numbers, counted from the last where below 0."""
    if not INTERPRETED.value:
        pytest.skip("a GPU runs all of them: test_renderings.py has sizes beyond 2**31")
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    builder = interpreter.interpreter_builder
    launch = interpreter.GridExecutor.__call__

    def choose(*numbers):
        def one_of(executor, *args, **options):
            chosen = [number % executor.grid[0] for number in numbers]
            executor.grid = (len(chosen),)
            monkeypatch.setattr(builder, "set_grid_idx", lambda x, y, z: setattr(builder, "grid_idx", (chosen[x], y, z)))
            return launch(executor, *args, **options)

        # memory that no program touches stays untouched: what runs on the host needs no copy back
        monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)
        monkeypatch.setattr(interpreter.GridExecutor, "__call__", one_of)

    # a tile is longer than a row
    monkeypatch.setattr(triton_dense, "_UNITS", 2**14)
    return choose


@pytest.mark.no_poison
@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16])
def test_dense_beyond_2_31_elements(programs, dtype, pair):
    rows = 2**14 + 7
    width = 2**31 // rows + 3
    parts = bounds((1, rows), width, 3, pair)
    programs(0, -2, -1)
    made = triton_dense.dense(*parts, width, dtype)
    assert made.numel() > 2**31
    for row in (0, 1, 2, rows - 4, rows - 3, rows - 2, rows - 1):
        seen = reaching(parts, row, width)
        expected = seen if dtype == torch.bool else torch.zeros(width, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)
        assert torch.equal(made[0, 0, row], expected), f"row {row}"


@pytest.mark.no_poison
@pytest.mark.parametrize("rows", [46341, 131101])
def test_bits_beyond_2_31_bits_and_bytes(programs, rows):
    width = rows + 2
    parts = bounds((1, rows), width, 5, True)
    programs(0, -2, -1)
    made = triton_dense.bits(*parts, width)
    assert made.numel() * 8 > (2**34 if rows > 2**17 else 2**31)
    for row in (0, 1, 2, rows - 3, rows - 2, rows - 1):
        first, last = row * width // 8, ((row + 1) * width + 7) // 8
        line = numpy.unpackbits(made[0, first:last].numpy(), bitorder="little")[row * width - first * 8 :]
        assert numpy.array_equal(line[:width].astype(bool), reaching(parts, row, width).numpy()), f"row {row}"
    assert not line[width:].any(), "padding"


@pytest.mark.no_poison
def test_block_map_of_more_than_2_31_blocks(programs):
    """The classes alone: the lists of all blocks would not fit."""
    rows, width, block = 2**16 + 3, 2**15 + 9, 1
    parts = bounds((1, rows), width, 7, True)
    classes = torch.empty(2 * rows * width, dtype=torch.uint8)
    columns = 2**16
    programs(-1)
    triton_block_map.classes_kernel[(rows,)](classes, *parts, rows, width, block, block, rows, rows, width, 1, columns, 1)
    expected = reaching(parts, rows - 1, width).to(torch.uint8) * 2
    assert torch.equal(classes[(rows - 1) * width : rows * width], expected)
    across = classes[rows * width :].view(width, rows)
    assert torch.equal(across[:, -1], expected)
    # the last row's lists, with memory for them alone
    counts, lists = torch.zeros(4, rows, dtype=torch.int32), torch.empty(2, rows * width, dtype=torch.int32)
    programs(-1)
    triton_block_map.lists_kernel[(rows,)](
        classes, counts[0], lists[0], counts[1], lists[1], counts[2], counts[3], counts[2], counts[3], rows, rows, width, columns
    )  # fmt: skip
    keys = torch.arange(width, dtype=torch.int32)
    assert counts[0, -1] == 0 and counts[1, -1] == expected.count_nonzero()
    assert torch.equal(lists[0, -width:], keys)
    assert torch.equal(lists[1, -width:], torch.cat([keys[expected == 2], keys[expected == 0]]))
