"""The token plan against the loops of oracle.py: where every row comes from and what is known about it."""

import pytest
import torch
from hypothesis import given

import vlm_fuse
from cases import BY_NAME, SPECIAL, Case, cases, long_batch
from checking import assert_bits, examples, merge

FACTS = {
    "source_index": (torch.int32, "source_index"),
    "text_index": (torch.int32, "token"),
    "position_ids": (torch.int64, "position"),
    "document_ids": (torch.int32, "document"),
    "image_ids": (torch.int32, "image"),
    "kind_ids": (torch.int8, "kind"),
    "attention_mask": (torch.bool, "kept"),
}


def expected(answer, name, lines) -> torch.Tensor:
    dtype, attribute = FACTS[name]
    return torch.tensor(answer.fact(attribute), dtype=dtype).view(lines, answer.width)


def check_plan(plan, case):
    answer = case.answer()
    lines = 1 if case.given.layout == "packed" else len(case.given.tokens)
    for name in FACTS:
        assert_bits(getattr(plan, name), expected(answer, name, lines), name)
    if case.given.labels is None:
        assert plan.labels is None
    else:
        labels = torch.tensor(answer.fact("label"), dtype=case.label_dtype).view(lines, answer.width)
        assert_bits(plan.labels, labels, "labels")
    assert_bits(plan.cu_seqlens, torch.tensor(answer.cu_seqlens, dtype=torch.int32), "cu_seqlens")
    assert plan.max_seqlen == answer.max_seqlen
    assert isinstance(plan.max_seqlen, int)


def rows_are_told(case) -> bool:
    """Whether plan() alone, without a tensor of rows, can know where each kind's rows begin."""
    for kind in case.given.kinds[:-1]:
        told = kind.sizes is not None or kind.counts is not None
        if not told and case.flat_tokens.count(kind.token) != kind.rows:
            return False
    return True


@pytest.mark.thinned(6)
@pytest.mark.parametrize("case", SPECIAL, ids=lambda case: case.name)
def test_plan_of_merge(case, backend, device):
    check_plan(merge(case.tensors(device=device), backend).plan, case)


@pytest.mark.thinned(8)
@pytest.mark.parametrize("case", [case for case in SPECIAL if rows_are_told(case)], ids=lambda case: case.name)
def test_plan_made_ahead(case, backend, device):
    plan = vlm_fuse.plan(case.input_ids(device), backend=backend, **case.settings(device), **case.kinds_for_plan(device))
    check_plan(plan, case)


def test_plan_of_random_batches(backend, device):
    @examples(backend)
    @given(cases())
    def check(case):
        check_plan(merge(case.tensors(device=device), backend).plan, case)

    check()


def test_plan_made_ahead_of_random_batches(backend, device):
    @examples(backend)
    @given(cases().filter(rows_are_told))
    def check(case):
        plan = vlm_fuse.plan(case.input_ids(device), backend=backend, **case.settings(device), **case.kinds_for_plan(device))
        check_plan(plan, case)

    check()


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
def test_attention_mask_of_any_integer_dtype(mask_dtype, backend, device):
    case = BY_NAME["packed_holes"]
    arguments = case.settings(device) | case.kinds_for_plan(device)
    # any nonzero value is a token, also one whose low bits are zero
    value = 1 if mask_dtype in (torch.bool, torch.uint8, torch.int8) else 256
    arguments["attention_mask"] = arguments["attention_mask"].mul(value).to(mask_dtype)
    check_plan(vlm_fuse.plan(case.input_ids(device), backend=backend, **arguments), case)


def test_attention_mask_of_large_and_negative_values(backend, device):
    case = BY_NAME["packed_holes"]
    arguments = case.settings(device) | case.kinds_for_plan(device)
    arguments["attention_mask"] = arguments["attention_mask"] * -(2**40)
    check_plan(vlm_fuse.plan(case.input_ids(device), backend=backend, **arguments), case)


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.float32, torch.bfloat16], ids=str)
def test_inputs_of_the_plan_may_be_any_views(mask_dtype, backend, device):
    case = BY_NAME["documents_padded"]
    arguments = case.settings(device) | case.kinds_for_plan(device)

    def strided(tensor):
        wide = tensor.new_full((tensor.shape[1] * 2, tensor.shape[0]), 1)
        wide[::2] = tensor.t()
        return wide[::2].t()

    arguments["attention_mask"] = arguments["attention_mask"].to(mask_dtype)
    for name in ("attention_mask", "document_ids", "labels"):
        arguments[name] = strided(arguments[name])
    ids = strided(case.input_ids(device))
    assert not ids.is_contiguous()
    check_plan(vlm_fuse.plan(ids, backend=backend, **arguments), case)


