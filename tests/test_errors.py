"""What a user reads when something is wrong: the sample or the argument, the counts, the remedy; and nothing written before."""

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given

import oracle
import vlm_fuse
from cases import TOKENS, Case, cases, written
from checking import assert_bits, examples, merge, placed

I = TOKENS[0]  # noqa: E741


def case_of(*samples, forms=(), text="embeds", combine="replace", **options) -> Case:
    return Case("", written(*samples, **options), forms, text=text, combine=combine)


#: batch, what it is, sample named, (words that must stand in the message)
MISMATCHES = {
    "too_few_rows": (case_of("aIIb", "IIIc", "dIef", rows=[4]), 1, ["3 placeholders", "2 feature rows", "6 placeholders", "4 feature rows"]),
    "no_rows_but_placeholders": (case_of("abcd", "aIIb", rows=[0]), 1, ["2 placeholders", "0 feature rows"]),
    "too_few_in_the_first_sample": (case_of("aIIb", rows=[1]), 0, ["2 placeholders", "1 feature rows"]),
    "too_many_rows": (case_of("aIIb", "IIIc", rows=[7]), None, ["7 feature rows", "5 placeholders", "unused_features='allow'"]),
    "rows_but_no_placeholder": (case_of("abc", "def", rows=[3]), None, ["3 feature rows", "0 placeholders", "unused_features='allow'"]),
    "counts_differ": (case_of("aIIb", "cIde", "IIfg", counts=[(2, 2, 1)]), 1, ["1 placeholders", "2 feature rows"]),
    "counts_too_small_for_a_sample": (case_of("aIIb", "cIde", counts=[(1, 2)]), 0, ["2 placeholders", "1 feature rows"]),
    "counts_add_up_to_less": (case_of("aIIb", "cIde", "IIfg", counts=[(2, 1, 1)], rows=[5]), 2, ["2 placeholders", "1 feature rows"]),
    "counts_add_up_to_more": (case_of("aIIb", "cIde", "IIfg", counts=[(2, 3, 2)], rows=[5]), 1, ["1 placeholders", "3 feature rows"]),
    "equal_totals_wrong_samples_by_images": (case_of("aIIb", "cIdd", sizes=[(1, 2)], forms=("list",)), 0, ["2 placeholders"]),
    "equal_totals_wrong_samples_by_tensor": (case_of("aIIIb", "cIdde", sizes=[(2, 2)], forms=("images",)), 0, ["3 placeholders"]),
    "image_cut_by_truncation": (case_of("abIII", "IIIIa", sizes=[(5, 4)], rows=[9]), 0, ["3 placeholders"]),
    "second_kind_too_few": (case_of("aIVb", "VVId", rows=[2, 2]), 1, [f"{TOKENS[1]}", "2 placeholders", "1 feature rows"]),
    "first_bad_sample_of_any_kind": (case_of("aIVV", "IIbd", rows=[2, 1]), 0, [f"{TOKENS[1]}", "2 placeholders", "1 feature rows"]),
    "masked_placeholders_take_rows_too": (case_of("a!!b", "IIcd", rows=[2]), 1, ["2 placeholders", "0 feature rows"]),
    "unused_allows_more_not_less": (case_of("aIIb", "IIcd", rows=[3], unused=True), 1, ["2 placeholders", "1 feature rows"]),
    "unused_with_counts_allows_more_not_less": (case_of("aIIb", "IIcd", counts=[(3, 1)], unused=True), 1, ["2 placeholders", "1 feature rows"]),
    "expand_too_few_images": (case_of("aIbI", "cIde", scheme="expand", layout="packed", sizes=[(2, 3)], forms=("list",)), 1, ["1 placeholders", "0 images"]),
    "expand_too_many_images": (case_of("aIbc", scheme="expand", layout="packed", sizes=[(2, 3)], forms=("list",)), None, ["2 images", "1 placeholders", "unused_features='allow'"]),
    "expand_counts_differ": (case_of("aIbI", "cIde", scheme="expand", layout="packed", sizes=[(2, 1, 3)], counts=[(2, 4)], forms=("list",)), 0, ["2 feature rows"]),
    "images_first_too_few": (case_of("ab", "cd", scheme="images_first", layout="padded", sizes=[(2,)], forms=("list",)), 1, ["image"]),
    "images_first_too_many": (case_of("ab", scheme="images_first", layout="padded", sizes=[(2, 2)], forms=("images",)), None, ["2 images"]),
    "document_returns": (case_of("abcd", "efgh", documents=["0011", "4554"]), 1, ["document_ids", "4"]),
    "document_returns_before_other_errors": (case_of("abcI", "efIh", documents=["0110", "4455"], rows=[1]), 0, ["document_ids", "0"]),
    "padded_length_too_small": (case_of("ab.", "cde", layout="padded", length=2), None, ["length", "3"]),
    "packed_length_too_small": (case_of("ab.", "cde", layout="packed", length=4), None, ["length", "5"]),
    "expanded_length_too_small": (case_of("aIb", scheme="expand", layout="packed", length=5, sizes=[(4,)]), None, ["length", "6"]),
}


