"""Patching an instance: where it reaches, what it leaves, how it is undone, and who else may stand on the model."""

import copy
import pickle
import threading
import types
import warnings

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

import vlm_fuse

transformers = pytest.importorskip("transformers", minversion="4.57")

from tiny_llava import IMAGE, batch, llava, same, scatters, step  # noqa: E402
from vlm_fuse.integrations import binding  # noqa: E402
from vlm_fuse.integrations.transformers import patch, patched, unpatch  # noqa: E402

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.no_poison]

def attributes(model) -> list[set]:
    return [set(module.__dict__) for module in model.modules()]


# -- patch, unpatch, patched --------------------------------------------------------------------------------------------


def test_a_patched_model_gives_the_same_without_masked_scatter():
    model = llava()
    before, names = step(model), attributes(model)
    assert patch(model) is None
    assert same(step(model), before) and scatters(lambda: step(model)) == 0
    unpatch(model)
    assert attributes(model) == names and scatters(lambda: step(model)) == 1


def test_only_the_instance_is_patched():
    model, other = llava(), llava()
    patch(model)
    assert scatters(lambda: step(other)) == 1
    assert scatters(lambda: step(model)) == 0


def test_patches_are_counted():
    model = llava()
    patch(model)
    with patched(model) as inside:
        assert inside is model
    assert scatters(lambda: step(model)) == 0, "a context leaves a patched model patched"
    patch(model)
    unpatch(model)
    assert scatters(lambda: step(model)) == 0
    unpatch(model)
    assert scatters(lambda: step(model)) == 1
    unpatch(model)  # once too often
    patch(model)
    assert scatters(lambda: step(model)) == 0
    unpatch(model)
    assert scatters(lambda: step(model)) == 1


def test_a_context_undoes_the_patch_when_its_body_raises():
    model = llava()
    with pytest.raises(KeyError), patched(model):
        raise KeyError
    assert scatters(lambda: step(model)) == 1


def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got int"):
        unpatch(5)
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got str"):
        patch("llava-hf/llava-1.5-7b-hf")


