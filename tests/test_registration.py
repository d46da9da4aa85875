"""merge inside everything PyTorch wraps around functions: compile, export, fake tensors, tracing, functorch, checkpoints, autocast."""

import copy
import functools
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import vlm_fuse
from cases import BY_NAME, VOCABULARY
from checking import assert_bits, assert_equal, merge, serving
from vlm_fuse import Attend

IMAGE = 33
NAMES = ["two_images_left_padded", "three_kinds_mixed_forms", "packed_layout", "documents_packed_again", "expanded_two_kinds", "legacy_counts", "fused_embedding_scaled", "added_expanded_weight_padded", "counts_by_sample", "padded_left_with_length", "only_text"]


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# -- the operators themselves ------------------------------------------------------------------------------------------


class Recorder(TorchDispatchMode):
    """Keeps every call of an operator of ours with its arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "vlm_fuse":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def recorded_calls(case, backend, device):
    tensors = case.tensors(device=device).require_grad()
    with Recorder() as recorder, serving(backend):
        merged = merge(tensors, backend, attend=Attend(window=2, images="bidirectional"))
        for name in ("position_ids", "document_ids", "image_ids", "kind_ids", "cu_seqlens", "kv_lo", "attention_mask"):
            getattr(merged, name)
        merged.inputs_embeds.backward(torch.randn_like(merged.inputs_embeds), create_graph=True)
    return recorder.calls


def as_leaves(value, floating_needs_grad=True):
    if isinstance(value, torch.Tensor):
        fresh = value.detach().clone()
        return fresh.requires_grad_() if value.is_floating_point() and floating_needs_grad else fresh
    if isinstance(value, (list, tuple)) and any(isinstance(item, torch.Tensor) for item in value):
        return [as_leaves(item) for item in value]
    return value


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name, backend, device):
    if backend == "triton" and name not in NAMES[1:4]:
        pytest.skip("the operators are the same; the interpreter is slow")
    calls = recorded_calls(replace(BY_NAME[name], D=4), backend, device)
    seen = {func.name() for func, _, _ in calls}
    assert {"vlm_fuse::plan", "vlm_fuse::facts", "vlm_fuse::intervals", "vlm_fuse::merge_rows", "vlm_fuse::merge_rows_backward"} <= seen
    for func, args, kwargs in calls:
        torch.library.opcheck(func, [as_leaves(arg) for arg in args], kwargs)


def test_every_operator_is_registered_completely():
    """A schema without a fake kernel stops torch.compile; one without autograd loses gradients."""
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("vlm_fuse::")]
    assert names
    for name in names:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "Meta") or torch._library.simple_registry.singleton.find(name).fake_impl.kernel is not None, name


# -- torch.compile -----------------------------------------------------------------------------------------------------


def everything(merged):
    """What a model reads of a merged batch."""
    return (merged.inputs_embeds, merged.position_ids, merged.document_ids, merged.attention_mask, merged.kind_ids, merged.image_ids, merged.cu_seqlens, merged.kv_lo, merged.kv_hi, merged.labels)


def batches(number, seed=0, most=9):
    """Batches of different sizes, counts and padding. Sizes of 0 and 1 are left out: PyTorch itself compiles those apart."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(number):
        B, T = (int(torch.randint(2, most, (), generator=generator)) for _ in range(2))
        ids = torch.randint(0, 30, (B, T + 4), generator=generator)
        ids[:, 1:3] = IMAGE
        ids[torch.rand(ids.shape, generator=generator) < 0.3] = IMAGE
        yield ids


def keep(ids, text, features, labels):
    return everything(vlm_fuse.merge(ids, text, features, image_token_id=IMAGE, labels=labels))


def padded(ids, text, features, labels):
    return everything(vlm_fuse.merge(ids, text, features, image_token_id=IMAGE, labels=labels, attention_mask=ids != 3, layout="padded", length=64, attend=Attend(window=4)))


def packed(ids, text, features, labels):
    return everything(vlm_fuse.merge(ids, text, features, image_token_id=IMAGE, labels=labels, attention_mask=ids != 3, layout="packed"))