def check_message(error, sample, words):
    text = str(error)
    if sample is not None:
        named = re.findall(r"sample (\d+)", text)
        assert named and int(named[0]) == sample, text
    for word in words:
        assert re.search(rf"(?<!\d){re.escape(word)}(?!\d)", text), f"{word!r} not in {text!r}"


@pytest.mark.thinned(2)
@pytest.mark.parametrize("name", MISMATCHES)
def test_sync_names_it_before_anything_is_written(name, backend, device):
    case, sample, words = MISMATCHES[name]
    assert oracle.error(case.given) is not None
    tensors = case.tensors(device=device)
    width = case.given.length or oracle.answer(replace(case.given, length=None)).width
    lines = 1 if case.given.layout == "packed" else len(case.given.tokens)
    out = torch.full((lines, width, case.D), 12345.0, device=device)
    with pytest.raises(ValueError) as caught:
        merge(tensors, backend, out=out, validate="sync")
    check_message(caught.value, sample, words)
    assert out.eq(12345).all(), "written before the error"
    with pytest.raises(ValueError) as caught:
        merge(tensors, backend, validate="sync")
    check_message(caught.value, sample, words)
    if case.given.layout == "keep" and case.text == "embeds":
        before = tensors.text.clone()
        with pytest.raises(ValueError):
            merge(tensors, backend, out=tensors.text, validate="sync")
        assert_bits(tensors.text, before, "inputs_embeds in place")


@pytest.mark.parametrize("options", [dict(), dict(layout="packed", length=8), dict(layout="padded")], ids=str)
def test_sync_names_the_placeholder(options, backend, device):
    ids = torch.tensor([[1, 77, 77, 2], [77, 3, 4, 1]], device=device)
    with pytest.raises(ValueError, match=r"sample 1 has 1 placeholders \(placeholder id 77\)"):
        vlm_fuse.merge(ids, torch.zeros(2, 4, 8, device=device), torch.ones(2, 8, device=device), image_token_id=77, validate="sync", backend=backend, **options)


@pytest.mark.parametrize("validate", ["sync", "async"])
def test_errors_of_batches_without_placeholders(validate, backend, device):
    def refused(match, **options):
        with pytest.raises(ValueError, match=match):
            vlm_fuse.merge(torch.ones(2, 4, dtype=torch.int64, device=device), torch.zeros(2, 4, 8, device=device), validate=validate, backend=backend, **options)
            vlm_fuse.raise_errors(device)

    refused("length: the packed row needs 8 rows", layout="packed", length=7)
    refused("id 0 returns", document_ids=torch.tensor([[0, 0, 0, 0], [0, 1, 0, 0]], device=device))


PLAN_KNOWS = [name for name, (case, *_) in MISMATCHES.items() if all(k.sizes is not None or k.counts is not None for k in case.given.kinds) and not any(k.rows != k.numbered for k in case.given.kinds)]


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", PLAN_KNOWS)
def test_plan_names_it_at_once(name, backend, device):
    case, sample, words = MISMATCHES[name]
    if case.given.scheme == "images_first" and sample is None:
        words = words[:1]
    with pytest.raises(ValueError) as caught:
        vlm_fuse.plan(case.input_ids(device), backend=backend, validate="sync", **case.settings(device), **case.kinds_for_plan(device))
    check_message(caught.value, sample, words)


ROWS_MISSING = ["too_few_rows", "no_rows_but_placeholders", "masked_placeholders_take_rows_too", "second_kind_too_few", "unused_with_counts_allows_more_not_less", "expand_too_few_images"]


