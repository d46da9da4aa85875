"""add_features (DeepStack): feature rows added to hidden states at the placeholders, everything else as it was."""

from dataclasses import replace

import pytest
import torch

import vlm_fuse
from cases import BY_NAME
from checking import assert_bits, assert_equal, placed, serving
from oracle import accumulator

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
short = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}.get
NAMES = ["two_images_left_padded", "three_kinds_mixed_forms", "packed_dropped_placeholders", "expanded_two_kinds", "legacy_two_kinds", "padded_left_with_length", "truncation_through_an_image", "no_tokens", "no_samples_packed"]


def plan_of(case, backend, device):
    tensors = case.tensors(device=device)
    return vlm_fuse.merge(case.input_ids(device), backend=backend, **tensors.merge_arguments()).plan


def features_of(case, tensors):
    if len(case.given.kinds) == 1:
        return tensors.features[0]
    return {kind.token: entry for kind, entry in zip(case.given.kinds, tensors.features)}


def expected_sum(case, hidden, rows):
    out, flat = hidden.clone(), case.answer().flat()
    table = out.view(len(flat), case.D)
    for r, row in enumerate(flat):
        if row.source is not None and row.source[0] == "feature":
            feature = rows[row.source[1]]
            wide = accumulator(hidden.dtype, feature.dtype)
            table[r] = (table[r].to(wide) + feature.to(wide)).to(hidden.dtype)
    return out


def hidden_for(plan, D, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(*plan.source_index.shape, D, generator=generator, dtype=torch.float64).to(dtype).to(device)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", NAMES)
def test_rows(name, backend, device):
    case = BY_NAME[name]
    plan = plan_of(case, backend, device)
    tensors, hidden = case.tensors(seed=2, device=device), hidden_for(plan, case.D, device=device)
    before = hidden.clone()
    with serving(backend):
        out = vlm_fuse.add_features(hidden, features_of(case, tensors), plan)
    assert_bits(out.cpu(), expected_sum(case, before.cpu(), case.tensors(seed=2).feature_rows()), "sum")
    assert_bits(hidden, before, "hidden states after the call")
    assert out.data_ptr() != hidden.data_ptr() or not out.numel()


@pytest.mark.thinned(3)
@pytest.mark.parametrize("feature", DTYPES, ids=lambda dtype: short(dtype))
@pytest.mark.parametrize("text", DTYPES, ids=lambda dtype: short(dtype))
def test_dtypes_and_gradients(text, feature, backend, device):
    case = replace(BY_NAME["packed_dropped_placeholders"], feature_dtypes=(feature,))
    plan = plan_of(case, backend, device)
    tensors = case.tensors(seed=2, device=device).require_grad()
    hidden = hidden_for(plan, case.D, text, device).requires_grad_()
    with serving(backend):
        out = vlm_fuse.add_features(hidden, tensors.features[0], plan)
        assert out.dtype == text
        assert_equal(out.detach().cpu(), expected_sum(case, hidden.detach().cpu(), case.tensors(seed=2).feature_rows()), "sum")
        grad = torch.randn(out.shape).to(text)
        out.backward(grad.to(device))
    assert_bits(hidden.grad.cpu(), grad, "gradient of the hidden states")
    rows = torch.zeros(case.given.kinds[0].rows, case.D, dtype=feature)
    for row, g in zip(case.answer().flat(), grad.view(-1, case.D)):
        if row.source is not None and row.source[0] == "feature":
            rows[row.source[1]] = g.to(feature)
    assert_equal(tensors.features[0].grad.cpu(), rows, "gradient of the features")


def test_left_out_kinds_add_nothing(backend, device):
    case = BY_NAME["three_kinds"]
    plan = plan_of(case, backend, device)
    tensors, hidden = case.tensors(seed=2, device=device), hidden_for(plan, case.D, device=device)
    token = case.given.kinds[1].token
    with serving(backend):
        out = vlm_fuse.add_features(hidden, {token: tensors.features[1]}, plan)
    expected = hidden.clone()
    expected[plan.kind_ids == 2] += tensors.features[1]
    assert_bits(out, expected, "sum")


@pytest.mark.thinned(3)
@pytest.mark.parametrize("nothing", [None, [], {}], ids=["none", "empty_list", "empty_dict"])
def test_nothing_to_add(nothing, backend, device):
    case = BY_NAME["only_text"]
    plan = plan_of(case, backend, device)
    hidden = hidden_for(plan, case.D, device=device).requires_grad_()
    with serving(backend):
        out = vlm_fuse.add_features(hidden, nothing, plan)
        out.sum().backward()
    assert_bits(out, hidden, "hidden states")
    assert hidden.grad.eq(1).all()


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", ["one_image", "two_images_left_padded", "expanded_two_kinds"])
def test_gradcheck(name, backend, device):
    case = replace(BY_NAME[name], D=2, forms=())
    plan = plan_of(case, backend, device)
    hidden = hidden_for(plan, 2, torch.float64, device).requires_grad_()
    features = [torch.randn(kind.rows, 2, dtype=torch.float64, device=device, requires_grad=True) for kind in case.given.kinds]

    def function(hidden, *features):
        given = dict(zip([kind.token for kind in case.given.kinds], features)) if len(features) > 1 else features[0]
        return vlm_fuse.add_features(hidden, given, plan)

    with serving(backend):
        assert torch.autograd.gradcheck(function, (hidden, *features))
        assert torch.autograd.gradgradcheck(function, (hidden, *features), fast_mode=True)


def test_three_sets_one_after_another(backend, device):
    """As Qwen3-VL does after its first three layers."""
    case = BY_NAME["packed_layout"]
    plan = plan_of(case, backend, device)
    hidden = hidden_for(plan, case.D, device=device)
    expected = hidden.cpu().clone()
    with serving(backend):
        for seed in range(3):
            hidden = vlm_fuse.add_features(hidden, case.tensors(seed, device).features[0], plan)
            expected = expected_sum(case, expected, case.tensors(seed).feature_rows())
    assert_bits(hidden.cpu(), expected, "after three sets")


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(hidden=torch.zeros(1, 3, 8)), ["hidden_states"]),
        (dict(hidden=torch.zeros(2, 10, 5)), ["D"]),
        (dict(features=torch.zeros(2, 8)), ["rows"]),
        (dict(features=torch.zeros(12, 8)), ["rows"]),
        (dict(features={99: torch.zeros(11, 8)}), ["99"]),
        (dict(features=torch.zeros(11, 8, dtype=torch.int64)), ["image_embeds"]),
    ],
    ids=["wrong_width", "wrong_hidden_size", "too_few_rows", "too_many_rows", "unknown_kind", "integer_rows"],
)
def test_refusals(change, words, backend, device):
    case = BY_NAME["two_images_left_padded"]
    plan = plan_of(case, backend, device)
    hidden = placed(change.get("hidden", torch.zeros(2, 10, 8)), device)
    features = placed(change.get("features", torch.zeros(11, 8)), device)
    assert case.given.kinds[0].rows == 11
    with serving(backend), pytest.raises((ValueError, TypeError)) as caught:
        vlm_fuse.add_features(hidden, features, plan)
    for word in words:
        assert word in str(caught.value)


def test_a_bare_tensor_serves_one_kind_only(backend, device):
    case = BY_NAME["three_kinds"]
    plan = plan_of(case, backend, device)
    with serving(backend), pytest.raises(ValueError, match="dict"):
        vlm_fuse.add_features(torch.zeros(*plan.source_index.shape, 8, device=device), torch.zeros(5, 8, device=device), plan)
