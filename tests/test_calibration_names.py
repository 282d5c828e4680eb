"""Calibration counts every layer under its own name: shared graphs, recompiles, tied weights, real models."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import fxquant

from .test_architectures import ARCHITECTURES, made, reached

QUIET = {"compiled": False, "progress": False}
EVERYWHERE = {port: ("minmax", "histogram") for port in ("input", "output", "weight")}


class Broken(nn.Module):
    def __init__(self, gain):
        super().__init__()
        self.fc, self.gain = nn.Linear(16, 16), gain

    def forward(self, x):
        torch._dynamo.graph_break()
        return self.fc(x) * self.gain


@torch.no_grad()
def test_blocks_that_share_a_graph_are_counted_apart():
    model = nn.Sequential(*[Broken(10.0) for _ in range(3)]).requires_grad_(False)
    x = torch.randn(4, 16)
    stats = fxquant.calibrate(model, [x, x], kinds=EVERYWHERE, **QUIET)
    names = {f"{i}.fc:{port}" for i in range(3) for port in EVERYWHERE}
    assert set(stats) == names and not stats.missed
    for i, block in enumerate(model):
        values = {"input": x, "output": block.fc(x), "weight": block.fc.weight}
        for port, value in values.items():
            found = stats[f"{i}.fc:{port}"]["minmax"]
            assert found.batches == (1 if port == "weight" else 2)
            torch.testing.assert_close(found.range(), torch.aminmax(value))
        x = block(x)


class Tied(nn.Module):
    """Two layers of one weight, behind a graph break: all blocks run one graph."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x):
        torch._dynamo.graph_break()
        return self.b(torch.relu(self.a(x)))


@torch.no_grad()
def test_layers_of_a_tied_weight_are_counted_apart_in_every_block():
    """The last block's weight is another layer's too, of a name that comes before it."""
    blocks = nn.Sequential(*[Tied() for _ in range(3)])
    model = nn.ModuleDict({"aaa": nn.Linear(16, 16, bias=False), "blocks": blocks})
    model["aaa"].weight = blocks[2].a.weight
    model.forward = lambda x: model["aaa"](blocks(x))
    x = torch.randn(4, 16) * 20
    stats = fxquant.calibrate(model, [x], kinds=EVERYWHERE, **QUIET)
    assert len(stats) == 3 * 7 and not stats.missed
    for i, block in enumerate(blocks):
        for name in ("a", "b"):
            found = stats[f"blocks.{i}.{name}:input"]["minmax"]
            torch.testing.assert_close(found.range(), torch.aminmax(x))
            assert found.batches == 1
            x = torch.relu(block.a(x)) if name == "a" else block.b(x)
            weight = stats[f"blocks.{i}.{name}:weight"]["histogram"]
            assert int(weight.counts.sum()) == 256
    torch.testing.assert_close(stats["aaa:input"]["minmax"].range(), torch.aminmax(x))


@pytest.mark.parametrize("chosen", [0, 1, 2])
def test_a_recipe_by_name_chooses_among_blocks_that_share_a_graph(chosen):
    model = nn.Sequential(*[Broken(1.0) for _ in range(3)])
    recipe = {f"{chosen}.fc": "int8dq", "*": None}
    stats = fxquant.calibrate(model, [torch.randn(4, 16)], recipe, **QUIET)
    assert set(stats) == {f"{chosen}.fc:input"} and not stats.missed


def test_recompiles_and_graph_breaks_add_to_the_same_statistics():
    """Ranks, sizes and a branch: five graphs or more of the same two layers."""

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x, twice=False):
            y = self.a(x)
            if y.sum() > 1e9:  # a break that depends on data
                return y
            return self.b(self.b(y)) if twice else self.b(y)

    model, graphs = Branches(), []
    shapes = [(3, 8), (5, 8), (2, 3, 8), (8,), (1, 8), (0, 8), (2, 1, 2, 8)]
    batches = [{"x": torch.randn(s), "twice": len(s) == 3} for s in shapes]
    kinds = {"input": ("token", "sample"), "weight": ("histogram",)}
    with fxquant.Calibration(model, kinds=kinds, compiled=False) as stats, torch.no_grad():
        for batch in batches:
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
            model(**batch)
    tokens = 3 + 5 + 6 + 1 + 1 + 0 + 4
    assert graphs[-1] >= 5
    assert stats["a:input"]["token"].tokens == tokens
    assert stats["b:input"]["token"].tokens == tokens + 6
    rows = torch.cat([b["x"].reshape(-1, 8) for b in batches])
    found = stats["a:input"]["sample"].rows
    assert torch.equal(found.sort(0).values, rows.sort(0).values)
    assert int(stats["b:weight"]["histogram"].counts.sum()) == 64


def test_a_linear_of_transformers_that_is_never_reached_is_listed():
    model = nn.ModuleDict({"a": nn.Linear(4, 6), "b": Conv1D(6, 4), "c": Conv1D(6, 4)})
    model.forward = lambda x: model["a"](x) + model["b"](x)
    kinds = {"weight": ["channel"]}
    recipe = [{"scheme": "int8dq", "in_features": 4}]
    stats = fxquant.calibrate(model, [torch.randn(2, 4)], recipe, kinds=kinds, **QUIET)
    assert stats.missed == ["c"]
    absmax = stats["b:weight"]["channel"].absmax
    assert torch.equal(absmax, model["b"].weight.abs().amax(0).detach()), "by output channel"


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.__name__)
@torch.no_grad()
def test_every_linear_of_any_architecture_has_statistics(architecture):
    model, inputs = made(architecture)
    seen = {}
    expected, _ = reached(model, inputs)
    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda module, args, y, name=name: seen.setdefault(name, []).append((args[0], y))
        )
        for name in expected
    ]
    model(**inputs)
    for hook in hooks:
        hook.remove()
    kinds = {port: ("minmax", "channel") for port in ("input", "output")}
    stats = fxquant.calibrate(model, [inputs], kinds=kinds, **QUIET)
    names = {name.rpartition(":")[0] for name in stats}
    assert names == expected and stats.reached == expected and not stats.missed
    for name, calls in seen.items():
        for port, values in zip(("input", "output"), zip(*calls, strict=True), strict=True):
            whole = torch.cat([v.reshape(-1, v.shape[-1]) for v in values])
            found = stats[f"{name}:{port}"]
            assert found["minmax"].batches == len(values)
            torch.testing.assert_close(
                found["channel"].absmax, whole.abs().amax(0), rtol=1e-4, atol=1e-5
            )


@torch.no_grad()
def test_two_models_at_once_and_one_within_the_other():
    a, b = nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 8))
    with (
        fxquant.Calibration(a, compiled=False) as one,
        fxquant.Calibration(b, compiled=False) as two,
    ):
        b(torch.ones(1, 8))
        a(100 * torch.ones(1, 8))
    assert (float(one["0:input"]["minmax"].high), float(two["0:input"]["minmax"].high)) == (100, 1)
    whole = nn.ModuleDict({"enc": a})
    whole.forward = lambda x: whole["enc"](x)
    for _ in range(2):
        assert set(fxquant.calibrate(whole, [torch.ones(1, 8)], **QUIET)) == {"enc.0:input"}
        assert set(fxquant.calibrate(a, [torch.ones(1, 8)], **QUIET)) == {"0:input"}
