"""Sequential solving: equal to a reference that runs the whole model again for each stage."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxquant
from fxquant.errors import (
    CaptureFailed,
    InvalidOption,
    NoCalibrationData,
    NonFiniteActivation,
    NothingObserved,
    ResumeMismatch,
    UnsupportedSpec,
)
from fxquant.scheme import get_scheme
from fxquant.solvers import Gram, get_solver

from .conftest import MLP, Block, sqnr
from .test_architectures import llama, made

QUIET = {"progress": False}


class FakeQuantized(nn.Module):
    """What the reference puts in the place of a solved linear."""

    def __init__(self, linear, scheme, codes):
        super().__init__()
        self.weight = scheme.weight.dequantize(codes, linear.weight.dtype)
        self.bias, self.input = linear.bias, scheme.input

    def forward(self, x):
        if self.input is not None:
            x = self.input.dequantize(self.input.quantize(x), x.dtype)
        return F.linear(x, self.weight, self.bias)


@torch.no_grad()
def reference(model, batches, stages, scheme, solver):
    """Codes by layer: the whole model is run again for each stage, with hooks."""
    model, scheme, found = copy.deepcopy(model), get_scheme(scheme), {}
    for stage in stages:
        grams, hooks = {}, []
        for name in stage:
            module = model.get_submodule(name)
            grams[name] = Gram(module.in_features, dtype=module.weight.dtype)

            def count(_, args, gram=grams[name]):
                gram.add(args[0])

            hooks.append(module.register_forward_pre_hook(count))
        for batch in batches:
            model(**batch) if isinstance(batch, dict) else model(batch)
        for hook in hooks:
            hook.remove()
        for name in stage:
            linear = model.get_submodule(name)
            found[name] = get_solver(solver)(linear.weight, scheme.weight, grams[name]).quantized
            parent, _, child = name.rpartition(".")
            quantized = FakeQuantized(linear, scheme, found[name])
            setattr(model.get_submodule(parent), child, quantized)
    return found


def stages_of(blocks, prefix=""):
    parts = (("q", "k", "v"), ("gate", "up"), ("down",))
    return [[f"{prefix}{i}.{n}" for n in stage] for i in range(blocks) for stage in parts]


@pytest.mark.parametrize("scheme", ["int4wo-32", "8da4w-32"])
def test_equals_running_the_whole_model_again_for_each_stage(scheme):
    model = nn.Sequential(*(Block(32) for _ in range(2))).double().eval().requires_grad_(False)
    batches = [torch.randn(2, n, 32, dtype=torch.float64) for n in (5, 9, 5, 12)]
    wanted = reference(model, batches, stages_of(2), scheme, "gptq")
    fxquant.quantize(model, scheme, solver="gptq", batches=batches, **QUIET)
    assert len(wanted) == 12
    for name, codes in wanted.items():
        module = model.get_submodule(name)
        assert torch.equal(module.codes, codes.codes), name
        assert torch.equal(module.scale, codes.scale), name
        assert module.record.solver == "gptq" and module.record.tokens == 62


def test_a_decoder_of_transformers_with_ragged_batches():
    model, inputs = made(llama)
    model = model.double()
    batches = [{"input_ids": inputs["input_ids"][:, :n]} for n in (9, 6, 7)]
    attention = "model.layers.0.self_attn."
    stages = [[f"{attention}{n}_proj" for n in "qkv"], [f"{attention}o_proj"]]
    stages += [[f"model.layers.0.mlp.{n}_proj" for n in ("gate", "up")]]
    stages += [["model.layers.0.mlp.down_proj"], ["lm_head"]]
    wanted = reference(model, batches, stages, "int4wo-32", "gptq")
    fxquant.quantize(model, "int4wo-32", solver="gptq", batches=iter(batches), **QUIET)
    for name, codes in wanted.items():
        assert torch.equal(model.get_submodule(name).codes, codes.codes), name


def test_errors_of_earlier_layers_are_made_up_for():
    torch.manual_seed(1)
    model = nn.Sequential(*(Block(64) for _ in range(2))).eval().requires_grad_(False)
    mix = torch.randn(64, 64) / 4
    data = [torch.randn(4, 16, 64) @ mix for _ in range(6)]
    x = torch.randn(8, 16, 64) @ mix
    expected = model(x)
    plain = fxquant.quantize(copy.deepcopy(model), "int4wo-32")
    fxquant.quantize(model, "int4wo-32", solver="gptq", batches=data, **QUIET)
    assert sqnr(model(x), expected) > sqnr(plain(x), expected) + 1.5


@pytest.mark.parametrize("keep", ["disk", "device"])
def test_where_values_wait_makes_no_difference(keep):
    model = nn.Sequential(Block(32), nn.ReLU(inplace=True), Block(32)).eval().requires_grad_(False)
    data = [torch.randn(2, 5, 32) for _ in range(3)]
    other, given = copy.deepcopy(model), [x.clone() for x in data]
    fxquant.quantize(model, "int4wo-32", solver="gptq", batches=data, **QUIET)
    fxquant.quantize(other, "int4wo-32", solver="gptq", batches=data, keep=keep, **QUIET)
    assert all(torch.equal(a, b) for a, b in zip(given, data, strict=True))
    mine, theirs = model.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


def interrupted_after(count: int):
    """GPTQ that stops at the layer after ``count`` ones; what it was asked for is listed."""
    asked: list[str] = []

    def solve(weight, spec, gram=None, *, layer="weight", **options):
        if len(asked) == count:
            raise KeyboardInterrupt
        asked.append(layer)
        return get_solver("gptq")(weight, spec, gram, layer=layer, **options)

    return replace(get_solver("gptq"), function=solve), asked


def test_an_interrupted_run_changes_nothing_and_goes_on_where_it_was(tmp_path):
    model = nn.Sequential(*(Block(32) for _ in range(3))).eval().requires_grad_(False)
    data = [torch.randn(2, 5, 32) for _ in range(3)]
    whole, before = copy.deepcopy(model), {k: v.clone() for k, v in model.state_dict().items()}
    fxquant.quantize(whole, "int4wo-32", solver="gptq", batches=data, **QUIET)
    run = {"recipe": "int4wo-32", "batches": data, "folder": tmp_path / "run", **QUIET}
    first, asked = interrupted_after(14)
    with pytest.raises(KeyboardInterrupt):
        fxquant.quantize(model, solver=first, **run)
    now = model.state_dict()
    assert now.keys() == before.keys() and all(torch.equal(now[k], before[k]) for k in now)
    second, rest = interrupted_after(-1)
    fxquant.quantize(model, solver=second, **run)
    assert 0 < len(rest) < 18 and rest[-1] == "2.down"
    assert set(asked) | set(rest) == {n for stage in stages_of(3) for n in stage}
    mine, theirs = model.state_dict(), whole.state_dict()
    assert all(torch.equal(mine[k], theirs[k]) for k in theirs)
    assert model.get_submodule("0.q").record == whole.get_submodule("0.q").record


@pytest.mark.parametrize("what", ["weights", "batches", "scheme", "options"])
def test_a_folder_of_another_run_is_refused(tmp_path, what):
    model = MLP().eval().requires_grad_(False)
    data = [torch.randn(6, 64)]
    run = {"recipe": "int4wo-32", "solver": "gptq", "batches": data, "folder": tmp_path, **QUIET}
    fxquant.quantize(copy.deepcopy(model), **run)
    if what == "weights":
        model.up.weight[3, 5] += 1
    run |= {
        "weights": {},
        "batches": {"batches": [torch.randn(6, 64)]},
        "scheme": {"recipe": "int4wo-64"},
        "options": {"solver": get_solver("gptq", act_order=False)},
    }[what]
    with pytest.raises(ResumeMismatch, match="another folder"):
        fxquant.quantize(model, **run)
    assert isinstance(model.up, nn.Linear)


class Sometimes(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.never, self.tied = (nn.Linear(32, 32) for _ in range(3))
        self.tied.weight = self.first.weight

    def forward(self, x):
        return self.tied(self.first(x).relu_())


def test_what_no_batch_reaches_is_an_error_before_anything_changes():
    model = Sometimes().eval().requires_grad_(False)
    data = [torch.randn(5, 32)]
    with pytest.raises(NoCalibrationData, match="never: gptq"):
        fxquant.quantize(model, "int4wo-32", solver="gptq", batches=data, **QUIET)
    assert isinstance(model.first, nn.Linear)
    recipe = {"never": None, "*": "int4wo-32"}
    fxquant.quantize(model, recipe, solver="gptq", batches=data, **QUIET)
    assert torch.equal(model.first.codes, model.tied.codes), "tied weights stay tied"
    assert isinstance(model.never, nn.Linear)


class Counting(nn.Module):
    """Writes to its own buffers whenever it runs."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(32, 32), nn.BatchNorm1d(32), nn.Linear(32, 32)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        self.calls.add_(1)
        return self.b(self.norm(self.a(x)))


