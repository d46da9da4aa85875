"""Our masks against those that transformers makes: equal where it is right, and a record of where it is not."""

import functools

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import oracle
import vlm_fuse
from checking import assert_bits, examples
from vlm_fuse import Attend, IntervalMask

# image blocks inside a window mean what Attend("bidirectional_windowed") says from 5.13.0 on (PR 46850)
transformers = pytest.importorskip("transformers", minversion="5.13")

from transformers import masking_utils  # noqa: E402

from transformers_release import RELEASE  # noqa: E402

TEXT, IMAGE, PAD = 3, 9, 0

FACTORIES = {
    "causal": (masking_utils.create_causal_mask, {}, Attend()),
    "window_1": (masking_utils.create_sliding_window_causal_mask, dict(sliding_window=1), Attend(window=1)),
    "window_3": (masking_utils.create_sliding_window_causal_mask, dict(sliding_window=3), Attend(window=3)),
    "chunks_of_1": (masking_utils.create_chunked_causal_mask, dict(attention_chunk_size=1), Attend(chunk_size=1)),
    "chunks_of_3": (masking_utils.create_chunked_causal_mask, dict(attention_chunk_size=3), Attend(chunk_size=3)),
    "full": (masking_utils.create_bidirectional_mask, {}, Attend("full")),
    # without causality their window is |q - k| <= w, ours |q - k| < w
    "full_window_2": (masking_utils.create_bidirectional_sliding_window_mask, dict(sliding_window=2), Attend("full", window=3)),
}
CAUSAL = [name for name in FACTORIES if not name.startswith("full")]

every_factory = pytest.mark.parametrize("name", FACTORIES)
causal_factories = pytest.mark.parametrize("name", CAUSAL)
sdpa_and_eager = pytest.mark.parametrize("implementation", ["sdpa", "eager"])


def wrong_in(*releases):
    """A record of what is wrong there. A newer release is looked at first, then named in the test or said to be right in docs/masks.md."""
    seen = " and ".join(f"{major}.{minor}" for major, minor in releases)
    return pytest.mark.skipif(RELEASE not in releases, reason=f"on record as wrong in transformers {seen}, this is {transformers.__version__}")


def repaired(what: str, change: str) -> str:
    return f"transformers {transformers.__version__} {what}: good. Take this record out of the test, and in docs/masks.md {change}"


def made_there(name, implementation, attention_mask, embeds, position_ids=None):
    factory, settings, attend = FACTORIES[name]
    config = transformers.LlamaConfig(**settings)
    config._attn_implementation = implementation
    # the fourth is the cache, past_key_values before 5.24, or the states of an encoder
    mask = factory(config, embeds, attention_mask, None, position_ids=position_ids)
    if mask is None:
        # sdpa needs none where its is_causal flag, or nothing, says the same
        Q = embeds.shape[1]
        mask = torch.ones(embeds.shape[0], 1, Q, Q, dtype=torch.bool)
        mask = mask.tril() if attend.kind == "causal" else mask
    return mask


def assert_same(mask: IntervalMask, expected, rows, what=""):
    """dense() or additive(), whichever `expected` is, on the rows chosen by a (B, Q) bool."""
    ours = mask.dense() if expected.dtype == torch.bool else mask.additive(expected.dtype)
    assert ours.shape == expected.shape
    assert_bits(ours[:, 0][rows], expected[:, 0][rows], what)


def assert_right(mask: IntervalMask, document_ids, image_ids=None, attend=None, **more):
    """Equal to plain loops."""
    rules = dict(vars(attend or Attend()))
    images = [None] * len(document_ids) if image_ids is None else image_ids
    dense = [oracle.may_see(line, image, **rules, **more) for line, image in zip(document_ids, images)]
    assert_bits(mask.dense()[:, 0], torch.tensor(dense, dtype=torch.bool), "ours")


def embeds_like(ids, dtype=torch.float32):
    return torch.zeros(*ids.shape, 1, dtype=dtype)


# -- batches -----------------------------------------------------------------------------------------------------------


