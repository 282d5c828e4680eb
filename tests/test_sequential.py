"""Sequential solving: equal to a reference that runs the whole model again for each stage."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fxquant
from fxquant import replay
from fxquant.errors import NoCalibrationData
from fxquant.scheme import get_scheme
from fxquant.solvers import Gram, get_solver

from .conftest import MLP, Block, sqnr
from .sequential_reference import QUIET, reference, stages_of
from .test_architectures import llama, made


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


def test_the_model_of_inference_is_solved():
    """Whatever mode it is in: with the running statistics, and without dropout."""
    data = [torch.randn(8, 32) for _ in range(3)]
    model = nn.Sequential(Counting(), nn.Dropout(0.5), nn.Linear(32, 32)).requires_grad_(False)
    other = copy.deepcopy(model).eval()
    for one in (model, other):
        fxquant.quantize(one, "int4wo-32", solver="gptq", batches=data, **QUIET)
    assert model.training and model[1].training and not other.training
    for (name, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_after_an_error_the_model_is_in_its_own_mode_at_once(monkeypatch):
    def put(self, *args):
        raise OSError("no room")

    monkeypatch.setattr(replay.Waiting, "put", put)
    model, calls = Counting().train().requires_grad_(False), [torch.randn(8, 32)]
    with pytest.raises(OSError) as raised:
        fxquant.quantize(model, "int4wo-32", solver="gptq", batches=calls, **QUIET)
    assert raised.value and model.training and model.norm.training


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