def test_buffers_that_the_model_writes_to_are_as_they_were():
    model = Counting().train().requires_grad_(False)
    before = {k: v.clone() for k, v in model.named_buffers()}
    data = [torch.randn(8, 32) for _ in range(3)]
    fxquant.quantize(model, "int4wo-32", solver="gptq", batches=data, **QUIET)
    assert model.b.record.tokens == 24
    assert all(torch.equal(model.get_buffer(k), v) for k, v in before.items())


class Breaks(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(32, 32)

    def forward(self, x):
        torch._dynamo.graph_break()
        return self.fc(x)


def test_bad_input_is_named():
    model = MLP().eval().requires_grad_(False)
    good, bad = torch.randn(4, 64), torch.randn(4, 64)
    bad[2, 7] = torch.inf
    gptq = {"solver": "gptq", **QUIET}
    with pytest.raises(NothingObserved, match="there was no batch"):
        fxquant.quantize(model, "int4wo-32", batches=[], **gptq)
    with pytest.raises(NonFiniteActivation, match=r"^up: .*channel 7"):
        fxquant.quantize(model, "int4wo-32", batches=[good, bad], **gptq)
    with pytest.raises(CaptureFailed, match="one graph"):
        broken = Breaks().eval().requires_grad_(False)
        fxquant.quantize(nn.Sequential(broken), "int4wo-32", batches=[torch.randn(2, 32)], **gptq)
    with pytest.raises(InvalidOption, match="batches"):
        fxquant.quantize(model, "int4wo-32", solver="gptq")
    with pytest.raises(InvalidOption, match="without batches"):
        fxquant.quantize(model, "int4wo-32", solver="hqq", folder="somewhere")
    with pytest.raises(InvalidOption, match="keep"):
        fxquant.quantize(model, "int4wo-32", batches=[good], keep="attic", **gptq)
    with pytest.raises(InvalidOption, match="one of rtn"):
        fxquant.quantize(model, "int4wo-32", solver="gptqq", batches=[good])
    with pytest.raises(InvalidOption, match="block_size"):
        get_solver("gptq", block=64)
    with pytest.raises(InvalidOption, match="solver"):
        fxquant.quantize(model, "int4wo-32", batches=[good])
    with pytest.raises(InvalidOption, match="an iterable of batches"):
        fxquant.quantize(model, "int4wo-32", batches=good, **gptq)
    with pytest.raises(InvalidOption, match="gram"):
        stats = fxquant.calibrate(model, [good], compiled=False, progress=False)
        fxquant.quantize(model, "int4wo-32", stats=stats, **gptq)
    assert isinstance(model.up, nn.Linear) and isinstance(model.down, nn.Linear)


@torch.no_grad()
def test_a_model_that_has_run_compiled_can_be_calibrated_and_solved(graphs):
    model = MLP().eval().requires_grad_(False)
    fxquant.quantize(model, {"up": "int8dq", "*": None})
    x = torch.randn(9, 64)
    wanted = torch.compile(model, backend="fxquant")(x)
    assert model.up._codes.untyped_storage().nbytes() == 0, "packed, and given up"
    stats = fxquant.calibrate(model, [x], {"down": "int8dq"}, compiled=False, progress=False)
    assert stats.reached == {"down"}
    fxquant.quantize(model, {"up": None, "*": "int8wo"}, solver="gptq", batches=[x], **QUIET)
    assert sqnr(model(x), wanted) > 30


class Writes(nn.Module):
    """Values written to in place, through views, parts of a split, an input, a buffer and a parameter."""

    def __init__(self, place: bool):
        super().__init__()
        self.place = place
        self.a, self.b, self.c = (nn.Linear(32, 32) for _ in range(3))
        self.register_buffer("cache", torch.zeros(6, 32))
        self.gain = nn.Parameter(torch.ones(32))

    def forward(self, x):
        if self.place:
            x.mul_(3)
            h = self.a(x)
            h.view(-1).mul_(2)
            first, _ = h.chunk(2, -1)
            first.add_(1)
            self.gain.add_(1)
            self.cache.copy_(h)
            y = self.b(h * self.gain)
            return self.c(y.relu_() + self.cache)
        h = self.a(x * 3) * 2
        h = h + torch.cat([torch.ones(6, 16), torch.zeros(6, 16)], -1)
        y = self.b(h * (self.gain + 1))
        return self.c(y.relu() + h)


def test_what_a_model_writes_in_place():
    torch.manual_seed(0)
    written = Writes(True).eval().requires_grad_(False)
    plain = Writes(False).eval().requires_grad_(False)
    plain.load_state_dict(written.state_dict())
    data = [torch.randn(6, 32) for _ in range(3)]
    before, kept = {k: v.clone() for k, v in written.state_dict().items()}, copy.deepcopy(data)
    for model in (written, plain):
        fxquant.quantize(model, "int4wo-32", solver="gptq", batches=data, **QUIET)
    for name in "abc":
        found, wanted = (m.get_submodule(name) for m in (written, plain))
        assert found.record.signal == pytest.approx(wanted.record.signal, rel=1e-4), name
        assert (found.codes != wanted.codes).float().mean() < 0.02, name
    assert all(torch.equal(a, b) for a, b in zip(data, kept, strict=True)), "the user's batches"
    assert torch.equal(written.gain, before["gain"]) and torch.equal(written.cache, before["cache"])


def test_a_loader_that_fills_one_tensor_again_and_a_module_with_two_names():
    class Twins(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(32, 32)
            self.b = self.a

        def forward(self, x):
            return self.b(self.a(x).relu())

    model = Twins().eval().requires_grad_(False)
    data, buffer = [torch.randn(4, 32) for _ in range(3)], torch.empty(4, 32)
    other = copy.deepcopy(model)
    fxquant.quantize(model, "int4wo-32", solver="gptq", batches=data, **QUIET)
    refilled = (buffer.copy_(x) for x in data)
    fxquant.quantize(other, "int4wo-32", solver="gptq", batches=refilled, **QUIET)
    assert torch.equal(model.a.codes, other.a.codes) and model.a is model.b
    stats = fxquant.calibrate(Twins().eval(), data, compiled=False, progress=False)
    assert fxquant.quantize(Twins().eval(), "int8static", stats=stats).b.input_scale is not None


def test_a_failing_solver_without_data_changes_nothing():
    model = MLP().requires_grad_(False)
    calls = []

    def solve(weight, spec, gram=None, *, layer="weight", **options):
        calls.append(layer)
        if len(calls) == 4:  # two trials of one row come first
            raise KeyboardInterrupt
        return get_solver("mse")(weight, spec, layer=layer)

    with pytest.raises(KeyboardInterrupt):
        fxquant.quantize(model, "int4wo-32", solver=replace(get_solver("mse"), function=solve))
    assert calls == ["up", "down", "up", "down"]
    assert isinstance(model.up, nn.Linear) and isinstance(model.down, nn.Linear)


@pytest.mark.parametrize("what", ["folds", "numbers"])
def test_other_folds_or_numbers_in_a_batch_are_another_run(tmp_path, what):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.up = nn.LayerNorm(32), nn.Linear(32, 32)

        def forward(self, x, power=1.0):
            return self.up(self.norm(x) ** power)

    model = Scaled().eval().requires_grad_(False)
    x = torch.randn(6, 32)
    run = {"solver": "gptq", "batches": [{"x": x, "power": 2.0}], "folder": tmp_path, **QUIET}
    fxquant.quantize(copy.deepcopy(model), "int8dq", **run)
    if what == "folds":
        run["stats"] = fxquant.calibrate(model, run["batches"], compiled=False, progress=False)
    else:
        run["batches"] = [{"x": x, "power": 3.0}]
    with pytest.raises(ResumeMismatch):
        fxquant.quantize(model, "int8dq", **run)


class Halves(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.first, self.second = nn.LayerNorm(32), nn.Linear(32, 32), nn.Linear(32, 16)

    def forward(self, x):
        x = self.first(self.norm(x))
        torch._dynamo.graph_break()
        return self.second(x)


def test_a_model_that_is_no_one_graph_is_solved_on_statistics(tmp_path):
    torch.manual_seed(0)
    model = Halves().eval().requires_grad_(False)
    model.norm.weight[:3] *= 20
    data = [torch.randn(9, 32) for _ in range(4)]
    kinds = {"input": ("channel", "gram", "sample")}
    stats = fxquant.calibrate(model, data, kinds=kinds, compiled=False, progress=False)
    stats.save(tmp_path / "stats.safetensors")
    stats = fxquant.Stats.load(tmp_path / "stats.safetensors")
    solved = fxquant.quantize(
        copy.deepcopy(model), "int4wo-32", solver="gptq", stats=stats, smooth=False
    )
    normed = [model.norm(x) for x in data]
    for name, seen in (("first", normed), ("second", [model.first(x) for x in normed])):
        gram = Gram(32)
        for x in seen:
            gram.add(x)
        spec, weight = get_scheme("int4wo-32").weight, model.get_submodule(name).weight
        wanted = get_solver("gptq")(weight, spec, gram)
        assert torch.equal(solved.get_submodule(name).codes, wanted.quantized.codes), name
    plain = fxquant.quantize(copy.deepcopy(model), "int8dq")
    both = fxquant.quantize(copy.deepcopy(model), "int8dq", solver="gptq", stats=stats)
    x = torch.cat(data)
    assert sqnr(both(x), model(x)) > sqnr(plain(x), model(x)) + 3, "smoothed, and solved for that"
    assert both.second.record.tokens == 36
    del stats._found["second:input"]
    with pytest.raises(NoCalibrationData, match=r"^second: gptq"):
        fxquant.quantize(model, "int4wo-32", solver="gptq", stats=stats)
    assert isinstance(model.second, nn.Linear)


class Mixed(nn.Module):
    """Autocast in the middle: the region must not be cut, and is in force where it was."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(32, 32) for _ in range(3))

    def forward(self, x):
        x = self.a(x)
        with torch.autocast("cpu", torch.bfloat16):
            x = torch.mm(self.b(x), x.T) @ x
        return self.c(x.float())


def test_autocast_regions():
    model = Mixed().eval().requires_grad_(False)
    data = [torch.randn(6, 32) for _ in range(2)]
    expected = model(data[0])
    fxquant.quantize(model, "int8wo", solver="gptq", batches=data, **QUIET)
    assert model.b.record.tokens == 12
    assert sqnr(model(data[0]), expected) > 30


@pytest.mark.parametrize("solver", ["rtn", "mse", "hqq"])
def test_solvers_without_data(solver):
    model = MLP().eval().requires_grad_(False)
    plain = fxquant.quantize(copy.deepcopy(model), "int4wo-32")
    weight = model.up.weight.clone()
    fxquant.quantize(model, "int4wo-32", solver=solver)
    assert model.up.record.solver == solver and model.up.record.tokens == 0
    error, other = ((m.up.weight - weight).square().sum() for m in (model, plain))
    same = torch.equal(model.up.codes, plain.up.codes)
    assert same == (solver == "rtn")
    if solver == "mse":
        assert error < other


def test_a_solver_that_does_not_serve_a_scheme_says_so_before_anything_changes():
    model = MLP().requires_grad_(False)
    recipe = {"up": "int4wo-32", "down": "int8wo"}
    with pytest.raises(UnsupportedSpec, match=r"^down: hqq cannot solve"):
        fxquant.quantize(model, recipe, solver="hqq")
    assert isinstance(model.up, nn.Linear)


def test_the_summary_says_how_each_layer_was_solved():
    model = MLP().eval().requires_grad_(False)
    data = [torch.randn(40, 64)]
    fxquant.quantize(model, {"up": "int4wo-32", "*": None}, solver="gptq", batches=data, **QUIET)
    record, text = model.up.record, fxquant.summary(model)
    (row,) = [line for line in text.splitlines() if line.startswith("up")]
    decibel = 10 * torch.log10(torch.tensor(record.signal / record.error))
    assert row.split()[:3] == ["up", "128x64", "int4wo-32"] and "down" not in text
    assert row.split()[3:6] == ["gptq", "40", f"{decibel:.1f}"]
    assert row.split()[6] == f"{100 * (1 - record.error / record.baseline):.0f}"