@st.composite
def padded(draw, most_rows=3):
    """input_ids and attention_mask: padding on both sides, at most one hole; a sample may be empty or one token."""
    Q = draw(st.integers(1, 9))
    ids, kept = [], []
    for _ in range(draw(st.integers(1, most_rows))):
        left = draw(st.integers(0, Q))
        tokens = draw(st.integers(0, Q - left))
        line = [0] * left + [1] * tokens + [0] * (Q - left - tokens)
        if tokens > 2 and draw(st.integers(0, 3)) == 0:
            line[left + draw(st.integers(1, tokens - 2))] = 0
        ids.append([draw(st.sampled_from((TEXT, IMAGE, IMAGE))) if keep else PAD for keep in line])
        kept.append(line)
    return torch.tensor(ids), torch.tensor(kept)


@st.composite
def full_rows(draw):
    """input_ids and document_ids (B, Q) without padding: several documents a row, some of one token."""
    Q, B = draw(st.integers(1, 10)), draw(st.integers(1, 3))
    starts = draw(st.lists(st.lists(st.booleans(), min_size=Q, max_size=Q), min_size=B, max_size=B))
    ids = draw(st.lists(st.lists(st.sampled_from((TEXT, IMAGE)), min_size=Q, max_size=Q), min_size=B, max_size=B))
    return torch.tensor(ids), torch.tensor(starts).int().cumsum(1)


LAYOUTS = st.sampled_from((dict(layout="keep"), dict(layout="padded", padding_side="left"), dict(layout="padded", padding_side="right")))
DTYPES = st.sampled_from((torch.float32, torch.bfloat16))


# -- equal -------------------------------------------------------------------------------------------------------------


@every_factory
@sdpa_and_eager
def test_padded_batches_have_the_same_mask_on_rows_of_tokens(name, implementation):
    """Chunks are counted there from the first token after the left padding, holes included: from the document's first row, as here."""
    attend = FACTORIES[name][2]

    @examples("cpu", 0.4)
    @hypothesis.given(padded(), LAYOUTS, DTYPES)
    def check(batch, layout, dtype):
        ids, kept = batch
        plan = vlm_fuse.plan(ids, image_token_id=IMAGE, attention_mask=kept, **layout)
        tokens = plan.attention_mask
        hypothesis.assume(tokens.shape[1])
        expected = made_there(name, implementation, tokens, embeds_like(tokens, dtype))
        assert_same(plan.mask(attend), expected, tokens, "plan")
        of_ids = IntervalMask.from_document_ids(torch.where(tokens, 7, -1), attend)
        assert_same(of_ids, expected, tokens, "from_document_ids")

    check()


@causal_factories
@sdpa_and_eager
def test_rows_of_several_documents_have_the_same_mask(name, implementation):
    if name.startswith("chunks") and RELEASE < (5, 23):
        pytest.skip("before 5.23 chunks are counted from the start of the row, not of the document")
    attend = FACTORIES[name][2]

    @examples("cpu", 0.4)
    @hypothesis.given(full_rows(), DTYPES)
    def check(batch, dtype):
        ids, documents = batch
        plan = vlm_fuse.plan(ids, image_token_id=IMAGE, document_ids=documents)
        expected = made_there(name, implementation, None, embeds_like(ids, dtype), plan.position_ids)
        every_row = torch.ones_like(ids, dtype=torch.bool)
        assert_same(plan.mask(attend), expected, every_row, "plan")
        assert_same(IntervalMask.from_document_ids(documents, attend), expected, every_row, "from_document_ids")

    check()


@causal_factories
@sdpa_and_eager
def test_batches_packed_into_one_row_have_the_same_mask(name, implementation):
    """Empty samples leave nothing behind; the tail is a document of its own there, so that only token rows can be equal."""
    if name.startswith("chunks") and RELEASE < (5, 23):
        pytest.skip("before 5.23 chunks are counted from the start of the row, not of the document")
    attend = FACTORIES[name][2]

    @examples("cpu", 0.4)
    @hypothesis.given(padded(most_rows=5), st.sampled_from((0, 0, 1, 3)))
    def check(batch, tail):
        ids, kept = batch
        length = int(kept.sum()) + tail
        hypothesis.assume(length)
        plan = vlm_fuse.plan(ids, image_token_id=IMAGE, attention_mask=kept, layout="packed", length=length)
        assert plan.attention_mask.all() or tail
        expected = made_there(name, implementation, None, embeds_like(plan.position_ids), plan.position_ids)
        assert_same(plan.mask(attend), expected, plan.attention_mask)

    check()


