"""Static schemes lowered: the kernels of dynamic ones on codes, the zero point in a wide bias."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxquant
from fxquant import passes
from fxquant.graph import layers, value
from fxquant.lowering import select
from fxquant.lowering.kernel import KERNELS, Device
from fxquant.lowering.triton_launch import INTERPRET
from fxquant.passes import lowering
from fxquant.scheme import SCHEMES, get_scheme

from ..conftest import MLP
from .by_hand import by_hand, weight_by_hand
from .helpers import Call, aten, calibrated, calls, count, ops, rewritten, through

STATIC = [name for name, row in SCHEMES.items() if row.static]


ON_CPU = ["native_w8a8", "dequantize", "int_mm"] + ["triton_w8a8"] * INTERPRET


@pytest.fixture
def only(monkeypatch):
    """Leave one kernel to choose."""

    def leave(name: str) -> None:
        kernel = KERNELS[name]
        choice = select.Choice(kernel.layout, ((kernel, 0),), {})
        monkeypatch.setattr(lowering, "select", lambda problem: choice)

    return leave


@torch.no_grad()
def test_a_kernel_that_quantizes_gets_the_codes_of_a_static_input(only, monkeypatch):
    model, x = Call(lambda m, x: F.linear(x, m.w)), torch.randn(1, 64)
    stats, found = calibrated(model, torch.randn(9, 64)), []
    for quantizes in (False, True):
        kernel = replace(KERNELS["dequantize"], quantizes=lambda problem, own=quantizes: own)
        monkeypatch.setitem(KERNELS, "dequantize", kernel)
        only("dequantize")
        found.append(rewritten(model, x, "int8static", stats, to="verified")(x))
    assert torch.equal(*found)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", ON_CPU)
@torch.no_grad()
def test_what_the_zero_point_adds_is_never_rounded_to_16_bits(kernel, dtype, bias, only):
    """Inputs from 0 to 4 are quantized around -128. Small ones nearly cancel what that adds, some 40
    times the result: rounded to 9 or 12 bits, it would be off by several percent."""
    model = Call(lambda m, x: F.linear(x, m.w, m.b if bias else None))
    with torch.no_grad():
        model.w += 1
        model.b.fill_(0.25)
    model, x = model.to(dtype), (0.1 * torch.rand(20, 64)).to(dtype)
    stats = calibrated(model, torch.rand(9, 64, dtype=dtype) * 4)
    only(kernel)
    gm = rewritten(model, x, "int8static", stats, to="verified")
    ends = stats["w:input"]["minmax"].range()
    x_dq = by_hand("int8static", x.double(), *map(float, ends))
    wanted = x_dq @ weight_by_hand("int8static", model.w.double()).T
    wanted += model.b.double() if bias else 0
    assert (wanted > 1).all()
    rounding = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(gm(x).double(), wanted, rtol=1.1 * rounding, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_symbolic_rows_are_dispatched_on_codes(dtype, monkeypatch):
    """Two kernels of one layout: the fallback below 17 rows, an integer product from there on."""
    steps = ((KERNELS["dequantize"], 0), (KERNELS["int_mm"], 17))
    choice = select.Choice(steps[0][0].layout, steps, {})
    monkeypatch.setattr(lowering, "select", lambda problem: choice)
    model, x = (
        Call(lambda m, x: F.relu(F.linear(x, m.w, m.b))).to(dtype),
        torch.rand(40, 64, dtype=dtype),
    )
    stats = calibrated(model, x)
    rows = {"x": {0: torch.export.Dim("rows", min=2)}}
    gm = fxquant.trace(model, (x,), dynamic_shapes=rows)
    for name, one in passes.pipeline("int8static", stats=stats, smooth=False):
        through(gm, one)
        if name == "merged":
            wanted = {n: gm(x[:n]) for n in (3, 16, 17, 40)}
    (node,) = calls(gm, ops.dispatch.default)
    assert node.args[4:] == ("int8dq", "canonical", "dequantize<17;int_mm", "relu", 32, dtype)
    assert value(node.args[0]).dtype == torch.int8 and value(node).dtype == dtype
    rounding = 1.01 * torch.finfo(dtype).eps if dtype == torch.bfloat16 else 1e-5
    for n, y in wanted.items():
        torch.testing.assert_close(gm(x[:n]), y, rtol=rounding, atol=1e-5)


@torch.no_grad()
def test_float64_on_the_fallback():
    model, x = MLP().double().requires_grad_(False), torch.randn(5, 64).double()
    stats = calibrated(model, x)
    reference = rewritten(model, x, "int8static", stats, to="quantized")
    gm = rewritten(model, x, "int8static", stats, to="verified")
    torch.testing.assert_close(gm(x), reference(x), rtol=1e-12, atol=1e-12)


HOPPER = Device(
    name="some Hopper",
    type="cuda",
    bandwidth=4e12,
    peak={"float32": 5e13, "bfloat16": 7e14, "int8": 1.15e15, "float8": 1.2e15},
    launch=3e-6,
    features=frozenset({"sm80", "sm89", "sm90", "hopper"}),
    units=132,
)


@pytest.mark.parametrize("rows", [1, 64, 2048])
@pytest.mark.parametrize("scheme", STATIC)
@torch.no_grad()
def test_a_gpu_runs_the_kernels_of_the_dynamic_scheme(scheme, rows, monkeypatch):
    """Their calls are traced here: codes as they are, one scale for all rows, the zero in the bias."""
    monkeypatch.setattr(lowering, "device_row", lambda device: HOPPER)
    model, x = nn.Linear(1024, 512).bfloat16(), torch.randn(rows, 1024).bfloat16()
    stats = calibrated(model, x)
    kernel, call = {}, {}
    for name in (scheme, SCHEMES[scheme].product.name):
        gm = rewritten(model, x, name, stats, to="verified")
        (layer,) = layers(gm).values()
        kernel[name], call[name] = (layer.kernel, layer.refused), gm
        assert layer.scheme == name
    assert kernel[scheme] == kernel[SCHEMES[scheme].product.name]
    assert not count(call[scheme])["fx.dequantize"]
    (quantize,) = calls(call[scheme], ops.quantize_static.default)
    assert value(quantize).dtype == get_scheme(scheme).input.dtype
    assert value(next(iter(reversed(call[scheme].graph.nodes))).args[0][0]).dtype == x.dtype
    assert not calls(call[scheme], aten.new_empty.default), "a stand-in that nothing reads"
