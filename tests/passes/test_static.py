"""Static schemes: ranges from calibration, one quantization a value, codes from layer to layer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxquant
from fxquant import Stats, passes
from fxquant.errors import (
    InvalidOption,
    NonFiniteStatistics,
    ShapeMismatch,
)
from fxquant.graph import layers, stage, value
from fxquant.lowering import select
from fxquant.lowering.kernel import KERNELS, Device
from fxquant.lowering.triton_launch import INTERPRET
from fxquant.passes import lowering
from fxquant.scheme import SCHEMES, get_scheme

from ..conftest import MLP, Block, sqnr
from .helpers import Call, aten, calls, count, ops, through

STATIC = [name for name, row in SCHEMES.items() if row.static]
X = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))


def calibrated(model: nn.Module, *batches, kinds=("minmax", "channel")) -> Stats:
    kinds = {"input": list(kinds)}
    return fxquant.calibrate(model, batches, kinds=kinds, compiled=False, progress=False)


def rewritten(model, x, scheme, stats, *, to="merged", smooth=False, **decided):
    """The graph after the passes up to ``to``."""
    gm = fxquant.trace(model.requires_grad_(False), (x,))
    for name, one in passes.pipeline(scheme, stats=stats, smooth=smooth, **decided):
        through(gm, one)
        if name == to:
            break
    return gm


def float32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32))


def by_hand(scheme: str, x: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """``x`` through codes of a range: what a static input means, in float64 but for the float32 scale."""
    low, high = float32(low), float32(high)
    if scheme == "fp8static":
        return e4m3(x, float32(max(-low, high) / 448))
    if scheme == "int8static-sym":
        scale, zero = float32(max(-low, high) / 127.5), 0
    else:
        low, high = min(low, 0.0), max(high, 0.0)
        scale = float32((high - low) / 255)
        zero = -128 - round(low / scale)
    return ((x / scale).round().add(zero).clamp(-128, 127) - zero) * scale


def e4m3(x: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).double() * scale


def weight_by_hand(scheme: str, w: torch.Tensor) -> torch.Tensor:
    largest = w.abs().amax(1, keepdim=True)
    if scheme == "fp8static":
        return e4m3(w, (largest / 448).float().double())
    scale = (largest / 127.5).float().double()
    return (w / scale).round().clamp(-128, 127) * scale


@pytest.mark.parametrize("scheme", STATIC)
@torch.no_grad()
def test_the_reference_is_the_model_fake_quantized_by_hand_and_fusing_keeps_it(scheme):
    model, x = MLP().double().requires_grad_(False), X.double()
    stats = calibrated(model, x, 0.5 * x)
    seen = {k.removesuffix(":input"): v["minmax"].range() for k, v in stats.items()}

    def linear(layer, name, x):
        x = by_hand(scheme, x, *map(float, seen[name]))
        return F.linear(x, weight_by_hand(scheme, layer.weight), layer.bias)

    wanted = linear(model.down, "down", F.gelu(linear(model.up, "up", x)))
    gm = rewritten(model, x, scheme, stats, to="quantized")
    assert stage(gm) == "reference" and not torch.equal(gm(x), model(x))
    torch.testing.assert_close(gm(x), wanted, rtol=1e-10, atol=1e-10)
    reference = gm(x)
    through(gm, passes.fold_qparams, passes.fuse, passes.hand_over, passes.merge)
    torch.testing.assert_close(gm(x), reference, rtol=1e-13, atol=1e-13)
    found = count(gm)
    assert found["fx.linear"] == found["fx.quantize_static"] == 2
    assert not found.keys() & {"fx.dequantize", "fx.quantize", "fx.static_qparams", "gelu"}
    down = calls(gm, ops.quantize_static.default)[1]
    assert down.args[0].target is ops.linear.default, "codes are made of the epilogue's output"


@pytest.mark.parametrize("smooth", [False, 0.5])
@pytest.mark.parametrize("scheme", STATIC)
@torch.no_grad()
def test_the_kernels_of_this_machine_compute_what_the_reference_means(scheme, smooth):
    model = Call(lambda m, x: F.relu(F.linear(x, m.w, m.b)))
    x = torch.randn(3, 7, 64)
    stats = calibrated(model, x)
    reference = rewritten(model, x, scheme, stats, smooth=smooth, to="quantized")
    gm = rewritten(model, x, scheme, stats, smooth=smooth, to="verified")
    wanted = reference(x)
    torch.testing.assert_close(gm(x), wanted, rtol=0, atol=1e-6 * float(wanted.abs().max()))
    (layer,) = layers(gm).values()
    assert layer.scheme == scheme and layer.rows == "21"
    assert SCHEMES[scheme].product.family in KERNELS[layer.kernel].families


ON_CPU = ["native_w8a8", "dequantize", "int_mm"] + ["triton_w8a8"] * INTERPRET


@pytest.fixture
def only(monkeypatch):
    """Leave one kernel to choose."""

    def leave(name: str) -> None:
        kernel = KERNELS[name]
        choice = select.Choice(kernel.layout, ((kernel, 0),), {})
        monkeypatch.setattr(lowering, "select", lambda problem: choice)

    return leave


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", ON_CPU)
@torch.no_grad()
def test_what_the_zero_point_adds_is_never_rounded_to_16_bits(kernel, dtype, bias, only):
    """Inputs from 0 to 4 are quantized around -128. Small ones nearly cancel what that adds, some 40
    times the result: rounded to 9 or 12 bits, it would be off by several percent."""
    model = Call(lambda m, x: F.linear(x, m.w, m.b if bias else None))
    with torch.no_grad():
        model.w += 1
        model.b.fill_(0.25)
    model, x = model.to(dtype), (0.1 * torch.rand(20, 64)).to(dtype)
    stats = calibrated(model, torch.rand(9, 64, dtype=dtype) * 4)
    only(kernel)
    gm = rewritten(model, x, "int8static", stats, to="verified")
    ends = stats["w:input"]["minmax"].range()
    x_dq = by_hand("int8static", x.double(), *map(float, ends))
    wanted = x_dq @ weight_by_hand("int8static", model.w.double()).T
    wanted += model.b.double() if bias else 0
    assert (wanted > 1).all()
    rounding = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(gm(x).double(), wanted, rtol=1.1 * rounding, atol=0)


@torch.no_grad()
def test_linears_that_share_an_input_quantize_it_once_and_merge():
    model, x = Block().requires_grad_(False), torch.randn(2, 7, 64)
    stats = calibrated(model, x)
    gm = rewritten(model, x, "int8static", stats, to="fused")
    found = count(gm)
    assert (found["fx.quantize_static"], found["fx.linear"]) == (3, 6)
    assert not found["fx.dequantize"] and not found["fx.quantize"]
    wanted = gm(x)
    through(gm, passes.hand_over, passes.merge)
    assert count(gm)["fx.linear"] == 3
    torch.testing.assert_close(gm(x), wanted)
    through(gm, passes.lower(), passes.verify)
    assert sqnr(gm(x), wanted) > 60
    assert {layer.scheme for layer in layers(gm).values()} == {"int8static"}
    assert layers(gm)["q"].merged == ("q", "k", "v")


@torch.no_grad()
def test_the_range_of_a_shared_input_is_that_of_all_its_layers():
    model = Call(lambda m, x: F.linear(x, m.w) + F.linear(x, m.other) + F.linear(2 * x, m.w))
    stats = calibrated(model, X)
    low, high = (t.clone() for t in stats["w:input"]["channel"].range())
    stats["other:input"]["channel"].high = torch.full((64,), 50.0)
    del stats._found["other:input"]["minmax"]
    gm = rewritten(model, X, "int8static", stats, to="quantized")
    shared, own = (n.args[0] for n in calls(gm, ops.static_qparams.default))
    assert [n.args[0].op for n in calls(gm, ops.quantize_static.default)] == [
        "placeholder",
        "call_function",
    ]
    ends = getattr(gm, shared.target)
    assert torch.equal(
        ends,
        torch.stack(
            [torch.minimum(low, stats["other:input"]["channel"].low), torch.full((64,), 50.0)]
        ),
    )
    assert torch.equal(getattr(gm, own.target), torch.stack([low, high]))


class Spy(torch.fx.Interpreter):
    """Keeps what every node gave."""

    def __init__(self, gm):
        super().__init__(gm)
        self.seen = {}

    def run_node(self, n):
        self.seen[n] = super().run_node(n)
        return self.seen[n]


@pytest.mark.parametrize("residual", [False, True], ids=["absorbed", "division"])
@torch.no_grad()
def test_ranges_are_those_of_the_smoothed_input(residual):
    """Channel 3 is 50 times the others: unsmoothed its range would leave them a handful of codes."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(64)
            self.q, self.k = nn.Linear(64, 32), nn.Linear(64, 64)
            self.norm.weight[3] *= 50
            self.q.weight[:, 3] /= 50
            self.k.weight[:, 3] /= 50

        def forward(self, x):
            y = self.norm(x)
            return torch.cat([self.q(y), self.k(y)], -1), (y if residual else x)

    model, x = Model().requires_grad_(False), torch.randn(40, 64)
    stats = calibrated(model, x)
    gm = rewritten(model, x, "int8static", stats, smooth=0.5)
    spy = Spy(gm)
    spy.run(x)
    (node,) = calls(gm, ops.quantize_static.default)
    values, scale, zero = (spy.seen[n] for n in node.args[:3])
    low, high = values.amin().clamp(max=0), values.amax().clamp(min=0)
    torch.testing.assert_close(scale, ((high - low) / 255).reshape(1), rtol=1e-5, atol=0)
    assert zero.tolist() == [-128 - round(float(low / scale))]
    assert values.abs().amax() < 0.5 * model.norm(x).abs().amax(), "it is not smoothed"
    assert ((y := node.args[0]).target is aten.mul.Tensor) == residual, y.target
    plain = rewritten(model, x, "int8static", stats, smooth=False)
    assert sqnr(gm(x)[0], model(x)[0]) > sqnr(plain(x)[0], model(x)[0]) + 6
    through(gm, passes.lower(), passes.verify)
    before = gm(x)[0]
    model.k.weight[:, 3] *= 16  # smoothing, and the scale with it, follow the weights
    again = rewritten(model, x, "int8static", stats, smooth=0.5, to="verified")
    assert torch.equal(gm(x)[0], again(x)[0]) and not torch.equal(gm(x)[0], before)
    assert sqnr(gm(x)[0], model(x)[0]) > 30