# -- models whose images see themselves ----------------------------------------------------------------------------------

TINY = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1, num_key_value_heads=1, head_dim=8, vocab_size=64)
LAYERS = ["sliding_attention", "full_attention"]
VISION = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=16, patch_size=4)
WINDOW = 3


@functools.cache
def model(family, implementation):
    if family == "gemma3":
        text = dict(TINY, sliding_window=WINDOW, layer_types=LAYERS)
        config = transformers.Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=4, image_token_id=IMAGE)
        kind = transformers.Gemma3Model
    elif family == "gemma4":
        text = dict(TINY, sliding_window=WINDOW, layer_types=LAYERS, use_bidirectional_attention="vision", global_head_dim=8, num_global_key_value_heads=1)
        text |= dict(hidden_size_per_layer_input=0, vocab_size_per_layer_input=64, num_kv_shared_layers=0)
        others = dict(video_token_id=60, audio_token_id=61, boi_token_id=62, eoi_token_id=63)
        config = transformers.Gemma4Config(text_config=text, vision_config=None, audio_config=None, image_token_id=IMAGE, **others)
        kind = transformers.Gemma4Model
    else:
        text = dict(TINY, model_type="gemma")
        vision = dict(VISION, model_type="siglip_vision_model", projection_dim=8)
        config = transformers.PaliGemmaConfig(text_config=text, vision_config=vision, image_token_id=IMAGE, projection_dim=8)
        kind = transformers.PaliGemmaModel
    return kind._from_config(config, attn_implementation=implementation).eval()


def layer_masks(family, implementation, ids, token_types, **more):
    """What the model hands to its language model as attention_mask: no images are needed for it, only where they are."""
    seen = {}
    whole = model(family, implementation)
    hook = whole.language_model.register_forward_pre_hook(lambda module, args, kwargs: seen.update(mask=kwargs["attention_mask"]), with_kwargs=True)
    types = {"mm_token_type_ids" if family == "gemma4" else "token_type_ids": token_types}
    try:
        with torch.no_grad():
            whole(input_ids=ids, use_cache=False, **types, **more)
    finally:
        hook.remove()
    return seen["mask"]


GEMMA = {
    "gemma3": {"sliding_attention": Attend(window=WINDOW, images="bidirectional_windowed"), "full_attention": Attend(images="bidirectional")},
    # its global layers read images like text (issue 46711)
    "gemma4": {"sliding_attention": Attend(window=WINDOW, images="bidirectional_windowed"), "full_attention": Attend()},
}


@pytest.mark.parametrize("family", GEMMA)
@sdpa_and_eager
def test_gemma_masks_of_one_document_a_row_are_equal(family, implementation):
    @examples("cpu", 0.4)
    @hypothesis.given(padded(), LAYOUTS)
    def check(batch, layout):
        ids, kept = batch
        plan = vlm_fuse.plan(ids, image_token_id=IMAGE, attention_mask=kept, attend=GEMMA[family], **layout)
        tokens, images = plan.attention_mask, plan.kind_ids == 1
        hypothesis.assume(tokens.shape[1])
        # where a hole is taken out of an image, two images stand side by side, which transformers melts into one
        hypothesis.assume(not (images[:, 1:] & images[:, :-1] & (plan.image_ids.diff() != 0)).any())
        moved = torch.where(images, IMAGE, torch.where(tokens, TEXT, PAD))
        masks = layer_masks(family, implementation, moved, images.int(), attention_mask=tokens.int())
        assert set(masks) == set(GEMMA[family])
        for layer, attend in GEMMA[family].items():
            # None under sdpa: the causal flag says it
            expected = masks[layer] if masks[layer] is not None else made_there("causal", "sdpa", None, embeds_like(moved))
            assert_same(plan.mask(attend), expected, tokens, layer)
            of_ids = IntervalMask.from_document_ids(torch.where(tokens, 0, -1), attend, image_ids=torch.where(images, 0, -1))
            assert_same(of_ids, expected, tokens, layer)

    check()


