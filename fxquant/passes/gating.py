"""gate: an activation of one of two merged linears, times the other one, becomes their epilogue."""

from __future__ import annotations

import operator

import torch
from torch import fx

from ..graph import emit, replace, value
from ..lowering.select import select
from .base import rewrites
from .fusion import activation_of, only_user
from .lowering import problem_of

aten = torch.ops.aten
ops = torch.ops.fxquant


@rewrites("fused", ensures="fused")
def gate(gm: fx.GraphModule) -> bool:
    """``act(gate) * up`` of a merged ``fxquant.linear`` (SwiGLU, Shazeer 2020, arXiv 2002.05202) is made by
    the linear itself, where every kernel that may run for it can: the two halves are never written.

    The first of the two linears must be the one with the activation, and as wide as the other in whole
    tiles of channels.
    """
    changed = False
    for node in gm.graph.find_nodes(op="call_function", target=ops.linear.default):
        found = _gated(node)
        if found is not None and _has_kernels(node, found[1]):
            product, epilogue = found
            with gm.graph.inserting_before(node):
                args = (*node.args[:6], epilogue, *node.args[7:])
                replace(product, emit(gm.graph, node, node.target, *args))  # type: ignore[arg-type]
            changed = True
    return changed


CHANNELS = 16
"""Of a tile: both halves have a whole number of them."""


def _gated(node: fx.Node) -> tuple[fx.Node, str] | None:
    """The product of the node's halves and the epilogue that it is, if nothing else reads them."""
    split = only_user(node)
    if node.args[6] != "" or split is None or split.target is not aten.split_with_sizes.default:
        return None
    _, sizes, dim = (*split.args, 0)[:3]
    rank = value(node).dim()
    if dim % rank != rank - 1:  # type: ignore[operator]  # rows, of which there may be a symbolic number
        return None
    parts = {n.args[1]: n for n in split.users if n.target is operator.getitem}
    if len(sizes) != 2 or sizes[0] != sizes[1] or sizes[0] % CHANNELS or len(parts) != 2:  # type: ignore
        return None
    active = only_user(parts[0])
    name = None if active is None else activation_of(active)
    if active is None or not name:
        return None
    product = only_user(active)
    if product is None or product.target is not aten.mul.Tensor or product.kwargs:
        return None
    same = value(product).dtype == value(node).dtype
    whole = set(product.args) == {active, parts[1]} and only_user(parts[1]) is product
    return (product, f"{name}_mul") if whole and same else None


def _has_kernels(node: fx.Node, epilogue: str) -> bool:
    """Whether all kernels that may run for ``node`` have this epilogue."""
    problem = problem_of(node)
    choice = select(problem)
    steps = [k for k, _ in choice.steps] if problem.m is None else [choice.at(problem.m)]
    return all(epilogue in kernel.epilogues for kernel in steps)