def packed_with_length(ids, text, features, labels):
    return everything(vlm_fuse.merge(ids, text, features, image_token_id=IMAGE, labels=labels, layout="packed", length=200, attend=Attend(images="bidirectional")))


def added(ids, text, features, labels):
    return everything(vlm_fuse.merge(ids, text, features, image_token_id=IMAGE, labels=labels, combine="add"))


def deepstack(ids, text, features, labels):
    merged = vlm_fuse.merge(ids, text, features, image_token_id=IMAGE, labels=labels)
    return vlm_fuse.add_features(merged.inputs_embeds * 2, features, merged.plan), *everything(merged)[1:]


def expanded(ids, text, features, labels):
    images = features[: features.shape[0] // 2 * 2].view(-1, 2, features.shape[1])
    return everything(vlm_fuse.merge(ids, text, images, image_token_id=IMAGE, labels=labels, scheme="expand", layout="packed", length=300, unused_features="allow", validate="off"))


FUNCTIONS = [keep, padded, packed, packed_with_length, added, deepstack, expanded]


def inputs_for(ids, seed, D=8, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    text, features = (torch.randn(*shape, D, generator=generator).to(device).requires_grad_() for shape in (ids.shape, (int(ids.eq(IMAGE).sum()),)))
    ids = ids.to(device)
    return ids, text, features, ids * 2


def check_compiled(function, compiled, ids, seed):
    given = inputs_for(ids, seed)
    expected, actual = function(*given), compiled(*given)
    for number, (a, b) in enumerate(zip(actual, expected)):
        assert_equal(a, b.detach(), f"output {number}")
    grad = torch.randn(expected[0].shape)
    wanted = torch.autograd.grad(expected[0], given[1:3], grad)
    for a, b in zip(torch.autograd.grad(actual[0], given[1:3], grad), wanted):
        assert_equal(a, b, "gradient")


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_ten_batches_without_a_graph_break_or_a_recompilation(compiler, function):
    compiled = torch.compile(function, backend=compiler, fullgraph=True, dynamic=True)
    first, *others = batches(10)
    check_compiled(function, compiled, first, 0)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed, ids in enumerate(others, 1):
            check_compiled(function, compiled, ids, seed)


@pytest.mark.parametrize("function", [keep, packed], ids=lambda function: function.__name__)
def test_inductor(function):
    compiled = torch.compile(function, backend="inductor", fullgraph=True, dynamic=True)
    first, *others = batches(4, seed=5)
    check_compiled(function, compiled, first, 0)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed, ids in enumerate(others, 1):
            check_compiled(function, compiled, ids, seed)


def test_shapes_that_were_static_at_first():
    """Without dynamic=True PyTorch compiles twice: once, and once more when it sees a size change."""
    compiled = torch.compile(keep, backend="aot_eager", fullgraph=True)
    all_batches = list(batches(6, seed=2))
    check_compiled(keep, compiled, all_batches[0], 0)
    for seed, ids in enumerate(all_batches[1:3], 1):
        check_compiled(keep, compiled, ids, seed)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed, ids in enumerate(all_batches[3:], 3):
            check_compiled(keep, compiled, ids, seed)


@pytest.mark.parametrize("name", ["fused_embedding_scaled", "fused_embedding_by_mask", "three_kinds", "three_kinds_mixed_forms", "counts_by_sample", "counts_and_sizes", "documents_packed_again", "documents_in_one_row", "legacy_left_padding", "legacy_counts", "expanded", "truncation_through_an_image", "features_but_no_placeholder", "added_to_scaled_weight"])
def test_compiled_cases(name):
    case = BY_NAME[name]
    expected_tensors, tensors = case.tensors().require_grad(), case.tensors().require_grad()
    names = ("inputs_embeds", "position_ids", "document_ids", "image_ids", "kind_ids", "labels", "cu_seqlens", "kv_lo")

    def function(ids, arguments):
        merged = vlm_fuse.merge(ids, **arguments)
        return [getattr(merged, name) for name in names]

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    expected = function(case.input_ids(), expected_tensors.merge_arguments())
    actual = compiled(case.input_ids(), tensors.merge_arguments())
    for what, a, b in zip(names, actual, expected):
        assert_equal(a, b.detach(), what)
    grad = torch.randn(expected[0].shape)
    expected[0].backward(grad)
    actual[0].backward(grad)
    for a, b in zip(tensors.leaves, expected_tensors.leaves):
        assert_equal(a.grad, b.grad, "gradient")


def test_a_ready_plan_under_compile():
    case = BY_NAME["packed_layout"]
    plan = vlm_fuse.plan(case.input_ids(), **case.settings(), **case.kinds_for_plan())
    tensors = case.tensors()

    @functools.partial(torch.compile, backend="aot_eager", fullgraph=True, dynamic=True)
    def function(ids, text, features):
        merged = vlm_fuse.merge(ids, text, features, image_token_id=IMAGE, plan=plan)
        return merged.inputs_embeds * 2, merged.position_ids

    rows, positions = function(case.input_ids(), tensors.text, tensors.features[0])
    expected = merge(tensors, "auto", plan=plan)
    assert torch.equal(rows, expected.inputs_embeds * 2) and torch.equal(positions, expected.position_ids)


def test_errors_come_through_compile():
    compiled = torch.compile(keep, backend="aot_eager", fullgraph=True, dynamic=True)
    ids, text, features, labels = inputs_for(next(batches(1)), 0)
    compiled(ids, text, features, labels)
    with pytest.raises(ValueError, match="sample"):
        compiled(ids, text, features[:-1], labels)


def test_out_is_refused_under_compile():
    def function(ids, text, features, out):
        return vlm_fuse.merge(ids, text, features, image_token_id=IMAGE, out=out).inputs_embeds

    ids, text, features, _ = (t.detach() for t in inputs_for(next(batches(1)), 0))
    with pytest.raises(Exception, match="out: refused under torch.compile"):
        torch.compile(function, backend="eager", fullgraph=True)(ids, text, features, torch.empty_like(text))


def test_a_module_compiled_and_trained():
    torch.manual_seed(0)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Embedding(VOCABULARY, 8)
            self.tower = torch.nn.Linear(5, 8)

        def forward(self, ids, pixels):
            merged = vlm_fuse.merge(ids, None, self.tower(pixels), weight=self.embedding.weight, image_token_id=IMAGE, layout="packed", length=128)
            return merged.unpack(merged.inputs_embeds.tanh()).square().mean()

    plain = Model()
    compiled = copy.deepcopy(plain)
    compiled.compile(backend="aot_eager", fullgraph=True, dynamic=True)
    for ids in batches(3, seed=3):
        pixels = torch.randn(int(ids.eq(IMAGE).sum()), 5)
        for model in (plain, compiled):
            model.zero_grad()
            model(ids, pixels).backward()
        for a, b in zip(compiled.parameters(), plain.parameters()):
            torch.testing.assert_close(a.grad, b.grad)


# -- export, tracing, fake tensors -------------------------------------------------------------------------------------


class Exported(torch.nn.Module):
    def __init__(self, layout, length):
        super().__init__()
        self.options = dict(image_token_id=IMAGE, layout=layout, length=length)

    def forward(self, ids, text, features):
        merged = vlm_fuse.merge(ids, text, features, **self.options)
        return merged.inputs_embeds, merged.position_ids


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not_strict"])
@pytest.mark.parametrize("layout, length", [("keep", None), ("packed", None), ("packed", 150)], ids=["keep", "packed", "packed_with_length"])
def test_export(layout, length, strict):
    first, second = batches(2, seed=4)
    B, T, N = (torch.export.Dim(name, min=2, max=4096) for name in ("samples", "tokens", "rows"))
    given = [tensor.detach() for tensor in inputs_for(first, 0)[:3]]
    program = torch.export.export(Exported(layout, length), tuple(given), dynamic_shapes=({0: B, 1: T}, {0: B, 1: T}, {0: N}), strict=strict)
    other = [tensor.detach() for tensor in inputs_for(second, 1)[:3]]
    for ids, text, features in (given, other):
        actual = program.module()(ids, text, features)
        expected = Exported(layout, length)(ids, text, features)
        for a, b in zip(actual, expected):
            assert_equal(a, b, "exported")
    ops = {str(node.target) for node in program.graph.nodes}
    assert any("vlm_fuse.merge_rows" in op for op in ops), "the result was baked in"
    with pytest.raises(ValueError, match="sample"):
        program.module()(given[0], given[1], given[2][:-1])


def test_make_fx_bakes_nothing_in():
    def function(ids, text, features):
        return vlm_fuse.merge(ids, text, features, image_token_id=IMAGE).inputs_embeds

    first = next(batches(1, seed=6))
    ids, text, features, _ = (tensor.detach() for tensor in inputs_for(first, 0))
    for tracing in ("real", "fake", "symbolic"):
        traced = make_fx(function, tracing_mode=tracing)(ids, text, features)
        moved = ids.roll(1, 1)
        assert_bits(traced(moved, text + 1, features * 2), function(moved, text + 1, features * 2), tracing)


def test_make_fx_of_the_gradient():
    def function(ids, text, features):
        out = vlm_fuse.merge(ids, text, features, image_token_id=IMAGE).inputs_embeds
        return torch.autograd.grad(out.sin().sum(), (text, features))

    ids, text, features, _ = inputs_for(next(batches(1, seed=6)), 0)
    traced = make_fx(function, tracing_mode="fake")(ids, text, features)
    _, other_text, other_features, _ = inputs_for(ids, 1)
    for a, b in zip(traced(ids, other_text, other_features), function(ids, other_text, other_features)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["two_images_left_padded", "padded_left_with_length", "packed_with_length", "fused_embedding_scaled", "three_kinds_mixed_forms", "added_to_weight"])
def test_fake_tensors(name):
    case = BY_NAME[name]
    expected = merge(case.tensors(), "auto")
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        tensors = case.tensors()
        tensors.features = [[mode.from_tensor(t) if not hasattr(t, "fake_mode") else t for t in entry] if isinstance(entry, list) else entry for entry in tensors.features]
        merged = merge(tensors.require_grad(), "auto")
        for field in ("inputs_embeds", "position_ids", "document_ids", "labels", "cu_seqlens", "kind_ids", "attention_mask", "kv_lo"):
            fake, real = getattr(merged, field), getattr(expected, field)
            assert type(fake).__name__ == "FakeTensor"
            assert (fake.shape, fake.dtype, fake.stride(), fake.device) == (real.shape, real.dtype, real.stride(), real.device), field
        merged.inputs_embeds.sum().backward()
        for leaf in tensors.leaves:
            assert leaf.grad.shape == leaf.shape


def test_fake_tensors_of_an_unknown_width():
    """Only a ShapeEnv can hold a size that depends on data; without one the remedy is told."""
    case = BY_NAME["packed_layout"]
    with FakeTensorMode(), pytest.raises(RuntimeError, match="length"):
        merge(case.tensors(), "auto")
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    with FakeTensorMode(shape_env=ShapeEnv()):
        merged = merge(case.tensors(), "auto")
        assert merged.inputs_embeds.shape[0] == 1 and merged.inputs_embeds.shape[2] == case.D
        assert not isinstance(merged.inputs_embeds.shape[1], int)


def test_meta_tensors():
    case = BY_NAME["two_images_left_padded"]
    merged = merge(case.tensors(device="meta"), "auto")
    assert merged.inputs_embeds.shape == (2, case.given.T, case.D) and merged.inputs_embeds.is_meta
    assert merged.position_ids.shape == (2, case.given.T)


def test_dispatch_modes_see_the_operators(backend, device):
    calls = recorded_calls(BY_NAME["two_images_left_padded"], backend, device)
    assert [func.name() for func, _, _ in calls].count("vlm_fuse::merge_rows") >= 1


@pytest.mark.thinned(3)
@pytest.mark.parametrize("place", ["cpu", "meta"])
@pytest.mark.parametrize("name", ["packed_layout", "documents_packed_again", "expanded_two_kinds", "legacy_counts", "counts_and_sizes", "fused_embedding_scaled"])
def test_default_device(name, place, backend, device):
    """Inside a `torch.device` context what the library makes for itself still lies with the tensors it was given."""
    case = BY_NAME[name]
    tensors = case.tensors(device=device).require_grad()
    arguments, ids = tensors.merge_arguments(), case.input_ids(device)
    expected = vlm_fuse.merge(ids, backend=backend, **arguments)
    with torch.device(place):
        actual = vlm_fuse.merge(ids, backend=backend, **arguments)
        for field in ("inputs_embeds", "position_ids", "document_ids", "image_ids", "cu_seqlens", "kv_lo"):
            assert torch.equal(getattr(actual, field), getattr(expected, field)), field
        unpacked = actual.unpack(actual.inputs_embeds)
        assert unpacked.device.type == device
        unpacked.sum().backward()


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["fused_embedding_scaled", "added_to_scaled_weight", "packed_layout"])
def test_default_dtype(name, default, backend, device):
    case = BY_NAME[name]
    found = []
    for dtype in (torch.get_default_dtype(), default):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            tensors = case.tensors(device=device).require_grad()
            merged = merge(tensors, backend)
            merged.inputs_embeds.sum().backward()
        finally:
            torch.set_default_dtype(before)
        found.append([merged.inputs_embeds.detach(), merged.position_ids, merged.kv_lo, *(leaf.grad for leaf in tensors.leaves)])
    for a, b in zip(*found):
        assert_bits(a, b, name)


class Counted(torch.Tensor):
    """A subclass that only watches."""

    seen: list = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


def test_tensor_subclasses(backend, device):
    case = BY_NAME["two_images_left_padded"]
    tensors = case.tensors(device=device)
    expected = merge(tensors, backend).inputs_embeds
    tensors.text = tensors.text.as_subclass(Counted)
    actual = merge(tensors, backend).inputs_embeds
    assert isinstance(actual, Counted), "what PyTorch's own functions return"
    assert torch.equal(actual.as_subclass(torch.Tensor), expected)


def test_parameters(backend, device):
    case = BY_NAME["fused_embedding"]
    tensors = case.tensors(device=device)
    tensors.weight = torch.nn.Parameter(tensors.weight)
    out = merge(tensors, backend).inputs_embeds
    assert type(out) is torch.Tensor
    out.sum().backward()
    assert tensors.weight.grad is not None


# -- autocast, functorch, checkpoints, inference -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["two_images_left_padded", "added", "fused_embedding_scaled"])
def test_autocast_changes_nothing(name, backend, device):
    case = BY_NAME[name]
    expected = merge(case.tensors(device=device), backend).inputs_embeds
    tensors = case.tensors(device=device).require_grad()
    with torch.autocast(device, dtype=torch.bfloat16):
        merged = merge(tensors, backend).inputs_embeds
        assert_bits(merged, expected, "inputs_embeds")
    merged.sum().backward()
    assert tensors.leaves[0].grad.dtype == torch.float32


def test_mixed_dtypes_as_autocast_makes_them(backend, device):
    """A tower under autocast gives bf16 rows, the embedding stays fp32."""
    tower = torch.nn.Linear(6, 8).to(device)
    ids = torch.tensor([[1, IMAGE, IMAGE, 2]], device=device)
    text = torch.randn(1, 4, 8, device=device, requires_grad=True)
    with torch.autocast(device, dtype=torch.bfloat16):
        features = tower(torch.randn(2, 6, device=device))
        assert features.dtype == torch.bfloat16
        out = vlm_fuse.merge(ids, text, features, image_token_id=IMAGE, backend=backend).inputs_embeds
    assert out.dtype == torch.float32
    assert torch.equal(out[0, 1:3], features.float())
    out.sum().backward()
    assert tower.weight.grad is not None and text.grad is not None


def functional(ids, backend, **options):
    def function(text, features):
        return vlm_fuse.merge(ids, text, features, image_token_id=IMAGE, backend=backend, **options).inputs_embeds.sin().sum()

    return function


@pytest.mark.parametrize("options", [{}, dict(combine="add"), dict(layout="packed")], ids=["keep", "add", "packed"])
def test_func_grad(options, backend, device):
    ids, text, features, _ = inputs_for(next(batches(1, seed=8)), 0, device=device)
    function = functional(ids, backend, **options)
    expected = torch.autograd.grad(function(text, features), (text, features))
    actual = torch.func.grad(function, argnums=(0, 1))(text.detach(), features.detach())
    for a, b in zip(actual, expected):
        torch.testing.assert_close(a, b)
    value, pull = torch.func.vjp(function, text.detach(), features.detach())
    for a, b in zip(pull(torch.ones_like(value)), expected):
        torch.testing.assert_close(a, b)


def test_func_grad_of_a_list_and_a_weight(backend, device):
    ids = torch.tensor([[1, IMAGE, IMAGE, 2, IMAGE]], device=device)

    def function(weight, first, second):
        return vlm_fuse.merge(ids, None, [first, second], weight=weight, embed_scale=1.5, image_token_id=IMAGE, backend=backend).inputs_embeds.cos().sum()

    given = [torch.randn(rows, 4, device=device, requires_grad=True) for rows in (5, 2, 1)]
    expected = torch.autograd.grad(function(*given), given)
    actual = torch.func.grad(function, argnums=(0, 1, 2))(*(t.detach() for t in given))
    for a, b in zip(actual, expected):
        torch.testing.assert_close(a, b)


def test_func_grad_twice(backend, device):
    ids, text, features, _ = inputs_for(next(batches(1, seed=8)), 0, device=device)
    text, features = text.detach().double(), features.detach().double()
    function = functional(ids, backend)

    def squares(text):
        return torch.func.grad(function)(text, features).square().sum()

    actual = torch.func.grad(squares)(text)
    leaf = text.clone().requires_grad_()
    (first,) = torch.autograd.grad(function(leaf, features), leaf, create_graph=True)
    (expected,) = torch.autograd.grad(first.square().sum(), leaf)
    torch.testing.assert_close(actual, expected)


def test_functional_call(backend, device):
    model = torch.nn.Embedding(VOCABULARY, 8, device=device)
    ids = torch.tensor([[1, IMAGE, 2]], device=device)

    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = model

        def forward(self, features):
            return vlm_fuse.merge(ids, None, features, weight=self.embedding.weight, image_token_id=IMAGE, backend=backend).inputs_embeds.sum()

    wrapped = Wrapped()
    features = torch.ones(1, 8, device=device)
    gradients = torch.func.grad(lambda parameters: torch.func.functional_call(wrapped, parameters, (features,)))(dict(wrapped.named_parameters()))
    counts = torch.zeros(VOCABULARY, device=device)
    counts[[1, 2]] = 1
    assert torch.equal(gradients["embedding.weight"], counts[:, None].expand(-1, 8))


def test_vmap_and_forward_mode_are_refused_in_words(backend, device):
    ids, text, features, _ = (tensor.detach() for tensor in inputs_for(next(batches(1, seed=8)), 0, device=device))

    def function(text):
        return vlm_fuse.merge(ids, text, features, image_token_id=IMAGE, backend=backend).inputs_embeds

    with pytest.raises(Exception, match="vmap"):
        torch.func.vmap(function)(torch.stack([text, text]))
    with pytest.raises(Exception, match="forward-mode"):
        torch.func.jvp(function, (text,), (torch.ones_like(text),))
    import torch.autograd.forward_ad as forward

    for needs_grad in (False, True):
        with forward.dual_level(), pytest.raises(Exception, match="forward.mode|forward AD"):
            function(forward.make_dual(text.clone().requires_grad_(needs_grad), torch.ones_like(text)))


@pytest.mark.parametrize("name", ["packed_layout", "fused_embedding", "expanded_two_kinds", "added_expanded_weight_padded"])
def test_gradients_of_many_losses(name, backend, device):
    """torch.vmap on autograd.grad gives what one after another gives, recorded or not; torch's older vmap is refused in words."""
    tensors = BY_NAME[name].tensors(device=device).require_grad()
    out = merge(tensors, backend).inputs_embeds
    generator = torch.Generator().manual_seed(1)
    losses = torch.randn(3, *out.shape, generator=generator).to(out).requires_grad_()

    def gradients(grad, record=False):
        return torch.autograd.grad(out, tensors.leaves, grad, retain_graph=True, create_graph=record)

    expected = [torch.stack(parts) for parts in zip(*map(gradients, losses.detach()))]
    assert_bits_of_all(torch.vmap(gradients)(losses.detach()), expected)

    recorded = torch.vmap(functools.partial(gradients, record=True))(losses)
    assert_bits_of_all(recorded, expected)
    singly = [torch.stack(parts) for parts in zip(*(gradients(grad, record=True) for grad in losses))]
    second = [torch.randn(part.shape, generator=generator).to(part) for part in recorded]
    assert_bits_of_all(*(torch.autograd.grad(parts, losses, second) for parts in (recorded, singly)))

    with pytest.raises(NotImplementedError, match="torch.vmap on torch.autograd.grad"):
        torch.autograd.grad(out, tensors.leaves, losses.detach(), is_grads_batched=True)


def assert_bits_of_all(found, expected):
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.thinned(2)
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not_reentrant"])
@pytest.mark.parametrize("name", ["packed_layout", "fused_embedding", "expanded_two_kinds"])
def test_checkpoint(name, reentrant, backend, device):
    case = BY_NAME[name]

    def function(*leaves):
        return merge(tensors, backend).inputs_embeds.sin()

    gradients = []
    for wrapped in (function, lambda *leaves: checkpoint(function, *leaves, use_reentrant=reentrant)):
        tensors = case.tensors(device=device).require_grad()
        wrapped(*tensors.leaves).sum().backward()
        gradients.append([leaf.grad for leaf in tensors.leaves])
    for a, b in zip(*gradients):
        assert torch.equal(a, b)


def test_selective_checkpoint_sees_the_operator(backend, device):
    """A policy may save the merged rows and recompute the rest."""
    seen = []

    def policy(ctx, op, *args, **kwargs):
        seen.append(str(op))
        return CheckpointPolicy.MUST_SAVE if "merge_rows" in str(op) else CheckpointPolicy.PREFER_RECOMPUTE

    ids, text, features, _ = inputs_for(next(batches(1, seed=8)), 0, device=device)

    def function(text, features):
        return vlm_fuse.merge(ids, text, features, image_token_id=IMAGE, backend=backend).inputs_embeds.sin()

    expected = torch.autograd.grad(function(text, features).sum(), (text, features))
    out = checkpoint(function, text, features, use_reentrant=False, context_fn=functools.partial(create_selective_checkpoint_contexts, policy))
    assert any("vlm_fuse.merge_rows" in op for op in seen)
    for a, b in zip(torch.autograd.grad(out.sum(), (text, features)), expected):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["packed_layout", "fused_embedding", "expanded_two_kinds", "added"])
