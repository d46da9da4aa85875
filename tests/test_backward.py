"""Gradients of merge: the plan read the other way, against loops and against plain autograd, once and twice."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from torch.autograd import gradcheck, gradgradcheck

import oracle
import vlm_fuse
from cases import BY_NAME, SPECIAL, cases
from checking import assert_equal, examples, merge

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
short = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}.get


def expected_gradients(tensors, grad) -> list:
    """In the order of tensors.leaves."""
    case, answer = tensors.case, tensors.case.answer()
    if tensors.text is not None:
        text = oracle.text_gradient(answer, grad, len(case.flat_tokens), case.dtype, case.combine).view(tensors.text.shape)
    else:
        text = oracle.weight_gradient(answer, grad, tensors.weight, case.flat_tokens, case.scale, case.combine)
    gradients, first = [text], 0
    for c, (kind, entry) in enumerate(zip(case.given.kinds, tensors.features)):
        whole = oracle.feature_gradient(answer, grad, first, kind.rows, kind.numbered, case.feature_dtype(c))
        first += kind.numbered
        if isinstance(entry, list):
            gradients += list(whole.split([len(image) for image in entry]))
        else:
            gradients.append(whole.view(entry.shape))
    return gradients


def check_gradients(case, backend, device, seed=0):
    tensors = case.tensors(device=device).require_grad()
    out = merge(tensors, backend).inputs_embeds
    assert out.requires_grad
    generator = torch.Generator().manual_seed(seed + 1)
    grad = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
    out.backward(grad.to(device))
    for leaf, expected in zip(tensors.leaves, expected_gradients(case.tensors(), grad)):
        assert leaf.grad is not None, "a gradient that is zero is not None"
        assert_equal(leaf.grad.cpu(), expected, f"gradient of {tuple(leaf.shape)}")


@pytest.mark.thinned(3)
@pytest.mark.parametrize("case", SPECIAL, ids=lambda case: case.name)
def test_gradients(case, backend, device):
    check_gradients(case, backend, device)


@pytest.mark.thinned(7)
@pytest.mark.parametrize("feature", DTYPES, ids=lambda dtype: short(dtype))
@pytest.mark.parametrize("text", DTYPES, ids=lambda dtype: short(dtype))
@pytest.mark.parametrize("name", ["two_images_left_padded", "one_token_many_times", "fused_embedding_scaled", "added_expanded_packed", "added_expanded_weight_padded"])
def test_dtypes(name, text, feature, backend, device):
    check_gradients(replace(BY_NAME[name], dtype=text, feature_dtypes=(feature,)), backend, device)


def test_gradients_of_random_batches(backend, device):
    @examples(backend)
    @given(cases(dtypes=DTYPES))
    def check(case):
        check_gradients(case, backend, device)

    check()


@pytest.mark.parametrize("name", ["three_kinds_mixed_forms", "packed_dropped_placeholders", "expanded_two_kinds", "legacy_two_kinds", "added_to_scaled_weight", "fused_embedding_scaled"])
def test_like_plain_autograd(name, backend, device):
    """The same function written in single rows, differentiated by PyTorch."""
    case = replace(BY_NAME[name], dtype=torch.float64, feature_dtypes=())
    tensors, plain = case.tensors(device=device).require_grad(), case.tensors().require_grad()
    out = merge(tensors, backend).inputs_embeds
    expected = oracle.merged_rows(case.answer(), torch.float64, **plain.oracle_arguments())
    weights = torch.randn(expected.shape, dtype=torch.float64)
    (out.sin() * weights.to(device)).sum().backward()
    (expected.sin() * weights).sum().backward()
    for leaf, other in zip(tensors.leaves, plain.leaves):
        wanted = torch.zeros_like(other) if other.grad is None else other.grad
        torch.testing.assert_close(leaf.grad.cpu(), wanted, rtol=1e-13, atol=1e-13)


CHECKED = ["one_image", "two_images_left_padded", "three_kinds_mixed_forms", "packed_dropped_placeholders", "expanded_left", "legacy_counts", "added_expanded_weight_padded", "fused_embedding_scaled", "added", "dummy_image_in_a_list_but_no_placeholder"]


@pytest.mark.thinned(10)
@pytest.mark.parametrize("name", CHECKED)
def test_gradcheck(name, backend, device):
    case = replace(BY_NAME[name], dtype=torch.float64, D=2)
    tensors = case.tensors(device=device).require_grad()
    structure = [len(entry) if isinstance(entry, list) else None for entry in tensors.features]

    def function(first, *features):
        copy = case.tensors(device=device)
        if case.text == "embeds":
            copy.text = first
        else:
            copy.weight = first
        copy.features, at = [], 0
        for n in structure:
            copy.features.append(features[at] if n is None else list(features[at : at + n]))
            at += 1 if n is None else n
        return merge(copy, backend).inputs_embeds

    assert gradcheck(function, tensors.leaves, fast_mode=backend != "cpu", raise_exception=True)
    assert gradgradcheck(function, tensors.leaves, fast_mode=True, raise_exception=True)


# -- who gets one ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["features_but_no_placeholder", "dummy_image_in_a_list_but_no_placeholder", "two_kinds_one_without_placeholder", "legacy_unused", "expanded_unused", "no_samples", "only_padding_packed"])
def test_unused_features_get_zeros_never_none(name, backend, device):
    """FSDP and ZeRO-3 wait for every rank's gradient: a text-only batch must still give one to the vision tower."""
    case = BY_NAME[name]
    tensors = case.tensors(device=device).require_grad()
    tower = torch.nn.Linear(case.D, case.D, bias=False).to(device)
    tensors.features = [[tower(image) for image in entry] if isinstance(entry, list) else tower(entry) for entry in tensors.features]
    out = merge(tensors, backend).inputs_embeds
    assert out.requires_grad
    out.float().square().sum().backward()
    assert tower.weight.grad is not None
    placeholders = sum(row.source is not None and row.source[0] == "feature" for row in case.answer().flat())
    assert bool(tower.weight.grad.eq(0).all()) == (placeholders == 0)
    assert tensors.leaves[0].grad is not None


