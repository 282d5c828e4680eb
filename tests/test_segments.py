"""segments_of: stages of independent linears, cut where the values that go on are small."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxquant
from fxquant import passes
from fxquant.graph import layer_of, layers, value
from fxquant.segments import MOST_STAGES, _cuts, segments_of

from .conftest import Block


def traced(model: nn.Module, *args: torch.Tensor):
    gm = fxquant.trace(model.eval().requires_grad_(False), args)
    passes.normalize(gm)
    return gm


def names(segments):
    return [[[layer_of(n) for n in stage] for stage in s.stages] for s in segments]


def test_blocks_are_cut_between_where_one_value_goes_on():
    gm = traced(nn.Sequential(*(Block(64) for _ in range(4))), torch.randn(2, 7, 64))
    found = segments_of(gm, layers(gm))
    stages = [tuple(stage) for s in names(found) for stage in s]
    wanted = [
        tuple(f"{i}.{n}" for n in stage)
        for i in range(4)
        for stage in (("q", "k", "v"), ("gate", "up"), ("down",))
    ]
    assert stages == wanted, "q, k and v do not read each other"
    for segment in found[1:]:
        assert [tuple(value(n).shape) for n in segment.reads] == [(2, 7, 64)]
    assert all(len(s.stages) <= MOST_STAGES for s in found)
    assert found[-1].leaves == () and found[0].leaves == found[1].reads


def test_every_node_up_to_the_last_linear_is_in_one_segment():
    gm = traced(nn.Sequential(Block(64), Block(64), nn.ReLU()), torch.randn(2, 7, 64))
    found = segments_of(gm, layers(gm))
    nodes = [n for s in found for n in s.nodes]
    assert len(nodes) == len(set(nodes)) and nodes == sorted(nodes)
    assert layer_of(nodes[-1]) == "1.down", "what follows need not be computed"
    seen = set(found[0].reads)
    for segment in found:
        assert set(segment.reads) <= seen
        seen |= set(segment.nodes)


def test_layers_that_are_not_wanted_and_no_layer():
    gm = traced(nn.Sequential(Block(64), Block(64)), torch.randn(2, 7, 64))
    assert names(segments_of(gm, {"1.q", "0.down"})) == [[["0.down"], ["1.q"]]]
    assert segments_of(gm, {"nothing"}) == []


class Reused(nn.Module):
    def __init__(self):
        super().__init__()
        self.twice, self.after = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        y = self.twice(x)
        return self.after(self.twice(y))


def test_a_layer_used_twice_has_one_stage_and_what_reads_its_second_use_a_later_one():
    gm = traced(Reused(), torch.randn(2, 8))
    assert [s for part in names(segments_of(gm, layers(gm))) for s in part] == [
        ["twice"],
        ["after"],
    ]


class InPlace(nn.Module):
    """A value that is written to after the next linear has run, and read by the one after it."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        y = self.a(x)
        z = self.b(y)
        y.add_(z)
        return self.c(y)


def test_nothing_is_cut_before_a_write_and_the_write_counts_as_a_dependence():
    model = InPlace().eval().requires_grad_(False)
    graphs = []

    def keep(gm, inputs):
        from fxquant.capture import from_dynamo

        graphs.append(from_dynamo(gm, inputs))
        passes.normalize(graphs[-1])
        return gm.forward

    with torch.no_grad():
        torch.compile(model, backend=keep)(torch.randn(2, 8))
    (gm,) = graphs
    found = segments_of(gm, layers(gm))
    assert [s for part in names(found) for s in part] == [["a"], ["b"], ["c"]]
    for segment in found[1:]:
        later = [n for n in gm.graph.nodes if str(n.target) == "aten.add_.Tensor"]
        assert not (set(segment.reads) & {later[0].args[0]} and later[0] in segment.nodes)


@pytest.mark.parametrize(
    "gaps, wanted",
    [
        ([], []),
        ([1.0] * 3, []),
        ([9, 1, 9, 9], [1]),
        ([2, 2, 2, 1, 2, 2, 2, 1, 2], [3, 7]),
        ([1, float("inf"), float("inf"), float("inf"), float("inf"), 1], [0, 5]),
        ([float("inf")] * 9, []),
    ],
)
def test_cuts_are_the_cheapest_with_few_stages_between(gaps, wanted):
    assert _cuts(gaps) == wanted
