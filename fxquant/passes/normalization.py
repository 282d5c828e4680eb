"""normalize: every spelling of a linear becomes ``aten.linear``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from ..capture import NAMES, name_layer
from ..graph import Layer, constants, emit, layers, note, replace, value
from .base import rewrites

aten = torch.ops.aten
ops = torch.ops.fxquant

TRANSPOSES = (aten.t.default, aten.numpy_T.default, aten.mT.default, aten.adjoint.default)
PRODUCTS = (aten.matmul.default, aten.mm.default, aten.addmm.default)


@rewrites("captured", "float", ensures="float")
def normalize(gm: fx.GraphModule) -> bool:
    """``matmul``, ``mm`` and ``addmm`` with a constant matrix become ``aten.linear``, and every
    linear is entered in the graph's list of layers under its name in the user's model.

    The casts that autocast would make are written out, so that what follows need not know of it.
    """
    changed = False
    constant, modules = constants(gm), NAMES.modules()
    for node in list(gm.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in PRODUCTS:
            node = _product_to_linear(gm, node, constant)
            changed |= node is not None
        if node is not None and node.target is aten.linear.default:
            changed |= _explicit_casts(gm, node, constant)
            _register(gm, node, constant, modules)
        elif node is not None and node.target is ops.linear.default:
            _register_quantized(gm, node, constant, modules)
    return changed


def _product_to_linear(gm: fx.GraphModule, node: fx.Node, constant: Any) -> fx.Node | None:
    bias, (x, matrix) = None, node.args[-2:]
    if node.target is aten.addmm.default:
        if any(node.kwargs.get(k, 1) != 1 for k in ("alpha", "beta")):
            return None
        bias = node.args[0]
        if value(bias).dim() != 1 or value(bias).shape[0] != value(node).shape[-1]:
            return None
    if not isinstance(x, fx.Node) or x in constant:
        return None
    if matrix not in constant or value(matrix).dim() != 2 or value(x).dim() < 2:
        return None
    with gm.graph.inserting_before(node):
        weight = _transposed(gm.graph, node, matrix)
        _also_constant(constant, [(weight, matrix)])
        args = _cast(gm, node, (x, weight, bias), constant)
        new = emit(gm.graph, node, aten.linear.default, *args)
    replace(node, new)
    return new


def _transposed(graph: fx.Graph, like: fx.Node, matrix: fx.Node) -> fx.Node:
    if _is_transpose(matrix):
        return matrix.args[0]  # type: ignore[return-value]
    return emit(graph, like, aten.t.default, matrix)


def _is_transpose(node: fx.Node) -> bool:
    if node.target in TRANSPOSES:
        return value(node).dim() == 2
    if node.target is aten.transpose.int:
        return value(node).dim() == 2 and {d % 2 for d in node.args[1:3]} == {0, 1}  # type: ignore
    return node.target is aten.permute.default and [d % 2 for d in node.args[1]] == [1, 0]  # type: ignore


def _explicit_casts(gm: fx.GraphModule, node: fx.Node, constant: Any) -> bool:
    """Under autocast a float32 linear computes in bfloat16: say so in the graph."""
    with gm.graph.inserting_before(node):
        args = _cast(gm, node, node.args, constant)
    changed = args != node.args
    node.args = args
    return changed


def _cast(gm: fx.GraphModule, like: fx.Node, args: Iterable[Any], constant: Any) -> tuple[Any, ...]:
    """``args`` in the dtype of what ``like`` computes of them."""
    dtype, given = value(like).dtype, tuple(args)
    found = tuple(
        a if a is None or value(a).dtype == dtype else emit(gm.graph, like, aten.to.dtype, a, dtype)
        for a in given
    )
    _also_constant(constant, zip(found, given, strict=True))
    return found


def _also_constant(constant: Any, pairs: Iterable[tuple[Any, Any]]) -> None:
    """Enter nodes that are computed from another one alone, given as (node, other)."""
    constant.update({node: constant[other] for node, other in pairs if other in constant})


def _register(
    gm: fx.GraphModule,
    node: fx.Node,
    constant: dict[fx.Node, frozenset[str]],
    modules: dict[int, str],
) -> None:
    x, weight = node.args[:2]
    name = name_layer(node, constant.get(weight, frozenset()), modules)  # type: ignore[arg-type]
    known = layers(gm)
    if name in known:
        known[name].uses += 1
    else:
        n, k = value(weight).shape[-2:] if value(weight).dim() > 1 else (1, value(weight).shape[0])
        known[name] = Layer(
            name=name,
            module_type=note(node).get("type", ""),
            in_features=int(k),
            out_features=int(n),
            dtype=str(value(weight).dtype).removeprefix("torch."),
            rows=str(value(x).numel() // value(x).shape[-1]) if value(x).shape[-1] else "0",
        )
    note(node)["layer"] = name
    if weight not in constant:
        known[name].reason = "its weight is not a parameter or a buffer"


def _register_quantized(
    gm: fx.GraphModule, node: fx.Node, constant: Any, modules: dict[int, str]
) -> None:
    """A QuantLinear of the user's model is a layer that has its scheme already."""
    x, codes = node.args[:2]
    name = name_layer(node, constant.get(codes, frozenset()), modules)
    layer = Layer(
        name=name,
        module_type=note(node).get("type", ""),
        in_features=int(value(x).shape[-1]),
        out_features=int(value(codes).shape[0]),
        scheme=str(node.args[5]),
        uses=layers(gm)[name].uses + 1 if name in layers(gm) else 1,
    )
    layers(gm)[name] = layer
    note(node)["layer"] = name