def test_ids_that_differ_only_above_32_bits(backend, device):
    ids = torch.tensor([[5, 5 + 2**32, 7, 5]], device=device)
    plan = vlm_fuse.plan(ids, image_token_id=5 + 2**32, backend=backend)
    assert plan.source_index.tolist() == [[-1, 0, -3, -4]]
    plan = vlm_fuse.plan(ids.int(), image_token_id=5 + 2**32, backend=backend)
    assert plan.source_index.tolist() == [[-1, -2, -3, -4]], "an id that int32 cannot hold stands nowhere in int32 ids"


def test_tail_is_not_one_document_per_padding_token():
    """transformers takes every position 0 for a new document: the tail counts on instead."""
    case = BY_NAME["packed_with_length"]
    plan = vlm_fuse.plan(case.input_ids(), **case.settings(), **case.kinds_for_plan())
    kept = sum(plan.attention_mask[0].tolist())
    assert plan.position_ids[0, kept:].tolist() == list(range(plan.position_ids.shape[1] - kept))
    assert plan.position_ids[0].eq(0).sum() == len(case.given.tokens) + 1


def test_the_plan_of_a_worker_travels():
    import pickle

    case = BY_NAME["packed_three_kinds"]
    plan = vlm_fuse.plan(case.input_ids(), **case.settings(), **case.kinds_for_plan())
    check_plan(pickle.loads(pickle.dumps(plan)), case)
    check_plan(plan.to("cpu"), case)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("name", ["packed_layout", "documents_packed_again", "left_to_right_padded", "documents_in_one_row"])
def test_fields_do_not_depend_on_the_order_of_asking(name, backend, device):
    case = BY_NAME[name]

    def made():
        return vlm_fuse.plan(case.input_ids(device), backend=backend, **case.settings(device), **case.kinds_for_plan(device))

    names = [*FACTS, "cu_seqlens", "max_seqlen", "labels", "kv_lo", "kv_hi"]
    forth, back = made(), made()
    first = {field: getattr(forth, field) for field in names}
    second = {field: getattr(back, field) for field in reversed(names)}
    for field in names:
        if field == "max_seqlen":
            assert first[field] == second[field]
        else:
            assert_bits(first[field], second[field], field)


def test_tensors_changed_in_place_are_noticed(backend, device):
    """Fields are made when first read; where the tokens were overwritten by then, the plan refuses instead of telling lies."""
    case = BY_NAME["packed_layout"]
    for changed in ("input_ids", "attention_mask", "labels"):
        arguments = case.settings(device) | case.kinds_for_plan(device)
        ids = case.input_ids(device)
        plan = vlm_fuse.plan(ids, backend=backend, **arguments)
        before = plan.position_ids
        (ids if changed == "input_ids" else arguments[changed]).fill_(1)
        assert plan.position_ids is before, "a field that was made stays"
        try:
            kinds = plan.kind_ids
        except RuntimeError as error:
            assert "changed in place" in str(error)
        else:
            assert kinds.tolist() == case.answer().fact("kind")


def test_max_documents_pads_cu_seqlens(backend, device):
    case = BY_NAME["documents_in_one_row"]
    plan = vlm_fuse.plan(case.input_ids(device), max_documents=6, backend=backend, **case.settings(device), **case.kinds_for_plan(device))
    assert plan.cu_seqlens.tolist() == [0, 4, 8, 9, 9, 9, 9]


def _with_plan(cases):
    """What a collate function does in a worker: plan the batch before the rows exist."""
    (case,) = cases
    return case.input_ids(), vlm_fuse.plan(case.input_ids(), **case.settings(), **case.kinds_for_plan())