def test_empty_feature_tensor_gets_an_empty_gradient(backend, device):
    ids = torch.tensor([[1, 2]], device=device)
    text, features = torch.randn(1, 2, 4, device=device, requires_grad=True), torch.empty(0, 4, device=device, requires_grad=True)
    vlm_fuse.merge(ids, text, features, image_token_id=7, backend=backend).inputs_embeds.sum().backward()
    assert features.grad.shape == (0, 4)
    assert text.grad.eq(1).all()


@pytest.mark.parametrize("frozen", ["text", "features", "weight"])
def test_frozen_inputs(frozen, backend, device):
    case = BY_NAME["fused_embedding" if frozen == "weight" else "two_images_left_padded"]
    tensors = case.tensors(device=device).require_grad()
    tensors.leaves[1 if frozen == "features" else 0].requires_grad_(False)
    out = merge(tensors, backend).inputs_embeds
    grad = torch.randn(out.shape)
    out.backward(grad.to(device))
    expected = expected_gradients(case.tensors(), grad)
    for leaf, wanted in zip(tensors.leaves, expected):
        if leaf.requires_grad:
            assert_equal(leaf.grad.cpu(), wanted, "gradient")
        else:
            assert leaf.grad is None


def test_some_images_of_a_list_frozen(backend, device):
    case = BY_NAME["expanded_left"]
    tensors = case.tensors(device=device).require_grad()
    tensors.features[0][1].requires_grad_(False)
    out = merge(tensors, backend).inputs_embeds
    grad = torch.randn(out.shape)
    out.backward(grad.to(device))
    expected = expected_gradients(case.tensors(), grad)
    assert tensors.features[0][1].grad is None
    for at in (0, 2):
        assert_equal(tensors.features[0][at].grad.cpu(), expected[1 + at], f"image {at}")


def test_one_tensor_twice_in_a_list(backend, device):
    image = torch.randn(2, 4, device=device, requires_grad=True)
    ids = torch.tensor([[7, 7, 1, 7, 7]], device=device)
    out = vlm_fuse.merge(ids, torch.zeros(1, 5, 4, device=device), [image, image], image_token_id=7, backend=backend).inputs_embeds
    grad = torch.randn(out.shape, device=device)
    out.backward(grad)
    torch.testing.assert_close(image.grad, grad[0, :2] + grad[0, 3:], rtol=0, atol=0)


# -- gradients as autograd hands them over -----------------------------------------------------------------------------


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", ["two_images_left_padded", "fused_embedding", "packed_three_kinds"])
@pytest.mark.parametrize("layout", ["expanded", "transposed", "last_stride_two", "unaligned"])
def test_gradients_of_any_strides(name, layout, backend, device):
    case = BY_NAME[name]
    tensors = case.tensors(device=device).require_grad()
    out = merge(tensors, backend).inputs_embeds
    G, W, D = out.shape
    grad = {
        "expanded": torch.randn(1, 1, D, device=device).expand(G, W, D),
        "transposed": torch.randn(D, W, G, device=device).permute(2, 1, 0),
        "last_stride_two": torch.randn(G, W, 2 * D, device=device)[..., ::2],
        "unaligned": torch.randn(G * W * D + 1, device=device)[1:].view(G, W, D),
    }[layout]
    gradients = torch.autograd.grad(out, tensors.leaves, grad)
    for actual, expected in zip(gradients, expected_gradients(case.tensors(), grad.cpu())):
        assert_equal(actual.cpu(), expected, layout)