@sdpa_and_eager
def test_paligemma_mask_of_one_document_a_row_is_that_of_a_prefix(implementation):
    @examples("cpu", 0.4)
    @hypothesis.given(padded(), st.integers(0, 9))
    def check(batch, prefix):
        ids, kept = batch
        # type 0 is the prefix, counted from the first token as prefix_lengths are
        first = kept.argmax(1, keepdim=True)
        types = (torch.arange(ids.shape[1]) - first >= prefix).int()
        expected = layer_masks("paligemma", implementation, ids, types, attention_mask=kept)
        mask = IntervalMask.from_document_ids(torch.where(kept.bool(), 0, -1), prefix_lengths=prefix)
        assert_same(mask, expected, kept.bool())

    check()


@pytest.mark.skipif(RELEASE < (5, 24), reason="before 5.24 the blocks of images are added after the documents were kept apart")
@sdpa_and_eager
def test_packed_rows_have_the_same_mask_where_documents_are_kept_apart_last(implementation):
    @examples("cpu", 0.4)
    @hypothesis.given(full_rows())
    def check(batch):
        ids, documents = batch
        plan = vlm_fuse.plan(ids, image_token_id=IMAGE, document_ids=documents)
        every_row, images = torch.ones_like(ids, dtype=torch.bool), ids == IMAGE
        expected = layer_masks("gemma3", implementation, ids, images.int(), position_ids=plan.position_ids)["full_attention"]
        assert_same(plan.mask(GEMMA["gemma3"]["full_attention"]), expected, every_row, "gemma3")
        prefixes = [int(d % 3) for d in range(int(documents.max()) + 1)]
        types = (plan.position_ids >= torch.tensor(prefixes)[documents]).int()
        expected = layer_masks("paligemma", implementation, ids, types, position_ids=plan.position_ids)
        assert_same(IntervalMask.from_document_ids(documents, prefix_lengths=prefixes), expected, every_row, "paligemma")

    check()


# -- where transformers is wrong: each fails when it is repaired ---------------------------------------------------------


def packed_row(*documents):
    """One row of documents written as strings, "t" text and "i" image: its ids, token types and plan."""
    ids = torch.tensor([[IMAGE if letter == "i" else TEXT for letter in "".join(documents)]])
    numbers = torch.tensor([[d for d, letters in enumerate(documents) for _ in letters]])
    return ids, (ids == IMAGE).int(), vlm_fuse.plan(ids, image_token_id=IMAGE, document_ids=numbers)


@wrong_in((5, 23), (5, 24))
@pytest.mark.parametrize("family", GEMMA)
def test_gemma_looks_for_the_images_of_packed_rows_at_the_wrong_rows_on_sliding_layers(family):
    """Since 5.23 a document's rows are looked up by their place in the document, in image blocks that are numbered by the row."""
    ids, types, plan = packed_row("tiiit", "itttiit")
    attend = GEMMA[family]["sliding_attention"]
    documents, images, positions = (part.tolist()[0] for part in (plan.document_ids, plan.image_ids, plan.position_ids))
    mask = plan.mask(attend)
    assert_right(mask, [documents], [images], attend)

    theirs = layer_masks(family, "sdpa", ids, types, position_ids=plan.position_ids)["sliding_attention"][0, 0]
    change = "say from which release on packed rows of Gemma 3 and 4 are right without a prepared mask."
    assert not torch.equal(theirs, mask.dense()[0, 0]), repaired(f"makes the right sliding mask for packed rows of {family}", change)
    # what goes wrong, to the last element
    looked_up = [images[position] for position in positions]
    wrong = [[d == e and q - k < WINDOW and (k <= q or 0 <= looked_up[q] == looked_up[k]) for k, e in enumerate(documents)] for q, d in enumerate(documents)]
    assert torch.equal(theirs, torch.tensor(wrong)), "the sliding mask of packed rows is wrong in another way than the docstring says"


@wrong_in((5, 23))
def test_paligemma_documents_of_a_packed_row_see_each_other():
    """Blocks are added after the documents were kept apart; 5.24 keeps them apart last."""
    ids, _, plan = packed_row("iitt", "itt", "t")
    prefixes = [3, 1, 0]
    # 0 is what the rows of a prefix have, images and question alike
    types = torch.tensor([[0, 0, 0, 1, 0, 1, 1, 1]])
    mask = IntervalMask.from_document_ids(plan.document_ids, prefix_lengths=prefixes)
    assert_right(mask, plan.document_ids.tolist(), prefix_lengths=prefixes)

    theirs = layer_masks("paligemma", "sdpa", ids, types, position_ids=plan.position_ids)[0, 0]
    other = plan.document_ids[0, :, None] != plan.document_ids[0]
    change = "say from which release on packed rows of PaliGemma are right without a prepared mask."
    assert (theirs & other).any(), repaired("keeps the documents of PaliGemma apart", change)
    assert torch.equal(theirs & ~other, mask.dense()[0, 0]), "inside a document it is right"
    prefix = types[0] == 0
    assert torch.equal(theirs & other, other & prefix[:, None] & prefix), "every prefix of the row is one block"


