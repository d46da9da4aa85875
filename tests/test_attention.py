"""vlm_fuse.attention against dense float64 attention without SDPA, forward and backward."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vlm_fuse
from mask_cases import any_masks
from vlm_fuse import Attend, IntervalMask
from vlm_fuse import scaled_dot_product as paths


def reference(q, k, v, mask, scale=None):
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    seen = mask.dense()
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = torch.where(seen.any(-1, keepdim=True), scores.masked_fill(~seen, -torch.inf), 0)
    return scores.softmax(-1) * seen @ v


def rows(mask, samples, heads, kv_heads, dim=8, value_dim=8, dtype=torch.float64):
    shapes = ((samples, heads, mask.kv_lo.shape[1], dim), (samples, kv_heads, mask.kv_length, dim), (samples, kv_heads, mask.kv_length, value_dim))
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def assert_like_dense(mask, q, k, v, **more):
    made, wanted = vlm_fuse.attention(q, k, v, mask, **more), reference(q, k, v, mask, **more)
    torch.testing.assert_close(made, wanted)
    grad = torch.randn_like(wanted)
    ours, theirs = (torch.autograd.grad(out, (q, k, v), grad) for out in (made, wanted))
    for name, one, other in zip("qkv", ours, theirs):
        torch.testing.assert_close(one, other, msg=lambda told, name=name: f"gradient of {name}: {told}")
    nothing = ~mask.dense().any(-1)[:, 0]
    assert made.transpose(1, 2)[nothing.expand(q.shape[0], -1)].eq(0).all(), "rows that see nothing give zeros"


@pytest.fixture(params=[(256, 32), (5, 0), (8, 3)], ids=lambda sizes: f"blocks_of_{sizes[0]}_joining_{sizes[1]}")
def block_rows(request, monkeypatch):
    """Small blocks too, so that the masks of a few rows take all of the ways."""
    monkeypatch.setattr(paths, "_BLOCK_ROWS", request.param[0])
    monkeypatch.setattr(paths, "_SMALL_ROWS", request.param[1])


def test_like_dense_attention(block_rows):
    @settings(max_examples=150)
    @given(any_masks(), st.sampled_from(((4, 4), (4, 2), (3, 1))), st.sampled_from((None, 0.3)))
    def check(mask, heads, scale):
        samples = mask.kv_lo.shape[0] if mask.kv_lo.shape[0] != 1 else 2  # a mask of one row serves two samples
        torch.manual_seed(0)
        assert_like_dense(mask, *rows(mask, samples, *heads), scale=scale)

    check()


@pytest.mark.parametrize(
    "attend", [Attend(), Attend("full"), Attend(window=300), Attend("full", window=40), Attend(window=64, sinks=4), Attend(chunk_size=128), Attend(images="bidirectional")], ids=str
)
def test_rows_of_many_blocks(attend):
    """Documents longer than a block of rows, some of one row, padding at both ends."""
    ids = torch.tensor([-1] * 5 + [0] * 700 + [1] + [2] * 40 + [3] + [4] * 250 + [-1] * 30)[None]
    images = torch.full_like(ids, -1)
    images[:, 100:500], images[:, 500:520] = 0, 1
    mask = IntervalMask.from_document_ids(ids, attend, image_ids=images)
    torch.manual_seed(0)
    assert_like_dense(mask, *rows(mask, 1, 2, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_lower_precision(dtype):
    mask = IntervalMask.from_cu_seqlens(torch.tensor([0, 90, 91, 400]), Attend(window=100, sinks=3), length=410)
    torch.manual_seed(0)
    q, k, v = rows(mask, 2, 4, 2, dtype=dtype)
    made = vlm_fuse.attention(q, k, v, mask)
    assert made.dtype == dtype
    wanted = reference(*(x.double() for x in (q, k, v)), mask)
    atol = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    torch.testing.assert_close(made.double(), wanted, atol=atol, rtol=0)
    found = torch.autograd.grad(made, (q, k, v), torch.ones_like(made))
    for one, other in zip(found, torch.autograd.grad(wanted, (q, k, v), torch.ones_like(wanted))):
        assert one.dtype == dtype and (one.double() - other.double()).norm() <= 10 * atol * max(float(other.double().norm()), 1)


def test_another_dimension_of_values():
    mask = IntervalMask.from_document_ids(torch.tensor([[0, 0, 1, -1, 1, 2]]), Attend(window=2))
    assert_like_dense(mask, *rows(mask, 1, 2, 2, dim=8, value_dim=5))


def test_padding_that_holds_nan_reaches_nobody():
    """Rows of padding are read by nothing: not even their NaN comes out."""
    mask = IntervalMask.from_document_ids(torch.tensor([[0, 0, 0, 1, 1, -1, -1]]))
    q, k, v = (x.detach() for x in rows(mask, 1, 2, 2))
    for x in (q, k, v):
        x[:, :, 5:] = torch.nan
        x.requires_grad_()
    made = vlm_fuse.attention(q, k, v, mask)
    assert made.isfinite().all() and made[:, :, 5:].eq(0).all()
    for grad in torch.autograd.grad(made.sum(), (q, k, v)):
        assert grad.isfinite().all() and grad[:, :, 5:].eq(0).all()


@pytest.mark.parametrize("attend", [Attend(), Attend(window=500), Attend(window=600, images="bidirectional")], ids=str)
def test_no_mask_of_rows_by_keys_is_made(attend):
    """Neither a mask nor scores: what is held at once stays far below Q x K, forward and backward."""
    T = 4096
    images = torch.full((1, T), -1)
    images[:, 100:900] = 0
    mask = IntervalMask.from_document_ids(torch.zeros(1, T, dtype=torch.int64), attend, image_ids=images)
    q, k, v = rows(mask, 1, 1, 1, dtype=torch.float32)
    with torch.profiler.profile(profile_memory=True) as profile:
        vlm_fuse.attention(q, k, v, mask).sum().backward()
    largest = max(event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")
    assert 0 < largest < T * T // 4


@pytest.mark.parametrize("attend", [Attend(), Attend(window=5), Attend("full")], ids=str)
def test_autocast_as_in_sdpa(attend):
    mask = IntervalMask.from_cu_seqlens(torch.tensor([0, 40, 45]), attend, length=50)
    q, k, v = rows(mask, 1, 2, 2, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = vlm_fuse.attention(q, k.bfloat16(), v, mask)
        wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask.dense())
    assert made.dtype == wanted.dtype == torch.bfloat16
    torch.testing.assert_close(made, wanted, atol=3e-2, rtol=3e-2)
    for one, other in zip(torch.autograd.grad(made.sum(), (q, k, v)), torch.autograd.grad(wanted.sum(), (q, k, v))):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, atol=5e-2, rtol=5e-2)


def test_gradients_only_where_they_are_asked_for():
    mask = IntervalMask.from_cu_seqlens(torch.tensor([0, 40]), Attend(window=5))
    for asked in ((True, False, False), (False, True, False), (False, False, True), (False, True, True)):
        q, k, v = (x.detach().requires_grad_(wanted) for x, wanted in zip(rows(mask, 1, 2, 1), asked))
        inputs = [x for x in (q, k, v) if x.requires_grad]
        made, wanted = vlm_fuse.attention(q, k, v, mask), reference(q, k, v, mask)
        for one, other in zip(torch.autograd.grad(made.sum(), inputs), torch.autograd.grad(wanted.sum(), inputs)):
            torch.testing.assert_close(one, other)
    with torch.no_grad():
        assert not vlm_fuse.attention(q, k, v, mask).requires_grad


def test_functorch_gradients():
    mask = IntervalMask.from_cu_seqlens(torch.tensor([0, 12]), Attend(window=5))
    q, k, v = (x.detach() for x in rows(mask, 1, 2, 2))
    found = torch.func.grad(lambda q: vlm_fuse.attention(q, k, v, mask).sum())(q)
    torch.testing.assert_close(found, torch.func.grad(lambda q: reference(q, k, v, mask).sum())(q))


def test_flex_path_without_gradients():
    """What a GPU takes by default, compiled for this CPU, which has no backward for it."""
    torch._dynamo.reset()
    mask = IntervalMask.from_cu_seqlens(torch.tensor([0, 150, 280]), Attend(window=60), length=300)
    q, k, v = (x.detach() for x in rows(mask, 2, 4, 2, dim=16, value_dim=16, dtype=torch.float32))
    with torch.no_grad():
        made = paths._by_flex(q, k, v, mask, None)
    torch.testing.assert_close(made, reference(q, k, v, mask), atol=2e-5, rtol=2e-5)
    assert made[:, :, 280:].eq(0).all()
    assert mask._kept["block_mask"] is mask._kept["block_mask"]
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "attend, offsets, length, rule",
    [
        (Attend(), [0, 30], 30, "sdpa_causal"),
        (Attend("full"), [0, 30], 30, "sdpa_full"),
        (Attend(), [0, 10, 30], 30, "varlen"),
        (Attend(), [0, 30], 40, "varlen"),
        (Attend(window=7), [0, 30], 30, "varlen"),
        (Attend(window=7, sinks=2), [0, 30], 30, "flex"),
    ],
)
def test_which_kernel_a_gpu_takes_where_the_host_knows_the_documents(attend, offsets, length, rule):
    assert paths._rule(IntervalMask.from_cu_seqlens(torch.tensor(offsets), attend, length=length)) == rule


@pytest.mark.gpu
@pytest.mark.parametrize("known", [False, True], ids=["flex", "by_rule"])
@pytest.mark.parametrize("attend", [Attend(), Attend(window=70), Attend(window=70, sinks=4), Attend("full")], ids=str)
def test_on_a_gpu(attend, known):
    mask = IntervalMask.from_cu_seqlens(torch.tensor([0, 200, 201, 600]), attend, length=640)
    if known:
        mask._segments()
    mask = mask.to("cuda")
    q, k, v = (torch.randn(1, heads, 640, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for heads in (4, 2, 2))
    made = vlm_fuse.attention(q, k, v, mask)
    wanted = reference(q.double(), k.double(), v.double(), mask)
    torch.testing.assert_close(made.double(), wanted, atol=3e-2, rtol=3e-2)
    assert made[:, :, 600:].eq(0).all()
    grad = torch.randn_like(made)
    for one, other in zip(torch.autograd.grad(made, (q, k, v), grad), torch.autograd.grad(wanted, (q, k, v), grad.double())):
        assert one.isfinite().all() and (one.double() - other.double()).norm() <= 0.05 * other.double().norm()


def test_rows_that_do_not_fit_are_refused():
    mask = IntervalMask.from_document_ids(torch.zeros(2, 5, dtype=torch.int32))
    q, k, v = rows(mask, 2, 4, 2)
    for wrong, error, told in (
        ((q[0], k, v), ValueError, "q: expected"),
        ((q, k.float(), v), TypeError, "k: expected the dtype"),
        ((q, k, v[:, :1]), ValueError, "v: expected"),
        ((q, k[..., :4], v), ValueError, "k: expected"),
        ((q[:, :3], k, v), ValueError, "3 heads of q"),
        ((q[:, :, :4], k, v), ValueError, "mask: has 2 samples of 5 rows"),
        ((q[:1], k[:1], v[:1]), ValueError, "mask: has 2 samples"),
        ((q.long(), k.long(), v.long()), TypeError, "floating"),
        ((q, None, v), TypeError, "k: expected a tensor"),
    ):
        with pytest.raises(error, match=told):
            vlm_fuse.attention(*wrong, mask)
    with pytest.raises(TypeError, match="mask: expected an IntervalMask"):
        vlm_fuse.attention(q, k, v, mask.dense())


def test_traced_with_fake_tensors_and_by_make_fx():
    """Where there are no values to cut by, SDPA under the dense mask is traced."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    def attend(ids, q):
        return vlm_fuse.attention(q, q, q, IntervalMask.from_document_ids(ids))

    ids, q = torch.tensor([[0, 0, 1, 1, 1, -1]]), torch.randn(1, 2, 6, 8)
    with FakeTensorMode() as mode:
        assert attend(mode.from_tensor(ids), mode.from_tensor(q)).shape == q.shape
    traced = make_fx(attend)(ids, q)
    other = torch.tensor([[0, 1, 1, 1, 2, 2]])
    torch.testing.assert_close(traced(other, q), attend(other, q))


