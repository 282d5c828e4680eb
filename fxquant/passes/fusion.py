"""fuse: the reference form of a linear, its bias and its activation become one ``fxquant.linear``."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..graph import (
    constants,
    emit,
    layer_of,
    layers,
    memory_of,
    move_before,
    replace,
    value,
    written,
)
from ..scheme import get_scheme
from .base import rewrites

aten = torch.ops.aten
ops = torch.ops.fxquant


def activation_of(node: fx.Node) -> str | None:
    """The epilogue that ``node`` is, if it is one."""
    if node.target is aten.gelu.default:
        return {"none": "gelu", "tanh": "gelu_tanh"}[node.kwargs.get("approximate", "none")]  # type: ignore[index]
    return {aten.relu.default: "relu", aten.silu.default: "silu"}.get(node.target)  # type: ignore[call-overload]


@rewrites("reference", ensures="fused")
def fuse(gm: fx.GraphModule) -> bool:
    """``int_mm``, ``mul`` by the scales, bias and activation become one node.

    ``linear(dq(q(x)), dq(codes, scale, zero), b)`` -> ``fxquant.linear(x, codes, scale, zero, b,
    scheme, epilogue)``, which quantizes ``x`` itself; a static scheme's takes ``q(x)``, what it was made
    with, and a dtype. A scheme whose input is not quantized as it asks is left alone.
    """
    fused: list[fx.Node] = []
    _prepare_once(gm)
    constant = constants(gm)
    held = gm.graph.find_nodes(op="call_function", target=ops.linear.default)  # QuantLinears
    for node in [*held, *gm.graph.find_nodes(op="call_function", target=aten.linear.default)]:
        if one := node if node in held else _fuse_linear(gm, node):
            fused.append(_absorb_bias(gm, one, constant))
    gm.graph.eliminate_dead_code()  # what is left of the reference form is not a sibling
    for node in fused:
        _absorb_activation(gm, node)
    return bool(fused)


PREPARATION = (ops.quantize_static.default, aten.div.Tensor, aten.to.dtype)
"""What a QuantLinear does to its input: smoothing, and codes of a static scheme."""


def _prepare_once(gm: fx.GraphModule) -> None:
    """QuantLinears that prepare one value alike (of q, k and v, say) read one result."""
    first: dict[Any, fx.Node] = {}
    changed = written(gm)
    for node in list(gm.graph.nodes):
        if node.target not in PREPARATION or node.kwargs:
            continue
        if any(memory_of(n) & changed for n in (node, *node.all_input_nodes)):
            continue
        if (known := first.setdefault((node.target, *node.args), node)) is not node:
            replace(node, known)


def _fuse_linear(gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    x, weight = node.args[:2]
    bias = node.args[2] if len(node.args) > 2 else None
    if not _is(weight, "weight"):
        return None
    codes, scale, zero, scheme = weight.args[:4]
    static: tuple[Any, ...] = ()
    if get_scheme(scheme).input is not None:
        if not _is(x, "input") or x.args[3] != scheme:
            layers(gm)[layer_of(node)].reason = f"its input is not quantized as {scheme} asks"
            return None
        if get_scheme(scheme).static:
            x, *qparams, _, _, dtype = x.args
            static = (*qparams, dtype)
        else:
            x = x.args[0].args[0].args[0]  # dequantize(getitem(quantize(x), 0), ...)
    args = (x, codes, scale, zero, bias, scheme, "", *static)
    with gm.graph.inserting_before(node):
        fused = emit(gm.graph, node, ops.linear.default, *args)
    replace(node, fused)
    return fused


def _is(node: Any, role: str) -> bool:
    return (
        isinstance(node, fx.Node) and node.target is ops.dequantize.default and node.args[4] == role
    )


def only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _absorb_bias(gm: fx.GraphModule, node: fx.Node, constant: Any) -> fx.Node:
    user = only_user(node)
    if node.args[4] is not None or user is None or user.target is not aten.add.Tensor:
        return node
    bias = next((a for a in user.args if a is not node), None)
    fits = (
        isinstance(bias, fx.Node)
        and bias in constant
        and list(value(bias).shape) == [value(node).shape[-1]]
        and value(bias).dtype == value(node).dtype
        and not user.kwargs
    )
    if not fits:
        return node
    move_before(node, bias)  # type: ignore[arg-type]
    with gm.graph.inserting_before(node):
        new = emit(gm.graph, node, node.target, *node.args[:4], bias, *node.args[5:])  # type: ignore
    replace(user, new)
    gm.graph.erase_node(node)
    return new


def _absorb_activation(gm: fx.GraphModule, node: fx.Node) -> None:
    user = only_user(node)
    epilogue = user is not None and activation_of(user)
    if not epilogue or _has_sibling(node):
        return
    assert user is not None
    with gm.graph.inserting_before(node):  # not at the user: the input may be written to in between
        args = (*node.args[:6], epilogue, *node.args[7:])
        new = emit(gm.graph, node, node.target, *args)  # type: ignore[arg-type]
    replace(user, new)
    gm.graph.erase_node(node)


def _has_sibling(node: fx.Node) -> bool:
    """Does another linear take the same input? Then ``merge`` is worth more than an epilogue."""
    x = node.args[0]
    assert isinstance(x, fx.Node)
    readers = (aten.linear.default, ops.linear.default, ops.quantize.default)
    return sum(user.target in readers for user in x.users) > 1
