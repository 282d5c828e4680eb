"""Codes widened for 16-bit products: by a kernel, or by the one that quantizes them."""

from __future__ import annotations

import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")

from torch._subclasses import FakeTensorMode  # noqa: E402

import fxquant  # noqa: E402, F401
from fxquant.inductor import trace_decomposed  # noqa: E402
from fxquant.lowering import triton_quantize, triton_widen  # noqa: E402
from fxquant.lowering.triton_launch import HAS_TRITON  # noqa: E402
from fxquant.passes.expansion import expand  # noqa: E402

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
ops = torch.ops.fxquant


def test_each_code_goes_where_the_lane_wants_it():
    k = 96
    codes, zero = torch.arange(k, dtype=torch.int8)[None], torch.zeros(1, 1, dtype=torch.int32)
    found = triton_widen.widen(codes, zero)[0].long()
    for block in range(k // 32):
        part = found[32 * block :][:32] - 32 * block
        for at, code in enumerate(part.tolist()):
            odd, half, lane, pair = at // 16, at // 8 % 2, at // 2 % 4, at % 2
            assert code == 16 * half + 4 * lane + 2 * pair + odd


@pytest.mark.parametrize("shape", [(5, 64), (3, 192), (1, 1024), (2, 1088), (0, 64)])
def test_the_kernel_equals_the_reference(shape):
    codes = torch.randint(-128, 128, shape, dtype=torch.int8, device=DEVICE)
    zero = torch.randint(-128, 128, (shape[0], 1), dtype=torch.int32, device=DEVICE)
    found, wanted = triton_widen.launch(codes, zero), triton_widen.widen(codes, zero)
    assert found.dtype == wanted.dtype == torch.bfloat16 and torch.equal(found, wanted)


@pytest.mark.parametrize("gate", ["", "silu_mul"])
@pytest.mark.parametrize("rows, k", [(3, 64), (2, 1088), (0, 64)])
def test_rows_are_widened_as_they_are_quantized(rows, k, gate):
    x = torch.randn(rows, 2 * k if gate else k).to(DEVICE, torch.bfloat16)
    if rows:
        x[1, 5] = float("nan")
    plain = ops.quantize_rows(x, "8da4w-32", gate)
    found = ops.quantize_rows(x, "8da4w-32", gate, True)
    assert len(found) == 2 and torch.equal(found[1].nan_to_num(7), plain[1].nan_to_num(7))
    assert found[0].dtype == torch.bfloat16
    assert torch.equal(found[0], triton_widen.widen(plain[0], plain[2]))


def widened_twice(x, *, also):
    """As two linears of the same activations read them, behind what Inductor could fuse with it; ``also``
    makes one more output of the codes."""
    codes, scale, zero = ops.quantize(x + 1, "8da4w-32", "input")
    wide = ops.widen(codes, zero)
    more = ops.widen(codes, zero)
    return wide, more + 1, scale, *also(codes, zero)


READS = {
    "nothing else": (lambda codes, zero: (), 1 << 20, [True]),
    "the codes": (lambda codes, zero: (codes.float(),), 1 << 20, [False]),
    "the zero points": (lambda codes, zero: (zero.float(),), 1 << 20, [False]),
    "few rows": (lambda codes, zero: (), 64, []),
}


@pytest.mark.parametrize("name", READS)
def test_one_kernel_where_nothing_else_reads_what_is_quantized(name, monkeypatch):
    also, values, wanted = READS[name]
    monkeypatch.setattr(triton_quantize, "PLACES", ("cuda", "cpu"))
    monkeypatch.setattr(triton_quantize, "LEAST", (1 << 20) // values)
    x = torch.randn(20, 64, device=DEVICE, dtype=torch.bfloat16)
    before = widened_twice(x, also=also)
    gm = trace_decomposed(lambda x: widened_twice(x, also=also), FakeTensorMode().from_tensor(x))
    expand(gm.graph)
    gm.graph.lint()
    gm.recompile()
    kernels = gm.graph.find_nodes(op="call_function", target=ops.quantize_rows.default)
    assert [len(k.args) == 4 and k.args[3] for k in kernels] == wanted
    assert not gm.graph.find_nodes(op="call_function", target=ops.widen.default)
    left = gm.graph.find_nodes(op="call_function", target=ops.quantize.default)
    assert len(left) == (not wanted), "few rows are for Inductor's loops"
    for found, expected in zip(gm(x), before, strict=True):
        # the kernel's scale may differ in its last bit, and with it a code on a half
        assert found.dtype == expected.dtype and float((found - expected).abs().max()) <= 1
        assert float((found == expected).float().mean()) > 0.98 or found.shape == (20, 1)