def test_under_compile_the_graph_breaks_on_a_cpu_and_the_result_holds():
    torch._dynamo.reset()
    mask = IntervalMask.from_cu_seqlens(torch.tensor([0, 3, 9]))
    q, k, v = rows(mask, 1, 2, 2)
    made = torch.compile(lambda q: vlm_fuse.attention(q * 2, k, v, mask) + 1, backend="aot_eager")(q)
    torch.testing.assert_close(made, reference(q * 2, k, v, mask) + 1)
    torch._dynamo.reset()


def test_second_derivatives_are_refused_and_not_wrong():
    """As by SDPA on a CPU; by rows that need a mask as by those that need none."""
    for attend in (Attend(), Attend(window=3)):
        mask = IntervalMask.from_cu_seqlens(torch.tensor([0, 9]), attend)
        q, k, v = rows(mask, 1, 1, 1)
        (grad,) = torch.autograd.grad(vlm_fuse.attention(q, k, v, mask).pow(2).sum(), q, create_graph=True)
        with pytest.raises((NotImplementedError, RuntimeError), match="second derivatives|not implemented"):
            torch.autograd.grad(grad.pow(2).sum(), (q, k, v))
        with pytest.raises((NotImplementedError, RuntimeError), match="second derivatives|not implemented"):
            torch.func.grad(lambda q: torch.func.grad(lambda q: vlm_fuse.attention(q, k, v, mask).sum())(q).sum())(q.detach())  # noqa: B023


