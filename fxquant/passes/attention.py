"""The channels of an attention's output are those of its values: a weighted mean over tokens keeps a factor
of each channel."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..graph import value

aten = torch.ops.aten

RESHAPES = (
    aten.reshape.default,
    aten.view.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
)
COPIES = (aten.clone.default, aten.contiguous.default)


def values_of(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The values whose channels ``node`` has, and what reads them: ``node`` is an attention, or its heads put
    together, [.., H * D], of values that were taken apart in the same way.

    Nothing else may read what lies between. Where query heads share one of the values (GQA), a channel of
    the values is several of the output's: None.
    """
    if _is_attention(node):
        return node.args[2], node  # type: ignore[return-value]
    if node.target not in RESHAPES:
        return None
    together = _made_for(node.args[0], node)
    attention = _made_for(_swapped(together), together)
    if attention is None or not _is_attention(attention):
        return None
    apart = _made_for(attention.args[2], attention)
    split = _made_for(_swapped(apart), apart)
    if split is None or split.target not in RESHAPES:
        return None
    values: Any = split.args[0]
    heads, size = value(together).shape[-2:]
    same = value(split).shape[-2:] == (heads, size)
    same = same and value(values).shape[-1] == value(node).shape[-1] == heads * size
    return (values, split) if same else None


def _is_attention(node: fx.Node) -> bool:
    return node.target is aten.scaled_dot_product_attention.default and len(node.args) > 2


def _made_for(node: Any, user: Any) -> fx.Node | None:
    """``node``, or what it is a copy of, if ``user`` alone reads it, once."""
    while isinstance(node, fx.Node) and list(node.users) == [user]:
        if [*user.args, *user.kwargs.values()].count(node) != 1:
            return None
        copy = (
            node.target in (*RESHAPES, *COPIES) and value(node).shape == value(node.args[0]).shape
        )
        if not copy:
            return node
        node, user = node.args[0], node
    return None


def _swapped(node: fx.Node | None) -> Any:
    """Of a [B, T, H, D] that was [B, H, T, D], or the other way: what it was."""
    if node is None or value(node).dim() != 4:
        return None
    if node.target is aten.transpose.int and {d % 4 for d in node.args[1:3]} == {1, 2}:  # type: ignore
        return node.args[0]
    moved = node.target is aten.permute.default and [d % 4 for d in node.args[1]] == [0, 2, 1, 3]  # type: ignore
    return node.args[0] if moved else None
