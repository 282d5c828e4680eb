"""torch.autocast around a model: a QuantLinear computes in its dtype, as the linear before it did."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fxquant
from fxquant.inductor import Regions
from fxquant.lowering import native
from fxquant.lowering.tuning import forget
from fxquant.scheme import SCHEMES, get_scheme

from .conftest import Block, sqnr

FAMILIES = [
    "int4wo-64",
    "int3wo-32",
    "int8wo",
    "int8dq",
    "8da4w-32",
    "fp8wo",
    "fp8dq",
    "int8static",
]
X = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def fallback_only(monkeypatch):
    """No kernel but ``dequantize``, as on a machine without a compiler."""
    monkeypatch.setattr(native, "refusal", lambda: "needs a C++ compiler")
    forget()
    yield
    forget()


def calibrated(model: nn.Module, scheme: str) -> dict:
    """What static schemes need; nothing for others."""
    if not get_scheme(scheme).static:
        return {}
    return {"stats": fxquant.calibrate(model, [X], progress=False), "smooth": False}


@pytest.mark.parametrize("scheme", FAMILIES)
@torch.no_grad()
def test_in_place_and_in_one_line_give_autocasts_dtype(scheme, graphs):
    model = Block().requires_grad_(False)
    more = calibrated(model, scheme)
    one_line = torch.compile(model, backend="fxquant", options={"scheme": scheme, **more})
    quantized = fxquant.quantize(copy.deepcopy(model), scheme, **more)
    run = torch.compile(quantized, backend="fxquant", fullgraph=True)
    wide = model(X)
    with torch.autocast("cpu", torch.bfloat16):
        q = quantized.q(X)
        assert q.dtype == model.q(X).dtype == torch.bfloat16
        wanted, eager, found = model(X), quantized(X), run(X)
        for y in (eager, found, one_line(X)):
            assert y.dtype == wanted.dtype and sqnr(y, wide) > get_scheme(scheme).sqnr - 4
        assert sqnr(found, eager) > 40
    assert quantized.q(X).dtype == torch.float32
    assert len(graphs) == 2


@pytest.mark.parametrize("scheme", ["int4wo-64", "int8dq", "int8static"])
@torch.no_grad()
def test_where_the_fallback_serves(scheme, graphs, fallback_only):
    """Its product is an ordinary linear, which autocast would round to bfloat16 once more."""
    model = Block().requires_grad_(False)
    fxquant.quantize(model, scheme, **calibrated(model, scheme))
    run = torch.compile(model, backend="fxquant", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        eager, found = model(X), run(X)
    assert found.dtype == eager.dtype and sqnr(found, eager) > 40


@torch.no_grad()
def test_the_op_itself_is_not_cast(graphs, fallback_only):
    """In the kernel's nodes, the reference and a region of the graph: float32 in, float32 out."""

    class Direct(nn.Module):
        def __init__(self, region: bool):
            super().__init__()
            self.layer = fxquant.QuantLinear.from_float(nn.Linear(64, 32), "int4wo-64")
            self.region = region

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16, enabled=self.region):
                q = self.layer
                args = (q._codes, q._scale, q._zero, q.bias, q.scheme, "")
                return torch.ops.fxquant.linear(x, *args)

    for region in (True, False):
        model = Direct(region)
        wanted = model.layer(X)
        run = torch.compile(model, backend="fxquant", fullgraph=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=not region):
            for y in (model(X), run(X)):
                assert y.dtype == torch.float32 and sqnr(y, wanted) > 110


@torch.no_grad()
def test_through_inductor(fallback_only):
    model = fxquant.quantize(Block().requires_grad_(False), "int4wo-64")
    run = torch.compile(model, backend="fxquant", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        found, eager = run(X), model(X)
    assert found.dtype == eager.dtype and sqnr(found, eager) > 40
    assert sqnr(run(X), model(X)) > 100, "and without"


@torch.no_grad()
def test_what_is_folded_at_a_call_under_autocast_is_exact(graphs):
    """Codes are computed and merged when the graph is first called: float8 ones too."""
    model = Block().bfloat16().requires_grad_(False)
    runs = [torch.compile(copy.deepcopy(model), backend="fxquant", options={"scheme": "fp8wo"})]
    runs.append(torch.compile(model, backend="fxquant", options={"scheme": "fp8wo"}))
    x = X.bfloat16()
    wanted = runs[0](x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(runs[1](x), wanted)


def test_nested_regions_of_two_devices_hold_together():
    graph = torch.fx.Graph()
    begin, end = torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast
    on = [graph.call_function(begin, (d, torch.bfloat16, True, True)) for d in ("cuda", "cpu")]
    inside = graph.call_function(torch.ops.aten.relu.default, ())
    graph.call_function(end, (on[1],))
    between = graph.call_function(torch.ops.aten.relu.default, ())
    graph.call_function(end, (on[0],))
    seen, regions = {}, Regions()
    for node in graph.nodes:
        with regions.around(node):
            seen[node] = torch.is_autocast_enabled("cuda"), torch.is_autocast_enabled("cpu")
    assert seen[inside] == (True, True) and seen[between] == (True, False)
    assert not torch.is_autocast_enabled("cuda") and not torch.is_autocast_enabled("cpu")


def test_every_family_is_here():
    served = {SCHEMES[s].product.family for s in FAMILIES}
    assert served >= {"w4a16", "w8a16", "w8a8", "w4a8", "wf8a16", "wf8af8"}
