"""Training steps of the benchmark: every contestant has the same samples and losses, what is profiled is counted, a run writes its files."""

import doctest
import functools
import gzip
import importlib
import json
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from benchmarks import train_throughput  # noqa: E402
from benchmarks.throughput import attends, goals, losses, measuring, profiled, samples, subjects, training, ways  # noqa: E402
from benchmarks.throughput.sections import PREFIX, Part, recorded  # noqa: E402
from benchmarks.throughput.ways import Way  # noqa: E402
from test_docs import ROOT  # noqa: E402

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.no_poison]

PADDED = ("left", "right", "maximum")


@functools.cache
def made(key, rows=1):
    if key != "nanovlm":
        pytest.importorskip("transformers")
    how = subjects.Setting("tiny", 512, rows, 0.0, 3)
    return subjects.subject(key, how, "cpu", torch.float32)


@pytest.fixture(scope="module", params=subjects.KEYS)
def subject(request):
    return made(request.param, 2 if request.param == "nanovlm" else 1)


@pytest.fixture(scope="module")
def nanovlm():
    return made("nanovlm", 2)


@pytest.fixture(scope="module")
def short():
    """One micro-batch, for whole runs."""
    return made("nanovlm")


def no_tick():
    pass


def by_sample(tokens, count):
    return [[part[tokens.samples == number].tolist() for part in (tokens.input_ids, tokens.labels)] for number in range(count)]


def test_every_layout_holds_the_same_tokens(subject):
    for micro in subject.load.micros:
        count = len(micro.samples)
        packed = by_sample(micro.packed, count)
        assert [len(ids) for ids, _ in packed] == [sample.tokens for sample in micro.samples]
        for layout in PADDED:
            tokens = getattr(micro, layout)
            assert by_sample(tokens, count) == packed and torch.equal(tokens.attention_mask, tokens.samples >= 0)
        placeholders = micro.packed.input_ids == subject.shape.preset.image_token_id
        assert int(placeholders.sum()) == sum(micro.sizes) > 0
        assert micro.left.attention_mask[:, -1].all() and micro.right.attention_mask[:, 0].all()


def test_rows_are_full_and_padding_is_what_was_asked_for(subject):
    load = subject.load
    assert all(micro.packed.attention_mask.all() and micro.packed.input_ids.shape == (1, load.capacity) for micro in load.micros)
    assert load.useful == load.capacity * len(load.micros) == sum(sample.tokens for micro in load.micros for sample in micro.samples)
    assert load.padding("left") == load.padding("right") == pytest.approx(samples.PADDING, abs=0.05)
    assert load.padding("maximum") == pytest.approx(samples.MAXIMUM_PADDING, abs=0.01) and load.padding("packed") == 0
    assert all(micro.maximum.input_ids.shape[1] == load.maximum for micro in load.micros)


def test_every_contestant_has_the_losses_of_its_samples_alone(subject):
    found = measuring.compared(subject, "cpu", no_tick)
    names = {way.name for way in subject.ways if way.why_not is None}
    assert names == set(found) and {ways.STOCK, ways.MERGE_REPLACED, ways.RIGHT, ways.MAXIMUM, ways.BY_VLM_FUSE, ways.DENSE, ways.NOT_ISOLATED} <= names
    assert all(facts["equal"] == (name != ways.NOT_ISOLATED) for name, facts in found.items())
    assert found[ways.NOT_ISOLATED]["difference"] > 100 * losses.TOLERANCE
    assert measuring.refusals(subject, found) == {}


def test_samples_of_all_layouts_are_predicted_alike_in_number(subject):
    for way in measuring.running(subject):
        if way.prepare is not None:
            way.prepare()
        for micro in subject.load.micros:
            with torch.no_grad():
                predicted = way.forward(micro)
            assert int((predicted.labels != -100).sum()) == micro.answers and int((predicted.samples >= 0).sum()) == subject.load.capacity


def gradients(subject, way):
    state = {name: value.clone() for name, value in subject.model.state_dict().items()}
    training.step_of(way, training.optimizer_of(subject.model), subject.load, "cpu", torch.float32)()
    subject.model.load_state_dict(state)
    return {name: parameter.grad.clone() for name, parameter in subject.model.named_parameters()}


