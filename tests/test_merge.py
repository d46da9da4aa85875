"""merge forward: every row against the loops of oracle.py, in every dtype, from every form of input, into every output."""

import functools
import itertools

import pytest
import torch
from hypothesis import given

import oracle
import vlm_fuse
from cases import BY_NAME, SPECIAL, VOCABULARY, Case, cases
from checking import assert_bits, assert_equal, examples, merge

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PAIRS = list(itertools.product(DTYPES, DTYPES))
short = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}.get


def expected_rows(tensors, dtype=None):
    case = tensors.case
    return oracle.merged_rows(case.answer(), dtype or case.dtype, **tensors.oracle_arguments())


def with_dtypes(case: Case, text, *features) -> Case:
    from dataclasses import replace

    return replace(case, dtype=text, feature_dtypes=features * len(case.given.kinds))


# -- rows --------------------------------------------------------------------------------------------------------------


@pytest.mark.thinned(2)
@pytest.mark.parametrize("case", SPECIAL, ids=lambda case: case.name)
def test_rows(case, backend, device):
    tensors = case.tensors(device=device)
    before = [leaf.clone() for leaf in tensors.leaves]
    merged = merge(tensors, backend)
    compare = assert_bits if case.combine == "replace" and case.scale is None else assert_equal
    compare(merged.inputs_embeds.cpu(), expected_rows(case.tensors()), "inputs_embeds")
    assert not merged.inputs_embeds.requires_grad
    assert merged.inputs_embeds.is_contiguous()
    for leaf, copy in zip(tensors.leaves, before):
        assert_bits(leaf, copy, "an input after the call")


@pytest.mark.thinned(5)
@pytest.mark.parametrize("case", SPECIAL, ids=lambda case: case.name)
def test_rows_in_bfloat16(case, backend, device):
    case = with_dtypes(case, torch.bfloat16, torch.bfloat16)
    assert_equal(merge(case.tensors(device=device), backend).inputs_embeds.cpu(), expected_rows(case.tensors()), "inputs_embeds")


def test_rows_of_random_batches(backend, device):
    @examples(backend)
    @given(cases(dtypes=DTYPES))
    def check(case):
        tensors = case.tensors(device=device)
        assert_equal(merge(tensors, backend).inputs_embeds.cpu(), expected_rows(case.tensors()), "inputs_embeds")

    check()


@pytest.mark.thinned(5)
@pytest.mark.parametrize("text, feature", PAIRS, ids=lambda dtype: short(dtype))
@pytest.mark.parametrize("name", ["two_images_left_padded", "fused_embedding_scaled", "added", "added_to_scaled_weight"])
def test_dtypes(name, text, feature, backend, device):
    case = with_dtypes(BY_NAME[name], text, feature)
    tensors = case.tensors(device=device)
    merged = merge(tensors, backend).inputs_embeds
    assert merged.dtype == text, "the output has the dtype of the text"
    assert_equal(merged.cpu(), expected_rows(case.tensors()), "inputs_embeds")


@pytest.mark.thinned(7)
@pytest.mark.parametrize("wanted", DTYPES, ids=lambda dtype: short(dtype))
@pytest.mark.parametrize("text, feature", PAIRS, ids=lambda dtype: short(dtype))
def test_out_decides_the_dtype(text, feature, wanted, backend, device):
    case = with_dtypes(BY_NAME["fused_embedding_scaled"], text, feature)
    tensors = case.tensors(device=device)
    out = torch.empty(2, case.given.T, case.D, dtype=wanted, device=device)
    merged = merge(tensors, backend, out=out)
    assert merged.inputs_embeds is out
    assert_equal(out.cpu(), expected_rows(case.tensors(), wanted), "out")


