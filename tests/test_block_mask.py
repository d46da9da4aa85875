"""block_mask against torch's create_block_mask tensor by tensor, and FlexAttention under it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from checking import assert_bits
from mask_cases import any_masks, document_masks
from test_renderings import BLOCK_MAP
from vlm_fuse import Attend, IntervalMask


@settings(max_examples=600)
@given(any_masks(), st.sampled_from((4, 8, (4, 8), (8, 2), 1, 64, 128)))
def test_equal_to_create_block_mask(mask, block_size):
    samples, rows = mask.kv_lo.shape
    if not samples * rows * mask.kv_length:
        return  # torch makes no mask without elements; test_renderings.py has these
    made = mask.block_mask(block_size)
    wanted = create_block_mask(made.mask_mod, samples if samples > 1 else None, None, rows, mask.kv_length, device="cpu", BLOCK_SIZE=block_size)
    # its elements come from the same mask_mod, which is held against the intervals here
    assert torch.equal(torch.vmap(lambda b: _elements(made.mask_mod, b, rows, mask.kv_length))(torch.arange(samples)), mask.dense()[:, 0])
    for name in BLOCK_MAP:
        assert_bits(getattr(made, name), getattr(wanted, name), name)
    assert made.seq_lengths == wanted.seq_lengths and made.BLOCK_SIZE == wanted.BLOCK_SIZE and made.shape == wanted.shape


def _elements(mask_mod, b, rows, keys):
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    with TransformGetItemToIndex():
        over_keys = torch.vmap(mask_mod, in_dims=(None, None, None, 0))
        return torch.vmap(over_keys, in_dims=(None, None, 0, None))(b, b, torch.arange(rows), torch.arange(keys))


def test_large_blocks_of_many_documents():
    """Documents of all lengths in 128 x 128 blocks, as in a training step."""
    generator = torch.Generator().manual_seed(0)
    for attend in (Attend(), Attend(window=200), Attend("full"), Attend(window=300, sinks=100)):
        lengths = torch.randint(0, 500, (12,), generator=generator)
        mask = IntervalMask.from_cu_seqlens(torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]), attend, length=int(lengths.sum()) + 77)
        made = mask.block_mask()
        wanted = create_block_mask(made.mask_mod, None, None, *made.seq_lengths, device="cpu")
        for name in BLOCK_MAP:
            assert_bits(getattr(made, name), getattr(wanted, name), name)


def test_a_mask_of_one_row_serves_any_batch_and_head():
    mask = IntervalMask.from_cu_seqlens(torch.tensor([0, 5, 20])).block_mask(4)
    wanted = create_block_mask(mask.mask_mod, 3, 2, 20, 20, device="cpu", BLOCK_SIZE=4)
    for name in BLOCK_MAP:
        ours, theirs = getattr(mask, name), getattr(wanted, name)
        assert torch.equal(ours.expand_as(theirs), theirs), name


# -- FlexAttention; uncompiled it ignores the table of blocks ----------------------------------------------------------


@pytest.fixture
def fresh_dynamo():
    """More shapes than dynamo compiles would fall back to eager, where the table of blocks is not looked at: then fail."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    torch._dynamo.reset()