def test_a_step_has_the_same_gradients_padded_and_packed(nanovlm):
    of = {way.name: way for way in nanovlm.ways}
    wanted = gradients(nanovlm, of[ways.STOCK])
    for name in (ways.MERGE_REPLACED, ways.RIGHT, ways.MAXIMUM, ways.BY_VLM_FUSE, ways.DENSE):
        for parameter, found in gradients(nanovlm, of[name]).items():
            torch.testing.assert_close(found, wanted[parameter], atol=1e-5, rtol=1e-3)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_what_runs_on_a_gpu_alone_computes_the_same(nanovlm, monkeypatch):
    """FlexAttention uncompiled; variable-length attention by SDPA, with its arguments as they are handed over."""
    from torch.nn.attention import flex_attention, varlen

    def by_document(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size, enable_gqa):
        assert q.shape[0] == cu_seq_q[-1] == cu_seq_k[-1] and max_q == max_k == cu_seq_q.diff().max() and window_size[1] == 0
        sizes = cu_seq_q.diff().tolist()
        parts = zip(*(part.transpose(0, 1)[None].split(sizes, 2) for part in (q, k, v)))
        return torch.cat([F.scaled_dot_product_attention(*part, is_causal=True, enable_gqa=enable_gqa) for part in parts], 2)[0].transpose(0, 1)

    monkeypatch.setattr(attends, "_compiled_flex", lambda: flex_attention.flex_attention)
    monkeypatch.setattr(varlen, "varlen_attn", by_document)
    of = {way.name: way for way in nanovlm.ways}
    micros = list(nanovlm.load.micros)
    wanted = training.losses_of(of[ways.DENSE], micros, "cpu", torch.float32)
    for name in (ways.FLEX, ways.VARLEN):
        assert of[name].why_not and losses.difference(training.losses_of(of[name], micros, "cpu", torch.float32), wanted) < losses.TOLERANCE


def test_a_contestant_with_other_losses_gets_no_time_and_the_command_fails(short, monkeypatch, tmp_path):
    leaking = next(way for way in short.ways if way.name == ways.NOT_ISOLATED)
    wrong = [way._replace(forward=leaking.forward) if way.name == ways.DENSE else way for way in short.ways]
    monkeypatch.setattr(subjects, "subject", lambda *_: short._replace(ways=wrong))
    assert train_throughput.main(["--only", "nanovlm", "--quick", "--out", str(tmp_path)]) == 1
    (result,) = json.loads((tmp_path / "throughput.json").read_text())["results"]
    assert list(result["refused"]) == [ways.DENSE] and ways.DENSE not in result["times"] and ways.DENSE not in result["rows"]
    assert ways.RIGHT in result["times"] and f"**Refused:** {ways.DENSE}" in (tmp_path / "throughput.md").read_text()


def test_a_comparison_that_cannot_see_a_leak_is_refused(nanovlm):
    apart = next(way for way in nanovlm.ways if way.name == ways.DENSE)
    blind = nanovlm._replace(ways=[way._replace(forward=apart.forward) if way.name == ways.NOT_ISOLATED else way for way in nanovlm.ways])
    assert list(measuring.refusals(blind, measuring.compared(blind, "cpu", no_tick))) == [ways.NOT_ISOLATED]


@pytest.mark.parametrize("nodes", [3, 40])
def test_a_planted_merge_is_counted_forward_and_backward(nodes):
    weight = torch.ones(64, 64, requires_grad=True)
    passes = 2

    def step():
        for _ in range(passes):
            x = weight * 2
            with Part("merge"):
                for _ in range(nodes):
                    x = x.sin()
            # reads the next number of a node without making one: it belongs to what comes after
            with Part("mask"):
                assert x.detach().ne(7).any()
            x.cos().sum().backward()
        with Part("optimizer"):
            weight.detach()[0, 0].item()

    found = profiled.profiled(step, "cpu")
    merge = found.parts["merge"]
    assert (merge.ranges, merge.nodes) == (passes, passes * nodes) and merge.forward > 0 and merge.backward > 0
    assert found.parts["mask"].ranges == passes and found.parts["mask"].nodes == 0
    assert 0 < found.share("merge") < found.share(*profiled.BETWEEN) < 1
    assert found.reads == passes and found.waits == 0  # bool() of the mask; not what the optimizer reads


def test_nodes_are_kept_only_while_they_are_asked_for():
    x = torch.ones(2, requires_grad=True)
    with recorded() as nodes:
        with Part("merge"):
            x.sin()
    with Part("merge"):
        x.cos()
    assert [(own.part, own.end - own.first) for own in nodes] == [("merge", 1)]


def test_parts_of_a_contestant(nanovlm):
    of = {way.name: way for way in nanovlm.ways}
    passes = len(nanovlm.load.micros)
    reads = {}
    for name in (ways.STOCK, ways.MERGE_REPLACED, ways.BY_VLM_FUSE):
        seen = profiled.profiled(training.step_of(of[name], training.optimizer_of(nanovlm.model), nanovlm.load, "cpu", torch.float32), "cpu")
        assert {part: found.ranges for part, found in seen.parts.items()} == dict.fromkeys(("vision", "merge", "mask", "positions"), passes) | {"optimizer": 1}
        assert seen.parts["merge"].nodes >= passes and seen.parts["vision"].nodes > seen.parts["merge"].nodes
        assert 0 < seen.share(*profiled.BETWEEN) < 1 and seen.share(*seen.parts) < 1
        reads[name] = seen.reads
    assert reads == {ways.STOCK: 3 * passes, ways.MERGE_REPLACED: 0, ways.BY_VLM_FUSE: 0}  # nonzero: of the write, and twice of its backward