@functools.cache
def every_pattern(dtype) -> torch.Tensor:
    """All bit patterns of a 16-bit dtype; of the wider ones those around what the narrow ones can hold."""
    if dtype in (torch.bfloat16, torch.float16):
        return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    generator = torch.Generator().manual_seed(3)
    bits = torch.randint(-(2**31), 2**31 - 1, (2**15,), generator=generator, dtype=torch.int64).to(torch.int32)
    values = [bits.view(torch.float32).to(torch.float64)]
    for narrow in (torch.bfloat16, torch.float16):
        exact = every_pattern(narrow)
        exact = exact[exact.isfinite()].to(torch.float64)[::17]
        above = torch.nextafter(exact.to(torch.float32), torch.tensor(torch.inf)).to(torch.float64)
        # halfway between neighbours: ties, and a hair to both sides of them
        ties = (exact[:-1] + exact[1:]) / 2
        values += [exact, above, ties, ties * (1 + 2**-40), ties * (1 - 2**-40), ties * (1 + 2**-23)]
    values.append(torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 65504, 65519.99, 65520, 1e-45, -1e-45, 3.5e38, 1e300, 1e-300], dtype=torch.float64))
    values = torch.cat(values).to(dtype)
    return torch.cat([values, values.new_zeros(-len(values) % 512)])


@pytest.mark.parametrize("source, wanted", PAIRS, ids=lambda dtype: short(dtype))
@pytest.mark.parametrize("which", ["features", "text", "weight"])
def test_conversion_is_that_of_torch(which, source, wanted, backend, device):
    values = every_pattern(source).view(-1, 512)
    if backend == "triton":
        values = values[:: max(1, len(values) // 24)]
    n = len(values)
    out = torch.empty(1, n + 1, 512, dtype=wanted, device=device)
    one = torch.ones(1, 512, dtype=source, device=device)
    values = values.to(device)
    token = torch.arange(n)
    if which == "features":
        ids = torch.tensor([[3] + [7] * n], device=device)
        vlm_fuse.merge(ids, torch.ones(1, n + 1, 512, dtype=source, device=device), values, image_token_id=7, out=out, backend=backend)
    elif which == "text":
        ids = torch.tensor([[7] + [3] * n], device=device)
        vlm_fuse.merge(ids, torch.cat([one, values])[None], one, image_token_id=7, out=out, backend=backend)
    else:
        ids = torch.cat([torch.tensor([n]), token])[None].to(device)
        vlm_fuse.merge(ids, None, one, weight=values, image_token_id=n, out=out, backend=backend)
    actual, expected = out[0, 1:].cpu(), values.cpu().to(wanted)
    nan = expected.isnan()
    assert torch.equal(actual.isnan(), nan)
    assert_bits(actual[~nan], expected[~nan], f"{source} as {wanted}")
    if source == wanted:
        assert_bits(actual, expected, "a copy keeps every bit, those of NaN too")


def test_feature_tensors_of_different_dtypes(backend, device):
    ids = torch.tensor([[1, 7, 7, 2, 7, 8, 8]], device=device)
    a, b = torch.randn(2, 6, dtype=torch.float64, device=device), torch.randn(1, 6, dtype=torch.float16, device=device)
    video = torch.randn(1, 2, 6, dtype=torch.bfloat16, device=device)
    text = torch.randn(1, 7, 6, device=device)
    out = vlm_fuse.merge(ids, text, {7: [a, b], 8: video}, backend=backend).inputs_embeds
    assert_bits(out[0], torch.cat([text[0, :1], a.float(), text[0, 3:4], b.float(), video[0].float()]), "inputs_embeds")


# -- forms of input ----------------------------------------------------------------------------------------------------


def _views(tensor):
    """The same values behind other strides."""
    wide = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] * 2), torch.nan)
    wide[..., ::2] = tensor
    yield "last_stride_two", wide[..., ::2]
    yield "transposed", tensor.transpose(0, -1).contiguous().transpose(0, -1)
    far = tensor.new_full((tensor.shape[0] * 2 + 1, *tensor.shape[1:]), torch.nan)
    far[1::2] = tensor
    yield "every_second", far[1::2]
    odd = tensor.new_full((tensor.numel() + 1,), torch.nan)
    odd[1:] = tensor.reshape(-1)
    yield "unaligned", odd[1:].view(tensor.shape)
    if tensor.dim() == 3:
        yield "images_last", tensor.permute(1, 2, 0).contiguous().permute(2, 0, 1)
        yield "rows_first", tensor.transpose(0, 1).contiguous().transpose(0, 1)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("view", ["last_stride_two", "transposed", "every_second", "unaligned", "images_last", "rows_first"])
