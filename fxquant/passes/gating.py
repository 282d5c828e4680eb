"""gate: an activation of one of two merged linears, times the other one, becomes their epilogue."""

from __future__ import annotations

import torch
from torch import fx

from ..graph import emit, replace, value
from ..lowering.select import select
from .base import rewrites
from .fusion import only_user
from .gates import gate_of
from .lowering import problem_of

aten = torch.ops.aten
ops = torch.ops.fxquant


@rewrites("fused", ensures="fused")
def gate(gm: fx.GraphModule) -> bool:
    """``act(gate) * up`` of a merged ``fxquant.linear`` (SwiGLU, Shazeer 2020, arXiv 2002.05202) is made by
    the linear itself, where every kernel that may run for it can: the two halves are never written.

    The activation must be the first half's (``merge`` sees to that), and both halves whole tiles of channels.
    """
    changed = False
    for product in gm.graph.find_nodes(op="call_function", target=aten.mul.Tensor):
        found = gate_of(product)
        if found is not None and _can_be_made_by(*found, product):
            node, epilogue = found
            with gm.graph.inserting_before(node):
                args = (*node.args[:6], epilogue, *node.args[7:])
                replace(product, emit(gm.graph, node, node.target, *args))  # type: ignore[arg-type]
            changed = True
    return changed


CHANNELS = 16
"""Of a tile: both halves have a whole number of them."""


def _can_be_made_by(node: fx.Node, epilogue: str, product: fx.Node) -> bool:
    """Whether ``node`` is a linear whose kernels, all that may run for it, have this epilogue, and which
    nothing else reads."""
    if node.target is not ops.linear.default or node.args[6] != "" or only_user(node) is None:
        return False
    y = value(product)
    if y.dtype != value(node).dtype or y.shape[-1] % CHANNELS:
        return False
    problem = problem_of(node)
    choice = select(problem)
    steps = [k for k, _ in choice.steps] if problem.m is None else [choice.at(problem.m)]
    return all(epilogue in kernel.epilogues for kernel in steps)