@pytest.mark.parametrize("ranges", ["percentile", "mse"])
@torch.no_grad()
def test_histograms_cut_outliers_off(ranges):
    model = Call(lambda m, x: F.linear(x, m.w))
    x = torch.randn(5000, 64)
    x[7, 7] = 20.0
    stats = calibrated(model, x, kinds=("minmax", "histogram"))
    scale = {}
    for way in ("minmax", ranges):
        gm = rewritten(model, x, "int8static", stats, ranges=way)
        spy = Spy(gm)
        spy.run(x)
        (node,) = calls(gm, ops.quantize_static.default)
        scale[way] = float(spy.seen[node.args[1]])
    assert scale["minmax"] > 20 / 255 and scale[ranges] < 0.85 * scale["minmax"]
    stats = calibrated(model, x)
    with pytest.raises(InvalidOption, match="a histogram among the statistics of w"):
        rewritten(model, x, "int8static", stats, ranges=ranges)
    stats = calibrated(model, x, kinds=("channel", "histogram"))
    with pytest.raises(InvalidOption, match="as that of w is"):
        rewritten(model, x, "int8static", stats, smooth=0.5, ranges=ranges)


def test_a_way_that_there_is_not():
    with pytest.raises(InvalidOption, match="one of minmax, percentile, mse"):
        passes.quantize_weights("int8static", {}, "median")


