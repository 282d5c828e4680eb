"""What a gate makes for one quantized input alone is quantized as it is made."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxquant
from fxquant import passes

from ..conftest import sqnr
from .helpers import calls, count, ops, through

X = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))


class SwiGLU(nn.Module):
    def __init__(self, combine=lambda a, b: F.silu(a) * b):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(64, 96), nn.Linear(64, 96), nn.Linear(96, 64)
        self.combine = combine
        self.requires_grad_(False)

    def forward(self, x):
        return self.down(self.combine(self.gate(x), self.up(x)))


def lowered(model, scheme, x=X, dynamic=False):
    shapes = ({0: torch.export.Dim("rows", min=2)},) if dynamic else None
    captured = fxquant.trace(model, (x,), dynamic_shapes=shapes)
    steps = itertools.takewhile(lambda step: step[0] != "lowered", passes.pipeline(scheme))
    fused = through(captured, *(one for name, one in steps if name != "gated"))
    wanted = fused(x)
    gm = through(fused, passes.lower(), passes.verify)
    return (
        gm,
        [n.args[3] if len(n.args) > 3 else "" for n in calls(gm, ops.quantize.default)],
        wanted,
    )


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("scheme", ["int8dq", "8da4w-32"])
@pytest.mark.parametrize("combine", [lambda a, b: F.silu(a) * b, lambda a, b: a * F.silu(b)])
@torch.no_grad()
def test_the_product_is_never_written(combine, scheme, dynamic):
    gm, gates, wanted = lowered(SwiGLU(combine), scheme, dynamic=dynamic)
    assert gates == ["", "silu_mul"]
    gm.graph.eliminate_dead_code()
    assert not count(gm).keys() & {"silu", "split_with_sizes"}
    assert sqnr(gm(X), wanted) > 45  # a code on a half may fall to either side


class Whole(nn.Module):
    """One linear for both, and halves in the user's own words."""

    def __init__(self, combine):
        super().__init__()
        self.both, self.down = nn.Linear(64, 192), nn.Linear(96, 64)
        self.combine = combine
        self.requires_grad_(False)

    def forward(self, x):
        return self.down(self.combine(self.both(x)))


def chunked(h):
    a, b = h.chunk(2, -1)
    return b * F.gelu(a)


def split(h):
    a, b = h.split(96, -1)
    return F.gelu(a) * b


def zeroed(h):
    a, b = h.split([96, 96], -1)
    y = F.gelu(a) * b
    h.zero_()
    return y


def filled(h):
    a, b = h.split([96, 96], -1)
    y = F.gelu(a) * b
    h[:, :100].fill_(3.0)
    return y


@pytest.mark.parametrize(
    "combine, gate",
    [(chunked, "gelu_mul"), (split, "gelu_mul"), (zeroed, ""), (filled, "")],
)
@torch.no_grad()
def test_halves_in_the_users_words(combine, gate):
    """Where their memory is written to, what the gate made is made where it was."""
    gm, gates, wanted = lowered(Whole(combine), "int8dq")
    assert gates == ["", gate]
    assert sqnr(gm(X), wanted) > 45


@pytest.mark.parametrize(
    "combine",
    [
        lambda a, b: (y := F.silu(a) * b) + y.relu(),
        lambda a, b: F.silu(a) * b + 1,
        lambda a, b: F.silu(a) * b * 2,
        lambda a, b: F.silu(a) * 3,
    ],
    ids=["read again", "shifted", "scaled", "a number"],
)
@torch.no_grad()
def test_anything_else_stays(combine):
    gm, gates, wanted = lowered(SwiGLU(combine), "int8dq")
    assert gates == ["", ""]
    assert sqnr(gm(X), wanted) > 45  # a code on a half may fall to either side


@torch.no_grad()
def test_floats_need_no_codes():
    gm, gates, _ = lowered(SwiGLU(), "int8wo")
    assert gates == [] and count(gm)["silu"] == 1


@pytest.mark.parametrize("dynamic", [False, True])
@torch.no_grad()
def test_through_inductor(dynamic):
    """As the lowered graph computes it, which is the reference's arithmetic."""
    model = SwiGLU(lambda a, b: F.gelu(a, approximate="tanh") * b)
    torch.compiler.reset()
    run = fxquant.compile(model, "int8dq", dynamic=dynamic)
    for rows in (5, 9) if dynamic else (5,):
        x = torch.randn(rows, 64)
        gm, gates, _ = lowered(model, "int8dq", x)
        assert gates == ["", "gelu_tanh_mul"]
        assert sqnr(run(x), gm(x)) > 45


@torch.no_grad()
def test_the_meaning_is_the_gate_then_the_codes():
    whole = torch.randn(4, 128)
    found = ops.quantize(whole, "8da4w-32", "input", "gelu_mul")
    first, second = whole.chunk(2, -1)
    for a, b in zip(found, ops.quantize(F.gelu(first) * second, "8da4w-32", "input"), strict=True):
        assert torch.equal(a, b)