@pytest.mark.parametrize(("key", "merges"), [("qwen2_5_vl", 1), ("qwen3_vl", 4), ("llava", 1)])
def test_parts_of_a_transformers_model(key, merges):
    subject = made(key)
    stock = subject.ways[0]
    stock.prepare()
    step = training.step_of(stock, training.optimizer_of(subject.model), subject.load, "cpu", torch.float32)
    with subject.parts():
        seen = profiled.profiled(step, "cpu")
    assert {part: found.ranges for part, found in seen.parts.items()} == dict(vision=1, merge=merges, mask=1, optimizer=1)
    assert seen.parts["merge"].nodes >= merges and 0 < seen.share(*profiled.BETWEEN) < 1
    assert set(profiled.profiled(step, "cpu").parts) == {"optimizer"}  # the hooks are gone


def test_a_run_writes_every_round_the_table_the_picture_and_two_traces(short, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(subjects, "subject", lambda *_: short)
    assert train_throughput.main(["--only", "nanovlm", "--quick", "--trace", "--out", str(tmp_path)]) == 0
    written = json.loads((tmp_path / "throughput.json").read_text())
    (result,) = written["results"]
    assert {"torch", "cpu", "threads", "dtype"} <= set(written["environment"]) and written["seconds"] > 0
    timed = {way.name for way in measuring.running(short)}
    assert set(result["times"]) == set(result["rows"]) == timed and all(len(rounds) == 3 for rounds in result["times"].values())
    assert set(result["not_run"]) == {ways.FLEX, ways.VARLEN} and result["useful_tokens"] == short.load.useful
    assert all(row["peak_bytes"] > 0 and 0 < row["between_share"] < 1 for row in result["rows"].values())
    text = (tmp_path / "throughput.md").read_text()
    assert all(f"| {name} |" in text for name in timed) and "Not run: packed, isolated, FlexAttention" in text and "the run took" in text
    assert (tmp_path / "throughput.png").read_bytes().startswith(b"\x89PNG")
    names = []
    for moment in ("before", "after"):
        with gzip.open(tmp_path / f"trace_{moment}.json.gz", "rt") as trace:
            names.append({event.get("name") for event in json.load(trace)["traceEvents"]})
    assert all(PREFIX + "merge" in found for found in names) and "aten::index_put_" in names[0] and "aten::index_put_" not in names[1]
    assert "useful tokens" in capsys.readouterr().out


def test_goals_are_ratios_within_rounds():
    times = {ways.BY_VLM_FUSE: [1.0, 2.0, 1.0], ways.STOCK: [1.2, 2.4, 9.0], ways.MAXIMUM: [4.0, 8.0, 4.0]}
    found = {goal["against"]: (goal["ratio"], goal["reached"]) for goal in goals.reached({"times": times})}
    assert found == {ways.STOCK: (pytest.approx(1.2), False), ways.MAXIMUM: (4.0, True)}


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="feature rows: the tower makes 64"):
        subjects.subject("nanovlm", subjects.Setting("tiny", 512, 1, 0.0, 3), "cpu", torch.float32, "finevision_native")
    with pytest.raises(ValueError, match="are full"):
        samples.filled_rows(samples.drawn("cauldron_64", 512, lambda rows: rows), 512, 10**6)
    with pytest.raises(SystemExit):
        train_throughput.asked(["--only", "nanovlm,other"])
    with pytest.raises(SystemExit, match="nanovlm: an image of"):
        train_throughput.main(["--only", "nanovlm", "--quick", "--distribution", "finevision_native", "--out", str(tmp_path)])


def test_what_cannot_run_says_why():
    assert attends.why_not_flex("cpu") and attends.why_not_varlen("cpu", torch.bfloat16) and attends.why_not_varlen("cuda", torch.float32)
    assert attends.why_not_varlen("cuda", torch.bfloat16) is None
    half = Way(ways.VARLEN, "packed", None, half_only=True)
    assert half.isolated and not Way(ways.NOT_ISOLATED, "packed", None).isolated
    assert isinstance(training.computing("cpu", torch.float32), nullcontext)


MODULES = sorted(path for path in (ROOT / "benchmarks/throughput").glob("*.py") if ">>> " in path.read_text())


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_examples_of_docstrings_run(path):
    failed, tried = doctest.testmod(importlib.import_module(f"benchmarks.throughput.{path.stem}"), optionflags=doctest.ELLIPSIS)
    assert tried and not failed
