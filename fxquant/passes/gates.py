"""``act(gate) * up``: how the two halves of one tensor meet in a graph."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from ..graph import value
from .fusion import activation_of, only_user

aten = torch.ops.aten


def gate_of(product: fx.Node) -> tuple[fx.Node, str] | None:
    """The node whose halves are read by ``product`` alone, and which of ``ops.GATES`` that is."""
    if product.target is not aten.mul.Tensor or product.kwargs:
        return None
    for active, second in (product.args, product.args[::-1]):
        name = activation_of(active) if isinstance(active, fx.Node) else None
        if not name or only_user(active) is not product:
            continue
        first = active.args[0]  # type: ignore[union-attr]
        split = _halves(first, second)
        if split is not None and only_user(first) is active and only_user(second) is product:
            return split.args[0], f"{name}_mul"  # type: ignore[return-value]
    return None


def _halves(first: Any, second: Any) -> fx.Node | None:
    """The split of the last dimension in two whose parts these are, in this order."""
    for i, part in enumerate((first, second)):
        if (
            not isinstance(part, fx.Node)
            or part.target is not operator.getitem
            or part.args[1] != i
        ):
            return None
    split = first.args[0]
    if split is not second.args[0] or split.target is not aten.split_with_sizes.default:
        return None
    whole, sizes, dim = (*split.args, 0)[:3]
    last = dim % value(whole).dim() == value(whole).dim() - 1
    whole_halves = len(sizes) == 2 and sizes[0] == sizes[1] and len(split.users) == 2
    return split if last and whole_halves else None
