"""Interval masks against a dense mask made from first principles, pair by pair."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracle
import vlm_fuse
from cases import BY_NAME, SPECIAL, cases
from checking import assert_bits, examples, merge, serving
from vlm_fuse import Attend, IntervalMask

ATTENDS = [
    Attend(),
    Attend(window=1),
    Attend(window=3),
    Attend("full"),
    Attend("full", window=2),
    Attend(images="bidirectional"),
    Attend(window=2, images="bidirectional"),
    Attend(window=3, images="bidirectional_windowed"),
    Attend(images="bidirectional_windowed"),
    Attend(window=2, sinks=1),
    Attend(window=1, sinks=3),
    Attend("full", window=1, sinks=2),
    Attend("full", window=2, images="bidirectional"),
    Attend(chunk_size=3),
    Attend(chunk_size=1),
    Attend(chunk_size=3, images="bidirectional"),
    Attend(window=2, sinks=2, images="bidirectional"),
    Attend("full", chunk_size=3),
    Attend("full", window=2, images="bidirectional_windowed"),
    Attend(chunk_size=3, images="bidirectional_windowed"),
    Attend(window=2**32 + 1),
    Attend("full", window=2**63, sinks=2**32),
]


def words(attend) -> str:
    told = [attend.kind] + [f"{name}_{getattr(attend, name)}" for name in ("window", "sinks", "chunk_size") if getattr(attend, name)]
    return "-".join(told + ([f"images_{attend.images}"] if attend.images != "causal" else []))


def rules(attend) -> dict:
    return dict(kind=attend.kind, window=attend.window, sinks=attend.sinks, chunk_size=attend.chunk_size, images=attend.images)


def wanted(documents, images, attend, **more):
    """[output row][query][key], and the first flat row that needs more than two runs of keys (None: all fit)."""
    dense = [oracle.may_see(line, None if images is None else images[g], **rules(attend), **more) for g, line in enumerate(documents)]
    flat = [line for row in dense for line in row]
    return dense, next((r for r, line in enumerate(flat) if oracle.runs_of_keys(line) > 2), None)


def check_intervals(mask, dense):
    G = len(dense)
    Q = mask.kv_lo.shape[1]
    expected = torch.tensor(dense, dtype=torch.bool).view(G, 1, Q, Q)
    assert mask.kv_length == Q
    for part in (mask.kv_lo, mask.kv_hi):
        assert part.dtype == torch.int32 and part.shape == (G, Q)
    assert_bits(mask.dense(), expected.to(mask.kv_lo.device), "dense")
    seconds = [[(0, 0)] * Q] * G if mask.kv_lo2 is None else torch.stack([mask.kv_lo2, mask.kv_hi2], -1).tolist()
    firsts = torch.stack([mask.kv_lo, mask.kv_hi], -1).tolist()
    for g, q in itertools.product(range(G), range(Q)):
        (lo, hi), (lo2, hi2) = firsts[g][q], seconds[g][q]
        runs = oracle.runs_of_keys(dense[g][q])
        if runs == 0:
            assert (lo, hi, lo2, hi2) == (0, 0, 0, 0), "a row that sees nothing has the empty interval (0, 0)"
        elif runs == 1:
            assert lo < hi and (lo2, hi2) == (0, 0), "touching intervals are merged"
        else:
            assert lo < hi < lo2 < hi2


def check_mask(make, documents, images, attend, **more):
    dense, too_many = wanted(documents, images, attend, **more)
    if too_many is None:
        check_intervals(make(), dense)
        vlm_fuse.raise_errors()
    else:
        with pytest.raises(ValueError, match=rf"row {too_many}\b.*two intervals"):
            make()
            vlm_fuse.raise_errors()  # of a GPU, which flags it


# -- of a plan ---------------------------------------------------------------------------------------------------------


@pytest.mark.thinned(2)
@pytest.mark.parametrize("attend", ATTENDS, ids=words)
def test_mask_of_every_case(attend, backend, device):
    step = 3 if backend != "triton" else 15
    for case in SPECIAL[ATTENDS.index(attend) % step :: step]:  # every case under some of the masks
        answer = case.answer()
        with serving(backend):
            plan = vlm_fuse.plan(case.input_ids(device), backend=backend, **case.settings(device), **case.kinds_for_plan(device))
            check_mask(lambda: plan.mask(attend), answer.fact("document"), answer.fact("image"), attend)


def test_intervals_of_random_merges(backend, device):
    @examples(backend, 0.5)
    @given(cases(), st.sampled_from(ATTENDS))
    def check(case, attend):
        answer = case.answer()
        merged = merge(case.tensors(device=device), backend, attend=attend)
        dense, too_many = wanted(answer.fact("document"), answer.fact("image"), attend)
        if too_many is not None:
            # merge itself never refuses; asking for the mask does
            with pytest.raises(ValueError, match=rf"row {too_many}\b"):
                merged.mask  # noqa: B018
                vlm_fuse.raise_errors()
            return
        mask = merged.mask
        check_intervals(mask, dense)
        for name in ("kv_lo", "kv_hi", "kv_lo2", "kv_hi2"):
            of_plan, of_mask = getattr(merged.plan, name), getattr(mask, name)
            assert (of_plan is None) == (of_mask is None)
            assert of_plan is None or torch.equal(of_plan, of_mask)
        if backend not in ("cuda", "triton"):  # on a GPU it would have to be read back whether a row needs it
            assert (mask.kv_lo2 is None) == all(oracle.runs_of_keys(line) < 2 for row in dense for line in row)

    check()


def test_several_masks_of_one_plan(backend, device):
    case = BY_NAME["packed_three_kinds"]
    attend = {"sliding_attention": Attend(window=2), "full_attention": Attend(images="bidirectional")}
    merged = merge(case.tensors(device=device), backend, attend=attend)
    assert set(merged.mask) == set(attend)
    answer = case.answer()
    for name, one in attend.items():
        check_mask(lambda: merged.mask[name], answer.fact("document"), answer.fact("image"), one)
        check_mask(lambda: merged.plan.mask(one), answer.fact("document"), answer.fact("image"), one)
    for name in ("kv_lo", "kv_hi", "kv_lo2", "kv_hi2"):
        with pytest.raises(AttributeError, match=r"plan\.mask\(attend\)"):
            getattr(merged.plan, name)


def test_a_hole_never_begins_a_document(backend, device):
    ids = torch.tensor([[3, 4, 0, 5, 6]], device=device)
    mask = torch.tensor([[1, 1, 0, 1, 1]], device=device)
    merged = vlm_fuse.merge(ids, torch.zeros(1, 5, 2, device=device), None, image_token_id=7, attention_mask=mask, backend=backend)
    assert merged.position_ids.tolist() == [[0, 1, 0, 2, 3]]
    dense = merged.mask.dense()[0, 0].int().tolist()
    assert dense == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [1, 1, 0, 1, 0], [1, 1, 0, 1, 1]]
    assert merged.kv_lo2.tolist() == [[0, 0, 0, 3, 3]] and merged.kv_hi2.tolist() == [[0, 0, 0, 4, 5]]


def test_two_holes_are_refused_only_when_the_mask_is_asked_for(backend, device):
    ids = torch.tensor([[3, 0, 5, 0, 6]], device=device)
    mask = torch.tensor([[1, 0, 1, 0, 1]], device=device)
    merged = vlm_fuse.merge(ids, torch.zeros(1, 5, 2, device=device), None, image_token_id=7, attention_mask=mask, validate="sync", backend=backend)
    with pytest.raises(ValueError, match=r"row 4\b.*two intervals"):
        merged.mask  # noqa: B018
    with pytest.raises(ValueError, match=r"row 4\b"):
        merged.kv_lo  # noqa: B018
    check_intervals(merged.plan.mask(Attend(window=3)), wanted([[0, -1, 0, -1, 0]], None, Attend(window=3))[0])


# -- from document ids -------------------------------------------------------------------------------------------------


@st.composite
def documents_and_images(draw):
    G, Q = draw(st.integers(0, 3)), draw(st.integers(0, 12))
    documents, images = [], []
    for _ in range(G):
        ids = draw(st.permutations(range(8)))
        line = [d for d in ids for _ in range(draw(st.integers(1, 6)))][:Q]
        line += [ids[-1]] * (Q - len(line))
        holes = draw(st.sampled_from((0, 0, 1, 2)))
        for _ in range(holes if Q else 0):
            line[draw(st.integers(0, Q - 1))] = -1
        tail = draw(st.integers(0, 2))
        line = line[: max(0, Q - tail)] + [-1] * min(tail, Q)
        image = [i for i in draw(st.lists(st.sampled_from((-1, -1, 0, 1, 2, 0)), min_size=Q, max_size=Q)) for _ in range(draw(st.integers(1, 3)))][:Q]
        documents.append(line)
        images.append(image)
    return documents, images, Q


def test_from_document_ids(backend, device):
    @examples(backend, 1.5)
    @given(documents_and_images(), st.sampled_from(ATTENDS), st.sampled_from((torch.int32, torch.int64)))
    def check(batch, attend, dtype):
        documents, images, Q = batch
        given_ids = torch.tensor(documents, dtype=dtype, device=device).view(len(documents), Q)
        given_images = torch.tensor(images, dtype=dtype, device=device).view(len(documents), Q)
        with serving(backend):
            check_mask(lambda: IntervalMask.from_document_ids(given_ids, attend, image_ids=given_images), documents, images, attend)

    check()


def test_any_attend(backend, device):
    attends = st.builds(
        lambda kind, reach, sinks, images: Attend(kind, **reach, sinks=sinks, images=images),
        st.sampled_from(("causal", "full")),
        st.sampled_from(({}, *({name: size} for name in ("window", "chunk_size") for size in (1, 2, 4, 100, 2**40)))),
        st.integers(0, 5),
        st.sampled_from(("causal", "bidirectional", "bidirectional_windowed")),
    )

    @examples(backend, 1.5)
    @given(documents_and_images(), attends)
    def check(batch, attend):
        documents, images, Q = batch
        ids, image_ids = (torch.tensor(x, dtype=torch.int32, device=device).view(len(documents), Q) for x in (documents, images))
        with serving(backend):
            check_mask(lambda: IntervalMask.from_document_ids(ids, attend, image_ids=image_ids), documents, images, attend)

    check()


def test_prefixes(backend, device):
    attends = st.sampled_from((Attend(), Attend(window=2), Attend(images="bidirectional")))
    prefixes = st.one_of(st.integers(0, 6), st.lists(st.integers(0, 6), min_size=8, max_size=8))

    @examples(backend)
    @given(documents_and_images(), attends, prefixes)
    def check(batch, attend, prefix):
        documents, images, Q = batch
        ids, image_ids = (torch.tensor(x, dtype=torch.int32, device=device).view(len(documents), Q) for x in (documents, images))

        def make():
            return IntervalMask.from_document_ids(ids, attend, image_ids=image_ids, prefix_lengths=prefix)

        with serving(backend):
            check_mask(make, documents, images, attend, prefix_lengths=prefix)

    check()


def test_shared_parent(backend, device):
    documents = [[0, 0, 0, 1, 1, 2, 2, -1], [3, 3, 4, 5, 5, 5, -1, -1]]
    parents = [-1, 0, 0, -1, -1, 3]
    ids = torch.tensor(documents, dtype=torch.int32, device=device)
    with serving(backend):
        for given_parents in (parents, torch.tensor(parents, dtype=torch.int32, device=device)):
            mask = IntervalMask.from_document_ids(ids, parent_ids=given_parents)
            check_intervals(mask, wanted(documents, None, Attend(), parent_ids=parents)[0])


def test_image_in_pieces_is_as_many_images(backend, device):
    documents, images = torch.tensor([[0] * 8], device=device), torch.tensor([[0, 0, -1, 0, 0, 1, 1, -1]], device=device)
    with serving(backend):
        mask = IntervalMask.from_document_ids(documents, Attend(images="bidirectional"), image_ids=images)
    assert mask.kv_hi.tolist() == [[2, 2, 3, 5, 5, 7, 7, 8]]


# -- renderings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_additive(dtype):
    mask = IntervalMask.from_document_ids(torch.tensor([[-1, 0, 0, 1], [2, 2, -1, -1]]))
    additive, dense = mask.additive(dtype), mask.dense()
    assert additive.dtype == dtype and additive.shape == (2, 1, 4, 4)
    assert additive[dense].eq(0).all()
    assert additive[~dense].eq(torch.finfo(dtype).min).all()
    assert torch.softmax(torch.randn(2, 1, 4, 4, dtype=dtype) + additive, -1).isfinite().all(), "an empty row must not make NaN"


def test_additive_refuses_integers():
    with pytest.raises(TypeError, match="dtype"):
        IntervalMask.from_document_ids(torch.tensor([[0]])).additive(torch.int64)


def test_dense_in_attention():
    """What SDPA gives with the mask is what every document gives alone; padding gives zeros."""
    documents = torch.tensor([[0, 0, 0, 1, 1, -1, -1]])
    q, k, v = (torch.randn(1, 2, 7, 4, dtype=torch.float64) for _ in range(3))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=IntervalMask.from_document_ids(documents).dense())
    for lo, hi in ((0, 3), (3, 5)):
        alone = torch.nn.functional.scaled_dot_product_attention(q[:, :, lo:hi], k[:, :, lo:hi], v[:, :, lo:hi], is_causal=True)
        torch.testing.assert_close(out[:, :, lo:hi], alone)
    assert out[:, :, 5:].eq(0).all()


def test_mask_of_intervals_given():
    lo, hi = torch.tensor([[0, 0]], dtype=torch.int32), torch.tensor([[1, 2]], dtype=torch.int32)
    lo2, hi2 = torch.tensor([[2, 0]], dtype=torch.int32), torch.tensor([[4, 0]], dtype=torch.int32)
    assert IntervalMask(lo, hi, 5, lo2, hi2).dense().int().tolist() == [[[[1, 0, 1, 1, 0], [1, 1, 0, 0, 0]]]]
    assert IntervalMask(lo, torch.zeros_like(lo), 0).dense().shape == (1, 1, 2, 0)
    for wrong, error in (((lo.long(), hi, 4), TypeError), ((lo, hi[:, :1], 4), ValueError), ((lo, hi, 4, lo2), TypeError), ((lo[0], hi[0], 4), ValueError), ((lo, hi, -1), ValueError), ((lo, hi, 2.0), ValueError)):
        with pytest.raises(error):
            IntervalMask(*wrong)


@pytest.mark.parametrize(
    "row", [(0, 6, 0, 0), (-1, 2, 0, 0), (3, 2, 0, 0), (3, 3, 0, 0), (0, 2, 2, 4), (0, 3, 2, 4), (3, 4, 0, 2), (0, 0, 2, 4), (0, 2, 4, 3), (0, 2, 3, 6)], ids=str
)
def test_intervals_out_of_order_are_refused_and_the_row_named(row):
    parts = torch.zeros(4, 2, 3, dtype=torch.int32)
    parts[:, 1, 2] = torch.tensor(row, dtype=torch.int32)
    with pytest.raises(ValueError, match="row 2 of sample 1 .*of 5 keys"):
        IntervalMask(*parts[:2], 5, *parts[2:])


@pytest.mark.parametrize("wrong", [dict(kind="casual"), dict(window=0), dict(window=-1), dict(window=2.5), dict(window=True), dict(sinks=-1), dict(chunk_size=0), dict(window=2, chunk_size=2), dict(images="both")], ids=str)
def test_attend_refuses(wrong):
    with pytest.raises(ValueError) as caught:
        Attend(**wrong)
    assert all(name in str(caught.value) for name in wrong)


def test_attend_is_a_constant():
    assert hash(Attend(window=4)) == hash(Attend(window=4)) and Attend(window=4) == Attend("causal", window=4) != Attend(window=5)
    with pytest.raises(AttributeError):
        Attend().window = 3


def test_images_need_their_ids():
    with pytest.raises(ValueError, match="image_ids"):
        IntervalMask.from_document_ids(torch.tensor([[0, 0]]), Attend(images="bidirectional"))


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_ids_beyond_int32_are_refused_and_never_taken_for_others():
    large = torch.tensor([[0, 2**32]])
    for call in (
        lambda: IntervalMask.from_document_ids(large),
        lambda: IntervalMask.from_document_ids(torch.zeros_like(large), Attend(images="bidirectional"), image_ids=large),
        lambda: vlm_fuse.plan(torch.tensor([[1, 2]]), image_token_id=9, document_ids=large),
        lambda: vlm_fuse.merge(torch.tensor([[1, 2]]), torch.zeros(1, 2, 4), document_ids=large),
        lambda: vlm_fuse.merge(torch.tensor([[1, 2]]), torch.zeros(1, 2, 4), None, image_token_id=9, document_ids=large),
    ):
        with pytest.raises(ValueError, match=r"_ids: id 4294967296 \(sample 0, row 1\)"):
            call()
    assert IntervalMask.from_document_ids(torch.tensor([[-(2**32), 5]])).kv_hi.tolist() == [[0, 2]], "far below 0 is padding"


@pytest.mark.parametrize(
    "parents, told",
    [([1, -1, -1], "document 0 .* parent 1"), ([0, -1, -1], "document 0"), ([-1, 2, -1], "document 1"), ([-1, -1, 7], "document 2 .* parent 7"), ([-1, 0], "2 entries.* id 2"), ([-1, -2, 0], "-2")],
)
def test_parents_that_do_not_come_first_are_refused(parents, told):
    ids = torch.tensor([[0, 0, 0, 1, 1, 2]])
    with pytest.raises(ValueError, match=f"parent_ids: .*{told}"):
        IntervalMask.from_document_ids(ids, parent_ids=parents)
    with pytest.raises(ValueError, match=f"parent_ids: .*{told}"):
        vlm_fuse.plan(ids, image_token_id=9, document_ids=ids, parent_ids=parents).position_ids  # noqa: B018
    with pytest.raises(ValueError, match="document 1 .sample 1. has parent 0"):
        IntervalMask.from_document_ids(torch.tensor([[0, 0], [1, 1]]), parent_ids=[-1, 0])


@pytest.mark.parametrize("name", ["prefix_lengths", "parent_ids"])
def test_what_is_no_list_of_ints_by_document_is_refused(name):
    ids = torch.tensor([[0, 0, 1]])
    for wrong in (2.5, [0.5, 1], [True, False], torch.tensor([1.0, 2.0]), torch.tensor([True, False]), "x", object(), [[0, 0], [0, 0]], torch.zeros(1, 2, dtype=torch.int64)):
        for call in (IntervalMask.from_document_ids, lambda ids, **more: vlm_fuse.plan(ids, image_token_id=9, **more)):
            with pytest.raises((TypeError, ValueError), match=name):
                call(ids, **{name: wrong})


def test_prefixes_below_zero_or_too_few_are_refused():
    ids = torch.tensor([[0, 0, 1]])
    for wrong, told in ((-1, "-1 is below 0"), ([1, -2], "-2 is below 0"), ([1], "1 entries.* id 1")):
        with pytest.raises(ValueError, match=f"prefix_lengths: .*{told}"):
            IntervalMask.from_document_ids(ids, prefix_lengths=wrong)


def test_a_plan_keeps_the_prefixes_that_it_was_given():
    given = [2]
    plan = vlm_fuse.plan(torch.tensor([[1, 2, 3]]), image_token_id=9, prefix_lengths=given)
    given[0] = 0
    assert plan.mask().kv_hi.tolist() == [[2, 2, 3]] and plan.mask(Attend(window=9)).kv_hi.tolist() == [[2, 2, 3]]


def test_what_is_no_attend_is_refused():
    for wrong in ("causal", None, {"full_attention": Attend()}, 3):
        for call in (lambda attend: IntervalMask.from_document_ids(torch.tensor([[0]]), attend), lambda attend: IntervalMask.from_cu_seqlens(torch.tensor([0, 1]), attend)):
            with pytest.raises(TypeError, match="attend: expected an Attend"):
                call(wrong)
    with pytest.raises((TypeError, RuntimeError)):
        IntervalMask.from_document_ids(torch.tensor([[0]])).to(torch.float32)
    with pytest.raises(ValueError, match="length"):
        IntervalMask.from_cu_seqlens(torch.tensor([0, 1]), length="5")


def test_numbers_beyond_all_rows_are_no_limit(backend, device):
    ids = torch.tensor([[0, 0, 0, 1, 1, 2]], device=device)
    with serving(backend):
        for size in (2**31 - 1, 2**40, 2**63 - 1, 2**70):
            for kind in ("causal", "full"):
                plain = IntervalMask.from_document_ids(ids, Attend(kind)).dense()
                for attend in (Attend(kind, window=size), Attend(kind, chunk_size=size), Attend(kind, window=1, sinks=size)):
                    made = IntervalMask.from_document_ids(ids, attend).dense()
                    assert torch.equal(made, plain if attend.sinks == 0 or kind == "causal" else IntervalMask.from_document_ids(ids, Attend(kind, window=1, sinks=6)).dense()), attend
            assert torch.equal(IntervalMask.from_document_ids(ids, prefix_lengths=size).dense(), IntervalMask.from_document_ids(ids, Attend("full")).dense())
        for nothing in ([], None):
            assert torch.equal(IntervalMask.from_document_ids(ids, prefix_lengths=nothing, parent_ids=nothing).dense(), IntervalMask.from_document_ids(ids).dense())


def test_varlen_of_fake_tensors_is_refused():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), pytest.raises(RuntimeError, match="fake tensor has no values"):
        IntervalMask.from_document_ids(torch.zeros(1, 8, dtype=torch.int64)).varlen()
