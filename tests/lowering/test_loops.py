"""Rows quantized in Inductor's loops: the reference's codes, scales and zero points, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch._inductor import metrics
from torch._inductor.utils import fresh_cache, run_and_get_code

import fxquant  # noqa: F401
from fxquant.errors import UnsupportedDtype
from fxquant.inductor import FakeTensorMode, trace_decomposed
from fxquant.passes.expansion import expand
from tests.conftest import called

ops = torch.ops.fxquant
K = 96
NAN, INF = float("nan"), float("inf")
SCHEMES = ["int8dq", "8da4w-32", "fp8dq"]


def rows(dtype: torch.dtype) -> torch.Tensor:
    """[n, K], among them those on which a scale or a zero point turns."""
    limits = torch.finfo(dtype)
    x = torch.randn(64, K, generator=torch.Generator().manual_seed(0))
    x[1], x[2], x[3] = 0, x[2].abs() + 5, -x[3].abs() - 5
    x[4, 7], x[5, 8], x[6, 9] = NAN, INF, -INF
    x[7], x[8], x[9] = limits.max, limits.tiny, -limits.smallest_normal
    x[10], x[10, :2] = 0, torch.tensor([limits.max, limits.min])
    x[11], x[12] = torch.arange(K) - 48.5, torch.arange(K) / 2  # codes on a half
    x[13:30] *= 10.0 ** torch.arange(-4, 13)[:, None] if dtype != torch.float16 else 1
    return x.to(dtype)


def bits(t: torch.Tensor) -> torch.Tensor:
    """NaN as one value: which of them is no matter."""
    t = t.float() if t.is_floating_point() else t
    return t.nan_to_num(-7.0).view(torch.int32) if t.is_floating_point() else t


def same(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    assert [(t.dtype, t.shape, t.stride()) for t in found] == [
        (t.dtype, t.shape, t.stride()) for t in wanted
    ]
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a.isnan(), b.isnan()) and torch.equal(bits(a), bits(b))


def compiled(function, *args, dynamic=False):
    torch.compiler.reset()
    with torch.no_grad(), fresh_cache():
        return run_and_get_code(torch.compile(function, dynamic=dynamic), *args)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_bit_is_the_references(scheme, dtype):
    def quantized(x):  # the product is exact: what is quantized is the same in both
        return ops.quantize(x * 0.5, scheme, "input")

    x = rows(dtype)
    found, code = compiled(quantized, x)
    same(found, quantized(x))
    assert not called("quantize", code)


def test_unknown_rows_of_any_rank():
    def quantized(x):
        return [t for s in SCHEMES for t in ops.quantize(x, s, "input")]

    x = rows(torch.bfloat16).reshape(4, 16, K)
    same(compiled(quantized, x, dynamic=True)[0], quantized(x))
    same(compiled(quantized, x.transpose(0, 1))[0], quantized(x.transpose(0, 1).contiguous()))


@pytest.mark.parametrize("scheme", ["int8static", "int8static-sym", "fp8static"])
def test_static_codes_are_the_references(scheme):
    x = rows(torch.bfloat16)
    scale, *zero = ops.static_qparams(torch.tensor([[-3.0], [5.0]]), None, scheme)
    args = (x, scale, zero[0] if zero else None, scheme)
    found, code = compiled(ops.quantize_static, *args)
    same([found], [ops.quantize_static(*args)])
    assert not called("quantize", code)


UNKNOWN = {
    "float64": (torch.float64, ("8da4w-32", "input")),
    "weights": (torch.float32, ("int4wo-32", "weight")),
    "a gate": (torch.float32, ("int8dq", "input", "silu_mul")),
    "no values": (torch.float32, ("int8dq", "input")),
}

REFUSED = {
    # by the reference, and so by what is compiled: x, its scale and zero point or none
    "integers": (torch.ones(4, K, dtype=torch.int64), "int8dq", None),
    "truth values": (torch.ones(4, K, dtype=torch.bool), "8da4w-32", None),
    "several scales": (torch.randn(4, K), "int8static-sym", (torch.ones(4), None)),
    "a zero point too few": (torch.randn(4, K), "int8static", (torch.ones(1), None)),
    "a zero point too many": (
        torch.randn(4, K),
        "fp8static",
        (torch.ones(1), torch.zeros(1, dtype=torch.int32)),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_reference_refuses_is_refused_once_compiled(case):
    x, scheme, qparams = REFUSED[case]

    def quantized(x):
        if qparams is None:
            return ops.quantize(x, scheme, "input")
        return ops.quantize_static(x, *qparams, scheme)

    with pytest.raises(Exception) as eager:
        quantized(x)
    with pytest.raises(type(eager.value)) as found:
        compiled(quantized, x)
    assert str(eager.value).splitlines()[0] in str(found.value)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_our_own_compiles_refuse_it_too(scheme, dtype):
    x = FakeTensorMode().from_tensor(torch.ones(4, K, dtype=dtype))
    gm = trace_decomposed(lambda x: ops.quantize(x, scheme, "input"), x)
    with pytest.raises(UnsupportedDtype):
        expand(gm.graph)


@pytest.mark.parametrize("case", UNKNOWN)
def test_what_the_loops_do_not_know_stays_a_call(case):
    """For Inductor alone; our backend has ``expand`` write it out."""
    dtype, args = UNKNOWN[case]
    x = torch.randn(4, 0 if case == "no values" else K, dtype=dtype)
    found, code = compiled(lambda x: ops.quantize(x, *args), x)
    same(found, ops.quantize(x, *args))
    assert called("quantize", code)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_site_stays_one_node(scheme):
    """And not the 17 to 37 of the reference's ops: Inductor's passes look at each, and lower it."""

    def model(x):
        for _ in range(3):
            codes, scale, *_ = ops.quantize(torch.rms_norm(x, (K,)), scheme, "input")
            x = x + codes.float() * scale
        return x

    gm = trace_decomposed(model, FakeTensorMode().from_tensor(torch.randn(8, K)))
    before = list(gm.graph.nodes)
    expand(gm.graph)
    assert list(gm.graph.nodes) == before


def test_a_gate_is_written_out_before_it():
    def model(x):
        return ops.quantize(x, "8da4w-32", "input", "silu_mul")

    x = rows(torch.bfloat16)
    gm = trace_decomposed(model, FakeTensorMode().from_tensor(x))
    expand(gm.graph)
    gm.recompile()
    (site,) = gm.graph.find_nodes(op="call_function", target=ops.quantize.default)
    assert site.args[1:] == ("8da4w-32", "input") and site.args[0].op == "call_function"
    wanted = model(x)
    for found, expected in zip(gm(x), wanted, strict=True):
        assert found.dtype == expected.dtype and found.shape == expected.shape
        close = (found.float() - expected.float()).abs().nan_to_num(0) <= 1
        assert bool(close.all()), "the decomposed silu rounds once less"


LOOPS = {"int8dq": 3, "fp8dq": 3, "8da4w-32": 5}
"""The ends of a row, one where they are symmetric; scale, zero point where there is one, codes."""


@pytest.mark.parametrize("scheme", LOOPS)
def test_a_result_is_one_loop_and_all_are_one_kernel(scheme):
    """With the mean before them: what of the norm is read again is not written out."""

    def model(x, weight):
        for _ in range(4):  # as much of a chain as a norm behind a residual has
            x = x * 1.5 + 0.25
        return ops.quantize(torch.rms_norm(x, (K,), weight), scheme, "input")

    metrics.reset()
    args = (torch.randn(1, K).bfloat16(), torch.randn(K).bfloat16())
    _, code = compiled(model, *args)
    assert metrics.ir_nodes_pre_fusion == 1 + LOOPS[scheme]
    assert sum(text.count(" = async_compile.") for text in code) == 1
