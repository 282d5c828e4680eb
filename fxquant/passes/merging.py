"""merge: linears that share an input (q/k/v, gate/up) become one."""

from __future__ import annotations

import operator
from collections import defaultdict
from typing import Any

import torch
from torch import fx

from ..graph import (
    constants,
    describe,
    emit,
    evaluate,
    layer_of,
    layers,
    memory_of,
    move_before,
    note,
    value,
    written,
)
from ..inductor import HigherOrderOperator, Regions
from .base import rewrites
from .folding import folds
from .fusion import activation_of, only_user

aten = torch.ops.aten
ops = torch.ops.fxquant


@rewrites("fused", ensures="fused")
def merge(gm: fx.GraphModule) -> bool:
    """One product over the rows of all weights, then a split: the input is quantized once.

    Only linears of one scheme, without an activation of their own and used where they stand in
    the same block of the graph. The parts are views; a ``view`` that they do not allow becomes a
    ``reshape``.
    """
    constant, changed = constants(gm), written(gm)
    groups: dict[Any, list[fx.Node]] = defaultdict(list)
    for node in gm.graph.find_nodes(op="call_function", target=ops.linear.default):
        x, codes = node.args[:2]
        if node.args[6] == "" and codes in constant:
            kind = (node.args[5], *node.args[7:])  # a static input's qparams and dtype too
            group = groups[x, kind, value(codes).shape[1], _region(node, changed)]
            bias = node.args[4]
            if not group or bias is None or bias in constant or bias < group[0]:
                group.append(node)
    pieces: list[fx.Node] = []
    for nodes in groups.values():
        distinct = {n.args[1] for n in nodes}
        if len(nodes) > 1 and len(distinct) == len(nodes):
            pieces += _merge(gm, nodes)
    if pieces:
        _settle(gm, pieces)
    return bool(pieces)


def _region(node: fx.Node, changed: set[fx.Node]) -> int:
    """The stretch that the node stands in, between grad-mode or autocast switches.

    Where the memory of its input is written to, between writes as well.
    """
    x = node.args[0]
    assert isinstance(x, fx.Node)
    fragile = bool(memory_of(x) & changed)
    region = 0
    for other in node.graph.nodes:
        if other is node:
            return region
        if other.op == "call_function":
            overload = isinstance(other.target, torch._ops.OpOverload)
            region += not overload and other.target is not operator.getitem
            region += fragile and overload and other.target._schema.is_mutable
    return region


def _merge(gm: fx.GraphModule, nodes: list[fx.Node]) -> list[fx.Node]:
    """The parts of the merged linear, one for each of ``nodes``, which they replace."""
    first, x = nodes[0], nodes[0].args[0]
    for node in nodes:
        for arg in node.args[1:5]:
            if isinstance(arg, fx.Node):
                move_before(first, arg)
    nodes = sorted(nodes, key=_is_activated, reverse=True)  # ``gate`` wants that half first
    sizes = [value(n).shape[-1] for n in nodes]
    with gm.graph.inserting_before(first):
        parts = [_column(gm, first, nodes, i) for i in (1, 2, 3)]
        bias = _biases(gm, first, nodes, sizes)
        args = (x, *parts, bias, first.args[5], "", *first.args[7:])
        whole = emit(gm.graph, first, ops.linear.default, *args)
        split = emit(gm.graph, first, aten.split_with_sizes.default, whole, sizes, -1)
        pieces = [emit(gm.graph, n, operator.getitem, split, i) for i, n in enumerate(nodes)]
    names = tuple(layer_of(n) for n in nodes)
    for node in (whole, split):
        note(node)["layer"] = "+".join(names)
        note(node)["members"] = names
    for node, piece, name in zip(nodes, pieces, names, strict=True):
        node.replace_all_uses_with(piece)
        gm.graph.erase_node(node)
        layers(gm)[name].merged = names
    return pieces


def _is_activated(node: fx.Node) -> bool:
    user = only_user(node)
    return user is not None and activation_of(user) is not None


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


def _settle(gm: fx.GraphModule, pieces: list[fx.Node]) -> None:
    """Bring the values behind the pieces up to date: they have strides of their own.

    A ``view`` that these do not allow becomes a ``reshape``. A piece that something depends on
    which must see the old strides (an output, a body, ``as_strided``) is copied.
    """
    before = {n: describe(n.meta.get("val")) for n in gm.graph.nodes}
    while fragile := _refresh_behind(gm, set(pieces), before):
        for piece in fragile:
            pieces.remove(piece)
            with gm.graph.inserting_after(piece):
                kept = {"memory_format": torch.contiguous_format}
                copy = emit(gm.graph, piece, aten.clone.default, piece, **kept)
            piece.replace_all_uses_with(
                copy, delete_user_cb=lambda user, copy=copy: user is not copy
            )


def _refresh_behind(
    gm: fx.GraphModule, pieces: set[fx.Node], before: dict[fx.Node, str]
) -> set[fx.Node]:
    """Evaluate anew what is behind ``pieces``; returns those that must not change their strides."""
    behind: dict[fx.Node, set[fx.Node]] = {piece: {piece} for piece in pieces}
    regions = Regions()
    for node in gm.graph.nodes:
        with regions.around(node):  # what the user wrote there may be cast
            sources = set().union(*(behind.get(n, set()) for n in node.all_input_nodes))
            same = node not in before or describe(node.meta.get("val")) == before[node]
            if not sources and same:
                continue
            if node.op != "call_function" or isinstance(node.target, HigherOrderOperator):
                return sources
            if node.target is aten.as_strided.default or not _refresh(node):
                return sources
            if describe(node.meta["val"]) != before.get(node):
                behind[node] = sources
    return set()


def _refresh(node: fx.Node) -> bool:
    """Evaluate ``node`` anew; False if it does not take its inputs as they are."""
    try:
        node.meta["val"] = evaluate(node)
    except (RuntimeError, ValueError):
        if node.target not in (aten.view.default, aten._unsafe_view.default):
            return False
        node.target = aten.reshape.default
        node.meta["val"] = evaluate(node)
    return True