@pytest.mark.parametrize("D", [6, 64])
def test_views_of_the_inputs(view, D, backend, device):
    ids = torch.tensor([[1, 7, 7, 2, 3], [7, 7, 4, 5, 1]], device=device)
    text, features, weight = torch.randn(2, 5, D, device=device), torch.randn(2, 2, D, device=device), torch.randn(9, D, device=device)
    expected = vlm_fuse.merge(ids, text, features, image_token_id=7, backend="reference").inputs_embeds
    fused = vlm_fuse.merge(ids, None, features, weight=weight, image_token_id=7, backend="reference").inputs_embeds
    assert_bits(expected[0], torch.cat([text[0, :1], features[0], text[0, 3:]]), "the reference itself")
    text_view, features_view = dict(_views(text))[view], dict(_views(features))[view]
    assert_bits(vlm_fuse.merge(ids, text_view, features_view, image_token_id=7, backend=backend).inputs_embeds, expected, view)
    listed = [features_view[0], features_view[1]]
    assert_bits(vlm_fuse.merge(ids, text_view, listed, image_token_id=7, backend=backend).inputs_embeds, expected, view)
    if view in dict(_views(weight)):
        weight_view = dict(_views(weight))[view]
        assert_bits(vlm_fuse.merge(ids, None, features_view, weight=weight_view, image_token_id=7, backend=backend).inputs_embeds, fused, view)


def test_expanded_inputs(backend, device):
    ids = torch.tensor([[1, 7, 7, 2], [7, 7, 4, 5]], device=device)
    text, row = torch.randn(1, 1, 8, device=device), torch.randn(1, 8, device=device)
    out = vlm_fuse.merge(ids, text.expand(2, 4, 8), row.expand(4, 8), image_token_id=7, backend=backend).inputs_embeds
    expected = torch.where((ids == 7)[..., None], row, text)
    assert_bits(out, expected, "inputs_embeds")


@pytest.mark.parametrize("D", [4, 5])
@pytest.mark.parametrize("order", ["neighbours", "backwards", "with_gaps", "other_storages", "same_tensor"])
def test_a_list_however_it_lies_in_memory(order, D, backend, device):
    """Neighbours in memory may be read as one piece; only neighbours may."""
    base = torch.randn(12, D, device=device)
    images = {
        "neighbours": [base[0:2], base[2:3], base[3:6]],
        "backwards": [base[4:6], base[3:4], base[0:3]],
        "with_gaps": [base[0:2], base[3:4], base[5:8]],
        "other_storages": [base[0:2].clone(), base[2:3].clone(), base[3:6].clone()],
        "same_tensor": [base[0:2], base[0:1], base[0:3]],
    }[order]
    ids = torch.tensor([[7, 7, 1, 7, 2, 7, 7, 7]], device=device)
    text = torch.randn(1, 8, D, device=device)
    out = vlm_fuse.merge(ids, text, images, image_token_id=7, backend=backend).inputs_embeds[0]
    assert_bits(out, torch.cat([images[0], text[0, 2:3], images[1], text[0, 4:5], images[2]]), order)


def test_three_hundred_images(backend, device):
    sizes = [(i * 7) % 4 for i in range(300)]
    images = [torch.randn(size, 3, device=device) for size in sizes]
    ids = torch.full((1, sum(sizes)), 7, device=device)
    out = vlm_fuse.merge(ids, torch.zeros(1, sum(sizes), 3, device=device), images, image_token_id=7, backend=backend)
    assert_bits(out.inputs_embeds[0], torch.cat(images), "inputs_embeds")
    expected = [i for i, size in enumerate(sizes) for _ in range(size)]
    assert out.image_ids.tolist() == [expected]


@pytest.mark.parametrize("sizes", [[2, 3], (2, 3), torch.tensor([2, 3]), torch.tensor([2, 3], dtype=torch.int32)], ids=["list", "tuple", "int64", "int32"])
def test_image_sizes_in_any_form(sizes, backend, device):
    case = BY_NAME["two_adjacent_images_by_sizes"]
    merged = merge(case.tensors(device=device), backend, image_sizes=sizes)
    assert merged.image_ids.tolist() == [[-1, 0, 0, 1, 1, 1, -1]]


@pytest.mark.parametrize("counts", [[2, 0, 2], (2, 0, 2), torch.tensor([2, 0, 2]), torch.tensor([2, 0, 2], dtype=torch.int32)], ids=["list", "tuple", "int64", "int32"])
def test_feature_counts_in_any_form(counts, backend, device):
    case = BY_NAME["counts_by_sample"]
    tensors = case.tensors(device=device)
    assert_bits(merge(tensors, backend, feature_counts=counts).inputs_embeds, expected_rows(case.tensors()), "inputs_embeds")