@pytest.mark.parametrize("text", ["embeds", "weight"])
def test_nan_of_image_rows_does_not_reach_the_text(text, backend, device):
    """0 * NaN is NaN: a gradient masked by multiplication would spread it."""
    case = BY_NAME["fused_embedding" if text == "weight" else "two_images_left_padded"]
    tensors = case.tensors(device=device).require_grad()
    merged = merge(tensors, backend)
    grad = torch.where(merged.kind_ids.eq(0)[..., None], 1.0, torch.nan).expand(merged.inputs_embeds.shape)
    first, features = torch.autograd.grad(merged.inputs_embeds, tensors.leaves, grad)
    if text == "embeds":
        kept = merged.kind_ids.eq(0)
        assert first[kept].eq(1).all()
        assert first[merged.source_index >= 0].eq(0).all()
    else:
        assert first.isfinite().all()
    assert features.isnan().all()


def test_nan_of_dropped_rows_reaches_nobody(backend, device):
    case = BY_NAME["padded_left_with_length"]
    tensors = case.tensors(device=device).require_grad()
    merged = merge(tensors, backend)
    grad = torch.where(merged.attention_mask[..., None], 1.0, torch.nan).expand(merged.inputs_embeds.shape)
    for gradient in torch.autograd.grad(merged.inputs_embeds, tensors.leaves, grad):
        assert gradient.isfinite().all()


# -- living inside a graph ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("combine", ["replace", "add"])
def test_in_place_on_a_tensor_of_the_graph(combine, backend, device):
    case = replace(BY_NAME["two_images_left_padded"], combine=combine)
    tensors = case.tensors(device=device).require_grad()
    leaf = tensors.text
    tensors.text = hidden = leaf * 2
    merged = merge(tensors, backend, out=hidden)
    assert merged.inputs_embeds is hidden
    assert_equal(hidden.detach().cpu(), oracle.merged_rows(case.answer(), torch.float32, **_doubled(case).oracle_arguments()).detach(), "in place")
    grad = torch.randn(hidden.shape)
    hidden.backward(grad.to(device))
    plain = _doubled(case)
    oracle.merged_rows(case.answer(), torch.float32, **plain.oracle_arguments()).backward(grad)
    torch.testing.assert_close(leaf.grad.cpu(), plain.leaf.grad)
    torch.testing.assert_close(tensors.features[0].grad.cpu(), plain.features[0].grad, rtol=0, atol=0)


def _doubled(case):
    plain = case.tensors().require_grad()
    plain.leaf = plain.text
    plain.text = plain.leaf * 2
    return plain


def test_in_place_tells_autograd(backend, device):
    """A tensor saved by somebody else and then overwritten must be noticed."""
    case = BY_NAME["two_images_left_padded"]
    tensors = case.tensors(device=device)
    leaf = tensors.text.requires_grad_()
    tensors.text = hidden = leaf * 1
    saved = hidden.exp()  # saves its result, not hidden
    other = hidden * hidden  # saves hidden
    merge(tensors, backend, out=hidden)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.sum().backward()
    saved.sum().backward()


def test_no_row_is_saved_for_backward(backend, device):
    """Backward needs the plan alone: inputs may be overwritten after the call."""
    case = BY_NAME["two_images_left_padded"]
    tensors = case.tensors(device=device).require_grad()
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = merge(tensors, backend).inputs_embeds
    assert not any(tensor.is_floating_point() for tensor in saved)
    with torch.no_grad():
        for leaf in tensors.leaves:
            leaf.fill_(torch.nan)
    out.detach().fill_(torch.nan)
    grad = torch.randn(out.shape)
    out.backward(grad.to(device))
    for leaf, expected in zip(tensors.leaves, expected_gradients(case.tensors(), grad)):
        assert_equal(leaf.grad.cpu(), expected, "gradient")


