"""lower: each fxquant.linear becomes the chosen kernel on packed weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fxquant
from fxquant import passes
from fxquant.errors import NoKernel
from fxquant.graph import layers, stage, value
from fxquant.lowering import select
from fxquant.lowering.kernel import KERNELS, LAYOUTS, Device, Kernel, Layout, M
from fxquant.passes import lowering
from fxquant.scheme import Quantized, QuantSpec

from ..conftest import MLP, Block, sqnr
from .helpers import Call, assert_provenance, calls, count, ops, through, trace

X = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))

BARE = Device(name="bare", type="none", bandwidth=1e10, peak={"float32": 1e11}, launch=1e-6)
"""A device that no kernel is written for: the fallback is all there is."""


def halves(scheme, q: Quantized) -> list[torch.Tensor]:
    return [q.codes.flip(0), *(t.flip(0) for t in q[1:] if t is not None)]


def whole(scheme, packed, n: int, k: int) -> Quantized:
    return Quantized(*(t.flip(0) for t in packed), *[None] * (3 - len(packed)))


FLIPPED = Layout(name="flipped", pack=halves, unpack=whole)


def flipped(scheme, x, packed, bias, epilogue):
    """A kernel with a layout and one activation of its own."""
    w = scheme.weight.dequantize(whole(scheme, packed, 0, 0), x.dtype)
    y = F.linear(x, w, bias)
    return {"": lambda y: y, "relu": F.relu}[epilogue](y)


def launches(seconds_a_row: float, seconds: float):
    return lambda problem: seconds + seconds_a_row * M


@pytest.fixture
def bare(monkeypatch) -> Device:
    monkeypatch.setattr(lowering, "device_row", lambda device: BARE)
    select._select.cache_clear()
    yield BARE
    select._select.cache_clear()


@pytest.fixture
def own_kernel(bare, monkeypatch) -> Kernel:
    """``flipped``, fast below 17 rows; the fallback above."""
    kernel = Kernel(
        name="flipped",
        families=frozenset(["w8a16", "w4a16"]),
        device="none",
        layout=FLIPPED,
        compute=flipped,
        cost=launches(1.0, 0.0),
        needs=(lambda p: None if p.n != 40 else "n is 40",),
        epilogues=frozenset(["relu"]),
    )
    fallback = KERNELS["dequantize"]
    slow = Kernel(**{**vars(fallback), "cost": launches(0.0, 16.5)})
    monkeypatch.setitem(KERNELS, "flipped", kernel)
    monkeypatch.setitem(KERNELS, "dequantize", slow)
    monkeypatch.setitem(LAYOUTS, "flipped", FLIPPED)
    return kernel


@pytest.mark.parametrize(
    "scheme",
    ["int8wo", "int8dq", "int4wo-32", "int4wo-64-sym", "8da4w-32", "int2wo-32", "fp8wo", "fp8dq"],
)
@torch.no_grad()
def test_the_kernels_of_this_machine_compute_what_the_fused_graph_means(scheme):
    model, x = Block().requires_grad_(False), torch.randn(2, 7, 64)
    gm = trace(model, x, to="fused", scheme=scheme)
    wanted = gm(x)
    through(gm, passes.lower(), passes.verify)
    assert stage(gm) == "lowered"
    found = count(gm)
    assert not found.keys() & {"fx.linear", "fx.pack", "fx.observe"}
    assert found["folded"] == 6
    assert sqnr(gm(x), wanted) > 45, "nearer to its own meaning than to anything float"
    for layer in layers(gm).values():
        assert layer.scheme == scheme and layer.kernel in KERNELS and layer.rows == "14"
        assert layer.kernel not in layer.refused
        assert all(layer.refused.values()), "a refusal without a reason"


@pytest.mark.parametrize("epilogue", ["", "relu", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_the_fallback_alone(bias, epilogue, bare):
    activation = {"": lambda y: y, "gelu_tanh": lambda y: F.gelu(y, approximate="tanh")}
    act = activation.get(epilogue) or getattr(F, epilogue)
    model = Call(lambda m, x: act(F.linear(x, m.w, m.b if bias else None)))
    gm = trace(model, X, to="fused")
    wanted = gm(X)
    through(gm, passes.lower())
    (layer,) = layers(gm).values()
    assert layer.kernel == "dequantize"
    assert set(layer.refused) == set(KERNELS) - {"dequantize"}
    assert count(gm)["linear"] == 1
    assert torch.equal(gm(X), wanted)


@torch.no_grad()
def test_a_kernel_has_its_own_layout_and_activation(own_kernel):
    relu = trace(Call(lambda m, x: F.relu(F.linear(x, m.w, m.b))), X, to="fused")
    silu = trace(Call(lambda m, x: F.silu(F.linear(x, m.w, m.b))), X, to="fused")
    for gm, epilogue in ((relu, "relu"), (silu, "silu")):
        wanted = gm(X)
        through(gm, passes.lower())
        assert count(gm)[epilogue] == 1 and torch.equal(gm(X), wanted)
        (node,) = gm.graph.find_nodes(op="call_module")
        (pack,) = getattr(gm, node.target).recipe.graph.find_nodes(
            op="call_function", target=ops.pack.default
        )
        assert pack.args[3:] == ("int8wo", "flipped")
        assert layers(gm)["w"].kernel == "flipped"


@torch.no_grad()
def test_the_number_of_rows_decides_and_the_layout_stays(own_kernel):
    """Above the crossover the fallback runs, on the weight that is packed for ``flipped``."""
    for rows, kernel in ((16, "flipped"), (17, "dequantize")):
        x = torch.randn(rows, 64)
        gm = trace(Call(lambda m, x: F.linear(x, m.w, m.b)), x, to="fused")
        wanted = gm(x)
        through(gm, passes.lower())
        assert layers(gm)["w"].kernel == kernel
        assert torch.equal(gm(x), wanted)
        (node,) = gm.graph.find_nodes(op="call_module")
        assert "'flipped'" in getattr(gm, node.target).recipe.code


@torch.no_grad()
def test_a_kernel_may_quantize_one_row_itself(bare, monkeypatch):
    """It then gets the row as it is, what a gate makes of it too; more rows are quantized before it."""
    seen = []

    def alone(scheme, x, packed, bias, epilogue):
        own = isinstance(scheme.input, QuantSpec)
        seen.append((own, x.dtype))
        x = scheme.input.dequantize(scheme.input.quantize(x), torch.float32)
        return flipped(scheme, x, packed, bias, epilogue)

    kernel = Kernel(
        name="alone",
        families=frozenset(["w8a8"]),
        device="none",
        layout=FLIPPED,
        compute=alone,
        cost=launches(0.0, 0.0),
        quantizes=lambda p: p.m == 1,
    )
    monkeypatch.setitem(KERNELS, "alone", kernel)
    monkeypatch.setitem(LAYOUTS, "flipped", FLIPPED)

    def product(m, x):
        return F.linear(F.silu(F.linear(x, m.w)) * F.linear(x, m.other), m.v)

    model = Call(product)
    model.v = torch.nn.Parameter(torch.randn(24, 32))
    for rows in (1, 2):
        seen.clear()
        x = torch.randn(rows, 64)
        gm = trace(model, x, to="fused", scheme="int8dq")
        wanted = gm(x)
        through(gm, passes.merge, passes.gate, passes.lower(), passes.verify)
        assert {layer.kernel for layer in layers(gm).values()} == {"alone"}
        gates = [n.args[3:] for n in calls(gm, ops.quantize.default)]
        assert gates == ([] if rows == 1 else [(), ("silu_mul",)])
        assert set(seen) == {(rows == 1, torch.float32)}
        torch.testing.assert_close(gm(x), wanted)


@torch.no_grad()
def test_a_need_that_is_not_met_is_said(own_kernel):
    gm = trace(torch.nn.Linear(64, 40), X, to="fused")
    through(gm, passes.lower())
    (layer,) = layers(gm).values()
    assert layer.kernel == "dequantize" and layer.refused["flipped"] == "n is 40"
    dynamic = trace(MLP(), X, to="fused", scheme="int8dq")
    through(dynamic, passes.lower())
    assert layers(dynamic)["up"].refused["flipped"] == "serves w4a16, w8a16, not w8a8"


def dynamic(model, scheme="int8wo", to="fused"):
    rows = torch.export.Dim("rows", min=2)
    gm = fxquant.trace(model.requires_grad_(False), (X,), dynamic_shapes={"x": {0: rows}})
    return through(gm, passes.normalize, passes.quantize_weights(scheme), passes.fuse)


@torch.no_grad()
def test_symbolic_rows_dispatch_when_called(own_kernel):
    gm = dynamic(MLP())
    wanted = {rows: gm(x) for rows, x in _batches().items()}
    through(gm, passes.lower(), passes.verify)
    found = calls(gm, ops.dispatch.default)
    assert [n.args[6:] for n in found] == [
        ("flipped<17;dequantize", "gelu", 128),
        ("flipped<17;dequantize", "", 32),
    ]
    assert layers(gm)["up"].kernel == "flipped<17;dequantize"
    assert layers(gm)["up"].rows == "dynamic"
    for rows, x in _batches().items():
        assert torch.equal(gm(x), wanted[rows]), rows


def _batches() -> dict[int, torch.Tensor]:
    return {
        m: torch.randn(m, 64, generator=torch.Generator().manual_seed(m)) for m in (2, 16, 17, 40)
    }


@torch.no_grad()
def test_symbolic_rows_with_one_kernel_need_no_dispatch(bare):
    gm = dynamic(MLP())
    wanted = {rows: gm(x) for rows, x in _batches().items()}
    through(gm, passes.lower(), passes.verify)
    assert count(gm)["fx.dispatch"] == 0 and layers(gm)["up"].kernel == "dequantize"
    for rows, x in _batches().items():
        assert torch.equal(gm(x), wanted[rows]), rows


@pytest.mark.parametrize("scheme", ["int8wo", "int8dq", "int4wo-32", "8da4w-32"])
@torch.no_grad()
def test_symbolic_rows_on_this_machine(scheme):
    gm = dynamic(MLP(), scheme)
    wanted = {rows: gm(x) for rows, x in _batches().items()}
    through(gm, passes.lower(), passes.verify)
    for rows, x in _batches().items():
        assert sqnr(gm(x), wanted[rows]) > 45


@torch.no_grad()
def test_leading_sizes_and_strides_of_the_input():
    """3-D, transposed, expanded, one row, no row: all are rows of one matrix."""
    model = torch.nn.Linear(64, 32).requires_grad_(False)
    inputs = [
        torch.randn(2, 3, 4, 64),
        torch.randn(64, 5).t(),
        torch.randn(1, 64).expand(5, 64),
        torch.randn(3, 128)[:, ::2],
        torch.randn(64),
        torch.randn(0, 64),
        torch.randn(3, 0, 64),
    ]
    for x in inputs:
        gm = trace(model, x, to="fused")
        wanted = gm(x)
        through(gm, passes.lower(), passes.verify)
        found = gm(x)
        assert found.shape == wanted.shape and found.stride() == wanted.stride()
        assert found.numel() == 0 or sqnr(found, wanted) > 45


def test_one_pack_for_a_weight_that_is_used_twice():
    model = Call(lambda m, x: F.linear(x, m.w) + F.linear(x * 2, m.w, m.b))
    gm = through(trace(model, X, to="fused"), passes.lower())
    assert count(gm)["folded"] == 1


def test_provenance():
    gm = through(trace(MLP(), X, to="fused"), passes.lower())
    for name, line in (("up", "self.up(x)"), ("down", "self.down(")):
        own = [
            n
            for n in gm.graph.nodes
            if n.op in ("call_function", "call_module")
            and n.meta["custom"]["fxquant"]["layer"] == name
        ]
        assert len(own) > 2
        assert_provenance(own, name, line)
    assert all("custom" in n.meta for n in gm.graph.nodes if n.op == "call_function")


@torch.no_grad()
def test_strict_refuses_the_fallback_and_lists_the_reasons(own_kernel):
    through(trace(MLP(), X, to="fused"), passes.lower(strict=True))
    model = torch.nn.Sequential(torch.nn.Linear(64, 40), torch.nn.Linear(40, 64))
    with pytest.raises(NoKernel, match=r"^strict: 0 fell back to dequantize; .*flipped: n is 40"):
        through(trace(model, X, to="fused"), passes.lower(strict=True))


@torch.no_grad()
def test_codes_that_are_no_constant_stay_as_they_are():
    """The codes of the linear come from the input: nothing to pack ahead of the call."""

    class Model(torch.nn.Module):
        def forward(self, x, w):
            codes, scale = torch.ops.fxquant.quantize(w, "int8wo", "weight")
            return torch.ops.fxquant.linear(x, codes, scale, None, None, "int8wo", "")

    model, w = Model(), torch.randn(32, 64)
    gm = fxquant.trace(model, (X, w))
    gm.meta["fxquant_stage"] = "fused"
    through(gm, passes.lower())
    assert count(gm)["fx.linear"] == 1 and count(gm)["folded"] == 0
    assert torch.equal(gm(X, w), model(X, w))


def test_the_values_are_those_that_a_run_gives():
    gm = through(trace(MLP().bfloat16(), X.bfloat16(), to="fused"), passes.lower())
    (output,) = gm.graph.find_nodes(op="output")
    (node,) = output.all_input_nodes
    y = gm(X.bfloat16())
    assert (value(node).shape, value(node).dtype) == (y.shape, y.dtype) == ((5, 32), torch.bfloat16)
