"""insert_observers: an observe node at the ports of each linear, that sends values and changes nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxquant
from fxquant import Stats, passes
from fxquant.graph import stage
from fxquant.observers import collecting
from fxquant.passes.observation import observers_at

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


def everywhere(gm, *batches) -> dict[str, list[torch.Tensor]]:
    """Every value by its name, in order."""
    seen: dict[str, list[torch.Tensor]] = {}
    with collecting(lambda name, x: seen.setdefault(name, []).append(x.clone())):
        for batch in batches:
            gm(batch)
    return seen


@torch.no_grad()
def test_outputs_have_their_bias_and_weights_are_what_the_product_reads():
    model, x = MLP().requires_grad_(False), torch.randn(2, 3, 64)
    gm = through(trace(model, x, to="float"), observers_at("output", "input", "weight"))
    assert stage(gm) == "observed" and count(gm)["fx.observe"] == 6
    assert torch.equal(gm(x), model(x)), "observing changed the result"
    seen = everywhere(gm, x)
    hidden = model.up(x)
    expected = {
        "up:input": x,
        "up:weight": model.up.weight,
        "up:output": hidden,
        "down:input": nn.functional.gelu(hidden),
        "down:weight": model.down.weight,
        "down:output": model(x),
    }
    assert seen.keys() == expected.keys()
    for name, values in seen.items():
        assert len(values) == 1 and torch.equal(values[0], expected[name]), name
    observed = calls(gm, ops.observe.default)
    assert_provenance([n for n in observed if "up" in n.args[1]], "up", "self.up(x)")
    gm.graph.eliminate_dead_code()
    assert count(gm)["fx.observe"] == 6
    passes.verify(gm)


@torch.no_grad()
def test_an_output_is_seen_before_it_is_written_to_and_all_who_read_it_read_the_copy():
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x):
            y = self.fc(x)
            first = y[0]
            y.mul_(2.0)
            return y, first, self.fc(y)

    model, x = Writes().requires_grad_(False), torch.randn(3, 8)
    gm = through(trace(model, x, to="float"), observers_at("output"))
    for found, wanted in zip(gm(x), model(x), strict=True):
        assert torch.equal(found, wanted)
    first, second = everywhere(gm, x)["fc:output"]
    assert torch.equal(first, model.fc(x)) and torch.equal(second, model(x)[2])


@torch.no_grad()
def test_a_weight_that_the_graph_transposes_or_computes():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.gain = nn.Parameter(torch.randn(8, 5)), nn.Parameter(torch.randn(6, 1))
            self.fc = nn.Linear(5, 6, bias=False)

        def forward(self, x):
            return nn.functional.linear(x @ self.w, self.fc.weight * self.gain)

    model, x = Odd().requires_grad_(False), torch.randn(3, 8)
    gm = through(trace(model, x, to="float"), observers_at("weight"))
    torch.testing.assert_close(gm(x), model(x))
    (first,), (second,) = everywhere(gm, x).values()
    assert torch.equal(first, model.w.t()) and torch.equal(second, model.fc.weight * model.gain)


def test_an_unknown_port_is_named():
    with pytest.raises(fxquant.FxQuantError, match=r"'bias'.*one of input, weight, output"):
        observers_at("input", "bias")
