"""insert_observers: an ``observe`` node at the input of every linear."""

from __future__ import annotations

import torch
from torch import fx

from ..graph import emit, layer_of
from .base import rewrites

aten = torch.ops.aten
ops = torch.ops.fxquant


@rewrites("float", ensures="observed")
def insert_observers(gm: fx.GraphModule) -> bool:
    """The input of each linear passes an ``observe`` node named ``<layer>:input``."""
    linears = gm.graph.find_nodes(op="call_function", target=aten.linear.default)
    for node in linears:
        with gm.graph.inserting_before(node):
            name = f"{layer_of(node)}:input"
            node.update_arg(0, emit(gm.graph, node, ops.observe.default, node.args[0], name))
    return bool(linears)
