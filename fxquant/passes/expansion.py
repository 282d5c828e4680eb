"""expand: the ops behind what quantizes activations, once AOTAutograd is done with the graph."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from ..graph import describe, emit, inline, replace, value
from ..inductor import WIDEST_HELD, realize, trace_decomposed
from ..lowering.loops import are_rows, is_static
from ..lowering.triton_quantize import are_many, is_served
from ..lowering.triton_widen import widen
from ..ops import finish, outputs, quantize, quantize_static, spec_of

aten = torch.ops.aten
ops = torch.ops.fxquant

REFERENCES = {
    ops.quantize.default: quantize,
    ops.quantize_static.default: quantize_static,
    ops.widen.default: widen,
}


def expand(graph: fx.Graph, *, held: bool = False) -> None:
    """Have Inductor write out each ``fxquant.quantize`` in loops, which fuse with others. Where there is
    nothing to fuse with, or there are many rows that Inductor's kernel does not hold (``held``: it does up to
    ``WIDEST_HELD`` values), it stays one kernel of our own.

    One node until here: AOTAutograd runs every op of a graph several times over, and thirty of them
    at every linear would cost it more than the rest of the model. Inductor's passes are no cheaper, so
    what ``loops`` can lower is left as it is; the others become the ops of the reference.
    """
    bodies: dict[Any, fx.GraphModule] = {}
    for target in REFERENCES:
        for node in graph.find_nodes(op="call_function", target=target):
            if _has_kernel(node, held):
                _keep_whole(graph, node)
            elif not _has_loops(node):
                _expand_one(graph, node, bodies)
            elif target is ops.quantize.default and _arguments(node)[3]:
                _expand_gate(graph, node, bodies)
    _keep_sums(graph)


def _keep_whole(graph: fx.Graph, node: fx.Node) -> None:
    """One kernel for a ``fxquant.quantize``, and for the ``fxquant.widen`` of all that it makes."""
    x, scheme, _, gate = _arguments(node)
    parts, widened = _parts(node), _widened(node)
    if not widened:
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
    for gone in (parts[0], parts[2], node):
        graph.erase_node(gone)


def _parts(node: fx.Node) -> dict[Any, fx.Node]:
    """What is taken of a ``fxquant.quantize``: codes, scale, zero point, by their index."""
    return {part.args[1]: part for part in node.users}


def _widened(node: fx.Node) -> list[fx.Node]:
    """The ``fxquant.widen`` of its codes and zero points, if nothing else takes those."""
    parts = _parts(node)
    if not {0, 2} <= parts.keys() or len(parts) != len(node.users):
        return []
    pair = parts[0], parts[2]
    found = list(pair[0].users)
    alone = all(n.target is ops.widen.default and n.args == pair for n in found)
    return found if alone and set(pair[1].users) == set(found) else []


VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
PRODUCTS = (aten.mm.default, aten.addmm.default, aten.bmm.default)


def _arguments(node: fx.Node) -> tuple[Any, ...]:
    """x, scheme, role and gate of a ``fxquant.quantize``."""
    return (*node.args, "")[:4]


def _has_kernel(node: fx.Node, held: bool) -> bool:
    if node.target is not ops.quantize.default:
        return False
    x, scheme, role, gate = _arguments(node)
    if role != "input" or not is_served(value(x), spec_of(scheme, role), gate):
        return False
    source = _viewed(x)
    if source.op == "placeholder" or _is_product(source):  # no kernel of Inductor's makes it
        return True
    fits = held and outputs(value(x).shape[1], gate) <= WIDEST_HELD
    fused = fits and _is_computed(source) and not _widened(node)
    return are_many(value(x), gate) and not fused


def _viewed(x: fx.Node) -> fx.Node:
    while x.target in VIEWS:
        x = x.args[0]  # type: ignore[assignment]
    return x


def _is_product(x: fx.Node) -> bool:
    ours = isinstance(x.target, torch._ops.OpOverload) and x.target.namespace == "fxquant"
    return ours or x.target in PRODUCTS


def _is_computed(x: fx.Node) -> bool:
    """Whether it is more than moved (as what attention makes is)."""
    op = isinstance(x.target, torch._ops.OpOverload) and x.target is not aten.clone.default
    return op and torch.Tag.pointwise in x.target.tags  # type: ignore[union-attr]


def _keep_sums(graph: fx.Graph) -> None:
    """Store what a linear's result was added to: each norm would otherwise add up again what all linears
    before it have added. (Linears that are one op: what scales the result of ATen's hides them.)"""
    for node in graph.find_nodes(op="call_function", target=aten.add.Tensor):
        if len(node.users) > 1 and any(_is_product(_viewed(n)) for n in node.all_input_nodes):
            realize(node)


def _has_loops(node: fx.Node) -> bool:
    if node.target is ops.quantize.default:
        x, scheme, role, gate = _arguments(node)
        shape, dtype = value(x).shape, value(x).dtype
        k = outputs(shape[-1], gate) if shape else 0
        return role == "input" and are_rows(k, dtype, spec_of(scheme, role))
    if node.target is ops.quantize_static.default:
        x, *qparams, scheme = node.args
        found = [(value(q).numel(), value(q).dtype) for q in qparams if q is not None]
        return is_static(value(x).shape, value(x).dtype, found, spec_of(scheme, "input"))
    return False


def _expand_gate(graph: fx.Graph, node: fx.Node, bodies: dict[Any, fx.GraphModule]) -> None:
    x, scheme, role, gate = _arguments(node)
    with graph.inserting_before(node):
        x = _inline(graph, node, finish, (x, gate), bodies)
        replace(node, emit(graph, node, ops.quantize.default, x, scheme, role))


def _expand_one(graph: fx.Graph, node: fx.Node, bodies: dict[Any, fx.GraphModule]) -> None:
    with graph.inserting_before(node):
        results = _inline(graph, node, REFERENCES[node.target], node.args, bodies)
    for qparam in results[1:] if isinstance(results, (list, tuple)) else ():
        realize(qparam)  # otherwise the codes' loop, and all others, would compute it again
    if isinstance(results, fx.Node):
        replace(node, results)
        return
    for user in list(node.users):
        replace(user, results[user.args[1]])  # type: ignore[index]
    graph.erase_node(node)


def _inline(
    graph: fx.Graph,
    like: fx.Node,
    reference: Callable[..., Any],
    arguments: Sequence[Any],
    bodies: dict[Any, fx.GraphModule],
) -> Any:
    """The ops of ``reference`` at these arguments; ``bodies``: those traced before, for equal ones."""
    tensors = [*dict.fromkeys(a for a in arguments if isinstance(a, fx.Node))]
    places = [tensors.index(a) if isinstance(a, fx.Node) else None for a in arguments]
    literals = tuple(None if isinstance(a, fx.Node) else a for a in arguments)
    values = [value(a) for a in tensors]
    key = (reference, literals, *places, *((describe(v), v.device) for v in values))
    if key not in bodies:

        def compute(*given: torch.Tensor) -> Any:
            args = [x if i is None else given[i] for i, x in zip(places, literals, strict=True)]
            return reference(*args)

        bodies[key] = trace_decomposed(compute, *values)
    return inline(graph, like, bodies[key], tensors)
