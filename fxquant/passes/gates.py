"""``act(gate) * up``: how the two halves of one tensor meet in a graph."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from ..graph import memory_of, value, written
from ..ops import LinearArguments
from ..scheme import get_scheme
from .fusion import activation_of, only_user

aten = torch.ops.aten
ops = torch.ops.fxquant


def made_for_one(gm: fx.GraphModule) -> set[fx.Node]:
    """The ``fxquant.linear`` nodes that quantize what a gate makes for them alone, of memory that nothing
    writes to: it may as well be made where they read it."""
    changed, found = written(gm), set()
    for node in gm.graph.find_nodes(op="call_function", target=ops.linear.default):
        a = LinearArguments(*node.args)
        if get_scheme(a.scheme).product.input is None or a.x_scale is not None:
            continue
        gate = gate_of(a.x)
        if gate is not None and only_user(a.x) is node and not memory_of(gate[0]) & changed:
            found.add(node)
    return found


def gate_of(product: fx.Node) -> tuple[fx.Node, str] | None:
    """The node whose halves are read by ``product`` alone, and which of ``ops.GATES`` that is. Halves are
    parts of a split, as of two linears that were merged or by the user's own ``split`` or ``chunk``."""
    if product.target is not aten.mul.Tensor or product.kwargs:
        return None
    for active, second in (product.args, product.args[::-1]):
        name = activation_of(active) if isinstance(active, fx.Node) else None
        if not name or only_user(active) is not product:
            continue
        first = active.args[0]  # type: ignore[union-attr]
        split = _halved(first, second)
        if split is not None and only_user(first) is active and only_user(second) is product:
            return split.args[0], f"{name}_mul"  # type: ignore[return-value]
    return None


SPLITS = (aten.split_with_sizes.default, aten.split.Tensor, aten.chunk.default)


def _halved(first: Any, second: Any) -> fx.Node | None:
    """The split of the last dimension in two whose parts these are, in this order."""
    parts = [p for p in (first, second) if isinstance(p, fx.Node) and p.target is operator.getitem]
    if [p.args[1] for p in parts] != [0, 1] or parts[0].args[0] is not parts[1].args[0]:
        return None
    split: Any = parts[0].args[0]
    if split.target not in SPLITS or split.kwargs or len(split.users) != 2:
        return None
    rank = value(split.args[0]).dim()
    last = (*split.args, 0)[2] % rank == rank - 1
    return split if last and value(first).shape[-1] == value(second).shape[-1] else None