@pytest.mark.thinned(2)
@pytest.mark.parametrize("name", ROWS_MISSING)
@pytest.mark.parametrize("validate", ["async", "off"])
def test_rows_without_a_feature_are_zero(name, validate, backend, device):
    case, sample, words = MISMATCHES[name]
    vlm_fuse_raises_nothing()
    tensors = case.tensors(device=device).require_grad()
    merged = merge(tensors, backend, validate=validate)
    answer = case.answer()
    expected = oracle.merged_rows(answer, case.dtype, **case.tensors().oracle_arguments())
    assert_bits(merged.inputs_embeds.cpu(), expected, "inputs_embeds")
    assert merged.source_index.tolist() == answer.fact("source_index")
    merged.inputs_embeds.sum().backward()
    for leaf in tensors.leaves:
        assert leaf.grad is not None and leaf.grad.isfinite().all()
    if validate == "off":
        vlm_fuse_raises_nothing()
    else:
        with pytest.raises(ValueError) as caught:
            vlm_fuse.raise_errors()
        # the id of the kind is not known any more
        check_message(caught.value, sample, [word for word in words if "image" not in word and word != str(TOKENS[1])])
    vlm_fuse_raises_nothing()


@pytest.mark.thinned(2)
@pytest.mark.parametrize("name", [name for name in MISMATCHES if name not in ROWS_MISSING and not name.startswith("images_first")])
def test_async_flags_every_error(name, backend, device):
    """No exception at the call, no access out of bounds, the same sample when somebody asks."""
    case, sample, words = MISMATCHES[name]
    if case.given.length is None and case.given.layout != "keep" and device != "cpu":
        pytest.skip("the width is read back, and errors with it")
    vlm_fuse_raises_nothing()
    try:
        merged = merge(case.tensors(device=device), backend, validate="async")
    except ValueError as error:
        # sizes and counts in host memory may be compared with the rows at once
        assert "add up" in str(error) or "counts" in name
        return
    assert merged.inputs_embeds.isfinite().all()
    with pytest.raises(ValueError) as caught:
        vlm_fuse.raise_errors(device)
    check_message(caught.value, sample, [])
    vlm_fuse_raises_nothing()


def vlm_fuse_raises_nothing():
    vlm_fuse.raise_errors()


def test_async_keeps_the_first_error(backend, device):
    first, second = case_of("aIIb", rows=[1]), case_of("abcd", "IIef", rows=[1])
    merge(first.tensors(device=device), backend, validate="async")
    merge(second.tensors(device=device), backend, validate="async")
    with pytest.raises(ValueError, match="sample 0"):
        vlm_fuse.raise_errors()
    vlm_fuse_raises_nothing()


def test_async_of_a_plan(backend, device):
    case = case_of("aIIb", "cIde", counts=[(1, 2)])
    vlm_fuse.plan(case.input_ids(device), backend=backend, validate="async", **case.settings(device), **case.kinds_for_plan(device))
    with pytest.raises(ValueError, match="sample 0"):
        vlm_fuse.raise_errors(torch.device(device))


def test_errors_of_random_batches(backend, device):
    """Broken at random: refused exactly where the loops refuse, and named as they name it."""

    @examples(backend, 2)
    @given(cases(broken=True))
    def check(case):
        error = oracle.error(case.given)
        tensors = case.tensors(device=device)
        if error is None:
            merge(tensors, backend, validate="sync")
            return
        with pytest.raises(ValueError) as caught:
            merge(tensors, backend, validate="sync")
        text = str(caught.value)
        if error.sample >= 0:
            named = re.findall(r"sample (\d+)", text)
            assert named and int(named[0]) == error.sample, (error, text)
            if error.what in ("too few", "counts") and case.given.scheme == "placeholders":
                check_message(caught.value, error.sample, [f"{error.placeholders} placeholders", f"{error.rows} feature rows"])
        elif error.what == "too many":
            unit = "feature rows" if case.given.scheme == "placeholders" else "images"
            check_message(caught.value, None, [f"{error.rows} {unit}"])

    check()


# -- ids outside the table ---------------------------------------------------------------------------------------------


