"""expand: the ops behind what quantizes activations, once AOTAutograd is done with the graph."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from ..graph import describe, emit, inline, replace, value
from ..inductor import realize, trace_decomposed
from ..lowering.triton_quantize import are_many, is_served
from ..lowering.triton_widen import widen
from ..ops import quantize, quantize_static, spec_of

aten = torch.ops.aten
ops = torch.ops.fxquant

REFERENCES = {
    ops.quantize.default: quantize,
    ops.quantize_static.default: quantize_static,
    ops.widen.default: widen,
}


def expand(graph: fx.Graph) -> None:
    """Put the ops of each ``fxquant.quantize`` into Inductor's graph, where they fuse with others. Where
    there are many rows, or nothing to fuse with, they stay one kernel of our own.

    One node until here: AOTAutograd runs every op of a graph several times over, and thirty of them
    at every linear would cost it more than the rest of the model.
    """
    bodies: dict[Any, fx.GraphModule] = {}
    for target in REFERENCES:
        for node in graph.find_nodes(op="call_function", target=target):
            if target is ops.quantize.default and _has_kernel(node):
                _keep_whole(graph, node)
            else:
                _expand_one(graph, node, bodies)


def _keep_whole(graph: fx.Graph, node: fx.Node) -> None:
    """One kernel for a ``fxquant.quantize``, and for the ``fxquant.widen`` of all that it makes."""
    x, scheme, _, gate = _arguments(node)
    parts = {part.args[1]: part for part in node.users}
    apart = {0, 2} <= parts.keys() and len(parts) == len(node.users)
    widened = list(parts[0].users) if apart else []
    pair = tuple(parts[i] for i in (0, 2)) if widened else ()
    alone = all(n.target is ops.widen.default and n.args == pair for n in widened)
    if not widened or not alone or set(pair[1].users) != set(widened):
        # a new node: the old one's meta has values for the arguments of the old op
        with graph.inserting_before(node):
            own = emit(graph, node, ops.quantize_rows.default, x, scheme, gate)
        replace(node, own)
        return
    with graph.inserting_before(node):
        own = emit(graph, node, ops.quantize_rows.default, x, scheme, gate, True)
        codes, scale = (emit(graph, node, operator.getitem, own, i) for i in (0, 1))
    for wide in widened:
        replace(wide, codes)
    if 1 in parts:
        replace(parts[1], scale)
    for gone in (*pair, node):
        graph.erase_node(gone)


VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
PRODUCTS = (aten.mm.default, aten.addmm.default, aten.bmm.default)


def _arguments(node: fx.Node) -> tuple[Any, ...]:
    """x, scheme, role and gate of a ``fxquant.quantize``."""
    return (*node.args, "")[:4]


def _has_kernel(node: fx.Node) -> bool:
    x, scheme, role, gate = _arguments(node)
    if role != "input" or not is_served(value(x), spec_of(scheme, role), gate):
        return False
    return are_many(value(x), gate) or _follows_a_kernel(x)


def _follows_a_kernel(x: fx.Node) -> bool:
    """Whether ``x`` is what a kernel has written that Inductor does not generate."""
    while x.target in VIEWS:
        x = x.args[0]  # type: ignore[assignment]
    ours = isinstance(x.target, torch._ops.OpOverload) and x.target.namespace == "fxquant"
    return ours or x.target in PRODUCTS


def _expand_one(graph: fx.Graph, node: fx.Node, bodies: dict[Any, fx.GraphModule]) -> None:
    tensors = node.all_input_nodes
    places = [tensors.index(a) if isinstance(a, fx.Node) else None for a in node.args]
    literals = tuple(None if isinstance(a, fx.Node) else a for a in node.args)
    values = [value(a) for a in tensors]
    key = (node.target, literals, *places, *((describe(v), v.device) for v in values))
    if key not in bodies:

        def compute(*given: torch.Tensor) -> Any:
            args = [x if i is None else given[i] for i, x in zip(places, literals, strict=True)]
            return REFERENCES[node.target](*args)  # type: ignore[index]

        bodies[key] = trace_decomposed(compute, *values)
    with graph.inserting_before(node):
        results = inline(graph, node, bodies[key], tensors)
    for qparam in results[1:] if isinstance(results, (list, tuple)) else ():
        realize(qparam)  # otherwise the codes' loop, and all others, would compute it again
    if isinstance(results, fx.Node):
        replace(node, results)
        return
    for user in list(node.users):
        replace(user, results[user.args[1]])  # type: ignore[index]
    graph.erase_node(node)
