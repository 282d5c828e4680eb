"""What a static scheme knows of its input before it comes: a range, by which it is quantized.

The range is that of the calibrated statistics. Where ``equalize`` has divided the channels of the input
it follows them: the scale is then computed in the graph, and folded like everything else that depends
on parameters alone.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import fx

from ..errors import InvalidOption, NonFiniteStatistics, ShapeMismatch
from ..graph import emit, layer_of, memory_of, new_constant, note, value, written
from ..scheme import QuantSpec, Scheme
from .folding import folds

ops = torch.ops.fxquant

Ends = tuple[torch.Tensor, torch.Tensor]
"""Smallest and largest value: of all, or of each channel."""

RANGES: dict[str, Callable[[Any, QuantSpec], Ends]] = {
    "minmax": lambda observer, spec: observer.range(),
    "percentile": lambda histogram, spec: histogram.percentile_range(),
    "mse": lambda histogram, spec: histogram.mse_range(spec.dtype, spec.mapping),
}
"""Ways to choose the range of a static input. All but "minmax" look at a histogram of its values."""


def check_ranges(ranges: Any) -> None:
    """Raises InvalidOption for a way that there is not."""
    if ranges not in RANGES:
        raise InvalidOption(name="ranges", value=ranges, expected=f"one of {', '.join(RANGES)}")


class StaticInputs:
    """The inputs of ``linears``, each with its static scheme: linears that read one value have one range,
    and share the nodes that quantize it."""

    def __init__(
        self,
        gm: fx.GraphModule,
        linears: Mapping[fx.Node, Scheme],
        stats: Mapping[str, Any] | None,
        ranges: str,
    ):
        self.gm = gm
        self.ends: dict[fx.Node, torch.Tensor] = {}
        self._shared: dict[fx.Node, list[fx.Node]] = {}
        self._found: dict[fx.Node, fx.Node] = {}
        changed = written(gm)
        groups: dict[Any, list[fx.Node]] = defaultdict(list)
        for node, scheme in linears.items():
            x = node.args[0]
            assert isinstance(x, fx.Node)
            apart = memory_of(x) & changed  # written to in between, it is not one value
            groups[x, scheme.name, node if apart else None].append(node)
        for nodes in groups.values():
            names = list(dict.fromkeys(map(layer_of, nodes)))
            smoothed = "smoothed_by" in note(nodes[0])
            spec, channels = linears[nodes[0]].input, int(value(nodes[0].args[1]).shape[1])
            assert spec is not None
            ends = ends_of(stats or {}, names, channels, spec, ranges, smoothed)
            for node in nodes:
                self._shared[node] = nodes
                if ends is not None:
                    self.ends[node] = ends

    def quantized(self, node: fx.Node, scheme: Scheme) -> fx.Node:
        """``dequantize(quantize_static(x))`` for the input of ``node``, the first of its group to ask."""
        nodes = self._shared[node]
        if nodes[0] not in self._found:
            self._found[nodes[0]] = self._emit(node, scheme)
        return self._found[nodes[0]]

    def _emit(self, node: fx.Node, scheme: Scheme) -> fx.Node:
        graph, x = self.gm.graph, node.args[0]
        name = note(node).get("smoothed_by")
        smoothing = next((n for n in graph.nodes if n.name == name), None)
        with graph.inserting_before(node):
            ends = new_constant(self.gm, "range", self.ends[node].to(value(x).device))
            qparams = folds(
                emit(graph, node, ops.static_qparams.default, ends, smoothing, scheme.name)
            )
            scale, *rest = (
                emit(graph, node, operator.getitem, qparams, i) for i in range(len(value(qparams)))
            )
            zero = rest[0] if rest else None
            codes = emit(graph, node, ops.quantize_static.default, x, scale, zero, scheme.name)
            args = (codes, scale, zero, scheme.name, "input", value(x).dtype)
            return emit(graph, node, ops.dequantize.default, *args)


def ends_of(
    stats: Mapping[str, Any],
    names: Iterable[str],
    channels: int,
    spec: QuantSpec,
    ranges: str,
    smoothed: bool,
) -> torch.Tensor | None:
    """The range over the inputs of these layers, float32 [2, channels] or [2, 1] on the CPU; None
    without usable statistics: those of a smoothed input must be by channel.

    Raises ShapeMismatch for statistics of another width; InvalidOption where ``ranges`` asks for a
    histogram that is not there, or that smoothing has made worthless; NonFiniteStatistics.
    """
    found = []
    for name in names:
        observers = stats.get(f"{name}:input", {})
        observer = _observer(name, observers, ranges, smoothed)
        if observer is None:
            continue
        if not observer.finite():
            raise NonFiniteStatistics(name=f"{name}:input", batch=observer.batches)
        low, high = RANGES[ranges](observer, spec)
        if low.shape not in ((), (channels,)):
            what, shape = f"statistics of {name}", tuple(low.shape)
            raise ShapeMismatch(what=what, found=shape, expected=(channels,))
        found.append(torch.stack([low.reshape(-1), high.reshape(-1)]).float().cpu())
    if not found:
        return None
    width = max(ends.shape[1] for ends in found)
    lows, highs = torch.stack([ends.expand(2, width) for ends in found], 1)
    return torch.stack([lows.amin(0), highs.amax(0)])


def _observer(name: str, observers: Mapping[str, Any], ranges: str, smoothed: bool) -> Any:
    """The observer that ``RANGES[ranges]`` reads, None where nothing usable was seen."""
    seen = {kind: observer for kind, observer in observers.items() if observer.batches}
    if ranges == "minmax":
        return seen.get("channel") or (None if smoothed else seen.get("minmax"))
    if seen and smoothed:
        expected = (
            f"'minmax' where inputs are smoothed, as that of {name} is: a histogram does not tell its"
            " channels apart; or no smoothing (smooth=False)"
        )
        raise InvalidOption(name="ranges", value=ranges, expected=expected)
    if seen and "histogram" not in seen:
        expected = (
            f"a histogram among the statistics of {name};"
            ' calibrate(..., kinds={"input": ["channel", "histogram"]}) has one'
        )
        raise InvalidOption(name="ranges", value=ranges, expected=expected)
    return seen.get("histogram")