@pytest.mark.thinned(2)
@pytest.mark.parametrize("bad", [9, 10**6, -1, -100, 2**31, 2**40, -(2**40)])
@pytest.mark.parametrize("layout", ["keep", "packed"])
def test_ids_outside_the_table(bad, layout, backend, device):
    ids = torch.tensor([[1, I, 2], [3, bad, 8]], device=device)
    weight, features = torch.randn(9, 4, device=device), torch.randn(1, 4, device=device)
    shape = (2, 3, 4) if layout == "keep" else (1, 6, 4)
    out = torch.full(shape, 12345.0, device=device)
    options = dict(weight=weight, image_token_id=I, layout=layout, backend=backend)
    with pytest.raises(IndexError) as caught:
        vlm_fuse.merge(ids, None, features, out=out, validate="sync", **options)
    assert str(bad) in str(caught.value) and "9" in str(caught.value)
    assert re.search(r"sample 1|token 4", str(caught.value)), caught.value
    assert out.eq(12345).all()
    merged = vlm_fuse.merge(ids, None, features, validate="async", **options).inputs_embeds
    assert merged.reshape(6, 4)[4].eq(0).all()
    assert_bits(merged.reshape(6, 4)[[0, 1, 2, 3, 5]], torch.stack([weight[1], features[0], weight[2], weight[3], weight[8]]), "other rows")
    with pytest.raises(IndexError, match=str(bad)):
        vlm_fuse.raise_errors()
    assert_bits(vlm_fuse.merge(ids, None, features, validate="off", **options).inputs_embeds, merged, "off")
    vlm_fuse_raises_nothing()


def test_add_reads_the_placeholders_own_row(backend, device):
    """So an id outside the table is refused there, and only there."""
    ids = torch.tensor([[1, 10**6, 2]], device=device)
    weight, features = torch.randn(9, 4, device=device), torch.randn(1, 4, device=device)
    vlm_fuse.merge(ids, None, features, weight=weight, image_token_id=10**6, backend=backend)
    with pytest.raises(IndexError, match="1000000"):
        vlm_fuse.merge(ids, None, features, weight=weight, image_token_id=10**6, combine="add", validate="sync", backend=backend)


def test_empty_table(backend, device):
    ids, rows, weight = torch.tensor([[1, I]], device=device), torch.zeros(1, 4, device=device), torch.zeros(0, 4, device=device)
    with pytest.raises(IndexError):
        vlm_fuse.merge(ids, None, rows, weight=weight, image_token_id=I, validate="sync", backend=backend)


# -- arguments ---------------------------------------------------------------------------------------------------------

