"""Static schemes: ranges from calibration, one quantization a value, codes from layer to layer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxquant import passes
from fxquant.errors import (
    InvalidOption,
    NonFiniteStatistics,
    ShapeMismatch,
)
from fxquant.graph import layers, stage
from fxquant.lowering.kernel import KERNELS
from fxquant.scheme import SCHEMES

from ..conftest import MLP, Block, sqnr
from .by_hand import by_hand, weight_by_hand
from .helpers import Call, aten, calibrated, calls, count, ops, rewritten, through

STATIC = [name for name, row in SCHEMES.items() if row.static]
X = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))


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
