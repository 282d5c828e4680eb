"""hand_over: views move codes, and nothing but views is passed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxquant
from fxquant import passes
from fxquant.graph import value

from .helpers import aten, calls, ops, through

X = torch.randn(6, 64, generator=torch.Generator().manual_seed(1))


class Chain(nn.Module):
    """Two linears and what ``between`` makes of the first one's result."""

    def __init__(self, between, width: int = 64):
        super().__init__()
        self.a, self.b, self.between = nn.Linear(64, 64), nn.Linear(width, 32), between
        self.requires_grad_(False)

    def forward(self, x):
        return self.b(self.between(self.a(x)))


def fused(model, x=X, scheme="int8static"):
    stats = fxquant.calibrate(model, [x], compiled=False, progress=False)
    gm = fxquant.trace(model, (x,))
    through(gm, passes.normalize, passes.quantize_weights(scheme, stats))
    return through(gm, passes.fold_qparams, passes.fuse)


CHAINS = {
    "nothing": (lambda y: y, 64, []),
    "relu": (F.relu, 64, []),
    "view": (lambda y: F.relu(y).view(2, 3, 64), 64, [aten.view.default]),
    "heads": (
        lambda y: y.view(2, 3, 4, 16).transpose(1, 2).reshape(8, 3, 16).permute(1, 0, 2),
        16,
        [aten.view.default, aten.transpose.int, aten.reshape.default, aten.permute.default],
    ),
    "flattened": (lambda y: F.gelu(y).unsqueeze(0).flatten(1), 384, None),
    "slices": (lambda y: y[1:4].expand(2, 3, 64).contiguous(), 64, None),
    "transposed": (lambda y: y.t().contiguous(), 6, None),
}


@pytest.mark.parametrize("scheme", ["int8static", "fp8static"])
@pytest.mark.parametrize("name", CHAINS)
@torch.no_grad()
def test_codes_come_right_out_of_the_producer(name, scheme):
    between, width, moved = CHAINS[name]
    model = Chain(between, width)
    gm = fused(model, scheme=scheme)
    wanted = gm(X)
    through(gm, passes.hand_over)
    assert torch.equal(gm(X), wanted)
    a, b = calls(gm, ops.linear.default)
    quantize = calls(gm, ops.quantize_static.default)[1]
    assert quantize.args[0] is a, "something lies between"
    between = []
    node = b.args[0]
    while node is not quantize:
        assert value(node).dtype.itemsize == 1
        between.append(node.target)
        node = node.args[0]
    assert moved is None or between == moved[::-1]
    through(gm, passes.merge, passes.lower(), passes.verify)
    scale = float(wanted.abs().max())
    torch.testing.assert_close(
        gm(X), wanted, rtol=0, atol=(0.01 if scheme[0] == "i" else 0.1) * scale
    )


STAYS = {
    "arithmetic": lambda y: y.view(2, 3, 64) + 1,
    "another reader": lambda y: (v := y.view(2, 3, 64)) + 0 * v.sum(),
    "a cast": lambda y: y.double().view(2, 3, 64).float(),
    "a reduction": lambda y: y.view(2, 3, 64).amax(0),
}


@pytest.mark.parametrize("name", STAYS)
@torch.no_grad()
def test_what_changes_or_shares_values_is_not_passed(name):
    gm = fused(Chain(STAYS[name]))
    before = gm.code
    assert not passes.hand_over(gm).modified
    assert gm.code == before


@torch.no_grad()
def test_a_view_that_has_another_reader_stays_whole():
    class Model(Chain):
        def forward(self, x):
            y = self.a(x).view(2, 3, 64)
            return self.b(y), y

    gm = fused(Model(None))
    assert not passes.hand_over(gm).modified


@torch.no_grad()
def test_memory_that_is_written_to_is_read_when_it_was():
    def between(y):
        v = y.clone()
        w = v.view(2, 3, 64)
        v.mul_(2)
        return w

    gm = fused(Chain(between))
    wanted = gm(X)
    assert not passes.hand_over(gm).modified
    assert torch.equal(gm(X), wanted)


@torch.no_grad()
def test_dynamic_schemes_have_nothing_to_hand_over():
    model = Chain(lambda y: y.view(2, 3, 64))
    gm = fxquant.trace(model, (X,))
    through(gm, passes.normalize, passes.quantize_weights("int8dq"), passes.fuse)
    assert not passes.hand_over(gm).modified