IDS = torch.tensor([[1, 5, 5, 2], [5, 3, 4, 1]])
TEXT = torch.zeros(2, 4, 8)
ROWS = torch.ones(3, 8)
GOOD = dict(input_ids=IDS, inputs_embeds=TEXT, image_embeds=ROWS, image_token_id=5)
#: changes, exception, words of the message
ARGUMENTS = {
    "ids_of_floats": (dict(input_ids=IDS.float()), TypeError, ["input_ids", "float32"]),
    "ids_of_int16": (dict(input_ids=IDS.short()), TypeError, ["input_ids", "int16"]),
    "ids_as_list": (dict(input_ids=IDS.tolist()), TypeError, ["input_ids", "list"]),
    "ids_of_one_sample": (dict(input_ids=IDS[0]), ValueError, ["input_ids", "(B, T)"]),
    "no_ids": (dict(input_ids=None), ValueError, ["input_ids"]),
    "no_text": (dict(inputs_embeds=None), ValueError, ["inputs_embeds", "weight"]),
    "text_twice": (dict(weight=torch.zeros(9, 8)), ValueError, ["inputs_embeds", "weight"]),
    "text_of_another_batch": (dict(inputs_embeds=torch.zeros(2, 5, 8)), ValueError, ["inputs_embeds", "(2, 4)", "(2, 5, 8)"]),
    "flat_text": (dict(inputs_embeds=torch.zeros(8, 8)), ValueError, ["inputs_embeds"]),
    "text_of_ints": (dict(inputs_embeds=TEXT.long()), TypeError, ["inputs_embeds", "int64"]),
    "text_of_complex": (dict(inputs_embeds=TEXT.to(torch.complex64)), TypeError, ["inputs_embeds", "complex64"]),
    "weight_of_ints": (dict(inputs_embeds=None, weight=torch.zeros(9, 8).long()), TypeError, ["weight"]),
    "weight_of_three_dimensions": (dict(inputs_embeds=None, weight=torch.zeros(1, 9, 8)), ValueError, ["weight", "(V, D)"]),
    "weight_needs_ids": (dict(inputs_embeds=None, weight=torch.zeros(9, 8), input_ids=None, image_token_id=None, placeholder_mask=IDS == 5), ValueError, ["weight", "input_ids"]),
    "scale_without_weight": (dict(embed_scale=2.0), ValueError, ["embed_scale", "weight"]),
    "scale_as_tensor": (dict(inputs_embeds=None, weight=torch.zeros(9, 8), embed_scale=torch.tensor(2.0)), TypeError, ["embed_scale"]),
    "features_of_another_size": (dict(image_embeds=torch.ones(3, 6)), ValueError, ["image_embeds", "6", "8"]),
    "features_of_ints": (dict(image_embeds=ROWS.long()), TypeError, ["image_embeds", "int64"]),
    "features_of_one_dimension": (dict(image_embeds=torch.ones(8)), ValueError, ["image_embeds"]),
    "features_of_four_dimensions": (dict(image_embeds=torch.ones(1, 1, 3, 8)), ValueError, ["image_embeds"]),
    "list_of_wrong_things": (dict(image_embeds=[ROWS, 3]), TypeError, ["image_embeds[1]"]),
    "list_of_one_row": (dict(image_embeds=[torch.ones(8)]), ValueError, ["image_embeds[0]"]),
    "list_with_another_size": (dict(image_embeds=[ROWS[:2], torch.ones(1, 6)]), ValueError, ["image_embeds"]),
    "features_as_string": (dict(image_embeds="rows"), TypeError, ["image_embeds"]),
    "no_features_but_placeholders": (dict(image_embeds=None), ValueError, ["sample 0", "2 placeholders"]),
    "no_images_but_placeholders": (dict(image_embeds=[]), ValueError, ["sample 0", "2 placeholders"]),
    "no_id": (dict(image_token_id=None), ValueError, ["image_token_id"]),
    "id_as_float": (dict(image_token_id=5.0), TypeError, ["image_token_id"]),
    "id_as_bool": (dict(image_token_id=True), TypeError, ["image_token_id"]),
    "id_as_string": (dict(image_token_id="<image>"), TypeError, ["image_token_id"]),
    "id_beyond_int64": (dict(image_token_id=2**63), ValueError, ["image_token_id", "int64"]),
    "id_beyond_int64_in_a_dict": (dict(image_token_id=None, image_embeds={-(2**63) - 1: ROWS}), ValueError, ["image_embeds", "int64"]),
    "id_and_dict": (dict(image_embeds={5: ROWS}), ValueError, ["image_token_id", "dict"]),
    "id_and_mask": (dict(placeholder_mask=IDS == 5), ValueError, ["placeholder_mask", "image_token_id"]),
    "mask_of_ints": (dict(image_token_id=None, placeholder_mask=(IDS == 5).long()), TypeError, ["placeholder_mask"]),
    "mask_of_another_shape": (dict(image_token_id=None, placeholder_mask=(IDS == 5)[:1]), ValueError, ["(1, 4)", "(2, 4)"]),
    "one_id_for_two_kinds": (dict(image_token_id=(5, 5)), ValueError, ["image_token_id"]),
    "several_ids_and_one_tensor": (dict(image_token_id=(5, 6)), ValueError, ["dict"]),
    "attention_mask_of_another_shape": (dict(attention_mask=torch.ones(2, 5)), ValueError, ["attention_mask", "(2, 4)", "(2, 5)"]),
    "attention_mask_of_four_dimensions": (dict(attention_mask=torch.ones(2, 1, 4, 4)), ValueError, ["attention_mask", "(B, T)"]),
    "attention_mask_as_list": (dict(attention_mask=[[1] * 4] * 2), TypeError, ["attention_mask"]),
    "labels_of_floats": (dict(labels=IDS.float()), TypeError, ["labels"]),
    "labels_of_another_shape": (dict(labels=IDS[:, :3]), ValueError, ["labels"]),
    "documents_of_floats": (dict(document_ids=IDS.float()), TypeError, ["document_ids"]),
    "documents_of_another_shape": (dict(document_ids=IDS[:1]), ValueError, ["document_ids"]),
    "unknown_scheme": (dict(scheme="placeholder"), ValueError, ["scheme", "placeholders, expand, images_first"]),
    "unknown_layout": (dict(layout="pack"), ValueError, ["layout", "keep, padded, packed"]),
    "unknown_combine": (dict(combine="sum"), ValueError, ["combine", "replace, add"]),
    "unknown_side": (dict(padding_side="both"), ValueError, ["padding_side", "right", "left"]),
    "unknown_validate": (dict(validate="yes"), ValueError, ["validate", "sync"]),
    "unknown_unused": (dict(unused_features="ignore"), ValueError, ["unused_features", "allow"]),
    "unknown_backend": (dict(backend="cudnn"), ValueError, ["backend", "reference"]),
    "layout_as_list": (dict(layout=["packed"]), ValueError, ["layout", "keep, padded, packed"]),
    "attend_as_string": (dict(attend="causal"), TypeError, ["attend"]),
    "length_with_keep": (dict(length=4), ValueError, ["length", "padded"]),
    "length_as_float": (dict(layout="packed", length=8.0), ValueError, ["length"]),
    "length_below_zero": (dict(layout="packed", length=-1), ValueError, ["length"]),
    "expand_keeps_no_layout": (dict(scheme="expand", image_embeds=[ROWS[:1]] * 3), ValueError, ["layout", "packed"]),
    "images_first_keeps_no_layout": (dict(scheme="images_first", image_embeds=[ROWS[:1]] * 2), ValueError, ["layout", "packed"]),
    "expand_needs_sizes": (dict(scheme="expand", layout="packed"), ValueError, ["image_sizes"]),
    "images_first_needs_sizes": (dict(scheme="images_first", layout="packed"), ValueError, ["image_sizes"]),
    "images_first_with_documents": (dict(scheme="images_first", layout="packed", image_embeds=[ROWS[:1]] * 2, document_ids=torch.zeros_like(IDS)), ValueError, ["document_ids", "images_first"]),
    "images_first_with_add": (dict(scheme="images_first", layout="packed", image_embeds=[ROWS[:1]] * 2, combine="add"), ValueError, ["combine", "images_first"]),
    "sizes_that_differ": (dict(image_embeds=[ROWS[:2], ROWS[2:]], image_sizes=[1, 2]), ValueError, ["image_sizes"]),
    "sizes_below_zero": (dict(image_sizes=[4, -1]), ValueError, ["image_sizes", "-1"]),
    "sizes_of_floats": (dict(image_sizes=torch.tensor([3.0])), TypeError, ["image_sizes"]),
    "sizes_as_int": (dict(image_sizes=3), TypeError, ["image_sizes"]),
    "sizes_add_up_to_less": (dict(image_sizes=[2]), ValueError, ["image_sizes", "2", "3"]),
    "sizes_add_up_to_more": (dict(image_sizes=[2, 2]), ValueError, ["image_sizes", "4", "3"]),
    "sizes_of_an_unknown_kind": (dict(image_sizes={6: [3]}), ValueError, ["image_sizes", "6"]),
    "counts_of_another_batch": (dict(feature_counts=[2, 1, 0]), ValueError, ["feature_counts", "2", "3"]),
    "counts_of_floats": (dict(feature_counts=torch.tensor([2.0, 1.0])), TypeError, ["feature_counts"]),
    "counts_below_zero": (dict(feature_counts=[4, -1]), ValueError, ["feature_counts", "-1"]),
    "counts_of_an_unknown_kind": (dict(feature_counts={7: [2, 1]}), ValueError, ["feature_counts", "7"]),
    "out_of_another_shape": (dict(out=torch.zeros(2, 5, 8)), ValueError, ["out", "(2, 4, 8)"]),
    "out_of_ints": (dict(out=torch.zeros(2, 4, 8).long()), TypeError, ["out"]),
    "out_expanded": (dict(out=torch.zeros(1, 1, 8).expand(2, 4, 8)), ValueError, ["out"]),
    "out_not_a_tensor": (dict(out=[0]), TypeError, ["out"]),
    "plan_not_a_plan": (dict(plan="plan"), TypeError, ["plan"]),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments(name):
    changes, error, words = ARGUMENTS[name]
    arguments = GOOD | changes
    vlm_fuse.merge(**GOOD)
    with pytest.raises(error) as caught:
        vlm_fuse.merge(**arguments)
    for word in words:
        assert word in str(caught.value), f"{word!r} not in {str(caught.value)!r}"


@pytest.mark.parametrize("shared", ["features", "weight", "view_of_features", "overlap"])
def test_out_never_aliases_what_is_read(shared, backend, device):
    ids, rows = IDS.to(device), torch.randn(40, 8, device=device)
    options = dict(image_token_id=5, backend=backend)
    text, features = torch.zeros(2, 4, 8, device=device), rows[:3]
    if shared == "weight":
        with pytest.raises(ValueError, match="out"):
            vlm_fuse.merge(ids, None, ROWS.to(device), weight=rows[:8], out=rows[:8].view(2, 4, 8), **options)
        return
    out = {"features": rows[:8], "view_of_features": rows[:8], "overlap": rows[2:10]}[shared].view(2, 4, 8)
    with pytest.raises(ValueError, match="out"):
        vlm_fuse.merge(ids, text, features, out=out, **options)


def test_out_that_overlaps_the_text_but_is_not_it(backend, device):
    buffer = torch.zeros(9, 4 * 8, device=device)
    text, out = buffer[:2].view(2, 4, 8), buffer[1:3].view(2, 4, 8)
    with pytest.raises(ValueError, match="out"):
        vlm_fuse.merge(IDS.to(device), text, ROWS.to(device), image_token_id=5, out=out, backend=backend)


def test_out_interleaved_with_what_is_read_is_legal_or_refused(backend, device):
    """Columns of one buffer: no element is shared."""
    ids, rows, buffer = IDS.to(device), ROWS.to(device), torch.randn(2, 4, 16, device=device)
    text, out = buffer[..., :8], buffer[..., 8:]
    expected = vlm_fuse.merge(ids, text.clone(), rows, image_token_id=5, backend="reference").inputs_embeds
    try:
        vlm_fuse.merge(ids, text, rows, image_token_id=5, out=out, backend=backend)
    except ValueError as error:
        assert "out" in str(error)
    else:
        assert_bits(out, expected, "out")


@pytest.mark.parametrize("which", ["text", "features"])
def test_out_while_gradients_are_recorded(which, backend, device):
    ids, text, rows = IDS.to(device), torch.zeros(2, 4, 8, device=device), torch.ones(3, 8, device=device)
    (text if which == "text" else rows).requires_grad_()
    out = torch.full((2, 4, 8), 12345.0, device=device)
    options = dict(image_token_id=5, backend=backend)
    with pytest.raises(ValueError, match="grad"):
        vlm_fuse.merge(ids, text, rows, out=out, **options)
    assert out.eq(12345).all()
    with torch.no_grad():
        vlm_fuse.merge(ids, text, rows, out=out, **options)
    if which == "text":
        with pytest.raises(ValueError, match="leaf"):
            vlm_fuse.merge(ids, text, rows, out=text, **options)
    with pytest.raises(ValueError, match="out"):
        vlm_fuse.merge(ids, text.detach(), rows.detach(), out=text.detach().clone().requires_grad_(), **options)


def test_in_place_with_another_layout(backend, device):
    text = torch.zeros(2, 4, 8, device=device)
    with pytest.raises(ValueError, match="keep"):
        vlm_fuse.merge(IDS.to(device), text, ROWS.to(device), image_token_id=5, layout="padded", out=text, backend=backend)


# -- a plan that disagrees ---------------------------------------------------------------------------------------------

CONTRADICTIONS = {
    "scheme": dict(scheme="expand"),
    "layout": dict(layout="packed"),
    "padding_side": dict(padding_side="left"),
    "length": dict(layout="padded", length=9),
    "combine": dict(combine="add"),
    "attend": dict(attend=vlm_fuse.Attend(window=3)),
    "unused_features": dict(unused_features="allow"),
    "image_token_id": dict(image_token_id=6),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_plan_settles_it(name):
    made = vlm_fuse.plan(IDS, image_token_id=5)
    with pytest.raises(ValueError) as caught:
        vlm_fuse.merge(**(GOOD | dict(plan=made) | CONTRADICTIONS[name]))
    text = str(caught.value)
    assert "plan" in text and (name in text or name == "length"), text


def test_plan_of_another_setting_serves_calls_that_name_it_or_leave_it():
    made = vlm_fuse.plan(IDS, image_token_id=5, layout="packed", combine="add", attend=vlm_fuse.Attend(window=2))
    for more in ({}, dict(layout="packed"), dict(combine="add"), dict(attend=vlm_fuse.Attend(window=2)), dict(image_token_id=5)):
        merged = vlm_fuse.merge(IDS, TEXT, ROWS, plan=made, **({"image_token_id": 5} | more))
        assert merged.inputs_embeds.shape == (1, 8, 8) and merged.plan.attend.window == 2
    vlm_fuse.merge(IDS, TEXT, ROWS, plan=made)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(image_embeds=torch.ones(2, 8)), ["2", "3"]),
        (dict(image_embeds=torch.ones(4, 8)), ["4", "3"]),
        (dict(image_embeds=None), ["3"]),
        (dict(image_embeds={6: ROWS}, image_token_id=None), ["6"]),
        (dict(inputs_embeds=torch.zeros(2, 5, 8)), ["inputs_embeds"]),
        (dict(inputs_embeds=torch.zeros(1, 4, 8)), ["inputs_embeds"]),
        (dict(image_embeds=torch.ones(3, 6)), ["image_embeds", "6"]),
        (dict(input_ids=IDS[:, :3], inputs_embeds=TEXT[:, :3]), ["(2, 3)"]),
        (dict(labels=IDS[:, :3]), ["labels"]),
    ],
    ids=["fewer_rows", "more_rows", "no_rows", "another_kind", "another_width", "another_batch", "another_hidden_size", "other_ids", "other_labels"],
)
def test_tensors_that_do_not_fit_the_plan(changes, words, backend, device):
    made = vlm_fuse.plan(IDS.to(device), image_token_id=5, backend=backend)
    with pytest.raises(ValueError) as caught:
        vlm_fuse.merge(**placed(GOOD | changes, device), plan=made, backend=backend)
    for word in words:
        assert word in str(caught.value), caught.value