def test_plans_made_by_the_workers_of_a_data_loader():
    chosen = [BY_NAME[name] for name in ("packed_three_kinds", "documents_packed_again", "expanded_left", "legacy_counts")]
    loader = torch.utils.data.DataLoader(chosen, batch_size=1, collate_fn=_with_plan, num_workers=1)
    for case, (ids, plan) in zip(chosen, loader):
        check_plan(plan, case)
        tensors = case.tensors()
        merged = vlm_fuse.merge(ids, plan=plan, **{name: value for name, value in tensors.merge_arguments().items() if name in ("inputs_embeds", "image_embeds", "image_token_id")})
        assert torch.equal(merged.inputs_embeds, merge(tensors, "reference").inputs_embeds)


def test_a_mismatch_is_named_in_the_worker():
    from dataclasses import replace

    case = BY_NAME["counts_by_sample"]
    kinds = (replace(case.given.kinds[0], counts=(2, 1, 1)),)
    broken = replace(case, given=replace(case.given, kinds=kinds))
    loader = torch.utils.data.DataLoader([broken], batch_size=1, collate_fn=_with_plan, num_workers=1)
    with pytest.raises(ValueError, match="sample 1"):
        next(iter(loader))


LONG = {
    "packed": dict(layout="packed"),
    "kept_without_sizes": dict(layout="keep", with_sizes=False),
    "padded_left": dict(layout="padded"),
    "documents_packed": dict(layout="packed", with_documents=True, with_sizes=False),
    "documents_kept": dict(layout="keep", with_documents=True),
    "expanded": dict(scheme="expand", layout="packed", T=2500),
    "many_short_samples": dict(layout="packed", B=700, T=9, runs=1),
    "one_sample": dict(layout="packed", B=1, T=9000, kinds=1),
    "eight_kinds": dict(layout="padded", T=900, kinds=8),
}


def smaller_on(backend, device) -> int:
    return 60 if backend == "triton" and device == "cpu" else 1


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", LONG)
def test_long_batches(name, backend, device):
    """Counts carried from block to block, across samples, kinds, images and documents."""
    from dataclasses import replace

    given = long_batch(7, **LONG[name], smaller=smaller_on(backend, device))
    if name == "padded_left":
        given = replace(given, padding_side="left")
    case = Case(name, given, document_dtype=torch.int32)
    plan = vlm_fuse.plan(case.input_ids(device), backend=backend, **case.settings(device), **case.kinds_for_plan(device))
    check_plan(plan, case)
    reference = vlm_fuse.plan(case.input_ids(), backend="reference", **case.settings(), **case.kinds_for_plan())
    for attend in (vlm_fuse.Attend(window=1500 // smaller_on(backend, device)), vlm_fuse.Attend(images="bidirectional")):
        try:
            expected = reference.mask(attend)
        except ValueError as refused:
            with pytest.raises(ValueError) as caught:
                plan.mask(attend)
                vlm_fuse.raise_errors(device)
            assert str(caught.value) == str(refused)
            continue
        mask = plan.mask(attend)
        for field in ("kv_lo", "kv_hi", "kv_lo2", "kv_hi2"):
            a, b = getattr(mask, field), getattr(expected, field)
            assert (a is None) == (b is None), field
            assert a is None or torch.equal(a.cpu(), b), field


def test_the_first_bad_sample_of_a_long_batch(backend, device):
    """The error of the last block must not hide that of an earlier one, nor the other way round."""
    from dataclasses import replace

    given = long_batch(4, with_sizes=False, kinds=1, T=3000, B=4, smaller=smaller_on(backend, device))
    case = Case("long", given)
    total = [line.count(100) for line in given.tokens]
    for sample in range(4):
        rows = sum(total[:sample]) + total[sample] - 1
        assert total[sample] > 0
        short = replace(case, given=replace(given, kinds=(replace(given.kinds[0], rows=rows),)), D=1)
        with pytest.raises(ValueError, match=rf"sample {sample} has {total[sample]} placeholders.* {total[sample] - 1} feature rows"):
            merge(short.tensors(device=device), backend, validate="sync")
    counts = list(total)
    counts[1], counts[2], counts[3] = counts[1] + 1, counts[2] - 2, counts[3] + 1
    wrong = replace(case, given=replace(given, kinds=(replace(given.kinds[0], counts=tuple(counts)),)), D=1)
    with pytest.raises(ValueError, match=rf"sample 1 has {total[1]} placeholders.* {total[1] + 1} feature rows"):
        merge(wrong.tensors(device=device), backend, validate="sync")


def test_twenty_kinds(backend, device):
    """Or the limit is told."""
    case = Case("twenty", long_batch(5, kinds=20, T=700, layout="padded", smaller=10 if backend == "triton" else 1))
    try:
        plan = vlm_fuse.plan(case.input_ids(device), backend=backend, **case.settings(device), **case.kinds_for_plan(device))
    except NotImplementedError as refused:
        assert backend == "triton" and "up to 8 kinds" in str(refused)
    else:
        check_plan(plan, case)


@pytest.mark.parametrize("layout", ["keep", "packed"])
@pytest.mark.parametrize("as_tensor", [False, True], ids=["list", "tensor"])
def test_positions_go_on_from_the_parent(layout, as_tensor, backend, device):
    """Branches after a shared prompt, and a branch of a branch: each counts on from the rows that it sees."""
    ids = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 7, 0, 8]], device=device)
    documents = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 3, -1, 3]], device=device)
    parents = [-1, 0, 0, 2]
    given = torch.tensor(parents, device=device) if as_tensor else parents
    plan = vlm_fuse.plan(ids, image_token_id=9, document_ids=documents, layout=layout, parent_ids=given, backend=backend)
    expected = [0, 1, 2, 3, 4, 3, 4, 5, 0, 6] if layout == "keep" else [0, 1, 2, 3, 4, 3, 4, 5, 6]
    assert plan.position_ids.tolist() == [expected]
    assert plan.document_ids.tolist() == [[0, 0, 0, 1, 1, 2, 2, 3, *([-1] if layout == "keep" else []), 3]]
    seen = plan.mask().dense()[0, 0].int()
    assert seen[4].tolist()[:5] == [1, 1, 1, 1, 1] and seen[6].tolist()[:7] == [1, 1, 1, 0, 0, 1, 1]


