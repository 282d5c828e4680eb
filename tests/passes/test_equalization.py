"""equalize: the float model is what it was, outliers are gone, whatever the architecture."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxquant
from fxquant import Stats, passes
from fxquant.observers import collecting
from fxquant.passes.equalization import equalize, groups_of

from ..conftest import sqnr
from ..test_architectures import ARCHITECTURES, made
from .helpers import aten, calls, count, ops, through, trace


def observed(model: nn.Module, *args) -> Stats:
    stats = Stats({"input": ["channel"]})
    gm = through(trace(model, *args, to="float"), passes.insert_observers)
    with collecting(stats.add):
        gm(*args)
    return stats


class Decoder(nn.Module):
    """RMSNorm written out, q/k/v, gate times up, a residual: what decoders are made of."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.norm = nn.Parameter(torch.rand(width) + 0.5)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.last = nn.LayerNorm(width)
        self.gate, self.up = nn.Linear(width, 2 * width), nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x):
        y = self.norm * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)
        q, k, v = self.q(y), self.k(y), self.v(y)
        x = x + self.o(F.scaled_dot_product_attention(q, k, v))
        y = F.dropout(self.last(x), 0.1, self.training)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def decoder(dtype: torch.dtype = torch.float64) -> Decoder:
    torch.manual_seed(0)
    return Decoder().to(dtype).eval().requires_grad_(False)


def test_groups_and_what_absorbs_them_are_read_from_the_graph():
    gm = trace(decoder(), torch.randn(2, 5, 32, dtype=torch.float64), to="float")
    found = {tuple(g.names): [str(n.target) for n, _ in g.absorbs] for g in groups_of(gm)}
    assert found == {
        ("q", "k", "v"): ["aten.mul.Tensor"],
        ("o",): ["aten.linear.default"] * 2,
        ("gate", "up"): ["aten.layer_norm.default"] * 2,
        ("down",): ["aten.linear.default"] * 2,
    }
    (down,) = [g for g in groups_of(gm) if g.names == ["down"]]
    assert fxquant.graph.layer_of(down.absorbs[0][0]) == "up", "not gate: silu is in the way"


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
@torch.no_grad()
def test_the_float_model_is_equal_and_scales_are_smooth_quants(alpha):
    model, x = decoder(), torch.randn(2, 5, 32, dtype=torch.float64)
    x[..., 3] *= 50
    stats, gm = observed(model, x), trace(model, x, to="float")
    through(gm, equalize(stats, alpha))
    torch.testing.assert_close(gm(x), model(x), rtol=1e-12, atol=1e-12)
    seen = stats["gate:input"]["channel"].absmax
    largest = torch.stack([m.weight.abs().amax(0) for m in (model.gate, model.up)]).amax(0)
    expected = seen.float().pow(alpha) / largest.float().pow(1 - alpha)
    norm = calls(gm, aten.layer_norm.default)[0]
    weight = run_node(gm, norm.args[2], x)
    torch.testing.assert_close(model.last.weight / weight, expected.double(), rtol=1e-5, atol=0)
    again = Stats({"input": ["channel"]})
    watched = through(gm, passes.insert_observers)
    with collecting(again.add):
        watched(x)
    before, smooth = (s["q:input"]["channel"].absmax for s in (stats, again))
    heaviest = torch.stack([m.weight.abs().amax(0) for m in (model.q, model.k, model.v)]).amax(0)
    expected = (before * heaviest).pow(1 - alpha)  # equation 4, on the activations' side
    torch.testing.assert_close(smooth, expected, rtol=1e-5, atol=0)


def run_node(gm, node, *args):
    seen = {}

    class Spy(torch.fx.Interpreter):
        def run_node(self, n):
            seen[n] = super().run_node(n)
            return seen[n]

    Spy(gm).run(*args)
    return seen[node]