@torch.no_grad()
def test_statistics_that_do_not_fit():
    model = MLP().requires_grad_(False)
    stats = calibrated(model, X)
    stats["down:input"]["channel"].low = torch.zeros(64)
    with pytest.raises(ShapeMismatch, match=r"statistics of down.*64.*128"):
        rewritten(model, X, "int8static", stats)
    stats = calibrated(model, X)
    stats["down:input"]["channel"].high[5] = float("inf")
    with pytest.raises(NonFiniteStatistics, match="down:input"):
        rewritten(model, X, "int8static", stats)


@torch.no_grad()
def test_a_layer_without_statistics_stays_float_and_says_so():
    model = MLP().requires_grad_(False)
    stats = calibrated(model, X)
    del stats._found["down:input"]
    gm = rewritten(model, X, {"*": "int8static"}, stats)
    up, down = layers(gm).values()
    assert (up.scheme, down.scheme) == ("int8static", None)
    assert down.reason == (
        "int8static needs statistics of its input: fxquant.calibrate with batches that reach it"
    )
    assert count(gm)["linear"] == count(gm)["fx.linear"] == 1
    assert sqnr(gm(X), model(X)) > 30
    # a smoothed input's range is known by channel or not at all
    stats = calibrated(model, X)
    del stats["up:input"]["channel"]
    gm = rewritten(model, X, "int8static", stats, smooth=0.5)
    assert layers(gm)["up"].scheme == "int8static", "nothing smoothed it: the extremes will do"


