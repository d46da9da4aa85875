"""merge with a plan made before: the rows are the same, and what is given again must agree."""

import pytest
import torch

import vlm_fuse
from cases import BY_NAME, SPECIAL
from checking import assert_bits, assert_equal, merge
from test_merge import expected_rows


@pytest.mark.thinned(5)
@pytest.mark.parametrize("case", [case for case in SPECIAL if case.given.kinds and not case.given.unused], ids=lambda case: case.name)
def test_ready_plan(case, backend, device):
    tensors = case.tensors(device=device)
    plan = vlm_fuse.plan(case.input_ids(device), combine=case.combine, backend=backend, **case.settings(device), **case.kinds_for_plan(device))
    arguments = tensors.merge_arguments()
    with_all = merge(tensors, backend, plan=plan)
    assert with_all.plan is plan
    assert_equal(with_all.inputs_embeds.cpu(), expected_rows(case.tensors()), "with every argument again")
    for name in ("attention_mask", "document_ids", "labels", "scheme", "layout", "padding_side", "length", "unused_features", "image_sizes", "feature_counts"):
        arguments.pop(name, None)
    few = vlm_fuse.merge(case.input_ids(device), backend=backend, plan=plan, **arguments)
    assert_equal(few.inputs_embeds.cpu(), expected_rows(case.tensors()), "with the plan alone")
    if case.given.labels is not None:
        assert_bits(few.labels, with_all.labels, "labels of the plan")


def test_labels_given_to_a_plan_without(backend, device):
    case = BY_NAME["packed_layout"]
    settings = case.settings(device) | dict(labels=None)
    plan = vlm_fuse.plan(case.input_ids(device), backend=backend, **settings, **case.kinds_for_plan(device))
    assert plan.labels is None
    merged = merge(case.tensors(device=device), backend, plan=plan)
    assert merged.labels.tolist() == case.answer().fact("label")
    assert plan.labels is None


@pytest.mark.parametrize("options", [dict(), dict(layout="packed", length=9), dict(combine="add"), dict(labels=True)], ids=str)
def test_labels_given_to_the_plan_of_a_merge(options, backend, device):
    ids = torch.tensor([[1, 9, 9, 2], [4, 5, 9, 3]], device=device)
    text, rows = torch.randn(2, 4, 8, device=device), torch.randn(3, 8, device=device)
    first = vlm_fuse.merge(ids, text, rows, image_token_id=9, backend=backend, **options | (dict(labels=ids) if "labels" in options else {}))
    again = vlm_fuse.merge(ids, text, rows, plan=first.plan, labels=ids, backend=backend)
    whole = vlm_fuse.merge(ids, text, rows, image_token_id=9, backend=backend, **options | dict(labels=ids))
    assert_bits(again.labels, whole.labels, "labels")
    assert (first.labels is None) == ("labels" not in options)


def test_a_plan_serves_many_calls(backend, device):
    case = BY_NAME["packed_three_kinds"]
    plan = vlm_fuse.plan(case.input_ids(device), backend=backend, **case.settings(device), **case.kinds_for_plan(device))
    for seed in range(3):
        merged = merge(case.tensors(seed, device), backend, plan=plan)
        assert_bits(merged.inputs_embeds, expected_rows(case.tensors(seed)), f"call {seed}")


def test_kinds_find_their_rows_by_id_not_by_order(backend, device):
    case = BY_NAME["three_kinds"]
    arguments = case.tensors(device=device).merge_arguments()
    plan = vlm_fuse.plan(case.input_ids(device), backend=backend, **case.settings(device), **case.kinds_for_plan(device))
    arguments["image_embeds"] = dict(reversed(arguments["image_embeds"].items()))
    merged = vlm_fuse.merge(case.input_ids(device), plan=plan, backend=backend, **arguments)
    assert_bits(merged.inputs_embeds, expected_rows(case.tensors()), "inputs_embeds")


def test_more_rows_than_a_plan_with_unused_features_counted(backend, device):
    """feature_starts are the plan's: rows beyond them are unused, of whatever kind."""
    ids = torch.tensor([[1, 7, 8, 8]], device=device)
    plan = vlm_fuse.plan(ids, image_token_id=(7, 8), unused_features="allow", backend=backend)
    a, b, text = (torch.randn(*shape, device=device) for shape in ((3, 4), (2, 4), (1, 4, 4)))
    out = vlm_fuse.merge(ids, text, {7: a, 8: b}, plan=plan, backend=backend).inputs_embeds[0]
    assert_bits(out, torch.cat([text[0, :1], a[:1], b]), "inputs_embeds")


def test_no_row_is_made_twice_for_other_kinds():
    """What the plan numbers stays below 2**31 - 1 whatever the ids are."""
    ids = torch.tensor([[2**62, -(2**62), 3]])
    plan = vlm_fuse.plan(ids, image_token_id=(2**62, -(2**62)))
    assert plan.source_index.tolist() == [[0, 1, -3]]
