"""plan.shard: each rank's rows are the whole's, cut; together they are the whole, forward and backward."""

from dataclasses import replace

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import vlm_fuse
from cases import SPECIAL, cases
from checking import assert_bits, assert_equal, examples

FACTS = ("position_ids", "document_ids", "image_ids", "kind_ids", "attention_mask")
ORDERS = ("contiguous", "zigzag")


def divisible(case, order, world_size):
    """The case with a width that the ranks can share, or None."""
    pieces = world_size * (2 if order == "zigzag" else 1)
    if case.given.layout == "keep":
        return case if case.given.T % pieces == 0 else None
    return replace(case, given=replace(case.given, length=-(-case.answer().width // pieces) * pieces))


def whole_plan(case, ids, backend, device):
    return vlm_fuse.plan(ids, combine=case.combine, backend=backend, **case.settings(device), **case.kinds_for_plan(device))


def features_of(case, entries):
    """As merge takes them with a plan."""
    if len(case.given.kinds) == 1:
        return entries[0]
    return {kind.token: entry for kind, entry in zip(case.given.kinds, entries)} or None


def own_features(case, entries, shard):
    """The rows of the images that the shard reads, a tensor each kind."""
    own = []
    for kind, entry, images in zip(case.given.kinds, entries, shard.images):
        rows = torch.cat([torch.zeros(0, case.D), *(one.reshape(-1, case.D) for one in entry)]) if isinstance(entry, list) else entry.reshape(-1, case.D)
        starts = [sum(kind.sizes[:i]) for i in range(len(kind.sizes) + 1)]
        own.append(torch.cat([rows[:0], *(rows[starts[i] : starts[i + 1]] for i in images)]))
    return own


def text_arguments(case, tensors, shard):
    if tensors.text is not None:
        return dict(input_ids=None if case.mask_instead_of_id else shard.input_ids, inputs_embeds=shard.pack(tensors.text))
    return dict(input_ids=shard.input_ids, weight=tensors.weight, embed_scale=case.scale)


def check(case, order, world_size, features, backend, device):
    if case.mask_instead_of_id and case.text == "weight":
        return  # a plan made from a mask knows no ids to look up
    tensors = placed_tensors(case, device)
    if not tensors.features and case.given.kinds:
        return
    ids = case.input_ids(device)
    plan = whole_plan(case, ids, backend, device)
    whole_text = dict(inputs_embeds=tensors.text) if tensors.text is not None else dict(weight=tensors.weight, embed_scale=case.scale)
    whole = vlm_fuse.merge(ids, **whole_text, image_embeds=features_of(case, tensors.features), plan=plan, backend=backend)
    grad = torch.randn(whole.inputs_embeds.shape, generator=torch.Generator().manual_seed(1)).to(device, whole.inputs_embeds.dtype)
    expected = torch.autograd.grad(whole.inputs_embeds, tensors.leaves, grad, allow_unused=True)
    total = [torch.zeros_like(leaf) for leaf in tensors.leaves]
    gathered, unpacked = [], torch.zeros_like(whole.unpack(whole.inputs_embeds))
    for rank in range(world_size):
        shard = plan.shard(rank, world_size, order=order, features=features)
        entries = tensors.features if features == "all" else own_features(case, tensors.features, shard)
        merged = vlm_fuse.merge(**text_arguments(case, tensors, shard), image_embeds=features_of(case, entries), plan=shard, backend=backend)
        assert_bits(merged.inputs_embeds, shard.slice(whole.inputs_embeds), f"rows of rank {rank}")
        for name in FACTS:
            assert_bits(getattr(merged, name), shard.slice(getattr(plan, name)), name)
        for name in ("labels", "shift_labels"):
            mine, all_of = getattr(shard, name), getattr(plan, name)
            assert (mine is None) == (all_of is None) and (mine is None or torch.equal(mine, shard.slice(all_of))), name
        assert torch.equal(merged.cu_seqlens, plan.cu_seqlens) and merged.max_seqlen == plan.max_seqlen
        assert torch.equal(merged.mask.dense(), shard.slice(plan.mask().dense(), 2))
        of_batch = vlm_fuse.merge(ids, **whole_text, image_embeds=features_of(case, entries), plan=shard, backend=backend)
        assert_bits(of_batch.inputs_embeds, merged.inputs_embeds, "from the text of the whole batch")
        parts, others = (torch.autograd.grad(made.inputs_embeds, tensors.leaves, shard.slice(grad), allow_unused=True) for made in (merged, of_batch))
        gathered.append(merged.inputs_embeds)
        unpacked += merged.unpack(merged.inputs_embeds)
        for sum_, part, other in zip(total, parts, others):
            assert (part is None) == (other is None) and (part is None or torch.equal(part, other)), "gradients from the text of the whole batch"
            if part is not None:
                sum_ += part
    assert_bits(shard.restore(torch.cat(gathered, 1)), whole.inputs_embeds, "restored")
    assert_equal(unpacked, whole.unpack(whole.inputs_embeds), "unpacked")
    for sum_, part in zip(total, expected):
        torch.testing.assert_close(sum_, torch.zeros_like(sum_) if part is None else part)


def placed_tensors(case, device):
    return case.tensors(device=device).require_grad()


@pytest.mark.thinned(24)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", SPECIAL, ids=lambda case: case.name)
def test_shards_are_the_whole(case, order, backend, device):
    fitting = [(n, divisible(case, order, n)) for n in (3, 2)]
    for world_size, made in fitting:
        if made is not None:
            check(made, order, world_size, "all", backend, device)
    if all(made is None for _, made in fitting):
        with pytest.raises(ValueError, match="pad input_ids to"):
            whole_plan(case, case.input_ids(device), backend, device).shard(0, 2, order=order)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", [c for c in SPECIAL if c.given.kinds and all(kind.sizes is not None for kind in c.given.kinds)], ids=lambda case: case.name)
def test_own_features(case, order):
    """Image rows that other ranks read are given by none but them; a plan on the CPU is what a data loader makes."""
    for world_size in (2, 4):
        made = divisible(case, order, world_size)
        if made is not None:
            check(made, order, world_size, "own", "auto", "cpu")


def random_shards(backend, device, data):
    order = data.draw(st.sampled_from(ORDERS))
    world_size = data.draw(st.integers(1, 4))
    case = data.draw(cases())
    made = divisible(case, order, world_size)
    if made is None:
        return
    sized = made.given.kinds and all(kind.sizes is not None for kind in made.given.kinds)
    check(made, order, world_size, data.draw(st.sampled_from(("all", "own"))) if sized else "all", backend, device)


def test_random_batches(backend, device):
    examples(backend, 0.4)(hypothesis.given(data=st.data())(lambda data: random_shards(backend, device, data)))()


def packed_plan(**options):
    ids = torch.tensor([[1, 9, 9, 2, 3, 9, 9, 9], [0, 0, 4, 9, 9, 9, 5, 6]])
    given = dict(image_token_id=9, image_sizes=[2, 3, 3], attention_mask=ids != 0, labels=ids, layout="packed", length=16)
    return vlm_fuse.plan(ids, **given | options)


def test_zigzag_gives_pieces_from_both_ends():
    plan = packed_plan()
    assert [plan.shard(rank, 2, order="zigzag").runs for rank in (0, 1)] == [((0, 4), (12, 16)), ((4, 8), (8, 12))]
    assert [plan.shard(rank, 4).runs for rank in range(4)] == [((0, 4),), ((4, 8),), ((8, 12),), ((12, 16),)]


def test_zigzag_shares_causal_work_evenly():
    """What a rank's rows see, counted, of one document."""
    plan = vlm_fuse.plan(torch.ones(1, 64, dtype=torch.int64), image_token_id=9)
    seen = [int(plan.shard(rank, 4, order="zigzag").mask().dense().sum()) for rank in range(4)]
    assert len(set(seen)) == 1 and sum(seen) == 64 * 65 // 2
    assert len({int(plan.shard(rank, 4).mask().dense().sum()) for rank in range(4)}) == 4


def test_torch_shares_rows_out_the_same_way():
    """The order of torch's own context_parallel, so that its attention may follow."""
    balancer = pytest.importorskip("torch.distributed.tensor.experimental._context_parallel._load_balancer", exc_type=ImportError)
    plan = vlm_fuse.plan(torch.arange(24)[None], image_token_id=99)
    indices = balancer._HeadTailLoadBalancer(24, 3, torch.device("cpu"))._generate_indices(restore=False)
    ours = torch.cat([plan.shard(rank, 3, order="zigzag").input_ids for rank in range(3)], 1)
    assert ours.flatten().tolist() == indices.flatten().tolist()


def test_the_next_token_of_a_rank_is_anothers():
    plan = packed_plan()
    first = plan.shard(0, 4)
    assert first.shift_labels[0, -1] == plan.labels[0, 4] and first.labels.shape == (1, 4)


def test_shards_of_a_shard():
    """Sequence parallelism within context parallelism."""
    plan = packed_plan()
    outer = plan.shard(1, 2, order="zigzag")
    for rank in (0, 1):
        inner = outer.shard(rank, 2)
        rows = torch.arange(4) + 4 + 4 * rank
        for name in (*FACTS, "labels", "shift_labels", "kv_lo", "kv_hi"):
            assert torch.equal(getattr(inner, name)[0], getattr(plan, name)[0, rows]), name
        assert inner.mask().kv_length == 16 and torch.equal(inner.pack(torch.arange(16).view(2, 8))[0], plan.pack(torch.arange(16).view(2, 8))[0, rows])
        text, features = torch.randn(2, 8, 5), torch.randn(8, 5)
        made = vlm_fuse.merge(None, inner.pack(text), features, plan=inner)
        expected = vlm_fuse.merge(None, text, features, plan=plan).inputs_embeds[:, rows]
        assert torch.equal(made.inputs_embeds, expected)
        assert torch.equal(vlm_fuse.merge(None, text, features, plan=inner).inputs_embeds, expected)


def test_add_features():
    plan = packed_plan()
    hidden, features = torch.randn(1, 16, 6), torch.randn(8, 6)
    whole = vlm_fuse.add_features(hidden, features, plan)
    for rank in (0, 1):
        for shard, given in ((plan.shard(rank, 2, order="zigzag"), features), (plan.shard(rank, 2, order="zigzag", features="own"), None)):
            if given is None:
                given = torch.cat([features[[(0, 2), (2, 5), (5, 8)][i][0] : [(0, 2), (2, 5), (5, 8)][i][1]] for i in shard.images[0]])
            assert torch.equal(vlm_fuse.add_features(shard.slice(hidden), given, shard), shard.slice(whole))


def test_mrope_positions_are_cut_alike():
    types = torch.tensor([[0, 1, 1, 1, 1, 0, 0, 0]])
    position_ids, _ = vlm_fuse.mrope_position_ids(types, image_grid_thw=torch.tensor([[1, 4, 4]]), document_ids=torch.zeros_like(types))
    plan = vlm_fuse.plan(torch.where(types == 1, 9, 2), image_token_id=9, document_ids=torch.zeros_like(types))
    shards = [plan.shard(rank, 2, order="zigzag") for rank in (0, 1)]
    assert shards[0].slice(position_ids, -1).shape == (4, 1, 4)
    assert torch.equal(shards[0].restore(torch.cat([shard.slice(position_ids, -1) for shard in shards], -1), -1), position_ids)


@pytest.mark.parametrize("order", ORDERS)
def test_attention_over_gathered_keys(order):
    """A rank's rows with the keys and values of all, as context parallelism has them."""
    plan = packed_plan()
    q, k, v = torch.randn(3, 1, 2, 16, 8)
    whole = vlm_fuse.attention(q, k, v, plan.mask())
    for rank in (0, 1):
        shard = plan.shard(rank, 2, order=order)
        torch.testing.assert_close(vlm_fuse.attention(shard.slice(q, 2), k, v, shard.mask()), shard.slice(whole, 2))
        ring = [shard.mask().slice(0, 8, start, start + 8).dense() for start in (0, 8)]
        assert torch.equal(torch.cat(ring, -1), shard.mask().dense())


def seen_by_varlen(mask) -> torch.Tensor:
    """(rows, keys): what causal variable-length attention sees, aligned as flash-attn does, to the last row and key of each document."""
    found = mask.varlen()
    assert found.causal and found.window_size == (-1, 0)
    seen = torch.zeros(mask.kv_lo.shape[1], mask.kv_length, dtype=torch.bool)
    for q, q_end, k, k_end in zip(found.cu_seqlens, found.cu_seqlens[1:], found.cu_seqlens_k, found.cu_seqlens_k[1:]):
        seen[q:q_end, k:k_end] = torch.ones(q_end - q, k_end - k, dtype=torch.bool).tril(k_end - k - (q_end - q))
    return seen


def test_varlen_of_shards():
    """A contiguous shard as one call; under zigzag each of its two pieces."""
    plan = packed_plan()
    tokens = plan.attention_mask[0]
    for rank in range(4):
        shard = plan.shard(rank, 4)
        kept = shard.slice(tokens, 0)
        assert torch.equal(seen_by_varlen(shard.mask())[kept], shard.mask().dense()[0, 0][kept])
        shard = plan.shard(rank, 4, order="zigzag")
        for start in (0, 2):
            piece, kept = shard.mask().slice(start, start + 2), shard.slice(tokens, 0)[start : start + 2]
            assert torch.equal(seen_by_varlen(piece)[kept], piece.dense()[0, 0][kept])


def test_whose_tokens_is_never_guessed():
    """Tokens of the shard and of the batch have one shape: the very ids decide, and without them it is refused."""
    ids = torch.tensor([[1, 9, 2, 9]])
    plan = vlm_fuse.plan(ids, image_token_id=9, image_sizes=[3, 3], scheme="expand", layout="packed")
    shard = plan.shard(1, 2)
    table, features = torch.randn(10, 4), torch.randn(6, 4)
    expected = vlm_fuse.merge(ids, weight=table, image_embeds=features, plan=plan).inputs_embeds[:, 4:]
    for given in (ids, shard.input_ids):
        assert torch.equal(vlm_fuse.merge(given, weight=table, image_embeds=features, plan=shard).inputs_embeds, expected)
        assert torch.equal(vlm_fuse.merge(given, table[given], features, plan=shard).inputs_embeds, expected)
        for call in (lambda g=given: vlm_fuse.merge(g.clone(), weight=table, image_embeds=features, plan=shard), lambda g=given: vlm_fuse.merge(None, table[g], features, plan=shard)):
            with pytest.raises(ValueError, match="give input_ids=shard.input_ids with rows of the shard"):
                call()
    same = plan.shard(0, 1)
    assert same.source_index.shape == (1, 8) and torch.equal(vlm_fuse.merge(ids.clone(), weight=table, image_embeds=features, plan=same).inputs_embeds[:, 4:], expected)
    kept = vlm_fuse.plan(ids, image_token_id=9).shard(0, 1)  # one rank: the numbers are the same, whosever they are
    assert torch.equal(vlm_fuse.merge(None, table[ids], features[:2], plan=kept).inputs_embeds, vlm_fuse.merge(ids, table[ids], features[:2], image_token_id=9).inputs_embeds)


def test_moved_and_pickled(tmp_path):
    """Sharded in a worker: facts not made yet are made where the whole is."""
    plan = packed_plan()
    shard = plan.shard(1, 2, order="zigzag", features="own")
    torch.save(shard, tmp_path / "shard.pt")
    read = torch.load(tmp_path / "shard.pt", weights_only=False)
    moved = read.to("cpu")
    for name in (*FACTS, "labels", "shift_labels", "text_index", "source_index", "kv_hi", "cu_seqlens"):
        assert torch.equal(getattr(moved, name), getattr(shard, name)), name
    assert type(moved) is type(shard) and moved.images == shard.images and moved.runs == shard.runs
    meta = shard.to("meta")
    assert meta.input_ids.device.type == "meta" and meta.position_ids.device.type == "meta" and meta.mask().kv_hi.device.type == "meta" and meta.shift_labels.shape == (1, 8)


def test_ids_outside_the_table_reach_no_embedding():
    ids = torch.tensor([[1, 40, 40, 2]])
    shard = vlm_fuse.plan(ids, image_token_id=40, layout="packed", length=4).shard(0, 2)
    table = torch.nn.Embedding(3, 4)
    merged = vlm_fuse.merge(shard.input_ids, table(shard.input_ids), torch.ones(2, 4), plan=shard)
    assert torch.equal(merged.inputs_embeds[0], torch.stack([table.weight[1], torch.ones(4)]))


def test_dummy_image_of_a_rank_without_images():
    """A rank that has no image rows still runs the tower; the gradient is zero, not None."""
    ids = torch.tensor([[9, 9, 1, 2, 3, 4, 5, 6]])
    shard = vlm_fuse.plan(ids, image_token_id=9, image_sizes=[2]).shard(1, 2, features="own")
    assert shard.images == ((),)
    dummy = torch.ones(2, 4, requires_grad=True)
    vlm_fuse.merge(None, torch.ones(1, 4, 4), dummy, plan=shard).inputs_embeds.sum().backward()
    assert torch.equal(dummy.grad, torch.zeros(2, 4))
    other = vlm_fuse.plan(ids, image_token_id=9, image_sizes=[2]).shard(0, 2, features="own")
    with pytest.raises(ValueError, match="4 feature rows for placeholder id 9, but the plan was made for 2"):
        vlm_fuse.merge(None, torch.ones(1, 4, 4), torch.ones(4, 4), plan=other)


@pytest.mark.parametrize("call, error, words", [
    (lambda p: p.shard(2, 2), ValueError, "rank: 2 is none of the 2 ranks"),
    (lambda p: p.shard(-1, 2), ValueError, "rank: -1"),
    (lambda p: p.shard(0, 0), ValueError, "0 ranks"),
    (lambda p: p.shard(True, 2), TypeError, "rank: expected an int, got bool"),
    (lambda p: p.shard(0, 1.5), TypeError, "world_size: expected an int"),
    (lambda p: p.shard(0, 2, order="striped"), ValueError, "order: unknown 'striped'; choose one of contiguous, zigzag"),
    (lambda p: p.shard(0, 2, features="some"), ValueError, "features: unknown"),
    (lambda p: p.shard(0, 3), ValueError, r"16 rows do not fall into 3 equal pieces .*length=18"),
    (lambda p: p.shard(0, 5, order="zigzag"), ValueError, "length=20"),
    (lambda p: p.shard(0, 2).slice(torch.ones(1, 8)), ValueError, "expected the 16 rows of the whole along dimension 1"),
    (lambda p: p.shard(0, 2).slice(torch.ones(16), 1), ValueError, "dimension 1"),
    (lambda p: p.shard(0, 2).restore(torch.ones(1, 8)), ValueError, "those of all ranks"),
    (lambda p: p.shard(0, 2).pack(torch.ones(1, 8)), ValueError, r"values: expected \(2, 8\)"),
    (lambda p: vlm_fuse.merge(torch.ones(2, 4, dtype=torch.int64), torch.ones(2, 4, 4), torch.ones(8, 4), plan=p.shard(0, 2)), ValueError, "shard.input_ids"),
    (lambda p: vlm_fuse.merge(torch.ones(2, 8, dtype=torch.int64), torch.ones(1, 4, 4), torch.ones(8, 4), plan=p.shard(0, 2)), ValueError, "inputs_embeds"),
    (lambda p: vlm_fuse.merge(None, torch.ones(1, 8, 4), torch.ones(8, 4), plan=p.shard(0, 2), layout="padded"), ValueError, "contradicts the plan"),
    (lambda p: vlm_fuse.merge(None, torch.ones(1, 8, 4), torch.ones(8, 4), plan=p.shard(0, 2)).model_kwargs("sdpa"), ValueError, "a shard, and see keys of other ranks"),
    (lambda p: vlm_fuse.merge(None, torch.ones(1, 8, 4), torch.ones(8, 4), plan=packed_plan(labels=None).shard(0, 2), labels=torch.ones(1, 8, dtype=torch.int64)), ValueError, "cut into shards without them"),
])  # fmt: skip
def test_refusals(call, error, words):
    with pytest.raises(error, match=words):
        call(packed_plan())


def test_own_features_need_sizes():
    with pytest.raises(ValueError, match="make the plan with image_sizes"):
        vlm_fuse.plan(torch.tensor([[9, 9, 1, 2]]), image_token_id=9).shard(0, 2, features="own")


def test_a_mask_knows_no_ids():
    mask = torch.tensor([[True, True, False, False]])
    shard = vlm_fuse.plan(None, placeholder_mask=mask).shard(1, 2)
    with pytest.raises(ValueError, match="made from a placeholder_mask"):
        shard.input_ids
    text = torch.randn(1, 4, 3)
    assert torch.equal(vlm_fuse.merge(None, shard.pack(text), torch.ones(2, 3), plan=shard).inputs_embeds, text[:, 2:])


def test_facts_are_those_of_the_tokens_that_were_given():
    """What is made later must not come from tokens that were written over since."""
    ids = torch.tensor([[1, 9, 9, 2]])
    shard = vlm_fuse.plan(ids, image_token_id=9).shard(0, 2)
    ids.fill_(3)
    with pytest.raises(RuntimeError, match="changed in place"):
        shard.kind_ids


def test_compiled():
    """A shard made outside serves compiled code, forward and backward, without a graph break."""
    plan = packed_plan()
    shard = plan.shard(1, 2, order="zigzag")
    text, features = torch.randn(1, 8, 4, requires_grad=True), torch.randn(8, 4, requires_grad=True)

    def step(text, features):
        return vlm_fuse.merge(None, text, features, plan=shard).inputs_embeds.sin()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    made, expected = (torch.autograd.grad(run(text, features).sum(), (text, features)) for run in (compiled, step))
    assert all(map(torch.equal, made, expected))
