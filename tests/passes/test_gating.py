"""gate: the activation of one half times the other one becomes an epilogue, where the kernels have it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxquant import passes
from fxquant.graph import layers, value
from fxquant.lowering import select
from fxquant.lowering.dequantize import LAYOUT
from fxquant.lowering.kernel import KERNELS, Device, Kernel
from fxquant.ops import GATES, finish
from fxquant.passes import lowering

from ..conftest import sqnr
from .helpers import aten, calls, count, ops, through, trace

X = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
DEVICE = Device(name="gates", type="none", bandwidth=1e10, peak={"float32": 1e11}, launch=1e-6)


def gating(scheme, x, packed, bias, epilogue):
    q = LAYOUT.unpack(scheme, packed, 0, 0)
    return finish(F.linear(x, scheme.weight.dequantize(q, x.dtype), bias), epilogue)


@pytest.fixture(params=["all", "some"])
def has_gates(request, monkeypatch):
    """Whether the kernel that is chosen has ``silu_mul``."""
    fallback = KERNELS["dequantize"]
    kernel = Kernel(
        name="gating",
        families=frozenset(["w8a16"]),
        device="none",
        layout=LAYOUT,
        compute=gating,
        cost=lambda problem: fallback.cost(problem) / 2,
        epilogues=frozenset(["silu_mul"] if request.param == "all" else []),
    )
    monkeypatch.setattr(lowering, "device_row", lambda device: DEVICE)
    monkeypatch.setitem(KERNELS, "gating", kernel)
    select._select.cache_clear()
    yield request.param == "all"
    select._select.cache_clear()


class Gate(nn.Module):
    def __init__(self, combine, widths=(48, 48)):
        super().__init__()
        self.a, self.b = (nn.Linear(64, width) for width in widths)
        self.combine = combine
        self.requires_grad_(False)

    def forward(self, x):
        return self.combine(self.a(x), self.b(x))


def merged(combine, **settings):
    return through(trace(Gate(combine, **settings), X, to="fused"), passes.merge)


@pytest.mark.parametrize(
    "combine",
    [
        lambda a, b: F.silu(a) * b,
        lambda a, b: b * F.silu(a),
        lambda a, b: F.silu(a).mul(b) + 1,
        lambda a, b: a * F.silu(b),
    ],
    ids=["gate first", "gate last", "method", "the second one's"],
)
@torch.no_grad()
def test_the_halves_are_never_written(combine, has_gates):
    gm = merged(combine)
    wanted = gm(X)
    through(gm, passes.gate)
    (node,) = calls(gm, ops.linear.default)
    found = count(gm)
    if not has_gates:
        assert node.args[6] == "" and found["silu"] == found["mul"] == 1
        return
    assert node.args[6] == "silu_mul" and value(node).shape == (5, 48)
    assert not found.keys() & {"silu", "mul", "split_with_sizes"}
    assert sqnr(gm(X), wanted) > 110
    through(gm, passes.lower(), passes.verify)
    assert layers(gm)["a"].kernel == layers(gm)["b"].kernel == "gating"
    assert sqnr(gm(X), wanted) > 110


OTHERS = {
    "read again": lambda a, b: F.silu(a) * b + b,
    "activation read again": lambda a, b: (y := F.silu(a)) * b + y,
    "squared": lambda a, b: F.silu(a) * F.silu(a) + b,
    "scaled": lambda a, b: F.silu(a) * 2 + b,
    "a sum": lambda a, b: F.silu(a) + b,
    "no activation": lambda a, b: a * b,
    "widened": lambda a, b: F.silu(a) * b.double(),
    "no such kernel": lambda a, b: F.gelu(a) * b,
}


class Halves(nn.Module):
    """One linear, and a split of the user's own along ``dim``."""

    def __init__(self, dim: int):
        super().__init__()
        self.linear, self.dim = nn.Linear(64, 64).requires_grad_(False), dim

    def forward(self, x):
        y = self.linear(x)
        a, b = y.split([y.shape[self.dim] // 2] * 2, self.dim)
        return F.silu(a) * b


@pytest.mark.parametrize("dim, gated", [(-1, True), (2, True), (0, False), (1, False)])
@torch.no_grad()
def test_halves_of_the_rows_are_no_gate(dim, gated, has_gates):
    x = torch.randn(32, 32, 64)
    gm = trace(Halves(dim), x, to="fused")
    wanted = gm(x)
    through(gm, passes.gate)
    (node,) = calls(gm, ops.linear.default)
    assert node.args[6] == ("silu_mul" if gated and has_gates else "")
    through(gm, passes.lower(), passes.verify)
    assert sqnr(gm(x), wanted) > 100


@torch.no_grad()
def test_a_symbolic_number_of_rows_is_halved():
    model = Halves(0)
    torch.compiler.reset()
    run = torch.compile(model, backend="fxquant", options={"scheme": "int8wo"}, dynamic=True)
    for rows in (6, 10):
        x = torch.randn(rows, 3, 64)
        assert sqnr(run(x), model(x)) > 30


@pytest.mark.parametrize("name", OTHERS)
@torch.no_grad()
def test_anything_else_stays(name, has_gates):
    gm = merged(OTHERS[name])
    before, wanted = count(gm), gm(X)
    through(gm, passes.gate)
    assert count(gm) == before and torch.equal(gm(X), wanted)


@pytest.mark.parametrize("width", [40, 8])
@torch.no_grad()
def test_halves_of_whole_tiles_alone(width, has_gates):
    gm = through(merged(lambda a, b: F.silu(a) * b, widths=(width, width)), passes.gate)
    assert calls(gm, aten.split_with_sizes.default)


@torch.no_grad()
def test_the_reference_of_every_gate():
    y = torch.randn(3, 8, dtype=torch.float64)
    known = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}
    known["gelu_tanh"] = lambda x: F.gelu(x, approximate="tanh")
    assert set(GATES.values()) == set(known)
    for epilogue, name in GATES.items():
        assert torch.equal(finish(y, epilogue), known[name](y[:, :4]) * y[:, 4:])
