"""Where a graph can be cut: stages of linears that are solved together, segments between few values.

A stage holds linears none of which reads what another one makes (q, k and v, say). Segments are
stretches of a few stages, cut where the values that go on are smallest (between the blocks of a
transformer), so that a model can be run a segment at a time on many batches.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import fx

from .graph import constants, layer_of, memory_of, parameters, value, writes
from .inductor import tree_leaves

aten = torch.ops.aten

MOST_STAGES = 4
"""Stages of a segment, unless nothing can be cut: a segment is run once more for each of them."""

NOMINAL = 128
"""What a symbolic size counts as, where values are weighed against each other."""


@dataclass(frozen=True)
class Segment:
    """A stretch of a graph. nodes: what is computed, in order; what depends on parameters alone is
    not among them. stages: its linears, by the stage. reads: the values that it takes from before, the
    graph's own inputs included. leaves: those that what follows reads."""

    nodes: tuple[fx.Node, ...]
    stages: tuple[tuple[fx.Node, ...], ...]
    reads: tuple[fx.Node, ...]
    leaves: tuple[fx.Node, ...]


def segments_of(
    gm: fx.GraphModule, wanted: Collection[str], counts: Sequence[int] | None = None
) -> list[Segment]:
    """The segments of ``gm``, at the float stage, up to the last linear of the ``wanted`` layers.

    counts: how many stages each segment holds, where another graph of the model has decided that. A
    layer that is used several times belongs to the stage of its first use.
    """
    constant = constants(gm)
    steps = [n for n in gm.graph.nodes if n.op.startswith("call") and n not in constant]
    stages = _stages(steps, wanted, constant)
    if not stages:
        return []
    place = {node: i for i, node in enumerate(steps)}
    steps = steps[: place[stages[-1][-1]] + 1]
    inputs = set(gm.graph.find_nodes(op="placeholder")) - set(parameters(gm))
    live = list(_live(steps, inputs))
    later, bound = _written_later(steps), _bound_by_state(steps, parameters(gm))
    costs = [
        math.inf if position in bound else _cost(values, written)
        for position, (values, written) in enumerate(zip(live, later, strict=True))
    ]
    gaps = []
    for before, after in pairwise(stages):
        between = range(place[before[-1]] + 1, place[after[0]] + 1)
        gaps.append(min((costs[p], -p) for p in between))  # of equals the last: less is run again
    chosen = _cuts([cost for cost, _ in gaps])
    if counts is not None and sum(counts) == len(stages):
        chosen = [end - 1 for end in accumulate(counts)][:-1]
    ends = [-gaps[i][1] for i in chosen] + [len(steps)]
    first = [0, *(i + 1 for i in chosen), len(stages)]
    return [
        Segment(
            nodes=tuple(steps[start:end]),
            stages=tuple(map(tuple, stages[first[i] : first[i + 1]])),
            reads=live[start],
            leaves=live[end] if end < len(steps) else (),
        )
        for i, (start, end) in enumerate(zip([0, *ends], ends, strict=False))
    ]


def _stages(
    steps: Sequence[fx.Node], wanted: Collection[str], constant: Collection[fx.Node]
) -> list[list[fx.Node]]:
    """The wanted linears in graph order, a new stage wherever one reads the present stage's output."""
    stages: list[list[fx.Node]] = []
    latest: dict[fx.Node, int] = {}  # the last stage that a value depends on
    home: dict[str, int] = {}
    for node in steps:
        depth = max((latest.get(n, -1) for n in node.all_input_nodes), default=-1)
        name = layer_of(node)
        if node.target is aten.linear.default and name in wanted and node.args[1] in constant:
            if name not in home:
                if depth == len(stages) - 1:
                    stages.append([])
                stages[-1].append(node)
                home[name] = len(stages) - 1
            depth = max(depth, home[name])
        latest[node] = depth
        for written in writes(node):
            for base in memory_of(written):
                latest[base] = max(depth, latest.get(base, -1))
    return stages


def _live(steps: Sequence[fx.Node], inputs: Collection[fx.Node]) -> Iterator[tuple[fx.Node, ...]]:
    """Before each step, the values there are that it or a later step reads."""
    last_use = {n: i for i, node in enumerate(steps) for n in node.all_input_nodes}
    live = dict.fromkeys(n for n in inputs if n in last_use)
    live = dict.fromkeys(sorted(live))
    for i, node in enumerate(steps):
        yield tuple(live)
        if node in last_use:
            live[node] = None
        for source in node.all_input_nodes:
            if last_use[source] == i:
                live.pop(source, None)


def _written_later(steps: Sequence[fx.Node]) -> list[frozenset[fx.Node]]:
    """For each step, the memory that it or a later one writes to."""
    found, now = [], frozenset[fx.Node]()
    for node in reversed(steps):
        now = now.union(*(memory_of(base) for base in writes(node)))
        found.append(now)
    return found[::-1]


def _bound_by_state(steps: Sequence[fx.Node], state: Collection[fx.Node]) -> set[int]:
    """Positions between a write to a parameter or buffer and a later read of it: what a call leaves
    there does not go on to the next segment."""
    first: dict[fx.Node, int] = {}
    last: dict[fx.Node, int] = {}
    for i, node in enumerate(steps):
        for source in node.all_input_nodes:
            last |= dict.fromkeys((m for m in memory_of(source) if m in state), i)
        for base in writes(node):
            for m in memory_of(base):
                if m in state:
                    first.setdefault(m, i)
    return {p for m, i in first.items() for p in range(i + 1, last[m] + 1)}


def _cost(live: Sequence[fx.Node], written: frozenset[fx.Node]) -> float:
    """Bytes that a cut keeps; infinite where it cannot be: a value that is no tensor or number goes
    on, or one that is written to afterwards."""
    if written and any(memory_of(node) & written for node in live):
        return math.inf
    return sum(_bytes(value(node)) for node in live)


def _bytes(found: Any) -> float:
    total = 0.0
    for leaf in tree_leaves(found):
        if isinstance(leaf, torch.Tensor):
            sizes = (s if isinstance(s, int) else NOMINAL for s in leaf.shape)
            total += math.prod(sizes) * leaf.element_size()
        elif not isinstance(leaf, int | float | torch.SymInt | torch.SymFloat | torch.SymBool):
            return math.inf
    return total


def _cuts(gaps: Sequence[float]) -> list[int]:
    """The gaps to cut, of the least sum with at most MOST_STAGES stages between them.

    gaps: what a cut between each stage and the next keeps. Where no cut is possible a segment is
    longer, as little as can be.
    """
    count = len(gaps) + 1
    best: list[tuple[int, float]] = [(0, 0.0)]  # (stages too many, bytes kept) up to each stage
    previous = [0]
    for end in range(1, count + 1):
        kept = gaps[end - 1] if end < count else 0.0
        ways = [
            ((best[start][0] + max(end - start - MOST_STAGES, 0), best[start][1] + kept), start)
            for start in range(end)
            if best[start][1] < math.inf
        ]
        found, start = min(ways)
        best.append(found)
        previous.append(start)
    chosen, at = [], previous[count]
    while at:
        chosen.append(at - 1)
        at = previous[at]
    return chosen[::-1]
