"""Smoothing in place: the float model is what it was, errors shrink, the checkpoint holds all of it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fxquant
from fxquant.errors import InvalidOption
from fxquant.scheme import get_scheme

from .conftest import sqnr
from .test_architectures import ARCHITECTURES, made

KINDS = {"input": ("channel", "sample")}


class Outlier(nn.Module):
    """A channel 60 times the others behind the norm, undone in the weights that read it; a residual."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.norm, self.up = nn.LayerNorm(width), nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        with torch.no_grad():
            self.norm.weight[7] *= 60
            self.up.weight[:, 7] /= 60

    def forward(self, x):
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


def calibrated(model, data, kinds=KINDS):
    return fxquant.calibrate(model, data, kinds=kinds, compiled=False, progress=False)


def folded(model, folds):
    """``model`` with ``folds`` written in, divisions included."""
    folds.apply(model)
    for name, divisor in folds.divisors.items():
        layer = model.get_submodule(name)
        layer.register_forward_pre_hook(lambda _, args, s=divisor: (args[0] / s.to(args[0]),))
    return model


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.__name__)
@torch.no_grad()
def test_folding_leaves_any_architecture_as_it_was(architecture):
    model, inputs = made(architecture)
    model, inputs = model.double(), {k: _double(v) for k, v in inputs.items()}
    stats = calibrated(model, [inputs], {"input": ["channel"]})
    expected = model(**inputs)[0]
    schemes = {name.removesuffix(":input"): get_scheme("int8dq") for name in stats}
    folds = stats.structure.folds(model, stats, 0.6, schemes)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = folded(model, folds)(**inputs)[0]
    changed = [k for k, v in model.state_dict().items() if not torch.equal(v, before[k])]
    assert len(changed) >= 2 and set(changed) <= set(folds.factors)
    rounding = 1e-7 if architecture.__name__ == "gemma" else 1e-12  # its norm is float32 inside
    torch.testing.assert_close(found, expected, rtol=rounding, atol=rounding)


def _double(x):
    return x.double() if x.is_floating_point() else x


@torch.no_grad()
def test_in_place_and_the_checkpoint_is_of_the_original_class(tmp_path):
    torch.manual_seed(0)
    model = Outlier().eval().requires_grad_(False)
    data = [torch.randn(16, 64) for _ in range(3)]
    stats = calibrated(model, data)
    stats.save(tmp_path / "stats.safetensors")
    stats, x = fxquant.Stats.load(tmp_path / "stats.safetensors"), data[0]
    expected = model(x) - x
    plain = fxquant.quantize(copy.deepcopy(model), "int8dq", stats=stats, smooth=False)
    bare = fxquant.quantize(copy.deepcopy(model), "int8dq")
    assert torch.equal(plain(x), bare(x)), "smooth=False leaves everything alone"
    fxquant.quantize(model, "int8dq", stats=stats, smooth=0.6)
    assert model.up.smoothing is None, "the norm takes it up"
    assert model.down.smoothing.shape == (128,), "gelu is in the way"
    assert sqnr(plain(x) - x, expected) < 27 and sqnr(model(x) - x, expected) > 34
    again = fxquant.quantize(Outlier().eval(), "int8dq")
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), model(x))
    with torch.device("meta"):
        empty = Outlier().eval()
    empty = fxquant.quantize(empty, "int8dq")
    empty.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(empty(x), model(x))
    again.load_state_dict(bare.state_dict())
    assert again.down.smoothing is None and torch.equal(again(x), bare(x))
    state = model.state_dict()
    state["down.smoothing"] = torch.ones(3)
    with pytest.raises(RuntimeError, match=r"down.smoothing has shape \[3\]"):
        again.load_state_dict(state)


@torch.no_grad()
def test_one_line_smooths_what_was_calibrated():
    torch.manual_seed(0)
    model = Outlier().eval().requires_grad_(False)
    data = [torch.randn(16, 64) for _ in range(3)]
    stats, x = calibrated(model, data), data[0]
    expected = model(x) - x
    plain = fxquant.compile(model, "int8dq")(x) - x
    run = fxquant.compile(model, "int8dq", stats=stats, smooth=0.6)
    smooth = run(x) - x
    assert sqnr(plain, expected) < 27 and sqnr(smooth, expected) > 34
    model.up.weight[:, 7] *= 2  # weights are inputs: the scale is chosen anew
    assert sqnr(run(x) - x, model(x) - x) > 34
    torch.compiler.reset()
    options = {"scheme": "int8dq", "stats": stats, "smooth": {"up": 0.9}}
    by_layer = torch.compile(model, backend="fxquant", options=options)(x)
    assert sqnr(by_layer - x, model(x) - x) > 34 and not torch.equal(by_layer, run(x))
    with pytest.raises(fxquant.FxQuantError, match="stats beside it"):
        fxquant.compile(model, "int8dq", smooth=0.5)
    with pytest.raises(fxquant.FxQuantError, match="statistics"):
        fxquant.compile(model, "int8dq", stats=3)


