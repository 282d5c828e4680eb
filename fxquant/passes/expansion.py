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


def expand(graph: fx.Graph) -> None:
    """Put the ops of each ``fxquant.quantize`` into Inductor's graph, where they fuse with others.

    One node until here: AOTAutograd runs every op of a graph several times over, and thirty of them
    at every linear would cost it more than the rest of the model.
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