def test_weight_with_a_plan_checks_ids_again(backend, device):
    ids = IDS.to(device)
    made = vlm_fuse.plan(ids, image_token_id=5, backend=backend)
    with pytest.raises(IndexError):
        vlm_fuse.merge(ids, None, ROWS.to(device), weight=torch.zeros(4, 8, device=device), plan=made, validate="sync", backend=backend)


@pytest.mark.parametrize(
    "changes, error, words",
    [
        (dict(image_token_id=(5, 5)), ValueError, ["image_token_id"]),
        (dict(image_token_id=5.5), TypeError, ["image_token_id"]),
        (dict(image_token_id=None, image_sizes=[3]), ValueError, ["image_token_id"]),
        (dict(image_token_id=(5, 6), image_sizes=[3]), ValueError, ["image_sizes", "dict"]),
        (dict(max_documents=-1), ValueError, ["max_documents"]),
        (dict(labels=torch.zeros(2, 4)), TypeError, ["labels"]),
    ],
    ids=["id_twice", "id_as_float", "sizes_without_id", "sizes_of_two_kinds", "max_documents", "labels"],
)
def test_arguments_of_plan(changes, error, words):
    with pytest.raises(error) as caught:
        vlm_fuse.plan(IDS, **(dict(image_token_id=5) | changes))
    for word in words:
        assert word in str(caught.value)