@torch.no_grad()
@torch.no_grad()
def test_the_graph_does_what_the_modules_do(graphs):
    torch.manual_seed(0)
    model = Outlier().eval().requires_grad_(False)
    data = [torch.randn(16, 64) for _ in range(3)]
    stats, x = calibrated(model, data), data[0]
    graph = fxquant.compile(model, "int8dq", stats=stats, smooth=0.6)(x)
    fxquant.quantize(model, "int8dq", stats=stats, smooth=0.6)
    assert sqnr(model(x) - x, graph - x) > 45
    compiled = fxquant.compile(model)(x)
    assert sqnr(compiled - x, model(x) - x) > 60


class Shared(nn.Module):
    """One norm before two linears in turn; a linear's weight that is also read as it is."""

    def __init__(self):
        super().__init__()
        self.norm, self.read = nn.LayerNorm(16), nn.LayerNorm(16)
        self.a, self.b, self.c = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x):
        x = self.b(self.norm(self.a(self.norm(x))))
        return self.c(self.read(x)) + self.c.weight.sum()


@torch.no_grad()
def test_parameters_with_other_uses_are_not_folded_into(caplog):
    model = Shared().double().eval().requires_grad_(False)
    x = torch.randn(4, 16, dtype=torch.float64)
    stats, expected = calibrated(model, [x]), model(x)
    with caplog.at_level("INFO", "fxquant"):
        schemes = dict.fromkeys("abc", get_scheme("int8dq"))
        folds = stats.structure.folds(model, stats, 0.5, schemes)
    assert set(folds.divisors) == {"a", "b"}, "the norm serves both: they divide for themselves"
    assert "a: norm.weight is used elsewhere too" in caplog.text
    assert "not smoothed: c: c.weight is used elsewhere too" in caplog.text
    assert set(folds.factors) == {"a.weight", "b.weight"}
    torch.testing.assert_close(folded(model, folds)(x), expected, rtol=1e-12, atol=1e-12)


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(32)
        self.gate, self.up, self.down = nn.Linear(32, 48), nn.Linear(32, 48), nn.Linear(48, 32)

    def forward(self, x):
        h = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


@torch.no_grad()
def test_a_weight_may_be_smoothed_for_what_it_reads_and_for_what_reads_it():
    model = Gated().double().eval().requires_grad_(False)
    x = torch.randn(9, 32, dtype=torch.float64)
    stats, expected = calibrated(model, [x]), model(x)
    schemes = dict.fromkeys(("gate", "up", "down"), get_scheme("int8dq"))
    folds = stats.structure.folds(model, stats, 0.5, schemes)
    assert set(folds.scales) == set(schemes) and not folds.divisors
    assert [d for d, _ in folds.factors["up.weight"]] == [1, 0]
    torch.testing.assert_close(folded(model, folds)(x), expected, rtol=1e-12, atol=1e-12)


class Reads(nn.Module):
    """A layer whose weight is read, not called."""

    def __init__(self):
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(32), nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        return self.b(nn.functional.linear(torch.tanh(self.norm(x)), self.a.weight, self.a.bias))


def test_a_smoothed_layer_whose_weight_is_read_shows_the_one_for_plain_inputs():
    model = Reads().eval()  # whose parameters require gradients
    data = [torch.randn(16, 32) * torch.logspace(-1, 1, 32) for _ in range(3)]
    stats = calibrated(model, data)
    expected, plain = model(data[0]), fxquant.quantize(copy.deepcopy(model), "int8dq")
    fxquant.quantize(model, "int8dq", stats=stats)
    assert model.a.smoothing is not None
    assert sqnr(model(data[0]), expected) > sqnr(plain(data[0]), expected) - 3
    assert not any(t.requires_grad for t in model.buffers())
    copy.deepcopy(model)


@torch.no_grad()
def test_a_partial_checkpoint_leaves_smoothing_with_its_codes():
    model = Outlier().eval().requires_grad_(False)
    x = torch.randn(16, 64)
    fxquant.quantize(model, "int8dq", stats=calibrated(model, [x]))
    before = model(x)
    model.load_state_dict({"norm.bias": model.norm.bias.clone()}, strict=False)
    assert model.down.smoothing is not None and torch.equal(model(x), before)


class Branches(nn.Module):
    """Two linears read one norm; a batch runs one of them."""

    def __init__(self):
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(32), nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x, other=False):
        h = self.norm(x)
        return self.b(h) if other else self.a(h)


@torch.no_grad()
def test_a_norm_that_an_unseen_linear_may_read_is_left_alone(caplog):
    model = Branches().double().eval().requires_grad_(False)
    x = torch.randn(9, 32, dtype=torch.float64)
    stats, expected = calibrated(model, [x]), model(x, other=True)
    with caplog.at_level("INFO", "fxquant"):
        fxquant.quantize(model, {"a": "int8dq", "b": None}, stats=stats)
    assert "b.weight, in no graph that calibration saw" in caplog.text
    torch.testing.assert_close(model(x, other=True), expected)
    assert model.a.smoothing is not None


