"""normalize: products with a constant matrix become aten.linear, and layers get their names."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxquant
from fxquant import passes
from fxquant.graph import layers, value

from ..conftest import MLP
from .helpers import Call, assert_provenance, aten, calls, count, exact, integers, through, trace

BECOME_LINEAR = {
    "matmul with a transpose": lambda m, x: x @ m.w.T,
    "matmul with .mT": lambda m, x: x @ m.w.mT,
    "matmul with .t()": lambda m, x: x @ m.w.t(),
    "matmul with transpose(-1, 0)": lambda m, x: x @ m.w.transpose(-1, 0),
    "matmul with permute": lambda m, x: x @ m.w.permute(1, 0),
    "matmul, weight [in, out]": lambda m, x: x @ m.wt,
    "mm": lambda m, x: torch.mm(x, m.wt),
    "addmm": lambda m, x: torch.addmm(m.b, x, m.wt),
    "addmm with a transpose": lambda m, x: torch.addmm(m.b, x, m.w.t()),
}


@pytest.mark.parametrize("name", BECOME_LINEAR)
def test_becomes_linear(name):
    x = integers(5, 64)
    model = exact(Call(BECOME_LINEAR[name]))
    gm = trace(model, x, to="float")
    found = count(gm)
    assert found["linear"] == 1
    assert not found.keys() & {"matmul", "mm", "addmm"}
    transposed = name.endswith("transpose") or ".t" in name or ".mT" in name or "permute" in name
    transposed |= "transpose" in name
    (linear,) = calls(gm, aten.linear.default)
    weight = linear.args[1]
    if transposed:  # the transpose is undone, not doubled
        assert weight.op == "get_attr" and weight.target == "w"
        assert not found.keys() & {"t", "numpy_T", "mT", "transpose", "permute"}
    else:
        assert weight.target is aten.t.default and weight.args[0].target == "wt"
    assert torch.equal(gm(x), model(x))
    assert (linear.args[2] is not None) == ("addmm" in name)


STAY = {
    "addmm with alpha": lambda m, x: torch.addmm(m.b, x, m.wt, alpha=2),
    "addmm with beta": lambda m, x: torch.addmm(m.b, x, m.wt, beta=0.5),
    "addmm with a matrix": lambda m, x: torch.addmm(x[:, :32], x, m.wt),
    "the weight on the left": lambda m, x: m.w @ x.T,
    "two weights": lambda m, x: x.sum() + m.w @ m.wt,
    "two activations": lambda m, x: x @ x.T,
    "a vector": lambda m, x: x[0] @ m.wt,
    "a batch of matrices": lambda m, x: x[None] @ torch.stack([m.wt]),
}


@pytest.mark.parametrize("name", STAY)
def test_stays_as_it_is(name):
    x, model = torch.randn(5, 64), Call(STAY[name])
    gm = trace(model, x)
    before, wanted = count(gm), gm(x)
    assert not passes.normalize(gm).modified
    assert count(gm) == before
    assert count(gm)["linear"] == 0 and not layers(gm)
    assert torch.equal(gm(x), wanted)


def test_a_bias_of_one_entry_is_no_bias_of_a_linear():
    class Scalar(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.b = nn.Parameter(torch.randn(64, 32)), nn.Parameter(torch.randn(1))

        def forward(self, x):
            return torch.addmm(self.b, x, self.w)

    x = torch.randn(5, 64)
    model = Scalar()
    gm = trace(model, x, to="float")
    assert count(gm)["linear"] == 0
    assert torch.equal(gm(x), model(x))


def test_once_is_enough():
    gm = trace(lambda m, x: x @ m.w.T, torch.randn(5, 64))
    assert passes.normalize(gm).modified
    before = gm.code
    layers(gm).clear()
    assert not passes.normalize(gm).modified
    assert gm.code == before


def test_the_layers_are_listed():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = MLP()
            self.twice = nn.Linear(32, 32, bias=False)

        def forward(self, x):
            return self.twice(self.twice(self.body(x)))

    gm = trace(Model().bfloat16(), torch.randn(2, 7, 64).bfloat16(), to="float")
    found = layers(gm)
    assert list(found) == ["body.up", "body.down", "twice"]
    up, twice = found["body.up"], found["twice"]
    assert (up.out_features, up.in_features, up.dtype) == (128, 64, "bfloat16")
    assert (up.uses, up.rows, up.reason, up.scheme) == (1, "14", "", None)
    assert up.module_type == "torch.nn.modules.linear.Linear"
    assert (twice.uses, twice.out_features, twice.in_features) == (2, 32, 32)


def test_symbolic_rows_are_listed_as_such():
    rows = torch.export.Dim("rows", min=2)
    gm = fxquant.trace(MLP(), (torch.randn(5, 64),), dynamic_shapes={"x": {0: rows}})
    passes.normalize(gm)
    assert not layers(gm)["up"].rows.isdigit()
    assert gm(torch.randn(9, 64)).shape == (9, 32)


def test_a_weight_that_is_computed_from_the_input_is_reported():
    gm = trace(lambda m, x: F.linear(F.linear(x, m.w), x[:, :32].contiguous()), torch.randn(5, 64))
    through(gm, passes.normalize)
    first, second = layers(gm).values()
    assert first.reason == ""
    assert second.reason == "its weight is not a parameter or a buffer"


def test_a_buffer_is_a_weight_and_one_that_the_graph_writes_is_not():
    class Buffers(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("fixed", torch.randn(32, 64))
            self.register_buffer("written", torch.randn(32, 64))

        def forward(self, x):
            self.written.add_(1.0)
            return F.linear(x, self.fixed) + F.linear(x, self.written)

    gm = trace(Buffers(), torch.randn(5, 64), to="float")
    reasons = [layer.reason for layer in layers(gm).values()]
    assert reasons == ["", "its weight is not a parameter or a buffer"]


def test_provenance_of_what_was_rewritten():
    class Conv1D(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = (
                nn.Parameter(torch.randn(64, 32)),
                nn.Parameter(torch.zeros(32)),
            )

        def forward(self, x):
            return torch.addmm(self.bias, x, self.weight)

    model = nn.Sequential(nn.ReLU(), Conv1D()).requires_grad_(False)
    gm = trace(model, torch.randn(5, 64), to="float")
    (linear,) = calls(gm, aten.linear.default)
    assert linear.meta["custom"]["fxquant"]["layer"] == "1"
    assert linear.meta["custom"]["fxquant"]["type"].endswith("Conv1D")
    for node in (linear, linear.args[1]):
        assert "torch.addmm(self.bias" in node.meta["stack_trace"]
        assert next(reversed(node.meta["nn_module_stack"].values()))[0] == "1"
    assert layers(gm)["1"].module_type.endswith("Conv1D")


def test_provenance_of_a_linear():
    gm = trace(MLP(), torch.randn(5, 64), to="float")
    up, down = calls(gm, aten.linear.default)
    assert_provenance([up], "up", "self.up(x)")
    assert_provenance([down], "down", "self.down(")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_autocast_casts_is_written_out(dtype, graphs):
    """Only Dynamo's graphs hold autocast as a region: the linear's operands get their casts."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(64, 32)

        def forward(self, x):
            with torch.autocast("cpu", dtype):
                return self.fc(x)

    found = []

    def look(gm, inputs):
        canonical = fxquant.capture.from_dynamo(gm, inputs)
        passes.normalize(canonical)
        (linear,) = calls(canonical, aten.linear.default)
        found.extend(value(a).dtype for a in linear.args)
        assert {a.target for a in linear.args} == {aten.to.dtype}
        return gm.forward

    x, model = torch.randn(5, 64), Model().requires_grad_(False)
    y = torch.compile(model, backend=look, fullgraph=True)(x)
    assert y.dtype == dtype and found == [dtype] * 3