@wrong_in((5, 23), (5, 24))
@pytest.mark.parametrize("family", GEMMA)
def test_adjacent_images_of_a_document_melt_into_one(family):
    ids = torch.tensor([[TEXT, *[IMAGE] * 4, TEXT]])
    plan = vlm_fuse.plan(ids, image_token_id=IMAGE, image_sizes=[2, 2])
    layer = "full_attention" if family == "gemma3" else "sliding_attention"
    attend = GEMMA[family][layer]
    mask = plan.mask(attend)
    assert plan.image_ids.tolist() == [[-1, 0, 0, 1, 1, -1]]
    assert_right(mask, plan.document_ids.tolist(), plan.image_ids.tolist(), attend)

    theirs = layer_masks(family, "sdpa", ids, (ids == IMAGE).int())[layer]
    change = "take out that adjacent images are one image there."
    assert theirs[0, 0, 1, 3] and not mask.dense()[0, 0, 1, 3], repaired(f"keeps adjacent images of {family} apart", change)
    # as if all four rows were one image
    melted = vlm_fuse.plan(ids, image_token_id=IMAGE).mask(attend)
    assert_same(melted, theirs, torch.ones_like(ids, dtype=torch.bool))


@wrong_in((5, 23))
def test_images_on_both_sides_of_a_boundary_see_each_other_in_gemma_3():
    """A document that ends with an image before one that begins with an image: one block. 5.24 keeps documents apart last."""
    ids, types, plan = packed_row("tii", "iit")
    attend = GEMMA["gemma3"]["full_attention"]
    mask = plan.mask(attend)
    assert_right(mask, plan.document_ids.tolist(), plan.image_ids.tolist(), attend)

    theirs = layer_masks("gemma3", "sdpa", ids, types, position_ids=plan.position_ids)["full_attention"][0, 0]
    other = plan.document_ids[0, :, None] != plan.document_ids[0]
    change = "say from which release on packed rows of Gemma 3 are right without a prepared mask."
    assert (theirs & other).any(), repaired("keeps images at a boundary of documents apart", change)
    assert torch.equal(theirs & other, other & (types[0, :, None] & types[0]).bool())


@wrong_in((5, 23), (5, 24))
@pytest.mark.parametrize("name", ["causal", "window_3", "chunks_of_3"])
def test_an_attention_mask_of_ones_switches_the_isolation_of_documents_off(name):
    attend = FACTORIES[name][2]
    ids, _, plan = packed_row("t", "tt", "ttt")
    mask = plan.mask(attend)
    assert_right(mask, plan.document_ids.tolist(), None, attend)

    without = made_there(name, "sdpa", None, embeds_like(ids), plan.position_ids)
    ones = made_there(name, "sdpa", torch.ones_like(ids), embeds_like(ids), plan.position_ids)
    every_row = torch.ones_like(ids, dtype=torch.bool)
    assert_same(mask, without, every_row)
    change = "take out that attention_mask must be None for packed rows."
    assert not torch.equal(ones, without), repaired("keeps documents apart under a mask of ones", change)
    assert_same(IntervalMask.from_document_ids(torch.zeros_like(ids), attend), ones, every_row, "as if the row were one document")


@wrong_in((5, 23), (5, 24))
def test_bidirectional_masks_know_no_packed_rows():
    ids, _, plan = packed_row("tt", "t")
    mask = plan.mask(Attend("full"))
    assert_right(mask, plan.document_ids.tolist(), None, Attend("full"))
    change = 'say that packed rows of Attend("full") are kept apart there too.'
    assert made_there("full", "sdpa", None, embeds_like(ids), plan.position_ids).all(), repaired("keeps the documents of a bidirectional mask apart", change)
