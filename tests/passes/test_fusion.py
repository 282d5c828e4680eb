"""fuse: the reference form, its bias and its activation become one fxquant.linear."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxquant
from fxquant import passes
from fxquant.graph import layers, stage

from ..conftest import MLP, Block, sqnr
from .helpers import Call, assert_provenance, aten, calls, count, ops, through, trace

X = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))

ACTIVATIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
}
BIASES = {
    "of the linear": lambda m, x: F.linear(x, m.w, m.b),
    "none": lambda m, x: F.linear(x, m.w),
    "added": lambda m, x: F.linear(x, m.w) + m.b,
    "added on the left": lambda m, x: m.b + F.linear(x, m.w),
    "computed afterwards": lambda m, x: F.linear(x, m.w) + m.b * 2,
}


@pytest.mark.parametrize("scheme", ["int8wo", "int8dq", "int4wo-32", "8da4w-32"])
@pytest.mark.parametrize("activation", ["", *ACTIVATIONS])
@pytest.mark.parametrize("bias", BIASES)
@torch.no_grad()
def test_bias_and_activation_become_one_node(bias, activation, scheme):
    def call(m, x):
        return ACTIVATIONS.get(activation, lambda y: y)(BIASES[bias](m, x))

    gm = trace(Call(call), X, to="reference", scheme=scheme)
    wanted = gm(X)
    through(gm, passes.fuse)
    assert stage(gm) == "fused"
    (node,) = calls(gm, ops.linear.default)
    assert node.args[5:] == (scheme, activation)
    assert (node.args[4] is None) == (bias == "none")
    quantize = 1  # the weight's; what quantized the input is gone
    extra = {"mul": 1} if bias == "computed afterwards" else {}
    outputs = 3 if scheme.startswith("int4wo") else 2
    assert count(gm) == {"fx.quantize": quantize, "getitem": outputs, "fx.linear": 1, **extra}
    # the same operations in the same order, but the bias may be added inside the product
    assert torch.equal(gm(X), wanted) or sqnr(gm(X), wanted) > 120


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_low_precision_rounds_once(dtype):
    """Fused is nearer to float32 than the reference, which rounds after every step."""
    model = Call(lambda m, x: F.gelu(F.linear(x, m.w) + m.b))
    wide = trace(model, X.to(dtype).float(), to="reference")(X.to(dtype).float())
    gm = trace(model.to(dtype), X.to(dtype), to="reference")
    before = sqnr(gm(X.to(dtype)), wide)
    through(gm, passes.fuse)
    y = gm(X.to(dtype))
    assert y.dtype == dtype and sqnr(y, wide) > before > 30


def test_provenance():
    gm = trace(MLP(), X, to="fused")
    up, down = calls(gm, ops.linear.default)
    assert (up.args[6], down.args[6]) == ("gelu", "")
    assert_provenance([up], "up", "self.up(x)")
    assert_provenance([down], "down", "self.down(")


KEPT = {
    "a vector of another length": (lambda m, x: F.linear(x, m.w) + m.b[:1], "add"),
    "an activation": (lambda m, x: F.linear(x, m.w) + x[:, :32], "add"),
    "a residual of the same shape": (lambda m, x: F.linear(x, m.w) + m.w[:5, :32], "add"),
    "with alpha": (lambda m, x: torch.add(F.linear(x, m.w), m.b, alpha=2), "add"),
    "a number": (lambda m, x: F.linear(x, m.w) + 1.5, "add"),
    "a second bias": (lambda m, x: F.linear(x, m.w, m.b) + m.b, "add"),
    "another dtype": (lambda m, x: F.linear(x, m.w) + m.b.double(), "add"),
    "a bias from the input": (lambda m, x: F.linear(x, m.w) + x.mean(0)[:32], "add"),
    "other activations": (lambda m, x: F.sigmoid(F.linear(x, m.w)), "sigmoid"),
    "a subtraction": (lambda m, x: F.linear(x, m.w) - m.b, "sub"),
}


@pytest.mark.parametrize("name", KEPT)
@torch.no_grad()
def test_what_is_no_epilogue_stays(name):
    call, op = KEPT[name]
    gm = trace(Call(call), X, to="reference")
    wanted = gm(X)
    through(gm, passes.fuse)
    assert count(gm)[op] == 1 and count(gm)["fx.linear"] == 1
    assert torch.equal(gm(X), wanted)


@torch.no_grad()
def test_a_value_that_is_read_twice_is_not_swallowed():
    def call(m, x):
        y = F.linear(x, m.w)
        z = y + m.b
        return y, F.relu(z), z

    gm = trace(Call(call), X, to="reference")
    wanted = gm(X)
    through(gm, passes.fuse)
    assert count(gm)["add"] == count(gm)["relu"] == 1
    assert all(torch.equal(a, b) for a, b in zip(gm(X), wanted, strict=True))


@torch.no_grad()
def test_an_activation_is_left_to_merge_where_a_sibling_reads_the_same_input():
    x = torch.randn(2, 7, 64)
    gm = trace(Block(), x, to="reference")
    wanted = gm(x)
    through(gm, passes.fuse)
    assert count(gm)["silu"] == 1
    assert [n.args[6] for n in calls(gm, ops.linear.default)] == [""] * 6
    assert sqnr(gm(x), wanted) > 120


def test_a_sibling_of_the_reference_form_alone_does_not_count():
    """The node that quantizes the input of a dynamic scheme reads x too, until it is removed."""
    gm = trace(lambda m, x: F.relu(F.linear(x, m.w)), X, to="fused", scheme="int8dq")
    assert count(gm)["relu"] == 0


@torch.no_grad()
def test_an_input_that_is_written_to_afterwards_is_read_before():
    def call(m, x):
        x = x * 1.0
        part = x[:2]
        y = F.linear(x, m.w)
        part.add_(1)
        return F.relu(y + m.b), x

    gm = trace(Call(call), X, to="reference")
    wanted = gm(X)
    through(gm, passes.fuse)
    assert count(gm)["relu"] == count(gm)["add"] == 0
    assert sqnr(gm(X)[0], wanted[0]) > 120


@torch.no_grad()
def test_a_dynamic_scheme_whose_input_is_not_its_own_is_left_alone():
    model = MLP().requires_grad_(False)
    gm = trace(model, X, to="reference", scheme="int8dq")
    up = calls(gm, aten.linear.default)[0]
    up.update_arg(0, up.args[0].args[0].args[0].args[0])  # x itself, no longer quantized
    gm.graph.eliminate_dead_code()
    gm.recompile()
    wanted = gm(X)
    through(gm, passes.fuse)
    assert count(gm)["fx.linear"] == 1 and count(gm)["linear"] == 1
    assert layers(gm)["up"].reason == "its input is not quantized as int8dq asks"
    assert sqnr(gm(X), wanted) > 120


@torch.no_grad()
def test_the_linear_of_a_quantized_module_takes_bias_and_activation_too():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.b = nn.Linear(64, 32, bias=False), nn.Parameter(torch.randn(32))

        def forward(self, x):
            return F.gelu(self.fc(x) + self.b)

    model = fxquant.quantize(Model().requires_grad_(False), "int4wo-32")
    gm = trace(model, X, to="fused")
    (node,) = calls(gm, ops.linear.default)
    assert node.args[4].target == "b" and node.args[6] == "gelu"
    assert sqnr(gm(X), model(X)) > 120
