"""verify: what a legal graph is at each stage."""

from __future__ import annotations

import torch
from torch import fx

from ..errors import IllegalGraph
from ..graph import STAGES, bodies_of, constants, describe, evaluate, is_folded, layers, stage
from .base import Pass

aten = torch.ops.aten
ops = torch.ops.fxquant

ABSENT = {
    "float": (ops.quantize, ops.dequantize, ops.observe, ops.pack, ops.dispatch),
    "observed": (ops.quantize, ops.dequantize, ops.pack, ops.dispatch),
    "reference": (ops.pack, ops.dispatch),
    "fused": (ops.observe, ops.pack, ops.dispatch),
    "lowered": (ops.observe,),
}
"""Ops that must not occur at a stage. ``fxquant.linear`` may: a QuantLinear brings it."""


def check(gm: fx.GraphModule) -> bool:
    """Raises IllegalGraph at the first node that may not stand where it does.

    Looked at: ops that the stage forbids, missing or wrong values, layers that claim a kernel
    without a scheme; once lowered, linears without a kernel, and weights that are quantized or
    packed at each call.
    """
    where = stage(gm)
    forbidden = ABSENT.get(where, ())
    constant = constants(gm) if where == "lowered" else {}
    for node in gm.graph.nodes:
        if node.op == "call_function":
            packet = getattr(node.target, "overloadpacket", None)
            if packet in forbidden:
                raise IllegalGraph(stage=where, node=node, reason=f"{packet} may not occur here")
            _check_value(node, where)
            if node.target is ops.linear.default and node.args[1] in constant:
                raise IllegalGraph(stage=where, node=node, reason="has no kernel")
            if node in constant and packet in (ops.quantize, ops.static_qparams, ops.pack):
                reason = "depends on parameters alone and is computed at each call"
                raise IllegalGraph(stage=where, node=node, reason=reason)
        if node.op == "call_module" and not is_folded(gm, node):
            raise IllegalGraph(stage=where, node=node, reason="calls a module that is not folded")
    for layer in layers(gm).values():
        if layer.kernel and not layer.scheme:
            raise IllegalGraph(stage=where, node=layer.name, reason="has a kernel, but no scheme")
    for body in bodies_of(gm):
        check(body)
    return False


def _check_value(node: fx.Node, where: str) -> None:
    if not isinstance(node.target, torch._ops.OpOverload) or node.is_impure():
        return
    if "val" not in node.meta or any("val" not in n.meta for n in node.all_input_nodes):
        raise IllegalGraph(stage=where, node=node, reason="has no value")
    if not node.meta.get("fxquant_emitted"):
        return  # as traced
    if torch.Tag.dynamic_output_shape in node.target.tags or node.target is aten.item.default:
        return
    found, kept = evaluate(node), node.meta["val"]
    if isinstance(kept, torch.Tensor | list | tuple) and describe(found) != describe(kept):
        reason = f"gives {describe(found)}, noted is {describe(kept)}"
        raise IllegalGraph(stage=where, node=node, reason=reason)


verify = Pass(check, requires=STAGES, name="verify")
