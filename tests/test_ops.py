"""The reference ops agree with their fakes, and opcheck accepts them."""

from __future__ import annotations

import pytest
import torch

import fxquant  # noqa: F401  defines the ops
from fxquant.ops import bundle
from fxquant.scheme import SCHEMES

ops = torch.ops.fxquant
DISTINCT = [s for s in SCHEMES if not s.endswith(("64", "128", "256", "128-sym", "256-sym"))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scheme", DISTINCT)
def test_ops_and_fakes(scheme, dtype):
    row = SCHEMES[scheme]
    checks = ["test_faketensor", "test_aot_dispatch_dynamic"]
    if not row.weight.dtype.is_floating_point:  # torch cannot compare float8 tensors for the schema
        checks.append("test_schema")
    w, x = torch.randn(6, 512, dtype=dtype), torch.randn(2, 3, 512, dtype=dtype)
    codes, scale, zero = bundle(ops.quantize(w, scheme, "weight"))
    torch.library.opcheck(ops.quantize, (w, scheme, "weight"), test_utils=checks)
    args = (codes, scale, zero, scheme, "weight", dtype)
    torch.library.opcheck(ops.dequantize, args, test_utils=checks)
    if row.input is not None:
        torch.library.opcheck(ops.quantize, (x, scheme, "input"), test_utils=checks)
    linear = (x, codes, scale, zero, torch.randn(6, dtype=dtype), scheme, "gelu")
    torch.library.opcheck(ops.linear, linear, test_utils=checks)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_linear_is_the_reference_form(scheme):
    """One fused op equals quantize, dequantize and a float product, in float64."""
    row = SCHEMES[scheme]
    w, x, b = (torch.randn(*s, dtype=torch.float64) for s in ((8, 256), (5, 256), (8,)))
    q = bundle(ops.quantize(w, scheme, "weight"))
    dq = ops.dequantize(*q, scheme, "weight", torch.float64)
    xq = x
    if row.input is not None:
        xq = ops.dequantize(*bundle(ops.quantize(x, scheme, "input")), scheme, "input", x.dtype)
    wanted = torch.relu(xq @ dq.T + b)
    found = ops.linear(x, *q, b, scheme, "relu")
    torch.testing.assert_close(found, wanted, rtol=1e-13, atol=1e-13)


def test_storages_are_told_apart():
    from fxquant.inductor import storage_of

    x = torch.randn(4, 4)
    assert storage_of(x) == storage_of(x.t()) == storage_of(x[1:].detach())
    assert storage_of(x) != storage_of(x.clone())
    if torch.backends.mkldnn.is_available():
        opaque = x.to_mkldnn()
        assert storage_of(opaque) not in (storage_of(x), storage_of(x.to_mkldnn()))