def test_attention_mask_of_floats(backend, device):
    case = BY_NAME["packed_holes"]
    arguments = case.settings(device) | case.kinds_for_plan(device)
    arguments["attention_mask"] = arguments["attention_mask"].float() * 0.5
    check_plan(vlm_fuse.plan(case.input_ids(device), backend=backend, **arguments), case)


def test_ids_of_other_integer_types(backend, device):
    import numpy

    case = BY_NAME["packed_three_kinds"]
    arguments = case.settings(device) | case.kinds_for_plan(device)
    arguments["image_token_id"] = tuple(numpy.int64(token) for token in arguments["image_token_id"])
    check_plan(vlm_fuse.plan(case.input_ids(device), backend=backend, **arguments), case)


def test_the_number_of_rows_may_be_said_without_sizes(backend, device):
    mask = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0]], dtype=torch.bool, device=device)
    made = vlm_fuse.plan(None, placeholder_mask=mask, feature_rows=3, backend=backend)
    assert made.source_index.tolist() == [[-1, 0, 1, -4], [2, -6, -7, -8]]
    with pytest.raises(ValueError, match="sample 1 has 1 placeholders .* 3 placeholders and 2 feature rows"):
        vlm_fuse.plan(None, placeholder_mask=mask, feature_rows=2, backend=backend, validate="sync")
    with pytest.raises(ValueError, match="4 feature rows but 3 placeholders"):
        vlm_fuse.plan(None, placeholder_mask=mask, feature_rows=4, backend=backend, validate="sync")
    unused = vlm_fuse.plan(None, placeholder_mask=mask, feature_rows=4, unused_features="allow", backend=backend)
    assert torch.equal(unused.source_index, made.source_index)
    ids = torch.where(mask, 7, 5)
    ids[1, 3] = 8
    kinds = vlm_fuse.plan(ids, image_token_id=(7, 8), feature_rows={7: 3, 8: 1}, backend=backend)
    assert kinds.feature_starts == (0, 3, 4) and kinds.source_index[1].tolist() == [2, -6, -7, 3]


@pytest.mark.parametrize("rows", [-1, 1.5, True, "3"])
def test_a_number_of_rows_that_is_none_is_refused(rows):
    with pytest.raises(ValueError, match="feature_rows: expected a number of rows"):
        vlm_fuse.plan(None, placeholder_mask=torch.ones(1, 2, dtype=torch.bool), feature_rows=rows)


def test_rows_of_no_kind_are_refused():
    with pytest.raises(ValueError, match="image_token_id: .*feature_rows"):
        vlm_fuse.plan(torch.ones(1, 2, dtype=torch.int64), feature_rows=2)