def reference(q, k, v, mask):
    """In float64, without SDPA."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    seen = mask.dense()
    scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~seen, -torch.inf)
    return torch.where(seen.any(-1, keepdim=True), scores, 0).softmax(-1) * seen @ v


MASKS = {
    "packed": lambda: IntervalMask.from_cu_seqlens(torch.tensor([0, 100, 256, 257, 300]), length=390),
    "windowed_with_sinks": lambda: IntervalMask.from_cu_seqlens(torch.tensor([0, 390]), Attend(window=70, sinks=5)),
    "images_of_several_samples": lambda: IntervalMask.from_document_ids(
        torch.tensor([[0] * 260 + [1] * 130, [0] * 330 + [-1] * 60], dtype=torch.int32),
        Attend(window=50, images="bidirectional"),
        image_ids=torch.tensor([[-1] * 40 + [0] * 200 + [-1] * 150, [0] * 150 + [-1] * 40 + [1] * 200], dtype=torch.int32),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MASKS)
def test_flex_attention_compiled(name, fresh_dynamo):
    mask = MASKS[name]()
    q, k, v = (torch.randn(2, heads, 390, 16) for heads in (4, 2, 2))
    block_mask = mask.block_mask()
    assert int(block_mask.full_kv_num_blocks.sum()) + int(block_mask.kv_num_blocks.sum()) < 16 * mask.kv_lo.shape[0], "some blocks are empty, or the table is not tested"
    with torch.no_grad():
        made = torch.compile(flex_attention, dynamic=False)(q, k, v, block_mask=block_mask, enable_gqa=True)
    torch.testing.assert_close(made.double(), reference(q, k, v, mask), atol=2e-5, rtol=2e-5)


@pytest.mark.slow
def test_flex_attention_is_not_compiled_anew_from_step_to_step(fresh_dynamo):
    """Other documents, other numbers of blocks, the same shapes."""
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(flex_attention, dynamic=False)
    q = torch.randn(1, 2, 256, 16)
    for offsets in ([0, 256], [0, 10, 256], [0, 128, 129, 250]):
        mask = IntervalMask.from_cu_seqlens(torch.tensor(offsets), length=256)
        with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=offsets != [0, 256]):
            made = compiled(q, q, q, block_mask=mask.block_mask())
        torch.testing.assert_close(made.double(), reference(q, q, q, mask), atol=2e-5, rtol=2e-5)


# -- inside torch.compile ----------------------------------------------------------------------------------------------


def test_renderings_are_traced_whole(fresh_dynamo):
    def render(document_ids):
        mask = IntervalMask.from_document_ids(document_ids, Attend(window=3))
        return mask.dense(), mask.bits(), mask.additive(torch.float32), mask.block_mask(4).kv_indices, mask.slice(1, 4).dense()

    compiled = torch.compile(render, fullgraph=True, dynamic=True, backend="aot_eager")
    for number, width in enumerate((9, 12, 17)):
        ids = torch.arange(width, dtype=torch.int32).div(4, rounding_mode="floor")[None]
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            for made, wanted in zip(compiled(ids), render(ids)):
                assert torch.equal(made, wanted)


@settings(max_examples=5)
@given(document_masks(samples=2))
def test_operators_are_registered_rightly(mask):
    ops = torch.ops.vlm_fuse
    for op, more in ((ops.dense.default, (torch.bool,)), (ops.dense.default, (torch.float16,)), (ops.bits.default, ()), (ops.block_map.default, (4, 3))):
        torch.library.opcheck(op, (*mask._parts, *more, "auto"))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", MASKS)
def test_mask_mods_are_known_as_intervals(name, dynamic, fresh_dynamo):
    """FlexAttention's flash kernel packs a mask whose graph it recognises as intervals: 32 keys a word, not one by one."""
    packing = pytest.importorskip("torch._inductor.kernel.flex.interval_mask_packing", reason="this torch does not pack intervals")
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    graphs = []

    def keep_graphs(module, inputs):
        graphs.extend(part for part in module.children() if isinstance(part, torch.fx.GraphModule))
        return module.forward

    mask = MASKS[name]()
    q = torch.randn(2, 2, 390, 16)
    with torch.no_grad():
        torch.compile(flex_attention, backend=aot_autograd(fw_compiler=keep_graphs), dynamic=dynamic)(q, q, q, block_mask=mask.block_mask())
    with V.set_graph_handler(GraphLowering(graphs[0])):
        found = [packing.select_packed_mask_intervals(graph) for graph in graphs]
    assert any(intervals is not None and len(intervals) == (1 if mask.kv_lo2 is None else 2) for intervals in found), f"{len(graphs)} graphs, none recognised"
