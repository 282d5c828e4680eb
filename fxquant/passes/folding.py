"""fold_qparams: what depends on parameters alone is computed once per weight, not once per call."""

from __future__ import annotations

import itertools
import operator
from typing import Any

import torch
from torch import fx

from ..graph import (
    add_operand,
    calls_of,
    constants,
    emit,
    fetch,
    is_folded,
    layer_of,
    replace,
    value,
)
from ..weights import Folded
from .base import rewrites

ops = torch.ops.fxquant


@rewrites("reference", "fused", "lowered")
def fold_qparams(gm: fx.GraphModule) -> bool:
    """The codes and qparams of each weight come from a memoized submodule (weights.Folded).

    Its inputs are the parameters themselves, so an update, a swap or a second instance of the
    model is seen. Dequantization is never folded: a weight stays quantized.
    """
    return fold(gm)


def fold(gm: fx.GraphModule) -> bool:
    """Move every constant ``quantize`` and ``pack`` into a memoized submodule.

    The body of a cond or a loop keeps its own until the graph around it hoists them.
    """
    if gm.meta.get("fxquant_body"):
        return False
    changed = hoist(gm)
    constant = constants(gm)
    targets = [n for n in gm.graph.nodes if _foldable(n) and n in constant]
    kept = (n for n in gm.graph.nodes if n.op not in ("placeholder", "get_attr"))
    first = next(n for n in kept if n not in targets)  # there is the output, at the latest
    inner = {s for n in targets for s in _behind(n)}
    for node in targets:
        if node not in inner:
            _fold_one(gm, node, first)
            changed = True
    gm.graph.eliminate_dead_code()
    return changed


def folds(node: fx.Node) -> fx.Node:
    """Ask for ``node``, which depends on parameters alone, to be folded."""
    node.meta["fxquant_fold"] = True
    return node


def _foldable(node: fx.Node) -> bool:
    if node.target is ops.pack.default or node.meta.get("fxquant_fold"):
        return True
    return node.target is ops.quantize.default and node.args[2] == "weight"


def _behind(node: fx.Node) -> set[fx.Node]:
    """Every node that ``node`` is computed from."""
    found: set[fx.Node] = set()
    todo = node.all_input_nodes
    while todo:
        one = todo.pop()
        if one not in found:
            found.add(one)
            todo.extend(one.all_input_nodes)
    return found


def _fold_one(gm: fx.GraphModule, node: fx.Node, first: fx.Node) -> None:
    recipe = fx.Graph()
    inputs: list[fx.Node] = []
    result = _copy(gm, node, recipe, {}, inputs)
    single = isinstance(value(node), torch.Tensor)
    recipe.output((result,) if single else result)
    name = next(f"folded_{i}" for i in range(len(gm.graph.nodes)) if not hasattr(gm, f"folded_{i}"))
    gm.add_submodule(name, Folded(fx.GraphModule(torch.nn.Module(), recipe), layer_of(node)))
    for source in inputs:
        if not source < first:  # a constant that tracing made stands where it is used
            first.prepend(source)
    with gm.graph.inserting_before(first):
        call = gm.graph.call_module(name, tuple(inputs))
        call.meta.update({k: v for k, v in node.meta.items() if k != "fxquant_fold"})
        new = call
        if single:
            call.meta["val"] = (value(node),)
            new = emit(gm.graph, node, operator.getitem, call, 0)
    replace(node, new)


