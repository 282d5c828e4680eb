"""merge: linears that share an input (q/k/v, gate/up) become one."""

from __future__ import annotations

import operator
from collections import defaultdict
from typing import Any

import torch
from torch import fx

from ..graph import constants, emit, evaluate, layer_of, layers, note, value
from ..inductor import HigherOrderOperator
from .base import describe, rewrites
from .folding import folds

aten = torch.ops.aten
ops = torch.ops.fxquant


@rewrites("fused", ensures="fused")
def merge(gm: fx.GraphModule) -> bool:
    """One product over the rows of all weights, then a split: the input is quantized once.

    Only linears of one scheme, without an activation of their own and used where they stand in
    the same block of the graph. The parts are views; a ``view`` that they do not allow becomes a
    ``reshape``.
    """
    constant = constants(gm)
    groups: dict[Any, list[fx.Node]] = defaultdict(list)
    for node in gm.graph.find_nodes(op="call_function", target=ops.linear.default):
        x, codes = node.args[:2]
        if node.args[6] == "" and codes in constant:
            groups[x, node.args[5], value(codes).shape[1], _region(node)].append(node)
    changed = False
    for nodes in groups.values():
        distinct = {n.args[1] for n in nodes}
        if len(nodes) > 1 and len(distinct) == len(nodes):
            _merge(gm, nodes, constant)
            changed = True
    if changed:
        _views_to_reshapes(gm)
    return changed


def _region(node: fx.Node) -> int:
    """Which stretch between grad-mode or autocast switches the node stands in."""
    region = 0
    for other in node.graph.nodes:
        if other is node:
            return region
        region += other.op == "call_function" and not isinstance(
            other.target, torch._ops.OpOverload | type(operator.getitem)
        )
    return region


def _merge(gm: fx.GraphModule, nodes: list[fx.Node], constant: Any) -> None:
    first, x = nodes[0], nodes[0].args[0]
    for node in nodes:
        for arg in node.args[1:5]:
            if isinstance(arg, fx.Node):
                _move_before(arg, first, constant)
    sizes = [value(n).shape[-1] for n in nodes]
    with gm.graph.inserting_before(first):
        parts = [_column(gm, first, nodes, i) for i in (1, 2, 3)]
        bias = _biases(gm, first, nodes, sizes)
        whole = emit(gm.graph, first, ops.linear.default, x, *parts, bias, first.args[5], "")
        split = emit(gm.graph, first, aten.split_with_sizes.default, whole, sizes, -1)
        split.meta["fxquant_split"] = True
        pieces = [emit(gm.graph, first, operator.getitem, split, i) for i in range(len(nodes))]
    names = tuple(layer_of(n) for n in nodes)
    note(whole)["layer"] = "+".join(names)
    note(whole)["members"] = names
    for node, piece, name in zip(nodes, pieces, names, strict=True):
        node.replace_all_uses_with(piece)
        gm.graph.erase_node(node)
        layers(gm)[name].merged = names


def _move_before(node: fx.Node, anchor: fx.Node, constant: Any) -> None:
    """Constant expressions may stand anywhere after the parameters: move them up to ``anchor``."""
    if node.op in ("placeholder", "get_attr") or node < anchor:
        return
    assert node in constant
    for source in node.all_input_nodes:
        _move_before(source, anchor, constant)
    anchor.prepend(node)


def _column(gm: fx.GraphModule, like: fx.Node, nodes: list[fx.Node], i: int) -> fx.Node | None:
    if nodes[0].args[i] is None:
        return None
    return emit(gm.graph, like, aten.cat.default, [n.args[i] for n in nodes], 0)


def _biases(
    gm: fx.GraphModule, like: fx.Node, nodes: list[fx.Node], sizes: list[int]
) -> fx.Node | None:
    """The biases in a row; a layer without one gets zeros."""
    present = next((n.args[4] for n in nodes if n.args[4] is not None), None)
    if present is None:
        return None
    parts = [
        n.args[4]
        if n.args[4] is not None
        else emit(gm.graph, like, aten.new_zeros.default, present, [size])
        for n, size in zip(nodes, sizes, strict=True)
    ]
    return folds(emit(gm.graph, like, aten.cat.default, parts, 0))


def _views_to_reshapes(gm: fx.GraphModule) -> None:
    """Bring values up to date behind the splits: the parts have strides of their own."""
    stale: set[fx.Node] = set()
    for node in gm.graph.nodes:
        split = node.meta.pop("fxquant_split", False)
        if split or stale.intersection(node.all_input_nodes):
            if node.op == "call_function" and not isinstance(node.target, HigherOrderOperator):
                before = describe(node.meta.get("val"))
                _refresh(node)
                if not split and describe(node.meta["val"]) == before:
                    continue
            stale.add(node)


def _refresh(node: fx.Node) -> None:
    try:
        node.meta["val"] = evaluate(node)
    except (RuntimeError, ValueError):
        if node.target not in (aten.view.default, aten._unsafe_view.default):
            raise
        node.target = aten.reshape.default
        node.meta["val"] = evaluate(node)
