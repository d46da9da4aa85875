"""What only a GPU can show: streams, graphs, several devices, nothing read back, nothing allocated but the results."""

from __future__ import annotations

import pytest
import torch

import vlm_fuse
from checking import assert_bits

GPU_BACKENDS = [name for name in ("cuda", "triton") if "cuda" in vlm_fuse.backends()[name].devices]
IMAGE, SAMPLES, LENGTH, HIDDEN, IMAGES = 9, 4, 64, 96, 40
FIELDS = ("inputs_embeds", "source_index", "position_ids", "labels", "document_ids", "attention_mask", "cu_seqlens", "kv_lo", "kv_hi")
LAYOUTS = {"keep": {}, "packed": dict(layout="packed", length=SAMPLES * LENGTH)}

pytestmark = [pytest.mark.gpu, pytest.mark.no_poison]
each_backend = pytest.mark.parametrize("name", GPU_BACKENDS or ["cuda"])
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


def batch(seed: int, device: str = "cuda", rows: int = HIDDEN) -> dict[str, torch.Tensor]:
    """As many placeholders in every batch, elsewhere in each."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, IMAGE, (SAMPLES, LENGTH), generator=rng)
    ids.view(-1)[torch.randperm(ids.numel(), generator=rng)[:IMAGES]] = IMAGE
    made = dict(ids=ids, text=torch.randn(SAMPLES, LENGTH, rows, generator=rng), features=torch.randn(IMAGES, rows, generator=rng))
    return {name: tensor.to(device) for name, tensor in made.items()}


def merge(given: dict[str, torch.Tensor], name: str, layout: str, **changes):
    text = changes.pop("text", given["text"])
    return vlm_fuse.merge(
        given["ids"], text, changes.pop("features", given["features"]), image_token_id=IMAGE, labels=given["ids"], validate="async", backend=name,
        **LAYOUTS[layout], **changes,
    )  # fmt: skip


def read(out) -> list[torch.Tensor]:
    return [getattr(out, field) for field in FIELDS]


def assert_as_reference(found: list[torch.Tensor], given: dict[str, torch.Tensor], layout: str) -> None:
    wanted = read(merge({key: value.cpu() for key, value in given.items()}, "reference", layout))
    for field, one, other in zip(FIELDS, found, wanted):
        assert_bits(one, other, field)


def busy(milliseconds: float) -> None:
    """Work on the current stream that takes about so long, without the host."""
    torch.cuda._sleep(int(milliseconds * 1_000_000))


@each_layout
@each_backend
def test_nothing_is_read_back(name, layout):
    given = batch(0)
    text, features = given["text"].requires_grad_(), given["features"].requires_grad_()
    grad = torch.ones_like(merge(given, name, layout).inputs_embeds)
    torch.autograd.grad(merge(given, name, layout).inputs_embeds, (text, features), grad)  # compiled, the record of errors made
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = merge(given, name, layout)
        found = read(out)
        torch.autograd.grad(out.inputs_embeds, (text, features), grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_as_reference(found, given, layout)


@each_layout
@each_backend
def test_on_the_stream_of_the_caller(name, layout):
    """What the stream still has to write is read after it, and what reads the results there needs no event."""
    given, late = batch(0), batch(1)
    merge(given, name, layout)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        busy(20)
        for key in given:
            given[key].copy_(late[key])
        out = merge(given, name, layout)
        found = [tensor.clone() for tensor in read(out)]
    side.synchronize()
    assert_as_reference(found, late, layout)


@each_layout
@each_backend
def test_several_streams_at_once(name, layout):
    """No state is shared: calls that overlap do not see one another."""
    given = [batch(seed) for seed in range(8)]
    merge(given[0], name, layout)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in given]
    found = [[] for _ in given]
    for _ in range(5):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found[i] = read(merge(given[i], name, layout))
    torch.cuda.synchronize()
    for made, one in zip(found, given):
        assert_as_reference(made, one, layout)


@each_backend
def test_record_stream_keeps_the_memory_until_the_other_stream_is_done(name):
    given = batch(0)
    out = merge(given, name, "keep")
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    wanted, addresses = [tensor.clone() for tensor in read(out)], {tensor.untyped_storage().data_ptr() for tensor in read(out)}
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        busy(50)
        copies = [tensor.clone() for tensor in read(out)]
    for tensor in read(out):
        tensor.record_stream(side)
    del tensor, out
    others = [torch.full_like(tensor, 1) for tensor in wanted]  # takes what is free
    assert not addresses & {tensor.untyped_storage().data_ptr() for tensor in others}
    torch.cuda.synchronize()
    for field, one, other in zip(FIELDS, copies, wanted):
        assert_bits(one, other, field)


@pytest.mark.parametrize("fused", [False, True], ids=["embeddings", "weight"])
@each_layout
@each_backend
def test_a_graph_is_replayed_with_other_ids(name, layout, fused):
    """Forward and backward captured once; then new ids, rows and gradients in the same memory."""
    given = batch(0)
    text, features = given["text"].requires_grad_(), given["features"].requires_grad_()
    weight = torch.randn(IMAGE + 1, HIDDEN, device="cuda", requires_grad=True)
    source = dict(text=None, weight=weight) if fused else {}
    leaves = (weight if fused else text, features)
    upstream = torch.randn_like(merge(given, name, layout).inputs_embeds)

    def step():
        out = merge(given, name, layout, **source)
        return read(out), torch.autograd.grad(out.inputs_embeds, leaves, upstream)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found, grads = step()
    for seed in (1, 2, 3):
        with torch.no_grad():
            for key, value in batch(seed).items():
                given[key].copy_(value)
            weight.normal_()
            upstream.normal_()
        graph.replay()
        torch.cuda.synchronize()
        replayed, replayed_grads = [tensor.clone() for tensor in found], [grad.clone() for grad in grads]
        eager, eager_grads = step()
        for field, one, other in zip((*FIELDS, "gradient of the table", "gradient of the features"), (*replayed, *replayed_grads), (*eager, *eager_grads)):
            assert_bits(one, other, field)
        if not fused:
            assert_as_reference(replayed, {key: value.detach() for key, value in given.items()}, layout)
    vlm_fuse.raise_errors()


@each_backend
def test_an_error_in_a_replayed_graph_is_flagged(name):
    given = batch(0)
    merge(given, name, "keep")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        merge(given, name, "keep")
    given["ids"].view(-1)[(given["ids"] == IMAGE).view(-1).nonzero()[0]] = 0  # a placeholder less
    graph.replay()
    with pytest.raises(ValueError, match=f"{IMAGES - 1}.*{IMAGES}|{IMAGES}.*{IMAGES - 1}"):
        vlm_fuse.raise_errors()
    vlm_fuse.raise_errors()


@each_backend
def test_an_error_on_another_stream_is_waited_for(name):
    given = batch(0)
    merge(given, name, "keep")
    torch.cuda.synchronize()
    place = int((given["ids"] == IMAGE).view(-1).nonzero()[0])
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        busy(50)
        given["ids"].view(-1)[place : place + 1].zero_()  # a placeholder less
        merge(given, name, "keep")
    with pytest.raises(ValueError, match=f"{IMAGES - 1}.*{IMAGES}|{IMAGES}.*{IMAGES - 1}"):
        vlm_fuse.raise_errors()
    vlm_fuse.raise_errors()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@each_layout
@each_backend
def test_on_a_device_that_is_not_the_current_one(name, layout):
    given = batch(0, "cuda:1")
    found = read(merge(given, name, layout))
    assert torch.cuda.current_device() == 0 and all(tensor.device == torch.device("cuda:1") for tensor in found)
    assert_as_reference(found, given, layout)
    mixed = given | dict(features=given["features"].to("cuda:0"))
    with pytest.raises(ValueError, match="image_embeds"):
        merge(mixed, name, layout)


@each_layout
@each_backend
def test_nothing_is_allocated_but_the_results(name, layout):
    """Of the size of the batch, that is: a workspace may take some bytes a token."""
    given = batch(0, rows=2048)
    merge(given, name, layout)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # a block that is too large for what it is taken for would be counted whole
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = merge(given, name, layout)
    kept = torch.cuda.memory_allocated() - before
    peak = torch.cuda.max_memory_allocated() - before
    rows = out.inputs_embeds.numel() * out.inputs_embeds.element_size()
    assert rows <= kept <= rows + 64 * SAMPLES * LENGTH + 16 * 512
    assert peak <= kept + 64 * SAMPLES * LENGTH + 16 * 512
