"""hf() and model_kwargs(): tiny transformers models give on packed rows what they give on each sample alone."""

import pytest
import torch

import vlm_fuse
from vlm_fuse import Attend, IntervalMask

transformers = pytest.importorskip("transformers")

SMALL = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, vocab_size=60, initializer_range=0.2, max_position_embeddings=64)
WINDOW, CHUNK = 5, 6


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=2, **SMALL)), Attend()


def gemma3():
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    config = transformers.Gemma3TextConfig(num_hidden_layers=3, head_dim=8, sliding_window=WINDOW, layer_types=layers, **SMALL)
    return transformers.Gemma3ForCausalLM(config), {"full_attention": Attend(), "sliding_attention": Attend(window=WINDOW)}


def llama4():
    layers = ["chunked_attention", "full_attention"]
    config = transformers.Llama4TextConfig(
        num_hidden_layers=2, head_dim=8, attention_chunk_size=CHUNK, layer_types=layers, no_rope_layers=[1, 0], intermediate_size_mlp=48,
        num_local_experts=2, moe_layers=[], **SMALL,
    )  # fmt: skip
    return transformers.Llama4ForCausalLM(config), {"full_attention": Attend(), "chunked_attention": Attend(chunk_size=CHUNK)}


def mistral():
    return transformers.MistralForCausalLM(transformers.MistralConfig(num_hidden_layers=2, head_dim=8, sliding_window=WINDOW, **SMALL)), Attend(window=WINDOW)


@pytest.fixture(scope="module", params=[llama, gemma3, llama4, mistral], ids=lambda made: made.__name__)
def family(request):
    torch.manual_seed(0)
    model, attend = request.param()
    return model.eval(), attend


def samples():
    generator = torch.Generator().manual_seed(1)
    lengths = (13, 1, 9, 0, 16)
    ids = torch.full((len(lengths), 18), 2)
    for line, length in zip(ids, lengths):
        line[18 - length :] = torch.randint(3, 60, (length,), generator=generator)
    return ids, (torch.arange(18) >= 18 - torch.tensor(lengths)[:, None]).long()


def alone(model, ids, mask):
    """Logits of the kept tokens of every sample, each run by itself without a mask."""
    with torch.no_grad():
        return torch.cat([model(input_ids=line[kept.bool()][None]).logits[0] for line, kept in zip(ids, mask) if kept.any()])


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("layout", ["packed", "padded", "keep"])
def test_logits_are_those_of_each_sample_alone(family, layout, attn_implementation):
    model, attend = family
    model.set_attn_implementation(attn_implementation)
    ids, mask = samples()
    more = dict(length=50) if layout == "packed" else {}
    merged = vlm_fuse.merge(ids, model.get_input_embeddings()(ids), attention_mask=mask, layout=layout, attend=attend, **more)
    with torch.no_grad():
        logits = model(inputs_embeds=merged.inputs_embeds, **merged.model_kwargs(attn_implementation)).logits
    torch.testing.assert_close(logits[merged.attention_mask], alone(model, ids, mask), atol=2e-5, rtol=2e-5)


@pytest.mark.slow
def test_flex_attention_isolates():
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, attend = llama()
    model.eval()
    ids, mask = samples()
    merged = vlm_fuse.merge(ids, model.get_input_embeddings()(ids), attention_mask=mask, layout="packed", attend=attend)
    wanted = alone(model, ids, mask)
    model.set_attn_implementation("flex_attention")
    with torch.no_grad():
        logits = model(inputs_embeds=merged.inputs_embeds, **merged.model_kwargs("flex_attention")).logits
    torch.testing.assert_close(logits[0], wanted, atol=2e-5, rtol=2e-5)
    torch._dynamo.reset()


