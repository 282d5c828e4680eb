"""insert_observers: an observe node before each linear, that sends its values and changes nothing."""

from __future__ import annotations

import torch
from torch import nn

from fxquant import Stats, passes
from fxquant.graph import stage
from fxquant.observers import collecting

from ..conftest import MLP, Block, sqnr
from .helpers import assert_provenance, aten, calls, count, ops, through, trace


def observing(gm, *batches) -> Stats:
    stats = Stats({"input": ["minmax"]})
    with collecting(stats.add):
        for batch in batches:
            gm(batch)
    return stats


@torch.no_grad()
def test_minimum_maximum_and_batches():
    model, batches = MLP().requires_grad_(False), [torch.randn(5, 64) * s for s in (1, 3, 0.5)]
    gm = through(trace(model, batches[0], to="float"), passes.insert_observers)
    assert stage(gm) == "observed" and count(gm)["fx.observe"] == 2
    for batch in batches:
        assert torch.equal(gm(batch), model(batch)), "observing changed the result"
    found = observing(gm, *batches)
    hidden = [nn.functional.gelu(model.up(batch)) for batch in batches]
    assert set(found) == {"up:input", "down:input"}
    for name, seen in (("up:input", batches), ("down:input", hidden)):
        low, high = found[name]["minmax"].range()
        assert low == min(float(b.min()) for b in seen)
        assert high == max(float(b.max()) for b in seen)
        assert found[name]["minmax"].batches == 3


def test_the_observed_input_is_the_one_that_the_linear_reads():
    gm = through(trace(Block(), torch.randn(2, 7, 64), to="float"), passes.insert_observers)
    linears = calls(gm, aten.linear.default)
    assert [n.args[0].target for n in linears] == [ops.observe.default] * 6
    names = [n.args[0].args[1] for n in linears]
    assert names == [f"{layer}:input" for layer in ("q", "k", "v", "gate", "up", "down")]
    q, k = linears[:2]
    assert q.args[0] is not k.args[0] and q.args[0].args[0] is k.args[0].args[0]
    assert_provenance([q, q.args[0]], "q", "q, k, v = (")


def test_a_layer_used_twice_has_one_observer():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(64, 64)

        def forward(self, x):
            return self.fc(self.fc(x))

    model, x = Twice().requires_grad_(False), torch.randn(5, 64)
    gm = through(trace(model, x, to="float"), passes.insert_observers)
    ((name, found),) = observing(gm, x).items()
    assert name == "fc:input"
    seen = torch.cat([x, model.fc(x)])
    assert found["minmax"].range() == (seen.min(), seen.max()) and found["minmax"].batches == 2


def test_dead_code_removal_keeps_observers_that_feed_a_linear_and_nothing_is_observed_twice():
    gm = through(trace(MLP(), torch.randn(5, 64), to="float"), passes.insert_observers)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    found = observing(gm, torch.randn(5, 64))
    assert {o["minmax"].batches for o in found.values()} == {1}


def test_a_graph_without_linears_is_left_alone():
    gm = trace(nn.Sequential(nn.ReLU()), torch.randn(5, 64), to="float")
    assert not passes.insert_observers(gm).modified
    assert count(gm) == {"relu": 1}


@torch.no_grad()
def test_an_observed_graph_can_be_quantized():
    model, x = MLP().requires_grad_(False), torch.randn(5, 64)
    gm = trace(model, x, to="float")
    through(gm, passes.insert_observers, passes.quantize_weights("int8dq"))
    assert stage(gm) == "reference" and count(gm)["fx.observe"] == 2
    assert 36 < sqnr(gm(x), model(x)) < 60
    assert observing(gm, x)["up:input"]["minmax"].batches == 1
    passes.verify(gm)