@pytest.mark.parametrize("options", [dict(), dict(layout="packed", length=12), dict(combine="add")], ids=str)
@pytest.mark.parametrize("validate", ["sync", "async"])
def test_rows_live_no_longer_than_their_owner_keeps_them(options, validate, backend, device):
    """The graph of the backward keeps neither the rows given nor the rows made."""
    ids = torch.tensor([[1, 9, 9, 2], [4, 5, 9, 3]], device=device)
    leaf = torch.randn(2, 4, 8, device=device, requires_grad=True)
    text, rows = leaf * 2, leaf[0, :3] * 3
    merged = vlm_fuse.merge(ids, text, rows, image_token_id=9, validate=validate, backend=backend, **options)
    loss = merged.inputs_embeds.sum()
    kept = [weakref.ref(tensor) for tensor in (text, rows, merged.inputs_embeds, merged.position_ids)]
    del text, rows, merged
    gc.collect()
    assert [found() is None for found in kept] == [True] * 4
    loss.backward()
    expected = torch.where((ids == 9)[..., None], float(options.get("combine") == "add"), 1.0) * 2
    expected = expected.expand(2, 4, 8).clone()
    expected[0, :3] += 3
    assert_equal(leaf.grad, expected, "gradient")


def test_ids_may_change_between_forward_and_backward(backend, device):
    """A data loader reuses its buffers."""
    case = BY_NAME["fused_embedding"]
    tensors = case.tensors(device=device).require_grad()
    ids = case.input_ids(device)
    out = vlm_fuse.merge(ids, backend=backend, **tensors.merge_arguments()).inputs_embeds
    ids.fill_(0)
    grad = torch.randn(out.shape)
    try:
        out.backward(grad.to(device))
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        for leaf, expected in zip(tensors.leaves, expected_gradients(case.tensors(), grad)):
            assert_equal(leaf.grad.cpu(), expected, "gradient")


def test_backward_twice(backend, device):
    tensors = BY_NAME["packed_three_kinds"].tensors(device=device).require_grad()
    out = merge(tensors, backend).inputs_embeds
    first = torch.autograd.grad(out.square().sum(), tensors.leaves, retain_graph=True)
    second = torch.autograd.grad(out.square().sum(), tensors.leaves)
    for a, b in zip(first, second):
        assert torch.equal(a, b)


def test_gradients_accumulate(backend, device):
    tensors = BY_NAME["fused_embedding"].tensors(device=device).require_grad()
    merge(tensors, backend).inputs_embeds.sum().backward()
    once = [leaf.grad.clone() for leaf in tensors.leaves]
    merge(tensors, backend).inputs_embeds.sum().backward()
    for leaf, first in zip(tensors.leaves, once):
        assert torch.equal(leaf.grad, 2 * first)


def test_weight_shared_with_another_layer(backend, device):
    case = replace(BY_NAME["fused_embedding"], dtype=torch.float64)
    tensors, plain = case.tensors(device=device).require_grad(), case.tensors().require_grad()
    out = merge(tensors, backend).inputs_embeds
    (out @ tensors.weight.t()).sin().sum().backward()
    expected = oracle.merged_rows(case.answer(), torch.float64, **plain.oracle_arguments())
    (expected @ plain.weight.t()).sin().sum().backward()
    torch.testing.assert_close(tensors.weight.grad.cpu(), plain.weight.grad, rtol=1e-12, atol=1e-12)


def test_double_backward_is_the_merge(backend, device):
    """The gradient is linear in grad, so its own gradient is merge of the vectors it is multiplied by."""
    case = replace(BY_NAME["packed_dropped_placeholders"], dtype=torch.float64)
    tensors = case.tensors(device=device).require_grad()
    out = merge(tensors, backend).inputs_embeds
    grad = torch.randn(out.shape, dtype=torch.float64, device=device, requires_grad=True)
    gradients = torch.autograd.grad(out, tensors.leaves, grad, create_graph=True)
    vectors = case.tensors(seed=9, device=device)
    (second,) = torch.autograd.grad(gradients, grad, [leaf for leaf in vectors.leaves])
    assert_equal(second, merge(vectors, backend).inputs_embeds, "double backward")


def test_plan_made_in_inference_mode(backend, device):
    case = BY_NAME["packed_layout"]
    with torch.inference_mode():
        plan = vlm_fuse.plan(case.input_ids(device), backend=backend, **case.settings(device), **case.kinds_for_plan(device))
    tensors = case.tensors(device=device).require_grad()
    out = merge(tensors, backend, plan=plan).inputs_embeds
    grad = torch.randn(out.shape)
    out.backward(grad.to(device))
    for leaf, expected in zip(tensors.leaves, expected_gradients(case.tensors(), grad)):
        assert_equal(leaf.grad.cpu(), expected, "gradient")