def test_placeholder_mask_needs_no_input_ids(backend, device):
    case = BY_NAME["one_image_mask_instead_of_id"]
    tensors = case.tensors(device=device)
    merged = vlm_fuse.merge(None, backend=backend, **tensors.merge_arguments())
    assert_bits(merged.inputs_embeds.cpu(), expected_rows(case.tensors()), "inputs_embeds")


@pytest.mark.parametrize("none", [None, [], "empty tensor", "empty dict entry"], ids=["none", "empty_list", "empty_tensor", "empty_dict_entry"])
def test_no_features(none, backend, device):
    text = torch.randn(2, 3, 4, device=device)
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]], device=device)
    options = dict(image_token_id=7)
    if none == "empty tensor":
        none = torch.empty(0, 4, device=device)
    elif none == "empty dict entry":
        none, options = {7: [], 8: torch.empty(0, 5, 4, device=device)}, {}
    merged = vlm_fuse.merge(ids, text, none, backend=backend, **options)
    assert_bits(merged.inputs_embeds, text, "inputs_embeds")
    assert merged.kind_ids.eq(0).all()


def test_one_id_for_images_and_videos(backend, device):
    """Molmo 2 marks both with one id: rows of both in reading order, as one kind."""
    ids = torch.tensor([[1, 7, 7, 2, 7, 7, 7]], device=device)
    image, video = torch.randn(2, 4, device=device), torch.randn(3, 4, device=device)
    out = vlm_fuse.merge(ids, torch.zeros(1, 7, 4, device=device), [image, video], image_token_id=7, backend=backend).inputs_embeds[0]
    assert_bits(out[[1, 2, 4, 5, 6]], torch.cat([image, video]), "feature rows")


def test_auto_serves_every_scheme():
    for name in ("two_images_left_padded", "expanded", "legacy_left_padding"):
        tensors = BY_NAME[name].tensors()
        assert_bits(merge(tensors, "auto").inputs_embeds, expected_rows(tensors), name)


def test_ids_outside_the_table_where_no_row_reads_them(backend, device):
    """Rows of padding that are dropped, and placeholders, may hold any id."""
    ids = torch.tensor([[10**6, 3, 7, -5], [2, 7, 7, 2**40]], device=device)
    mask = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 0]], device=device)
    weight, features = torch.randn(5, 4, device=device), torch.randn(3, 4, device=device)
    out = vlm_fuse.merge(ids, None, features, weight=weight, image_token_id=7, attention_mask=mask, layout="packed", backend=backend)
    assert_bits(out.inputs_embeds[0], torch.cat([weight[3:4], features[:1], weight[2:3], features[1:]]), "inputs_embeds")


# -- values that must not spread ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("combine", ["replace", "add"])
def test_nan_and_inf_stay_in_their_rows(combine, backend, device):
    ids = torch.tensor([[1, 7, 2, 7, 3]], device=device)
    text, features = torch.randn(1, 5, 6, device=device), torch.randn(2, 6, device=device)
    text[0, 0], text[0, 2, 3], features[1] = torch.nan, torch.inf, torch.nan
    out = vlm_fuse.merge(ids, text, features, image_token_id=7, combine=combine, backend=backend).inputs_embeds[0]
    assert out[0].isnan().all() and out[3].isnan().all()
    assert out[[1, 4]].isfinite().all()
    assert_bits(out[2], text[0, 2], "a row with one inf")