def test_flash_arguments_are_those_of_transformers_own_collator():
    collator = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    ids, mask = samples()
    kept = [line[here.bool()].tolist() for line, here in zip(ids, mask) if here.any()]
    wanted = collator([{"input_ids": line, "labels": line} for line in kept])
    merged = vlm_fuse.merge(ids, torch.zeros(*ids.shape, 4), attention_mask=mask, labels=ids, layout="packed")
    made = merged.model_kwargs("flash_attention_2")
    assert made["attention_mask"] is None and "is_causal" not in made
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        assert made[name].dtype == wanted[name].dtype and torch.equal(made[name], wanted[name]), name
    assert made["max_length_q"] == int(wanted["max_length_q"]) and made["max_length_k"] == int(wanted["max_length_k"])
    assert torch.equal(made["position_ids"], wanted["position_ids"]) and torch.equal(merged.labels, wanted["labels"])
    # theirs numbers the documents that there are, ours the samples: layers compare them only
    assert made["seq_idx"].dtype == wanted["seq_idx"].dtype and torch.equal(made["seq_idx"].diff() != 0, wanted["seq_idx"].diff() != 0)


def test_what_each_implementation_is_given():
    mask = IntervalMask.from_cu_seqlens(torch.tensor([0, 3, 5]))
    assert mask.hf("sdpa")["attention_mask"].dtype == torch.bool
    assert mask.hf("eager")["attention_mask"].dtype == torch.float32
    assert mask.hf("eager", torch.bfloat16)["attention_mask"].dtype == torch.bfloat16
    assert type(mask.hf("flex_attention")["attention_mask"]).__name__ == "BlockMask"
    for name in ("flash_attention_2", "flash_attention_3", "kernels-community/flash-attn2"):
        assert set(mask.hf(name)) == {"attention_mask", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}
    assert IntervalMask.from_cu_seqlens(torch.tensor([0, 3, 5]), Attend("full")).hf("flash_attention_2")["is_causal"] is False
    for name in ("paged|sdpa", "", None, "flex"):
        with pytest.raises(ValueError, match="attn_implementation"):
            mask.hf(name)


def test_flash_refuses_what_it_cannot_express():
    with pytest.raises(ValueError, match="varlen: rows 0 to 3"):
        IntervalMask.from_document_ids(torch.zeros(1, 4, dtype=torch.int32), prefix_lengths=2).hf("flash_attention_2")
    ids, mask = samples()
    rows = torch.zeros(*ids.shape, 4)
    attend = {"full_attention": Attend(), "chunked_attention": Attend(chunk_size=CHUNK)}
    merged = vlm_fuse.merge(ids, rows, attention_mask=mask, layout="packed", attend=attend)
    with pytest.raises(ValueError, match="'full_attention' and 'chunked_attention' cut the rows"):
        merged.model_kwargs("flash_attention_2")
    attend = {"full_attention": Attend(), "sliding_attention": Attend(window=WINDOW)}
    made = vlm_fuse.merge(ids, rows, attention_mask=mask, layout="packed", attend=attend).model_kwargs("flash_attention_2")
    assert made["attention_mask"] is None and made["cu_seq_lens_q"].tolist() == [0, 13, 14, 23, 39]


def test_what_goes_with_the_mask():
    ids = torch.tensor([[7, 7, 3], [4, 5, 2]])
    mask = ids != 2
    rows, features = torch.zeros(2, 3, 4), torch.ones(2, 4)
    packed = vlm_fuse.merge(ids, rows, features, image_token_id=7, attention_mask=mask, layout="packed", length=7)
    made = packed.model_kwargs("sdpa")
    assert made["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1]]
    assert made["seq_idx"].tolist() == [[0, 0, 0, 1, 1, -1, -1]] and made["seq_idx"].dtype == torch.int32
    assert made["cu_seq_lens_q"].tolist() == [0, 3, 5, 7]
    assert made["mm_token_type_ids"].tolist() == [[1, 1, 0, 0, 0, 0, 0]]
    keep = vlm_fuse.merge(ids, rows, features, image_token_id=7, attention_mask=mask).model_kwargs("eager")
    assert set(keep) == {"attention_mask", "position_ids", "mm_token_type_ids"}, "a row of one document needs no more"
    assert keep["attention_mask"].dtype == rows.dtype
    documents = vlm_fuse.merge(ids, rows, features, image_token_id=7, document_ids=torch.tensor([[0, 0, 1], [2, 3, -1]]))
    assert "seq_idx" in documents.model_kwargs("sdpa") and "cu_seq_lens_q" not in documents.model_kwargs("sdpa")