@torch.no_grad()
def test_a_value_that_others_read_is_divided_by_a_node_of_its_own():
    class Post(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.fc = nn.LayerNorm(16), nn.Linear(16, 16)

        def forward(self, x):
            y = self.norm(x)
            return y + self.fc(y)

    model, x = Post().double().requires_grad_(False), torch.randn(3, 16, dtype=torch.float64)
    gm = trace(model, x, to="float")
    (group,) = groups_of(gm)
    assert group.absorbs == []
    through(gm, equalize(observed(model, x)))
    torch.testing.assert_close(gm(x), model(x), rtol=1e-12, atol=1e-12)
    (linear,) = calls(gm, aten.linear.default)
    assert linear.args[0].target is aten.mul.Tensor
    assert calls(gm, aten.layer_norm.default)[0].args[2].op in ("placeholder", "get_attr")


@torch.no_grad()
def test_channels_of_zeros_keep_a_scale_of_one():
    model = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 8)).double().requires_grad_(False)
    model[0].weight[2], model[0].bias[2] = 0.0, 0.0
    model[1].weight[:, 5] = 0.0
    x = torch.randn(3, 16, dtype=torch.float64)
    gm = through(trace(model, x, to="float"), equalize(observed(model, x)))
    y = gm(x)
    assert torch.isfinite(y).all()
    torch.testing.assert_close(y, model(x), rtol=1e-12, atol=1e-12)


def powers_of_two(stats: Stats) -> Stats:
    """Statistics of as many channels, each a power of two: no product with these is ever rounded."""
    random, found = torch.Generator().manual_seed(5), Stats({"input": ["channel"]})
    for name, observers in stats.items():
        exponents = torch.randint(-6, 7, observers["channel"].absmax.shape, generator=random)
        found.add(name, torch.exp2(exponents.double())[None])
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.__name__)
@torch.no_grad()
def test_any_architecture_is_what_it_was(architecture):
    """In float64: to the last bit where scales are powers of two (alpha 1: the statistics themselves), and
    to the rounding of float32, which scales have, at any other. Something takes up a scale in all of
    them: a norm, or in gemma, whose norms end in a cast to another tensor's dtype, up before down."""
    model, inputs = made(architecture)
    inputs = {k: x.double() if x.is_floating_point() else x for k, x in inputs.items()}
    seen = {"groups": 0, "absorbed": 0, "smoothed": 0}

    def float_graph(gm, examples):
        return through(fxquant.capture.from_dynamo(gm, examples), passes.normalize)

    def backend(gm, examples):
        watched, stats = float_graph(gm, examples), Stats({"input": ["channel"]})
        groups = groups_of(watched)
        seen["groups"] += len(groups)
        seen["absorbed"] += sum(bool(group.absorbs) for group in groups)
        inside = [node.meta["val"].dtype for group in groups for node, _ in group.absorbs]
        rounding = 1e-12 if torch.float32 not in inside else 1e-7  # gemma's norm is float32 inside
        through(watched, passes.insert_observers)
        with collecting(stats.add):
            expected = watched(*examples)
        for found, alpha, error in ((powers_of_two(stats), 1.0, 0.0), (stats, 0.5, rounding)):
            smoothed = through(float_graph(gm, examples), equalize(found, alpha))
            for a, b in zip(smoothed(*examples), expected, strict=True):
                if isinstance(a, torch.Tensor) and a.is_floating_point() and a.numel():
                    assert a.dtype == b.dtype
                    assert float((a - b).abs().max()) <= error * float(b.abs().max()), alpha
        linears = calls(smoothed, aten.linear.default)
        seen["smoothed"] += sum("smoothed" in n.meta["custom"]["fxquant"] for n in linears)
        return smoothed.forward

    torch.compiler.reset()
    torch.compile(model.double(), backend=backend)(**inputs)
    torch.compiler.reset()
    assert seen["groups"] >= 3 and seen["smoothed"] >= 4 and seen["absorbed"] >= 1


