"""insert_observers: an ``observe`` node at the input of every linear, or wherever else is asked for."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from ..errors import InvalidOption
from ..graph import emit, layer_of
from .base import Pass

aten = torch.ops.aten
ops = torch.ops.fxquant

PORTS: Mapping[str, int | None] = {"input": 0, "weight": 1, "output": None}
"""What can be observed of ``linear(input, weight, bias)``: an argument, or its result."""


def observers_at(*ports: str) -> Pass:
    """The pass after which these ports of each linear pass a node ``observe(x, "<layer>:<port>")``.

    The weight is what the product reads, [out_features, in_features], also where a graph transposes,
    casts or computes it; it is copied at every call, as everything observed is. The output has its bias.
    Raises InvalidOption for another port.
    """
    for port in ports:
        if port not in PORTS:
            expected = f"one of {', '.join(PORTS)}"
            raise InvalidOption(name="ports", value=port, expected=expected)

    def insert_observers(gm: fx.GraphModule) -> bool:
        linears = gm.graph.find_nodes(op="call_function", target=aten.linear.default)
        for node in linears:
            for port in ports:
                _observe(gm.graph, node, port)
        return bool(linears and ports)

    insert_observers.__doc__ = f"Each linear's {', '.join(ports)} passes ``observe``."
    return Pass(insert_observers, requires=("float",), ensures="observed")


def _observe(graph: fx.Graph, node: fx.Node, port: str) -> None:
    place, name = PORTS[port], f"{layer_of(node)}:{port}"
    if place is None:
        with graph.inserting_after(node):
            seen = emit(graph, node, ops.observe.default, node, name)
        node.replace_all_uses_with(seen, delete_user_cb=lambda user: user is not seen)
    else:
        with graph.inserting_before(node):
            node.update_arg(place, emit(graph, node, ops.observe.default, node.args[place], name))


insert_observers = observers_at("input")
