"""Graphs of small models as text, on a made-up device without kernels: the same on every machine."""

from __future__ import annotations

import operator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from expecttest import TestCase
from torch import fx, nn

import fxquant
from fxquant import passes
from fxquant.graph import fetch, is_folded, stage
from fxquant.lowering.kernel import Device
from fxquant.passes import lowering
from fxquant.passes.base import Pass, describe

DEVICE = Device(name="golden", type="none", bandwidth=1e10, peak={"float32": 1e11}, launch=1e-6)


class Model(nn.Module):
    """A GELU between two linears."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(x)))


class Attention(nn.Module):
    """Two linears on one input, one without a bias."""

    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(32, 32), nn.Linear(32, 32, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q(x).view(2, 4, 8) * self.k(x).view(2, 4, 8)


def listing(gm: fx.GraphModule) -> str:
    """A line for each node: its name, value and expression; then what is folded."""
    lines = []
    for node in gm.graph.nodes:
        if node.op == "output":
            lines.append(f"return {', '.join(map(str, node.all_input_nodes))}")
        elif node.op == "placeholder":
            lines.append(f"input {node}: {_short(node.meta['val'])}")
        elif node.op == "get_attr":
            lines.append(f"{node} = self.{node.target}")
        else:
            value = "" if node.target is operator.getitem else f": {_short(node.meta['val'])}"
            args = ", ".join(
                [*map(_text, node.args), *(f"{k}={v}" for k, v in node.kwargs.items())]
            )
            lines.append(f"{node}{value} = {_name(node)}({args})")
    for node in gm.graph.find_nodes(op="call_module"):
        if is_folded(gm, node):
            recipe = fetch(gm, str(node.target)).recipe.graph
            lines.append(f"{node.target}:")
            lines += [
                f"  {n} = {_name(n)}({', '.join(map(_text, n.args))})"
                for n in recipe.nodes
                if n.op == "call_function"
            ]
            (output,) = recipe.find_nodes(op="output")
            lines.append(f"  return {', '.join(map(str, output.all_input_nodes))}")
    return "\n".join(lines)


def _short(value: Any) -> str:
    return describe(value).replace("torch.", "").replace(" stride ", "")


def _text(arg: Any) -> str:
    return str(arg).replace("torch.", "") if arg != "" else "''"


def _name(node: fx.Node) -> str:
    if node.target is operator.getitem:
        return "getitem"
    return (
        f"self.{node.target}"
        if node.op == "call_module"
        else str(node.target).removesuffix(".default")
    )


class GoldenGraphs(TestCase):
    def graph(self, model: nn.Module, wanted: str, *steps: Pass) -> str:
        torch.manual_seed(0)
        gm = fxquant.trace(model, (torch.randn(2, 32),))
        with mock.patch.object(lowering, "device_row", lambda device: DEVICE):
            for one in steps:
                one(gm)
        self.assertEqual(stage(gm), wanted)
        return listing(gm)

    def until_merge(self, scheme: str, **decided: Any) -> tuple[Pass, ...]:
        names = ("lowered", "verified")
        found = passes.pipeline(scheme, **decided)
        return tuple(one for name, one in found if name not in names)