class Repeated(nn.Module):
    """Blocks after a graph break, which share one compiled graph."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Part() for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(32), nn.Linear(32, 32)

    def forward(self, x):
        torch._dynamo.graph_break()
        return self.fc(self.norm(x))


@torch.no_grad()
def test_blocks_that_share_a_graph_are_each_smoothed_by_their_own_norm():
    model = Repeated().double().eval().requires_grad_(False)
    x = torch.randn(9, 32, dtype=torch.float64)
    stats, expected = calibrated(model, [x]), model(x)
    names = [f"blocks.{i}.fc" for i in range(3)]
    folds = stats.structure.folds(model, stats, 0.5, dict.fromkeys(names, get_scheme("int8dq")))
    assert set(folds.scales) == set(names) and not folds.divisors
    assert {f"blocks.{i}.norm.weight" for i in range(3)} < set(folds.factors)
    torch.testing.assert_close(folded(model, folds)(x), expected, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_statistics_from_before_a_layer_was_quantized_are_refused():
    model = Gated().eval().requires_grad_(False)
    stats = calibrated(model, [torch.randn(9, 32)])
    fxquant.quantize(model, {"gate": "int8static", "*": None}, stats=stats)
    with pytest.raises(InvalidOption, match=r"gate\.weight is none of its parameters"):
        fxquant.quantize(model, {"up": "int8static", "*": None}, stats=stats)
    assert isinstance(model.up, nn.Linear)


def test_names_with_commas_and_compiled_parts():
    body = nn.ModuleDict({"a, b": nn.Linear(32, 32), "c": nn.Linear(32, 32)})
    model = nn.Sequential(nn.LayerNorm(32), Both(body)).eval().requires_grad_(False)
    x = torch.randn(9, 32)
    stats = calibrated(model, [x])
    assert stats.structure.beside("1.body.c") == ("1.body.a, b", "1.body.c")
    model[1] = torch.compile(model[1], backend="eager")
    fxquant.quantize(torch.compile(model, backend="eager"), "int8static", stats=stats)
    assert {type(m) for m in body.values()} == {fxquant.QuantLinear}
    assert body["c"].smoothing is None and body["c"].input_scale is body["a, b"].input_scale


class Both(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return sum(m(x) for m in self.body.values())


@torch.no_grad()
def test_alpha_found_by_output_error():
    torch.manual_seed(0)
    model = Outlier().eval().requires_grad_(False)
    data = [torch.randn(64, 64) for _ in range(4)]
    stats, x = calibrated(model, data), torch.randn(64, 64)
    expected = model(x) - x
    found = {}
    for smooth in (False, 0.3, 0.6, 0.9, "auto"):
        quantized = fxquant.quantize(copy.deepcopy(model), "int8dq", stats=stats, smooth=smooth)
        found[smooth] = sqnr(quantized(x) - x, expected)
    fixed = [found[a] for a in (0.3, 0.6, 0.9)]
    assert found["auto"] > max(fixed) - 0.5 and found["auto"] > found[False] + 8, found
    alphas = stats.structure.alphas(
        dict(model.named_parameters()), stats, dict.fromkeys(("up", "down"), get_scheme("int8dq"))
    )
    assert set(alphas) == {"up", "down"} and 0 <= alphas["up"] <= 1
    by_layer = fxquant.quantize(copy.deepcopy(model), "int8dq", stats=stats, smooth=alphas)
    auto = fxquant.quantize(copy.deepcopy(model), "int8dq", stats=stats, smooth="auto")
    assert torch.equal(by_layer(x), auto(x))


@torch.no_grad()
def test_awq_scales_what_matters_where_it_can_be_folded(caplog):
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
    model = model.eval().requires_grad_(False)
    model[0].weight[:3] *= 20
    data = [torch.randn(8, 16, 64) for _ in range(4)]
    stats, x = calibrated(model, data), torch.randn(8, 16, 64)
    expected = model(x)
    plain = fxquant.quantize(copy.deepcopy(model), "int4wo-32")
    with caplog.at_level("WARNING", "fxquant"):
        fxquant.quantize(model, "int4wo-32", stats=stats, smooth="awq")
    assert sqnr(model(x), expected) > sqnr(plain(x), expected) + 1
    assert "not smoothed: 3: nothing before it can take up the scale" in caplog.text
    assert all(m.smoothing is None for m in model.modules() if isinstance(m, fxquant.QuantLinear))


def test_bad_input_is_named():
    model = Outlier().eval().requires_grad_(False)
    stats = calibrated(model, [torch.randn(4, 64)], {"input": ["channel"]})
    for smooth in ("auto", "awq"):
        with pytest.raises(InvalidOption, match="samples of the inputs of up"):
            fxquant.quantize(model, "int8dq", stats=stats, smooth=smooth)
    for smooth in (1.5, -0.1, "much", {"up": 2}, {"nobody": 0.5}, True):
        with pytest.raises(InvalidOption, match="smooth"):
            fxquant.quantize(model, "int8dq", stats=stats, smooth=smooth)
    with pytest.raises(InvalidOption, match="stats beside it"):
        fxquant.quantize(model, "int8dq", smooth=0.5)
    assert isinstance(model.up, nn.Linear)
