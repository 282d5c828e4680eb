"""Every spelling of a linear becomes one, from Dynamo, torch.export and a plain module."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxquant
from fxquant.errors import CaptureFailed

from .conftest import MLP, sqnr

K, N = 64, 32


class Spelling(nn.Module):
    """A weight [N, K], its transpose [K, N] and a bias, used by ``call``."""

    def __init__(self, call):
        super().__init__()
        self.w = nn.Parameter(torch.randn(N, K) / 8)
        self.wt = nn.Parameter(torch.randn(K, N) / 8)
        self.b = nn.Parameter(torch.randn(N))
        self.call = call
        self.requires_grad_(False)

    def forward(self, x):
        return self.call(self, x)


class Conv1D(nn.Module):
    """The linear of GPT-2: its weight is [in, out]."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(K, N) / 8), nn.Parameter(torch.randn(N))

    def forward(self, x):
        size = (*x.shape[:-1], N)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size)


SPELLINGS = {
    "F.linear": lambda m, x: F.linear(x, m.w, m.b),
    "F.linear no bias": lambda m, x: F.linear(x, m.w),
    "x @ w.T": lambda m, x: x @ m.w.T,
    "x @ w.mT + b": lambda m, x: x @ m.w.mT + m.b,
    "x @ w": lambda m, x: x @ m.wt,
    "matmul transpose": lambda m, x: torch.matmul(x, m.w.transpose(0, 1)),
    "matmul permute": lambda m, x: torch.matmul(x, m.w.permute(1, 0)),
    "addmm": lambda m, x: torch.addmm(m.b, x.reshape(-1, K), m.wt),
    "mm": lambda m, x: torch.mm(x.reshape(-1, K), m.w.t()),
    "half of a weight": lambda m, x: F.linear(x, m.w[: N // 2]),
    "two weights in a row": lambda m, x: F.linear(x, torch.cat([m.w, m.wt.T])),
    "no_grad region": lambda m, x: _no_grad(m, x),
    "in a loop": lambda m, x: _loop(m, x),
}


def _no_grad(m, x):
    with torch.no_grad():
        return F.linear(x, m.w, m.b)


def _loop(m, x):
    for _ in range(3):
        x = x + F.pad(F.linear(x, m.w, m.b), (0, K - N)) / 8
    return x


@pytest.mark.parametrize("rank", [2, 3, 4])
@pytest.mark.parametrize("name", SPELLINGS)
@torch.no_grad()
def test_spelling(name, rank, graphs):
    model = Spelling(SPELLINGS[name])
    x = torch.randn(*(2, 3, 4)[: rank - 1], K)
    report = fxquant.explain(model, x, options={"scheme": "int8wo"})
    (layer,) = [x for x in report.layers if "in no compiled graph" not in x.reason]
    assert layer.scheme == "int8wo" and layer.uses == (3 if "loop" in name else 1)
    run = torch.compile(model, backend="fxquant", options={"scheme": "int8wo"}, fullgraph=True)
    y = run(x)
    assert 38 < sqnr(y, model(x)) < 60
    assert y.stride() == model(x).stride()
    _assert_no_float_product(graphs[-1])
    lowered = _run_pipeline(fxquant.trace(model, (x,)), "int8wo")
    assert 38 < sqnr(lowered(x), model(x)) < 60


def _assert_no_float_product(gm):
    """Each product that is left reads packed weights, and no float parameter."""
    products = ("linear", "mm", "matmul", "addmm")
    for node in gm.graph.nodes:
        if node.op == "call_function" and str(node.target).split(".")[-2:][0] in products:
            assert all(n.op != "placeholder" or "folded" in n.name for n in _sources(node.args[1]))


def _sources(node):
    if node.op == "placeholder":
        yield node
    for n in node.all_input_nodes:
        yield from _sources(n)


def _run_pipeline(gm, scheme):
    for _, one in fxquant.passes.pipeline(scheme):
        one(gm)
    return gm


@torch.no_grad()
def test_conv1d_and_its_name(graphs):
    model = nn.Sequential(nn.LayerNorm(K), Conv1D())
    x = torch.randn(2, 3, K)
    report = fxquant.explain(model, x, options={"scheme": "int4wo-32"})
    assert [(layer.name, layer.scheme) for layer in report.layers] == [("1", "int4wo-32")]
    run = torch.compile(model, backend="fxquant", options={"scheme": "int8wo"}, fullgraph=True)
    assert 38 < sqnr(run(x), model(x)) < 60


@torch.no_grad()
def test_tied_head_is_quantized_and_the_embedding_is_not(graphs):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(50, K)
            self.head = nn.Linear(K, 50, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens):
            return self.head(self.embed(tokens))

    model = Tied()
    tokens = torch.randint(50, (2, 7))
    report = fxquant.explain(model, tokens)
    assert [layer.name for layer in report.quantized] == ["head"]
    run = torch.compile(model, backend="fxquant", options={"scheme": "int8wo"}, fullgraph=True)
    assert 38 < sqnr(run(tokens), model(tokens)) < 60


@torch.no_grad()
def test_cond_bodies_are_quantized(graphs):
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(K, K), nn.Linear(K, K)

        def forward(self, x):
            return torch.cond(x.sum() > 0, self.a, lambda x: self.b(x) * 2, (x,))

    model = Branch().requires_grad_(False)
    run = torch.compile(model, backend="fxquant", options={"scheme": "int8wo"}, fullgraph=True)
    for x in (torch.rand(5, K), -torch.rand(5, K)):
        assert 38 < sqnr(run(x), model(x)) < 60
    model.b.weight.mul_(-1)
    assert 38 < sqnr(run(x), model(x)) < 60
    report = fxquant.explain(model, x, options={"scheme": "int8wo"})
    assert {layer.name for layer in report.quantized} == {"a", "b"}


@torch.no_grad()
def test_autocast_computes_in_its_dtype(graphs):
    class Autocast(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(K, N)

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                y = self.fc(x)
            return y, self.fc(x)

    model = Autocast()
    x = torch.randn(5, K)
    run = torch.compile(model, backend="fxquant", options={"scheme": "int8wo"}, fullgraph=True)
    for y, wanted in zip(run(x), model(x), strict=True):
        assert y.dtype == wanted.dtype
        assert 34 < sqnr(y, wanted) < 60
    (layer,) = fxquant.explain(model, x).layers
    assert layer.uses == 2 and layer.scheme


@torch.no_grad()
def test_what_is_not_a_parameter_stays_float_and_is_reported(graphs):
    class Free(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(K, K)

        def forward(self, x, w):
            return F.linear(self.fc(x), w)

    model, x, w = Free(), torch.randn(5, K), torch.randn(N, K)
    report = fxquant.explain(model, x, w)
    assert [layer.name for layer in report.quantized] == ["fc"]
    assert report.unquantized[0].reason == "its weight is not a parameter or a buffer"
    run = torch.compile(model, backend="fxquant", options={"scheme": "int8wo"}, fullgraph=True)
    assert 38 < sqnr(run(x, w), model(x, w)) < 60


@torch.no_grad()
def test_graph_breaks_keep_names(graphs):
    class Breaks(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = MLP(), MLP(width=32)

        def forward(self, x):
            x = self.first(x)
            torch._dynamo.graph_break()
            return self.second(x)

    model, x = Breaks(), torch.randn(5, K)
    report = fxquant.explain(model, x)
    assert report.graphs == 2
    names = {layer.name for layer in report.quantized}
    assert names == {"first.up", "first.down", "second.up", "second.down"}
    run = torch.compile(model, backend="fxquant", options={"scheme": "int8wo"})
    assert sqnr(run(x), model(x)) > 36


@torch.no_grad()
def test_exported_program_and_dynamic_shapes(graphs):
    model, x = MLP(), torch.randn(5, K)
    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: rows},))
    lowered = _run_pipeline(fxquant.trace(program), "8da4w-32")
    for m in (2, 5, 70):
        y = torch.randn(m, K)
        assert 15 < sqnr(lowered(y), model(y)) < 40


def test_what_export_refuses_is_a_named_error():
    class Branches(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(CaptureFailed):
        fxquant.trace(Branches(), (torch.randn(3),))