def test_more_documents_than_max_documents():
    with pytest.raises(ValueError, match="max_documents"):
        vlm_fuse.plan(IDS, image_token_id=5, document_ids=torch.tensor([[0, 0, 1, 1], [2, 2, 3, 3]]), max_documents=3).cu_seqlens  # noqa: B018


def test_unpack_of_other_rows():
    merged = vlm_fuse.merge(**GOOD)
    for wrong in (torch.zeros(2), torch.zeros(2, 5), torch.zeros(1, 8, 3), torch.zeros(4, 2, 8)):
        with pytest.raises(ValueError, match="rows"):
            merged.unpack(wrong)


@pytest.mark.parametrize("device", ["meta"])
def test_devices_that_differ(device):
    for name in ("inputs_embeds", "image_embeds"):
        with pytest.raises(ValueError, match="meta"):
            vlm_fuse.merge(**(GOOD | {name: GOOD[name].to(device)}))
    for name in ("attention_mask", "labels", "document_ids"):
        with pytest.raises(ValueError, match=f"{name}.*meta"):
            vlm_fuse.merge(**(GOOD | {name: torch.zeros(2, 4, dtype=torch.int64, device=device)}))


def test_a_named_backend_never_falls_back():
    for name, info in vlm_fuse.backends().items():
        if not info.available:
            with pytest.raises(RuntimeError, match=name):
                vlm_fuse.merge(**GOOD, backend=name)


def test_the_variable_names_a_backend(monkeypatch):
    monkeypatch.setenv("VLM_FUSE_BACKEND", "no_such_backend")
    with pytest.raises(ValueError, match="no_such_backend"):
        vlm_fuse.merge(**GOOD)
    vlm_fuse.merge(**GOOD, backend="reference")


@pytest.mark.parametrize("layout", ["keep", "packed"])
def test_ids_that_nobody_looks_up_may_be_any(layout, backend, device):
    ids = torch.tensor([[-7, 9, 2**40], [2, -1, 9]], device=device)
    given = dict(image_token_id=9, layout=layout, length=6 if layout == "packed" else None, backend=backend)
    for validate in ("sync", "async"):
        out = vlm_fuse.merge(ids, torch.zeros(2, 3, 4, device=device), torch.ones(2, 4, device=device), validate=validate, **given)
        vlm_fuse.raise_errors()
        assert out.inputs_embeds[..., 0].flatten().tolist() == [0, 1, 0, 0, 0, 1]
