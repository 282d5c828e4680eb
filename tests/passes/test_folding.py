"""fold_qparams: what depends on parameters alone is computed once for each state of them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxquant import passes, weights
from fxquant.errors import NonFiniteWeight
from fxquant.graph import bodies_of, stage

from ..conftest import MLP, sqnr
from .helpers import Call, assert_provenance, calls, count, ops, through, trace

X = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def runs(monkeypatch) -> list[str]:
    """The layers whose weights were really quantized or packed, in order."""
    found: list[str] = []
    compute = weights.Folded._compute

    def counted(self, *args):
        found.append(self.layer)
        return compute(self, *args)

    monkeypatch.setattr(weights.Folded, "_compute", counted)
    return found


def folded(gm: torch.fx.GraphModule) -> list[torch.fx.Node]:
    return list(gm.graph.find_nodes(op="call_module"))


@pytest.mark.parametrize("scheme", ["int8wo", "int8dq", "int4wo-32", "8da4w-32", "fp8dq"])
@torch.no_grad()
def test_weights_are_quantized_once_and_the_result_is_the_same(scheme, runs):
    model = MLP().requires_grad_(False)
    gm = trace(model, X, to="reference", scheme=scheme)
    wanted, inputs = gm(X), count(gm)["fx.quantize"] - 2
    through(gm, passes.fold_qparams)
    assert stage(gm) == "reference"
    found = count(gm)
    assert (found["folded"], found["fx.quantize"], found["linear"]) == (2, inputs, 2)
    assert found["fx.dequantize"] == 2 + inputs, "a dequantized weight was kept"
    for _ in range(3):
        assert torch.equal(gm(X), wanted)
    assert runs == ["up", "down"]


def test_nothing_but_the_parameter_goes_into_a_fold():
    gm = through(trace(MLP(), X, to="reference"), passes.fold_qparams)
    up, down = folded(gm)
    assert [n.target for n in (*up.args, *down.args)] == ["up.weight", "down.weight"]
    assert_provenance([up, *up.users], "up", "self.up(x)")
    assert_provenance([down, *down.users], "down", "self.down(")
    assert not any(True for m in gm.modules() if isinstance(m, weights.Folded) for _ in m.buffers())
    first_op = next(n for n in gm.graph.nodes if n.op == "call_function")
    assert up < first_op and down < first_op, "folds come first: they are hoisted out of the call"


@torch.no_grad()
def test_an_update_is_seen_and_nothing_else_is_quantized_again(runs):
    model = MLP().requires_grad_(False)
    gm = through(trace(model, X, to="reference"), passes.fold_qparams)
    assert 38 < sqnr(gm(X), model(X)) < 60
    gm.get_parameter("up.weight").mul_(-2)
    model.up.weight.mul_(1)  # the exported graph holds the model's own parameters
    assert 38 < sqnr(gm(X), model(X)) < 60
    assert runs == ["up", "down", "up"]


def test_a_second_time_changes_nothing():
    gm = through(trace(MLP(), X, to="reference"), passes.fold_qparams)
    before = gm.code
    assert not passes.fold_qparams(gm).modified
    assert gm.code == before


@torch.no_grad()
def test_an_expression_of_parameters_is_folded_whole(runs):
    class LoRA(nn.Module):
        def __init__(self):
            super().__init__()
            self.base = nn.Parameter(torch.randn(32, 64) / 8)
            self.a, self.b = nn.Parameter(torch.randn(4, 64) / 8), nn.Parameter(torch.randn(32, 4))

        def forward(self, x):
            return F.linear(x, self.base + self.b @ self.a)

    model = LoRA().requires_grad_(False)
    gm = through(trace(model, X, to="reference"), passes.fold_qparams)
    found = count(gm)
    assert found["folded"] == 1 and not found.keys() & {"add", "matmul", "mm", "fx.quantize"}
    (node,) = folded(gm)
    assert {n.target for n in node.args} == {"base", "a", "b"}
    assert 38 < sqnr(gm(X), model(X)) < 60
    model.a.mul_(-3)
    assert 38 < sqnr(gm(X), model(X)) < 60
    assert len(runs) == 2


@torch.no_grad()
def test_a_shared_weight_is_folded_once(runs):
    model = Call(lambda m, x: F.linear(x, m.w) + F.linear(x * 2, m.w, m.b))
    gm = through(trace(model, X, to="reference"), passes.fold_qparams)
    assert count(gm)["folded"] == 1
    gm(X)
    assert len(runs) == 1


@torch.no_grad()
def test_two_graphs_of_one_model_share_what_is_folded(runs):
    model = MLP().requires_grad_(False)
    first, second = (
        through(trace(model, X[:rows], to="reference"), passes.fold_qparams) for rows in (2, 5)
    )
    before = weights.resident_bytes()
    first(X[:2])
    once = weights.resident_bytes() - before
    assert once == (128 * 64 + 32 * 128) + 4 * (128 + 32), "codes, and float32 scales"
    second(X)
    assert weights.resident_bytes() - before == once and len(runs) == 2


def test_a_weight_that_is_written_in_the_graph_is_not_folded():
    class Written(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("w", torch.randn(32, 64) / 8)

        def forward(self, x):
            self.w.mul_(2.0)
            return F.linear(x, self.w)

    gm = through(trace(Written(), X, to="reference"), passes.fold_qparams)
    assert count(gm)["folded"] == 0


@torch.no_grad()
def test_packed_weights_are_folded_with_their_quantization(runs):
    model = MLP().requires_grad_(False)
    gm = trace(model, X, to="fused")
    through(gm, passes.fold_qparams, passes.lower())
    found = count(gm)
    assert found["folded"] == 2 and not found.keys() & {"fx.quantize", "fx.pack"}
    for node in folded(gm):
        recipe = getattr(gm, node.target).recipe.graph
        targets = [n.target for n in recipe.nodes if n.op == "call_function"]
        assert targets[0] is ops.quantize.default and targets[-1] is ops.pack.default
        assert len(recipe.find_nodes(op="placeholder")) == 1
    before = weights.resident_bytes()
    assert 38 < sqnr(gm(X), model(X)) < 60
    assert runs == ["up", "down"]
    held = weights.resident_bytes() - before
    assert held == (128 * 64 + 32 * 128) + 4 * (128 + 32), "canonical codes are kept as well"


def test_a_constant_that_tracing_made_may_stand_anywhere():
    def call(m, x):
        return F.linear(F.relu(x), m.w * torch.tensor([2.0])) + F.linear(x, m.other)

    model = Call(call)
    gm = through(trace(model, X, to="reference"), passes.fold_qparams)
    assert count(gm)["folded"] >= 1
    assert 38 < sqnr(gm(X), model(X)) < 70


def test_a_weight_that_is_not_finite_is_named_with_its_layer():
    model = MLP().requires_grad_(False)
    gm = through(trace(model, X, to="reference"), passes.fold_qparams)
    model.down.weight[3, 4] = float("nan")
    with pytest.raises(NonFiniteWeight, match=r"^down: .* nan at \(3, 4\)"):
        gm(X)


@torch.no_grad()
def test_weights_of_branches_are_hoisted_out_of_them(runs):
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x):
            return torch.cond(x.sum() > 0, self.a, lambda x: self.b(x) * 2, (x,))

    model = Branch().requires_grad_(False)
    gm = trace(model, X, to="reference")
    assert [count(body)["fx.quantize"] for body in bodies_of(gm)] == [1, 1]
    through(gm, passes.fold_qparams)
    assert count(gm)["folded"] == 2
    for body in bodies_of(gm):
        assert count(body)["fx.quantize"] == 0 and count(body)["fx.dequantize"] == 1
    for x in (X.abs(), -X.abs()):
        assert 38 < sqnr(gm(x), model(x)) < 60
        gm(x)
    assert sorted(runs) == ["a", "b"]


@torch.no_grad()
def test_tensors_that_tracing_made_inside_of_a_branch_come_out(graphs):
    """AOTAutograd takes no graph whose bodies own tensors."""

    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x):
            def scaled(x):
                return self.a(x) * torch.tensor([2.0]) + torch.tensor([1.0, 3.0]).sum()

            return torch.cond(x.sum() > 0, scaled, self.b, (x,)) * torch.tensor([0.5])

    model = Branch().requires_grad_(False)
    run = torch.compile(model, backend="fxquant", options={"scheme": "int8wo"}, fullgraph=True)
    for x in (X.abs(), -X.abs()):
        assert 38 < sqnr(run(x), model(x)) < 70
    (gm,) = graphs
    for graph in (gm, *bodies_of(gm)):
        assert not list(graph.named_buffers(recurse=False))
    for body in bodies_of(gm):
        assert not body.graph.find_nodes(op="get_attr")


def test_inputs_are_quantized_at_each_call():
    gm = through(trace(MLP(), X, to="reference", scheme="int8dq"), passes.fold_qparams)
    assert [n.args[2] for n in calls(gm, ops.quantize.default)] == ["input", "input"]
