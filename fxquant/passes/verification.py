"""verify: what a legal graph is at each stage."""

from __future__ import annotations

import torch
from torch import fx

from ..errors import IllegalGraph
from ..graph import STAGES, bodies_of, evaluate, is_folded, layers, stage
from .base import Pass, describe

aten = torch.ops.aten
ops = torch.ops.fxquant

ABSENT = {
    "float": (ops.quantize, ops.dequantize, ops.linear, ops.observe, ops.pack),
    "observed": (ops.quantize, ops.dequantize, ops.linear, ops.pack),
    "reference": (ops.linear, ops.pack, ops.dispatch),
    "fused": (ops.observe, ops.pack, ops.dispatch),
    "lowered": (ops.observe, ops.linear),
}
"""Ops that must not occur at a stage."""


def check(gm: fx.GraphModule) -> bool:
    """Raises IllegalGraph at the first node that may not stand where it does.

    Looked at: ops that the stage forbids, missing or wrong values, weights quantized but not
    folded, layers that claim a kernel without a scheme.
    """
    where = stage(gm)
    forbidden = ABSENT.get(where, ())
    for node in gm.graph.nodes:
        if node.op == "call_function":
            packet = getattr(node.target, "overloadpacket", None)
            if packet in forbidden:
                raise IllegalGraph(stage=where, node=node, reason=f"{packet} may not occur here")
            _check_value(node, where)
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
    if isinstance(kept, torch.Tensor) and describe(found) != describe(kept):
        reason = f"gives {describe(found)}, noted is {describe(kept)}"
        raise IllegalGraph(stage=where, node=node, reason=reason)


verify = Pass(check, requires=STAGES, name="verify")