@torch.no_grad()
def test_transposed_weights_come_before_what_is_computed_from_them_and_regions_stay(caplog):
    class Products(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.w = nn.LayerNorm(16), nn.Parameter(torch.randn(16, 8))
            self.fc = nn.Linear(8, 8)

        def forward(self, x):
            y = torch.addmm(self.fc.bias, self.norm(x), self.w)
            with torch.autocast("cpu", torch.bfloat16):
                return self.fc(torch.relu(y))

    model, x = Products().requires_grad_(False), torch.randn(3, 16)
    gm = trace(model, x, to="float")
    assert [len(g.absorbs) for g in groups_of(gm)] == [2], "the other one is in autocast's region"
    with caplog.at_level("WARNING"):
        through(gm, equalize(observed(model, x)))
    assert "inside of a region: fc" in caplog.text
    assert sqnr(gm(x).float(), model(x).float()) > 40, "bfloat16 rounds in the region"


@torch.no_grad()
def test_int8_wins_back_what_an_outlier_cost():
    """One channel of the input 60 times the others, exactly undone in the weights that read it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(128), nn.Linear(128, 64)).requires_grad_(False)
    model[0].weight[7] *= 60
    model[1].weight[:, 7] /= 60
    x = torch.randn(64, 128)
    expected = model(x)
    stats = observed(model, x)
    plain = through(trace(model, x, to="float"), passes.quantize_weights("int8dq"))(x)
    gm = through(trace(model, x, to="float"), equalize(stats), passes.quantize_weights("int8dq"))
    smoothed = gm(x)
    assert sqnr(plain, expected) < 25 and sqnr(smoothed, expected) > 36
    through(gm, passes.fold_qparams, passes.fuse)
    assert count(gm)["fx.linear"] == 1 and not calls(gm, ops.quantize.default)
    torch.testing.assert_close(gm(x), smoothed, rtol=1e-4, atol=1e-4)


def test_weight_only_schemes_and_layers_without_statistics_are_left_alone(caplog):
    model, x = decoder(), torch.randn(2, 5, 32, dtype=torch.float64)
    gm = trace(model, x, to="float")
    before = count(gm)
    assert not equalize(observed(model, x), 0.5, "int8wo")(gm).modified
    with caplog.at_level("WARNING"):
        assert not equalize(Stats(), 0.5)(gm).modified
    assert "want of statistics: q, k, v" in caplog.text and count(gm) == before
    for alpha in (1.5, -0.1, "auto", {"q": 2}):
        with pytest.raises(fxquant.FxQuantError, match="smooth"):
            equalize(Stats(), alpha)


class Reads(nn.Module):
    """Two linears that read what ``between`` may change, behind a norm."""

    def __init__(self, between, mask=None):
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
        self.between, self.mask = between, mask

    def forward(self, x):
        y = self.norm(x)
        y = y if self.mask is None else x * self.mask
        first = self.a(y)
        self.between(y)
        return first, self.b(y)


ODD = {
    "written between": (lambda y: y[:, :3].mul_(2), None),
    "set between": (lambda y: y[:, 0].fill_(7), None),
    "a bool mask": (lambda y: None, torch.arange(16) % 3 > 0),
    "whole numbers": (lambda y: None, torch.arange(16) % 5),
    "a tiny gain": (lambda y: None, torch.where(torch.arange(16) == 3, 1e-40, 1.0)),
}


@pytest.mark.parametrize("case", ODD)
@torch.no_grad()
def test_values_that_change_and_vectors_that_are_not_floats(case):
    between, mask = ODD[case]
    model, x = Reads(between, mask).requires_grad_(False), torch.randn(4, 16) * 9
    expected = model(x)
    gm = through(trace(model, x, to="float"), equalize(observed(model, x), 1.0))
    for a, b in zip(gm(x), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_statistics_of_another_width_are_named():
    model, x = decoder(), torch.randn(2, 5, 32, dtype=torch.float64)
    stats = Stats({"input": ["channel"]})
    stats.add("q:input", torch.randn(3, 7))
    with pytest.raises(fxquant.FxQuantError, match=r"statistics of q has shape \(7,\)"):
        equalize(stats)(trace(model, x, to="float"))
