"""expand: the ops behind ``fxquant.quantize`` of activations, once AOTAutograd is done with the graph."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import fx

from ..graph import describe, inline, replace, value
from ..inductor import trace_decomposed
from ..ops import quantize

ops = torch.ops.fxquant


def expand(graph: fx.Graph) -> bool:
    """Put the ops of each ``fxquant.quantize`` into Inductor's graph, where they fuse with others.

    One node until here: AOTAutograd runs every op of a graph several times over, and thirty of them
    at every linear would cost it more than the rest of the model. Returns whether kernels may
    overlap (``overlappable``).
    """
    bodies: dict[Any, fx.GraphModule] = {}
    for node in graph.find_nodes(op="call_function", target=ops.quantize.default):
        x, scheme, role = node.args
        key = (describe(value(x)), value(x).device, scheme, role)
        if key not in bodies:
            reference = partial(quantize, scheme=scheme, role=role)
            bodies[key] = trace_decomposed(reference, value(x))
        with graph.inserting_before(node):
            results = inline(graph, node, bodies[key], [x])
        for user in list(node.users):
            replace(user, results[user.args[1]])  # type: ignore[index]
        graph.erase_node(node)
    return overlappable(graph)


VIEWS = frozenset(
    {
        torch.ops.aten.expand.default,
        torch.ops.aten.permute.default,
        torch.ops.aten.unsqueeze.default,
        torch.ops.aten.view.default,
    }
)


def overlappable(graph: fx.Graph) -> bool:
    """Whether every kernel that Inductor makes of ``graph`` reads something.

    On Hopper a kernel may start before the one ahead of it has ended (programmatic dependent
    launch). Inductor's kernels wait for that one with their first load; one that loads nothing
    would not, and whatever follows it would wait for the wrong kernel. Tensors made from nothing
    are no kernels where Inductor writes their value into the pointwise ops that use them.
    """
    return all(_inlined(node) for node in graph.nodes if _from_nothing(node))


def _from_nothing(node: fx.Node) -> bool:
    made = node.op == "call_function" and isinstance(node.meta.get("val"), torch.Tensor)
    return made and not any(
        isinstance(n.meta.get("val"), torch.Tensor) for n in node.all_input_nodes
    )


def _inlined(node: fx.Node) -> bool:
    return all(
        torch.Tag.pointwise in getattr(user.target, "tags", ())
        or (user.target in VIEWS and _inlined(user))
        for user in node.users
    )