def _copy(
    gm: fx.GraphModule,
    node: fx.Node,
    recipe: fx.Graph,
    done: dict[fx.Node, fx.Node],
    inputs: list[fx.Node],
) -> fx.Node:
    """Copy the expression of ``node`` back to the parameters into ``recipe``."""
    if node in done:
        return done[node]
    if node.op in ("placeholder", "get_attr"):
        done[node] = recipe.placeholder(f"p{len(inputs)}")
        inputs.append(node)
    elif is_folded(gm, node):
        inner = fetch(gm, str(node.target)).recipe.graph
        copies = {
            p: _copy(gm, a, recipe, done, inputs)  # type: ignore[arg-type]
            for p, a in zip(inner.find_nodes(op="placeholder"), node.args, strict=True)
        }
        done[node] = recipe.graph_copy(inner, copies)  # type: ignore[assignment]
    else:
        copy = {n: _copy(gm, n, recipe, done, inputs) for n in node.all_input_nodes}
        done[node] = recipe.node_copy(node, lambda n: copy[n])
        done[node].meta.clear()
    return done[node]


def hoist(gm: fx.GraphModule) -> bool:
    """Bring constant ``quantize`` and ``pack`` nodes out of the bodies of cond, loops and regions.

    Tensors that tracing made inside of a body come out too: only the outermost graph may own any.
    """
    changed = False
    for node in list(gm.graph.nodes):
        bodies = [body for body, _ in calls_of(gm, node)]
        for i, body in enumerate(bodies):
            changed |= hoist(body)
            constant = constants(body)
            _, operands = list(calls_of(gm, node))[i]  # hoisting from one body adds to all
            bound: dict[fx.Node, Any] = dict(
                zip(body.graph.find_nodes(op="placeholder"), operands, strict=True)
            )
            for target in [n for n in body.graph.nodes if _foldable(n) and n in constant]:
                _hoist_one(gm, node, body, bodies, target, bound)
                changed = True
            for target in body.graph.find_nodes(op="get_attr"):
                if isinstance(fetch(body, str(target.target)), torch.Tensor):
                    _hoist_one(gm, node, body, bodies, target, bound)
                    changed = True
            for name, _ in list(body.named_buffers(recurse=False)):
                delattr(body, name)
            body.recompile()
    return changed


def _hoist_one(
    gm: fx.GraphModule,
    call: fx.Node,
    body: fx.GraphModule,
    bodies: list[fx.GraphModule],
    target: fx.Node,
    bound: dict[fx.Node, Any],
) -> None:
    with gm.graph.inserting_before(call):
        outer = _emit_outside(gm, target, bound, {})
        outer.meta.update({k: v for k, v in target.meta.items() if k == "fxquant_fold"})
        single = isinstance(value(target), torch.Tensor)
        for item in [target] if single else list(target.users):
            operand = outer
            if not single:
                operand = emit(gm.graph, target, operator.getitem, outer, item.args[1])
            add_operand(call, operand)
            for other in bodies:
                holes = other.graph.find_nodes(op="placeholder")
                graph = other.graph
                with graph.inserting_after(holes[-1]) if holes else graph.inserting_before(None):
                    new = graph.placeholder(f"hoisted_{len(holes)}")
                new.meta["val"] = value(operand)
                if other is body:
                    other.meta["fxquant_parameters"][new.name] = layer_of(target)
                    item.replace_all_uses_with(new)
                    bound[new] = operand
                else:
                    other.recompile()
    body.graph.eliminate_dead_code()


def _emit_outside(
    gm: fx.GraphModule, node: fx.Node, bound: dict[fx.Node, Any], done: dict[fx.Node, fx.Node]
) -> fx.Node:
    if node in bound:
        return bound[node]
    if node.op == "get_attr" and node not in done:
        name = next(n for i in itertools.count() if not hasattr(gm, n := f"hoisted_tensor_{i}"))
        gm.register_buffer(name, fetch(node.graph.owning_module, str(node.target)))
        done[node] = gm.graph.get_attr(name)
        done[node].meta["val"] = value(node)
    elif node not in done:
        env = {n: _emit_outside(gm, n, bound, done) for n in node.all_input_nodes}
        args = fx.node.map_arg(node.args, lambda n: env[n])
        kwargs = fx.node.map_arg(node.kwargs, lambda n: env[n])
        done[node] = emit(gm.graph, node, node.target, *args, **kwargs)  # type: ignore[arg-type]
    return done[node]
