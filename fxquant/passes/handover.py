"""hand_over: what a static linear reads is quantized where it is made, and travels as codes.

Nothing between two of them is dequantized; where views lie between, they move one byte for a value.
"""

from __future__ import annotations

import torch
from torch import fx

from ..graph import emit, memory_of, move_before, replace, written
from .base import rewrites

aten = torch.ops.aten
ops = torch.ops.fxquant

MOVES = frozenset(
    {
        aten.alias.default,
        aten.clone.default,
        aten.contiguous.default,
        aten.expand.default,
        aten.flatten.using_ints,
        aten.permute.default,
        aten.reshape.default,
        aten.select.int,
        aten.slice.Tensor,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.t.default,
        aten.transpose.int,
        aten.unflatten.int,
        aten.unsqueeze.default,
        aten.view.default,
        aten._unsafe_view.default,
    }
)
"""Ops that move values and change none: one scale for all of them holds before and after."""


@rewrites("fused", ensures="fused")
def hand_over(gm: fx.GraphModule) -> bool:
    """``quantize_static(view(y))`` becomes ``view(quantize_static(y))``, as far up as nothing but that
    quantization reads what the view gives, and nothing writes to its memory."""
    changed, moved = written(gm), False
    for node in gm.graph.find_nodes(op="call_function", target=ops.quantize_static.default):
        while _moves_freely(node, changed):
            node = _before_its_view(gm.graph, node)
            moved = True
    return moved


def _moves_freely(node: fx.Node, changed: set[fx.Node]) -> bool:
    view = node.args[0]
    assert isinstance(view, fx.Node)
    return view.target in MOVES and list(view.users) == [node] and not memory_of(view) & changed


def _before_its_view(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """Exchange ``node`` with the view that it reads; returns its successor."""
    view, *rest = node.args
    assert isinstance(view, fx.Node)
    for qparam in rest:
        if isinstance(qparam, fx.Node):
            move_before(view, qparam)
    with graph.inserting_before(view):
        codes = emit(graph, node, node.target, view.args[0], *rest)  # type: ignore[arg-type]
        moved = emit(graph, view, view.target, codes, *view.args[1:], **view.kwargs)  # type: ignore
    replace(node, moved)
    graph.erase_node(view)
    return codes