def test_inference_mode(name, backend, device):
    case = BY_NAME[name]
    expected = merge(case.tensors(device=device), backend)
    with torch.inference_mode():
        tensors = case.tensors(device=device)
        merged = merge(tensors, backend)
        assert merged.inputs_embeds.is_inference()
        assert_bits(merged.inputs_embeds, expected.inputs_embeds, "inputs_embeds")
        assert torch.equal(merged.position_ids, expected.position_ids) and torch.equal(merged.kv_lo, expected.kv_lo)
        if case.given.layout == "keep" and case.text == "embeds":
            merge(tensors, backend, out=tensors.text)
            assert_bits(tensors.text, expected.inputs_embeds, "in place")


def test_inference_then_training_in_one_process(backend, device):
    """What the first call caches must not be an inference tensor that the second cannot save."""
    case = BY_NAME["added_expanded_weight_padded"]
    with torch.inference_mode():
        merge(case.tensors(device=device), backend, validate="async")
    tensors = case.tensors(device=device).require_grad()
    merge(tensors, backend, validate="async").inputs_embeds.sum().backward()
    assert tensors.weight.grad is not None
    vlm_fuse.raise_errors()


def test_no_grad(backend, device):
    tensors = BY_NAME["packed_layout"].tensors(device=device).require_grad()
    with torch.no_grad():
        assert not merge(tensors, backend).inputs_embeds.requires_grad


def test_deepcopy_of_a_plan():
    case = BY_NAME["packed_three_kinds"]
    plan = vlm_fuse.plan(case.input_ids(), **case.settings(), **case.kinds_for_plan())
    other = copy.deepcopy(plan)
    plan.source_index.zero_()
    assert other.source_index.tolist() == case.answer().fact("source_index")
    assert other.position_ids.tolist() == case.answer().fact("position")
