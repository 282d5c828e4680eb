"""What the tests of passes share: traced models, their ops counted, provenance, exact weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn

import fxquant
from fxquant import Stats, passes
from fxquant.passes.base import Pass, signature

aten = torch.ops.aten
ops = torch.ops.fxquant


class Call(nn.Module):
    """A weight [32, 64], its like, a bias [32] and three more weights, used by ``call(m, x)``."""

    def __init__(self, call: Callable[[Call, torch.Tensor], Any]):
        super().__init__()
        self.w, self.other = (
            nn.Parameter(torch.randn(32, 64) / 8),
            nn.Parameter(torch.randn(32, 64) / 8),
        )
        self.wt = nn.Parameter(torch.randn(64, 32) / 8)
        self.b = nn.Parameter(torch.randn(32))
        self.call = call
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> Any:
        return self.call(self, x)


def trace(model: nn.Module | Callable, *args: Any, to: str = "captured", scheme: Any = "int8wo"):
    """The graph of ``model`` after the passes that lead to the stage ``to``, not folded or merged."""
    module = model if isinstance(model, nn.Module) else Call(model)
    gm = fxquant.trace(module.requires_grad_(False), args)
    steps = {
        "captured": [],
        "float": [passes.normalize],
        "reference": [passes.normalize, passes.quantize_weights(scheme)],
        "fused": [passes.normalize, passes.quantize_weights(scheme), passes.fuse],
    }
    return through(gm, *steps[to])


def through(gm: fx.GraphModule, *steps: Pass) -> fx.GraphModule:
    """Run passes; what they must not change is looked at after each."""
    for one in steps:
        before = signature(gm)
        result = one(gm)
        assert result.graph_module is gm
        assert signature(gm) == before
        assert all("val" in n.meta for n in gm.graph.nodes if n.op == "call_function")
        assert_sound(gm.graph)
    return gm


def assert_sound(graph: fx.Graph) -> None:
    """Forwards, backwards and by kind the same nodes: one inserted beside an erased node is not."""
    nodes = list(graph.nodes)
    assert list(reversed(graph.nodes)) == nodes[::-1]
    for op in ("placeholder", "get_attr", "call_module"):
        assert set(graph.find_nodes(op=op)) == {n for n in nodes if n.op == op}


def count(gm: fx.GraphModule) -> Counter[str]:
    """How often each op is called, by its name without namespace; calls of folded submodules too."""
    found: Counter[str] = Counter()
    for node in gm.graph.nodes:
        if node.op == "call_function":
            name = getattr(node.target, "__name__", str(node.target))
            namespace = getattr(node.target, "namespace", "")
            short = name.partition(".")[0]
            found["fx." + short if namespace == "fxquant" else short] += 1
        elif node.op == "call_module":
            found["folded"] += 1
    return found


def calls(gm: fx.GraphModule, *targets: Any) -> list[fx.Node]:
    return [n for n in gm.graph.nodes if n.op == "call_function" and n.target in targets]


def assert_provenance(nodes: Sequence[fx.Node], layer: str, line: str) -> None:
    """Each node tells its layer, the module that it comes from and the user's line of code."""
    assert nodes
    for node in nodes:
        assert node.meta["custom"]["fxquant"]["layer"] == layer, node
        assert line in node.meta["stack_trace"], node
        path, kind = list(node.meta["nn_module_stack"].values())[-1]
        assert path == layer and kind.endswith("Linear"), node


def exact(model: nn.Module) -> nn.Module:
    """Integer weights to +-127, and 127.5 in column 0: int8 per channel gives them the scale 1."""
    for parameter in model.parameters():
        values = torch.randint(-127, 128, parameter.shape).float()
        if parameter.dim() == 2:
            values[:, 0] = 127.5
        parameter.data = values
    return model


def integers(*shape: int) -> torch.Tensor:
    """Small integers, 0 where an exact weight has 127.5: products and sums without any rounding."""
    x = torch.randint(-8, 9, shape).float()
    x[..., 0] = 0
    return x


def calibrated(
    model: nn.Module, *batches: Any, kinds: Sequence[str] = ("minmax", "channel")
) -> Stats:
    """The statistics of these batches, without a compiler."""
    observed = {"input": list(kinds)}
    return fxquant.calibrate(model, batches, kinds=observed, compiled=False, progress=False)


def rewritten(
    model: nn.Module,
    x: torch.Tensor,
    scheme: Any,
    stats: Stats,
    *,
    to: str = "merged",
    smooth: Any = False,
    **decided: Any,
) -> fx.GraphModule:
    """The graph after the passes up to the one that PIPELINE calls ``to``."""
    gm = fxquant.trace(model.requires_grad_(False), (x,))
    for name, one in passes.pipeline(scheme, stats=stats, smooth=smooth, **decided):
        through(gm, one)
        if name == to:
            break
    return gm