@torch.no_grad()
def test_schemes_side_by_side():
    """A static and a dynamic layer on one input, and one product in one graph: nothing is mixed up."""
    model = Call(lambda m, x: (F.linear(x, m.w), F.linear(x, m.other), F.linear(x, m.wt.t())))
    stats = calibrated(model, X)
    recipe = {"w": "int8static", "other": "int8dq", "wt": "int8static-sym"}
    reference = rewritten(model, X, recipe, stats, to="quantized")
    gm = rewritten(model, X, recipe, stats, to="verified")
    for found, wanted, y in zip(gm(X), reference(X), model(X), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
        assert sqnr(found, y) > 33
    assert {name: layer.scheme for name, layer in layers(gm).items()} == recipe


@torch.no_grad()
def test_memory_that_is_written_to_in_between_is_quantized_twice():
    def call(m, x):
        x = x.clone()
        y = F.linear(x, m.w)
        x.mul_(0.5)
        return y + F.linear(x, m.other)

    model = Call(call)
    stats = calibrated(model, X)
    gm = rewritten(model, X, "int8static", stats)
    assert count(gm)["fx.quantize_static"] == 2
    assert sqnr(gm(X), model(X)) > 33


@pytest.mark.parametrize("scheme", STATIC)
@torch.no_grad()
def test_regions_and_branches(scheme):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x):
            return torch.cond(x.sum() > 0, lambda x: self.a(x).relu(), lambda x: self.b(x), (x,))

    model = Model().requires_grad_(False)
    stats = calibrated(model, X.abs(), -X.abs())
    gm = rewritten(model, X, scheme, stats, to="verified")
    assert {layer.scheme for layer in layers(gm).values()} == {scheme}
    for x in (X.abs(), -X.abs()):
        assert sqnr(gm(x), model(x)) > 28


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_symbolic_rows_are_dispatched_on_codes(dtype, monkeypatch):
    """Two kernels of one layout: the fallback below 17 rows, an integer product from there on."""
    steps = ((KERNELS["dequantize"], 0), (KERNELS["int_mm"], 17))
    choice = select.Choice(steps[0][0].layout, steps, {})
    monkeypatch.setattr(lowering, "select", lambda problem: choice)
    model, x = (
        Call(lambda m, x: F.relu(F.linear(x, m.w, m.b))).to(dtype),
        torch.rand(40, 64, dtype=dtype),
    )
    stats = calibrated(model, x)
    rows = {"x": {0: torch.export.Dim("rows", min=2)}}
    gm = fxquant.trace(model, (x,), dynamic_shapes=rows)
    for name, one in passes.pipeline("int8static", stats=stats, smooth=False):
        through(gm, one)
        if name == "merged":
            wanted = {n: gm(x[:n]) for n in (3, 16, 17, 40)}
    (node,) = calls(gm, ops.dispatch.default)
    assert node.args[4:] == ("int8dq", "canonical", "dequantize<17;int_mm", "relu", 32, dtype)
    assert value(node.args[0]).dtype == torch.int8 and value(node).dtype == dtype
    rounding = 1.01 * torch.finfo(dtype).eps if dtype == torch.bfloat16 else 1e-5
    for n, y in wanted.items():
        torch.testing.assert_close(gm(x[:n]), y, rtol=rounding, atol=1e-5)


@torch.no_grad()
def test_float64_on_the_fallback():
    model, x = MLP().double().requires_grad_(False), X.double()
    stats = calibrated(model, x)
    reference = rewritten(model, x, "int8static", stats, to="quantized")
    gm = rewritten(model, x, "int8static", stats, to="verified")
    torch.testing.assert_close(gm(x), reference(x), rtol=1e-12, atol=1e-12)


HOPPER = Device(
    name="some Hopper",
    type="cuda",
    bandwidth=4e12,
    peak={"float32": 5e13, "bfloat16": 7e14, "int8": 1.15e15, "float8": 1.2e15},
    launch=3e-6,
    features=frozenset({"sm80", "sm89", "sm90", "hopper"}),
    units=132,
)


@pytest.mark.parametrize("rows", [1, 64, 2048])
@pytest.mark.parametrize("scheme", STATIC)
@torch.no_grad()
def test_a_gpu_runs_the_kernels_of_the_dynamic_scheme(scheme, rows, monkeypatch):
    """Their calls are traced here: codes as they are, one scale for all rows, the zero in the bias."""
    monkeypatch.setattr(lowering, "device_row", lambda device: HOPPER)
    model, x = nn.Linear(1024, 512).bfloat16(), torch.randn(rows, 1024).bfloat16()
    stats = calibrated(model, x)
    kernel, call = {}, {}
    for name in (scheme, SCHEMES[scheme].dynamic):
        gm = rewritten(model, x, name, stats, to="verified")
        (layer,) = layers(gm).values()
        kernel[name], call[name] = (layer.kernel, layer.refused), gm
        assert layer.scheme == name
    assert kernel[scheme] == kernel[SCHEMES[scheme].dynamic]
    assert not count(call[scheme])["fx.dequantize"]
    (quantize,) = calls(call[scheme], ops.quantize_static.default)
    assert value(quantize).dtype == get_scheme(scheme).input.dtype
    assert value(next(iter(reversed(call[scheme].graph.nodes))).args[0][0]).dtype == x.dtype
    assert not calls(call[scheme], aten.new_empty.default), "a stand-in that nothing reads"