@pytest.mark.parametrize("scale", [0.0, -1.0])
def test_scales_that_are_not_above_zero(scale):
    mask = IntervalMask.from_cu_seqlens(torch.tensor([0, 40, 41]))
    assert_like_dense(mask, *rows(mask, 1, 2, 2), scale=scale)


def test_backward_under_hooks_on_saved_tensors():
    mask = IntervalMask.from_cu_seqlens(torch.tensor([0, 12]), Attend(window=3))
    q, k, v = rows(mask, 1, 2, 2)
    with torch.autograd.graph.save_on_cpu():
        vlm_fuse.attention(q, k, v, mask).sum().backward()
    (wanted,) = torch.autograd.grad(reference(q, k, v, mask).sum(), q)
    torch.testing.assert_close(q.grad, wanted)


def test_padding_inside_a_document_that_holds_nan_reaches_nobody():
    mask = IntervalMask.from_document_ids(torch.tensor([[0, 0, 0, -1, 0, 0]]))
    q, k, v = (x.detach() for x in rows(mask, 1, 2, 2))
    for x in (q, k, v):
        x[:, :, 3] = torch.nan
        x.requires_grad_()
    made = vlm_fuse.attention(q, k, v, mask)
    assert made.isfinite().all() and made[:, :, 3].eq(0).all()
    for grad in torch.autograd.grad(made.sum(), (q, k, v)):
        assert grad.isfinite().all() and grad[:, :, 3].eq(0).all()


def test_new_masks_compile_nothing_anew():
    """Under torch.compile the graph breaks around the call, and nothing inside of it is traced."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda q, mask: vlm_fuse.attention(q * 2, q, q, mask) + 1, backend="aot_eager")
    q = torch.randn(1, 2, 60, 8)
    frames = []
    for number in range(5):
        offsets = torch.tensor([0, 5 + 3 * number, 30 + number, 60])
        mask = IntervalMask.from_cu_seqlens(offsets, Attend(window=4 + number))
        torch.testing.assert_close(compiled(q, mask), reference(q * 2, q, q, mask) + 1, atol=1e-5, rtol=1e-5)
        frames.append(torch._dynamo.utils.counters["frames"]["total"])
    assert frames[0] and frames[1:] == frames[:1] * 4, frames
    torch._dynamo.reset()


def test_meta_tensors():
    mask = IntervalMask.from_cu_seqlens(torch.tensor([0, 6])).to("meta")
    assert vlm_fuse.attention(*(x.to("meta") for x in rows(mask, 1, 2, 2)), mask).shape == (1, 2, 6, 8)