@pytest.mark.parametrize("out_dtype", DTYPES, ids=lambda dtype: short(dtype))
def test_sums_are_in_double_where_any_table_is(out_dtype, backend, device):
    """Also in rows whose own two tables are not."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.tensor([[1, 7, 7, 2, 7, 7, 7, 3]], device=device)
    text = torch.randn(1, 8, 33, generator=generator).to(device)
    single, double = (torch.randn(rows, 33, generator=generator).to(device, dtype) for rows, dtype in ((2, torch.float32), (3, torch.float64)))
    out = torch.empty(1, 8, 33, dtype=out_dtype, device=device)
    vlm_fuse.merge(ids, text, [single, double], image_token_id=7, combine="add", out=out, backend=backend)
    wanted = text[0].double()
    wanted[[1, 2, 4, 5, 6]] += torch.cat([single.double(), double])
    assert_bits(out[0], wanted.to(out_dtype), "sums")


def test_embedding_under_a_placeholder_is_not_read(backend, device):
    """clone-and-index overwrites it, so its NaN must not show."""
    ids = torch.tensor([[1, 7, 7]], device=device)
    text = torch.randn(1, 3, 6, device=device)
    text[0, 1:] = torch.nan
    assert vlm_fuse.merge(ids, text, torch.ones(2, 6, device=device), image_token_id=7, backend=backend).inputs_embeds.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_zeros_keep_their_sign_where_there_is_no_text_to_add(dtype, backend, device):
    """An id outside the table has no row: the feature row is copied as it is."""
    ids = torch.tensor([[50, 3]], device=device)
    rows = torch.tensor([[-0.0, 0.0, 1.0], [-0.0, 0.0, 2.0]], dtype=dtype, device=device)
    weight = torch.zeros(5, 3, device=device)
    out = vlm_fuse.merge(ids, None, rows[:1], weight=weight, image_token_id=50, combine="add", validate="off", backend=backend)
    assert out.inputs_embeds[0, 0].signbit().tolist() == [True, False, False]
    out = vlm_fuse.merge(ids, None, rows[:1], weight=weight, image_token_id=3, combine="add", validate="off", backend=backend)
    assert out.inputs_embeds[0, 1].signbit().tolist() == [False, False, False]


# -- outputs -----------------------------------------------------------------------------------------------------------


@pytest.mark.thinned(3)
@pytest.mark.parametrize("combine", ["replace", "add"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: short(dtype))
def test_in_place(dtype, combine, backend, device):
    from dataclasses import replace

    case = replace(BY_NAME["two_images_left_padded"], combine=combine, dtype=dtype, feature_dtypes=(torch.float32,), D=24)
    tensors = case.tensors(device=device)
    pointer = tensors.text.data_ptr()
    merged = merge(tensors, backend, out=tensors.text)
    assert merged.inputs_embeds is tensors.text
    assert tensors.text.data_ptr() == pointer
    assert_equal(tensors.text.cpu(), expected_rows(case.tensors()), "inputs_embeds")


def test_in_place_into_a_view(backend, device):
    case = BY_NAME["two_images_left_padded"]
    tensors = case.tensors(device=device)
    wide = torch.full((2, case.given.T, case.D + 3), 9.0, device=device)
    wide[..., : case.D] = tensors.text
    tensors.text = wide[..., : case.D]
    merge(tensors, backend, out=tensors.text)
    assert_bits(wide[..., : case.D].cpu(), expected_rows(case.tensors()), "inputs_embeds")
    assert wide[..., case.D :].eq(9).all(), "beyond the rows of out"


@pytest.mark.parametrize("name", ["two_images_left_padded", "packed_layout", "expanded", "legacy_left_padding", "fused_embedding", "added"])
def test_out(name, backend, device):
    case = BY_NAME[name]
    expected = expected_rows(case.tensors())
    tensors = case.tensors(device=device)
    out = torch.full_like(expected, torch.nan).to(device)
    merged = merge(tensors, backend, out=out)
    assert merged.inputs_embeds is out
    assert_equal(out.cpu(), expected, "out")
    wide = torch.full((*expected.shape[:-1], case.D * 2), 5.0, device=device)
    merge(tensors, backend, out=wide[..., : case.D])
    assert_equal(wide[..., : case.D].cpu(), expected, "a view as out")
    assert wide[..., case.D :].eq(5).all()


def test_out_with_any_strides(backend, device):
    """Rows may lie anywhere; elements of a row that are not neighbours are refused on every backend alike."""
    case = BY_NAME["two_images_left_padded"]
    expected = expected_rows(case.tensors())
    tensors = case.tensors(device=device)
    B, T, D = expected.shape
    for name, out in {
        "tokens_first": torch.full((T, B, D), 5.0, device=device).transpose(0, 1),
        "every_second_row": torch.full((B, 2 * T, D), 5.0, device=device)[:, ::2],
    }.items():
        merge(tensors, backend, out=out)
        assert_bits(out.cpu(), expected, name)
    for name, out in {
        "last_stride_two": torch.full((B, T, 2 * D), 5.0, device=device)[..., ::2],
        "samples_last": torch.full((T, D, B), 5.0, device=device).permute(2, 0, 1),
    }.items():
        with pytest.raises(ValueError, match="out"):
            merge(tensors, backend, out=out)
        assert out.eq(5).all(), name


def test_the_output_takes_writes_in_place(backend, device):
    case = BY_NAME["two_images_left_padded"]
    tensors = case.tensors(device=device).require_grad()
    out = merge(tensors, backend).inputs_embeds
    assert not out._is_view(), "a view of a custom function's output refuses writes in place"
    out[:, 0] += 1
    out.mul_(2)
    out.sum().backward()
    assert tensors.text.grad[0, -1].eq(2).all()


# -- what MergedBatch gives --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["packed_layout", "documents_packed_again", "three_kinds", "legacy_packed"])
def test_fields_of_the_plan_are_read_through(name, backend, device):
    merged = merge(BY_NAME[name].tensors(device=device), backend)
    for field in ("source_index", "text_index", "position_ids", "document_ids", "image_ids", "kind_ids", "attention_mask", "kv_lo", "kv_hi", "cu_seqlens", "labels"):
        assert torch.equal(getattr(merged, field), getattr(merged.plan, field)), field
    assert merged.max_seqlen == merged.plan.max_seqlen
    assert merged.kv_lo2 is None and merged.kv_hi2 is None
    with pytest.raises(AttributeError):
        merged.no_such_field


@pytest.mark.thinned(5)
@pytest.mark.parametrize("case", SPECIAL, ids=lambda case: case.name)
def test_unpack(case, backend, device):
    tensors = case.tensors(device=device)
    merged = merge(tensors, backend)
    answer = case.answer()
    shape = (1 if case.given.layout == "packed" else len(case.given.tokens), answer.width)
    number = torch.arange(1, shape[0] * shape[1] + 1, device=device).view(shape)
    for rows in (number, number.double()[..., None] + torch.arange(3, device=device) / 4, (number % 2).bool(), merged.inputs_embeds):
        rows = rows.clone()
        rows[~merged.attention_mask] = 0
        expected = oracle.unpacked(case.given, answer, rows.cpu())
        assert_equal(merged.unpack(rows).cpu(), expected, "unpack")


@pytest.mark.parametrize("name", ["packed_layout", "left_to_right_padded", "legacy_left_padding", "expanded_packed_tensor"])
def test_unpack_is_differentiable(name, backend, device):
    case = BY_NAME[name]
    merged = merge(case.tensors(device=device), backend)
    rows = torch.randn(*merged.document_ids.shape, 3, dtype=torch.float64, device=device, requires_grad=True)
    back = merged.unpack(rows)
    weights = torch.randn_like(back)
    (gradient,) = torch.autograd.grad((back * weights).sum(), rows)
    (expected,) = torch.autograd.grad((oracle.unpacked(case.given, case.answer(), rows) * weights).sum(), rows)
    assert_equal(gradient, expected, "gradient of unpack")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_unpack_of_rows_that_did_not_fit(layout, side, backend, device):
    """Where nobody checks, samples end with the width given, and no row goes to another sample."""
    ids = torch.tensor([[9, 1], [9, 2]], device=device)
    options = dict(scheme="expand", layout=layout, padding_side=side, image_token_id=9, length=2 if layout == "padded" else 4, validate="off", backend=backend)
    out = vlm_fuse.merge(ids, torch.zeros(2, 2, 1, device=device), torch.ones(2, 2, 1, device=device), **options)
    rows = torch.arange(1, 5, device=device).view(out.document_ids.shape)
    expected = [[1, 2, 0], [3, 4, 0]] if layout == "padded" else [[1, 2, 3], [4, 0, 0]]
    assert out.unpack(rows).tolist() == expected and out.unpack(rows.double()).tolist() == expected


@pytest.mark.parametrize("name", ["no_samples", "no_tokens", "only_padding_packed", "no_samples_packed"])
def test_unpack_of_nothing(name, backend, device):
    case = BY_NAME[name]
    merged = merge(case.tensors(device=device), backend)
    back = merged.unpack(merged.inputs_embeds)
    assert back.shape == (len(case.given.tokens), case.given.T, case.D)
    assert back.eq(0).all()


def test_vocabulary_is_what_the_cases_think():
    assert all(0 <= token < VOCABULARY or token in [k.token for k in case.given.kinds] for case in SPECIAL for token in case.flat_tokens)


# -- memory ------------------------------------------------------------------------------------------------------------


def allocated(function) -> int:
    """Bytes that PyTorch allocated during a call, freed again or not."""
    with torch.profiler.profile(profile_memory=True) as profile:
        result = function()
    del result
    return sum(max(0, event.self_cpu_memory_usage) for event in profile.events())


@pytest.mark.no_poison
@pytest.mark.parametrize("way", ["keep", "packed", "weight", "list", "mixed_dtypes", "add", "expand", "views"])
def test_nothing_of_the_outputs_size_but_the_output(way):
    """Beside the output and its gradients: less than 64 bytes a token."""
    if not vlm_fuse.backends()["cpu"].available:
        pytest.skip("plain PyTorch makes temporaries")
    B, T, D = 2, 600, 512
    ids = torch.randint(0, 100, (B, T))
    ids[:, ::2] = 700
    rows = int(ids.eq(700).sum())
    text, features = torch.randn(B, T, D), torch.randn(rows, D)
    options = dict(image_token_id=700, attention_mask=(torch.arange(T) < T - 5).expand(B, T), backend="cpu")
    given = dict(inputs_embeds=text, image_embeds=features)
    if way == "weight":
        given = dict(inputs_embeds=None, weight=torch.randn(100, D), image_embeds=features)
    elif way == "list":
        given["image_embeds"] = [features[i : i + 6].clone() for i in range(0, rows, 6)]
    elif way == "mixed_dtypes":
        given["image_embeds"] = features.bfloat16()
    elif way == "expand":
        given["image_embeds"] = torch.randn(rows, 3, D)
        options |= dict(scheme="expand", layout="packed")
    elif way == "views":
        given = dict(inputs_embeds=torch.randn(T, B, D).transpose(0, 1), image_embeds=torch.randn(rows, 2 * D)[:, ::2])
    elif way in ("packed", "add"):
        options |= dict(layout="packed") if way == "packed" else dict(combine="add")
    leaves = [leaf for value in given.values() if value is not None for leaf in (value if isinstance(value, list) else [value])]

    def forward():
        merged = vlm_fuse.merge(ids, **given, **options)
        return merged, merged.position_ids, merged.document_ids, merged.cu_seqlens, merged.kv_lo

    merged = forward()[0]
    tokens = merged.source_index.numel()
    output = merged.inputs_embeds.numel() * merged.inputs_embeds.element_size()
    assert allocated(forward) - output < 64 * tokens
    if way in ("packed", "views", "mixed_dtypes"):
        return  # the profiler takes its time; the others stand for these backward
    for leaf in leaves:
        leaf.requires_grad_()
    out = forward()[0].inputs_embeds
    grad = torch.randn_like(out)
    gradients = sum(leaf.numel() * leaf.element_size() for leaf in leaves)
    extra = 100 * D * 4 if way == "weight" else 0  # sums of the rows of one id
    assert allocated(lambda: torch.autograd.grad(out, leaves, grad)) - gradients < 64 * tokens + extra


def test_lazily_negated_tensors(backend, device):
    """`conj().imag` negates when it is read: a kernel that reads the memory would see the values before."""

    def negated(*shape):
        return torch.randn(*shape, dtype=torch.complex64, device=device).conj().imag

    ids = torch.tensor([[1, 9, 9]], device=device)
    text, features, weight = negated(1, 3, 4), negated(2, 4), negated(10, 4)
    assert text.is_neg() and features.is_neg() and weight.is_neg()
    expected = text.resolve_neg().clone()
    expected[ids == 9] = features.resolve_neg()
    for pair in ((text, features), (text.resolve_neg(), features), (text, [features[:1], features[1:]])):
        assert_bits(vlm_fuse.merge(ids, *pair, image_token_id=9, backend=backend).inputs_embeds, expected)
    looked_up = vlm_fuse.merge(ids, None, features, weight=weight, image_token_id=9, backend=backend).inputs_embeds
    assert_bits(looked_up[0, 0], weight.resolve_neg()[1])