def test_a_deepcopy_of_a_patched_model_is_patched():
    model = llava()
    patch(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.model.multi_modal_projector.linear_2.weight.zero_()
    assert scatters(lambda: step(twin)) == 0
    assert not same(step(twin)[1:2], step(model)[1:2]), "the copy runs on parameters of its own"
    unpatch(model)
    assert scatters(lambda: step(twin)) == 0
    unpatch(twin)
    assert scatters(lambda: step(twin)) == 1


def test_a_pickle_loads_unpatched_and_can_be_patched():
    model = llava()
    patch(model)
    loaded = pickle.loads(pickle.dumps(model))
    assert scatters(lambda: step(loaded)) == 1
    patch(loaded)
    assert scatters(lambda: step(loaded)) == 0 and same(step(loaded), step(model))
    unpatch(loaded)
    assert scatters(lambda: step(loaded)) == 1
    assert scatters(lambda: step(model)) == 0


def test_save_pretrained_writes_the_same(tmp_path):
    model = llava()
    patch(model)
    step(model)
    model.save_pretrained(tmp_path)
    loaded = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert scatters(lambda: step(loaded)) == 1 and same(step(loaded), step(model))


def test_replicas_of_data_parallel_run_on_their_own_parameters():
    model = llava()
    patch(model)
    replica = model.model._replicate_for_data_parallel()
    assert replica.forward.__self__ is replica
    assert replica._replicate_for_data_parallel.__self__ is replica


def test_threads_may_patch_unpatch_and_run():
    model, given = llava().eval(), batch()
    with torch.no_grad():
        expected = model(**given).logits
    wrong = []

    def work():
        try:
            for _ in range(8):
                with patched(model), torch.no_grad():
                    if not torch.equal(model(**given).logits, expected):
                        wrong.append("other logits")
        except Exception as error:  # a thread's own would go unseen
            wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert not any(map(binding.is_patched, model.modules())) and scatters(lambda: step(model)) == 1


# -- what cannot be patched ----------------------------------------------------------------------------------------------


def test_a_model_without_merges_is_named():
    with pytest.warns(UserWarning, match="Linear has no module that merges features") as caught:
        patch(nn.Linear(2, 2))
    assert len(caught) == 1 and caught[0].filename == __file__


def test_one_warning_lists_all_that_is_left_and_why():
    model = llava()
    for module in (model, model.model):
        module.forward = lambda *args, **kwargs: None
    namespace = {"nn": nn}
    exec("class Sourceless(nn.Module):\n    def forward(self, x, mask, rows):\n        return x.masked_scatter(mask, rows)", namespace)
    model.extra = namespace["Sourceless"]()
    with pytest.warns(UserWarning) as caught:
        patch(model)
    assert len(caught) == 1
    text = str(caught[0].message)
    assert "LlavaModel.forward: test_one_warning_lists_all_that_is_left_and_why.<locals>.<lambda> was put on the instance" in text
    assert "Sourceless.forward: its source cannot be read" in text


def test_nothing_is_said_where_all_is_patched():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patch(llava())


# -- mismatches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "tokens"), [(5, 9), (3, 7)], ids=["more_placeholders", "more_features"])
def test_a_mismatch_is_refused_with_both_counts(rows, tokens):
    model = llava()
    with pytest.raises(ValueError):
        model(**batch(rows))
    with patched(model), pytest.raises(ValueError, match=f"tokens: {tokens}, .*(sample 1 has .* {tokens} placeholders and 8 feature rows|8 feature rows but {tokens} placeholders)"):
        model(**batch(rows))


@pytest.mark.parametrize("rows", [5, 3], ids=["more_placeholders", "more_features"])
def test_a_mismatch_is_refused_in_traced_code(rows):
    model = llava().eval()
    torch._dynamo.reset()
    with patched(model), torch.no_grad():
        model(**batch())  # transformers takes a lock in the first call
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        compiled(**batch())
        with pytest.raises(ValueError, match=r"8 feature rows.* placeholders|placeholders.* 8 feature rows"):
            compiled(**batch(rows))


def test_transformers_own_switch_turns_the_check_off(monkeypatch):
    monkeypatch.setenv("TRANSFORMERS_DISABLE_TORCH_CHECK", "1")
    model = llava()
    with patched(model):
        model(**batch(rows=3))  # a feature row too many, as masked_scatter takes it


# -- others on the model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["vlm_fuse", "accelerate"])
def test_hooks_of_accelerate(first):
    hooks = pytest.importorskip("accelerate.hooks")
    model, calls = llava(), []
    expected = step(model)

    class Counts(hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(type(module).__name__)
            return args, kwargs

    def hook():
        for module in (model, model.model, model.model.language_model):
            hooks.add_hook_to_module(module, Counts())

    if first == "accelerate":
        hook()
        patch(model)
    else:
        patch(model)
        hook()
    assert same(step(model), expected) and len(calls) == 3
    assert scatters(lambda: step(model)) == 0
    patch(model)
    unpatch(model)
    assert scatters(lambda: step(model)) == 0
    unpatch(model)
    calls.clear()
    assert scatters(lambda: step(model)) == 1 and len(calls) == 3, "the hooks stay"
    patch(model)
    for module in (model, model.model, model.model.language_model):
        hooks.remove_hook_from_module(module)
    assert scatters(lambda: step(model)) == 0 and same(step(model), expected), "the patch stays when the hooks go"
    unpatch(model)
    assert scatters(lambda: step(model)) == 1 and same(step(model), expected)


def test_a_wrapper_around_the_patch_stays_and_runs_the_original():
    import functools

    model, calls = llava(), []
    expected = step(model)
    patch(model)
    inner = model.model.forward

    @functools.wraps(inner)
    def forward(*args, **kwargs):
        calls.append(1)
        return inner(*args, **kwargs)

    model.model.forward = forward
    assert scatters(lambda: step(model)) == 0 and calls
    unpatch(model)
    assert scatters(lambda: step(model)) == 1 and same(step(model), expected) and model.model.forward is forward
    with patched(model):
        assert scatters(lambda: step(model)) == 0, "under the wrapper it is still there, and is switched on again"
    assert scatters(lambda: step(model)) == 1


def test_a_forward_that_others_have_bound_is_rewritten():
    """As Liger binds the forward of its own on an instance."""
    model = llava()

    def forward(self, input_ids=None, inputs_embeds=None, **kwargs):
        embeds = self.get_input_embeddings()(input_ids)
        rows = self.get_image_features(kwargs.pop("pixel_values")).pooler_output
        inputs_embeds = embeds.masked_scatter((input_ids == IMAGE)[..., None], torch.cat(tuple(rows)))
        return self.language_model(inputs_embeds=inputs_embeds, attention_mask=kwargs.get("attention_mask"))

    if transformers.__version__ < "5":
        pytest.skip("features were given in another form")
    model.model.forward = types.MethodType(forward, model.model)
    given = {name: value for name, value in batch().items() if name != "labels"}
    with torch.no_grad():
        expected = model.model(**given).last_hidden_state
        with patched(model):
            assert scatters(lambda: model.model(**given)) == 0
            assert torch.equal(model.model(**given).last_hidden_state, expected)
    assert model.model.forward.__func__ is forward and scatters(lambda: model.model(**given)) == 1


@pytest.mark.parametrize("first", ["vlm_fuse", "liger"])
def test_patches_of_liger(first):
    """Its forward of the outer model, without the kernels that need a GPU."""
    liger = pytest.importorskip("liger_kernel.transformers")
    model, given = llava(), batch()
    del given["labels"]
    with torch.no_grad():
        expected = model(**given).logits
        if first == "vlm_fuse":
            patch(model)
        liger.apply_liger_kernel_to_llava(model=model, rope=False, rms_norm=False, swiglu=False)
        own = model.forward
        if first == "liger":
            patch(model)
        assert model.forward == own and own.__func__.__module__.startswith("liger_kernel")
        assert torch.equal(model(**given).logits, expected) and scatters(lambda: model(**given)) == 0
        unpatch(model)
        assert model.forward == own and torch.equal(model(**given).logits, expected) and scatters(lambda: model(**given)) == 1


@pytest.mark.parametrize("first", ["vlm_fuse", "peft"])
def test_adapters_of_peft(first):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)

    def adapted(patching):
        model = llava()
        if patching == "before":
            patch(model)
        torch.manual_seed(3)
        model = peft.get_peft_model(model, config)
        if patching == "after":
            patch(model)
        return model

    expected, model = step(adapted("never")), adapted("before" if first == "vlm_fuse" else "after")
    assert same(step(model), expected) and scatters(lambda: step(model)) == 0
    unpatch(model)
    assert same(step(model), expected) and scatters(lambda: step(model)) == 1
    patch(model)
    merged = model.merge_and_unload().requires_grad_()
    assert scatters(lambda: step(merged)) == 0


def test_gradient_checkpointing():
    model = llava().train()
    model.gradient_checkpointing_enable()
    expected = step(model)
    with patched(model):
        assert same(step(model), expected) and scatters(lambda: step(model)) == 0


def test_generate_with_a_cache():
    model = llava().eval()
    given = batch()
    del given["labels"]
    given["input_ids"], given["attention_mask"] = given["input_ids"].flip(1), given["attention_mask"].flip(1)
    expected = model.generate(**given, max_new_tokens=6, do_sample=False)
    with patched(model):
        made = model.generate(**given, max_new_tokens=6, do_sample=False)
        assert torch.equal(made, expected) and made.shape[1] > given["input_ids"].shape[1]
        assert scatters(lambda: model.generate(**given, max_new_tokens=2, do_sample=False)) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    model = llava().to(dtype)
    given = batch() | {"pixel_values": batch()["pixel_values"].to(dtype)}
    expected = step(model, **given)
    with patched(model):
        assert same(step(model, **given), expected) and scatters(lambda: step(model, **given)) == 0


def test_autocast():
    model = llava()
    with torch.autocast("cpu", torch.bfloat16):
        expected = step(model)
        with patched(model):
            assert same(step(model), expected)


# -- torch.compile -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", ["grad", "jvp", "jacrev", "jacfwd", "hessian", "vmap", "dual numbers", "double backward"])
def test_transforms_of_torch_func(transform):
    """`merge` refuses some of them in words: there the model's own masked_scatter runs."""
    model, inputs = llava().eval(), batch()
    model.set_attn_implementation("eager")  # sdpa has no forward mode
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    table = next(name for name, value in model.named_parameters() if value is model.get_input_embeddings().weight)
    one = torch.tensor(1.0)

    def logits(factor):
        scaled = parameters | {table: parameters[table] * factor}
        return torch.func.functional_call(model, scaled, (), inputs, tie_weights=False).logits[0, -1, :8]

    def dual():
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(logits(forward_ad.make_dual(one, one))).tangent

    def twice():
        factor = one.clone().requires_grad_()
        (first,) = torch.autograd.grad(logits(factor).square().sum(), factor, create_graph=True)
        return torch.autograd.grad(first, factor)[0]

    run = {
        "grad": lambda: torch.func.grad(lambda factor: logits(factor).sum())(one),
        "jvp": lambda: torch.func.jvp(logits, (one,), (one,))[1],
        "jacrev": lambda: torch.func.jacrev(logits)(one),
        "jacfwd": lambda: torch.func.jacfwd(logits)(one),
        "hessian": lambda: torch.func.hessian(lambda factor: logits(factor).square().sum())(one),
        "vmap": lambda: torch.vmap(logits)(torch.tensor([1.0, 2.0])),
        "dual numbers": dual,
        "double backward": twice,
    }[transform]
    expected = run()
    assert expected.abs().max() > 0
    with patched(model):
        assert torch.equal(run(), expected)


def test_fewer_graph_breaks_under_compile():
    model, given = llava(), batch()

    def everything(run):
        """Zeros where there is none: which of the two the unused layer of the tower has is another thing in traced code since 5.24."""
        loss, logits = step(run)[:2]
        return [loss, logits, *(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone() for parameter in model.parameters())]

    def graphs():
        torch._dynamo.reset()
        return torch._dynamo.explain(model)(**given).graph_count

    before = graphs()
    with patched(model):
        assert graphs() == 1 <= before
        torch._dynamo.reset()
        expected = everything(model)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        for one, other in zip(everything(compiled), expected):
            torch.testing.assert_close(one, other)


def test_unpatching_a_compiled_model():
    model = llava().eval()
    torch._dynamo.reset()
    patch(model)
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager")
        expected = compiled(**batch()).logits
        unpatch(model)
        torch.testing.assert_close(compiled(**batch()).logits, expected)


# -- on a GPU ------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_on_a_gpu_nothing_waits_and_a_mismatch_is_raised_later():
    model = llava().cuda()
    given = {name: value.cuda() for name, value in batch().items()}
    torch.use_deterministic_algorithms(True, warn_only=True)
    expected = step(model, **given)
    with patched(model):
        for one, other in zip(step(model, **given), expected):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
        wrong = {name: value.cuda() for name, value in batch(rows=5).items()}
        model(**wrong)
        torch.cuda.synchronize()
        with pytest.raises(ValueError, match="9 placeholders and 8 feature rows"):
            for _ in range(3):
                model(**given)
                torch.cuda.synchronize()
        model(**given)
        model(**wrong)
        with pytest.raises(ValueError, match="placeholders"):
            vlm_fuse.raise_errors()


# -- the calls themselves ------------------------------------------------------------------------------------------------


def test_merges_of_other_forms_are_left_to_torch():
    from vlm_fuse.integrations.transformers import merges

    x, source = torch.randn(2, 3, 4), torch.randn(5, 4)
    elements = torch.rand(2, 3, 4) > 0.5
    assert torch.equal(merges.masked_scatter(x, elements, torch.arange(24.0)), x.masked_scatter(elements, torch.arange(24.0)))
    rows = torch.tensor([[1, 0, 1], [1, 0, 0]]).bool()
    for mask in (rows[..., None], rows[..., None].expand_as(x)):
        for form in (source, source.view(1, 5, 4), source.flatten()):  # more than is needed
            assert torch.equal(merges.masked_scatter(x, mask, form), x.masked_scatter(mask, form))
    ids = torch.arange(6).view(2, 3)
    assert torch.equal(merges.masked_scatter(ids, rows, torch.arange(9)), ids.masked_scatter(rows, torch.arange(9)))
    with pytest.raises(RuntimeError):
        merges.masked_scatter(x, rows[..., None], source.double())


def test_assignments_of_other_forms_are_left_to_torch():
    from vlm_fuse.integrations.transformers import merges

    rows = torch.tensor([[1, 0, 1], [1, 0, 0]]).bool()
    for mask, value in ((rows, torch.randn(4)), (rows, torch.randn(1, 4)), (rows, 0.0), ((0, 1), torch.randn(4)), (rows, torch.randn(3, 4))):
        x = torch.randn(2, 3, 4)
        expected = x.clone()
        expected[mask] = value
        assert torch.equal(merges.assigned(x, mask, value), expected)
    with pytest.raises(ValueError, match="placeholders"):
        merges.assigned(torch.randn(2, 3, 4), rows, torch.randn(2, 4))


def test_errors_of_the_device_are_raised_without_waiting_once_they_are_known():
    ids, rows = torch.tensor([[5, 7, 7]]), torch.zeros(1, 4)
    vlm_fuse.merge(ids, torch.ones(1, 3, 4), rows, image_token_id=7, validate="async")
    with pytest.raises(ValueError, match="placeholders"):
        vlm_fuse.raise_errors(wait=False)
    vlm_fuse.raise_errors(wait=False)
