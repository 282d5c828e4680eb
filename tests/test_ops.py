"""The reference ops agree with their fakes, and opcheck accepts them."""

from __future__ import annotations

import pytest
import torch

import fxquant  # noqa: F401  defines the ops
from fxquant.errors import InvalidOption
from fxquant.ops import bundle
from fxquant.scheme import SCHEMES

from .conftest import linear_on

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
    static = ()
    if row.static:
        ends = torch.tensor([[-3.0, -1.0], [2.0, 4.0]])
        given = (ends, torch.tensor([1.0, 2.0]), scheme)
        torch.library.opcheck(ops.static_qparams, given, test_utils=checks)
        qparams = bundle([x, *ops.static_qparams(*given)])[1:]
        torch.library.opcheck(ops.quantize_static, (x, *qparams, scheme), test_utils=checks)
        x = ops.quantize_static(x, *qparams, scheme)
        static = (*qparams, dtype)
    elif row.input is not None:
        torch.library.opcheck(ops.quantize, (x, scheme, "input"), test_utils=checks)
    linear = (x, codes, scale, zero, torch.randn(6, dtype=dtype), scheme, "gelu", *static)
    torch.library.opcheck(ops.linear, linear, test_utils=checks)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_linear_is_the_reference_form(scheme):
    """One fused op equals quantize, dequantize and a float product, in float64."""
    row = SCHEMES[scheme]
    w, x, b = (torch.randn(*s).double() for s in ((8, 256), (5, 256), (8,)))
    q = bundle(ops.quantize(w, scheme, "weight"))
    dq = ops.dequantize(*q, scheme, "weight", torch.float64)
    xq = x
    if row.static:
        xq = row.input.dequantize(row.input.quantize(x.float()), x.dtype)
    elif row.input is not None:
        xq = ops.dequantize(*bundle(ops.quantize(x, scheme, "input")), scheme, "input", x.dtype)
    wanted = torch.relu(xq @ dq.T + b)
    found = linear_on(x, q, b, scheme, "relu")
    torch.testing.assert_close(found, wanted, rtol=1e-13, atol=1e-13)


def test_a_static_scheme_takes_codes_and_no_other_does():
    w, x = torch.randn(8, 64), torch.randn(5, 64)
    one = torch.ones(1)
    q = bundle(ops.quantize(w, "int8static", "weight"))
    for device in ("cpu", "meta"):  # the reference and its fake
        x, one, q = x.to(device), one.to(device), [None if t is None else t.to(device) for t in q]
        with pytest.raises(InvalidOption, match="int8static takes its input's scale from calibr"):
            ops.linear(x, *q, None, "int8static", "")
        with pytest.raises(InvalidOption, match="the input of int8dq is not static"):
            ops.linear(x, *q, None, "int8dq", "", one, None, torch.float32)


def test_static_qparams_are_those_of_the_smoothed_range():
    """Channel 1 has the extremes until it is divided by 8; the range is widened to hold 0."""
    ends = torch.tensor([[1.0, 8.0], [2.0, 80.0]])
    smoothing = torch.tensor([0.5, 8.0])
    scale, zero = ops.static_qparams(ends, smoothing, "int8static")
    assert scale.shape == zero.shape == (1,) and zero.dtype == torch.int32
    torch.testing.assert_close(scale, torch.tensor([10.0 / 255]))
    assert zero.tolist() == [-128]
    (scale,) = ops.static_qparams(ends, None, "int8static-sym")
    torch.testing.assert_close(scale, torch.tensor([80.0 / 127.5]))
    (scale,) = ops.static_qparams(-ends, smoothing, "fp8static")
    torch.testing.assert_close(scale, torch.tensor([10.0 / 448]))


def test_static_codes_saturate_in_any_rank():
    scale, zero = torch.tensor([0.5]), torch.tensor([-28], dtype=torch.int32)
    x = torch.tensor([-1e9, -50.0, 0.0, 0.24, 0.26, 77.5, 78.0, 1e9]).reshape(2, 2, 2)
    codes = ops.quantize_static(x, scale, zero, "int8static")
    assert codes.dtype == torch.int8 and codes.shape == x.shape
    assert codes.flatten().tolist() == [-128, -128, -28, -28, -27, 127, 127, 127]


def test_storages_are_told_apart():
    from fxquant.storage import storage_of

    x = torch.randn(4, 4)
    assert storage_of(x) == storage_of(x.t()) == storage_of(x[1:].detach())
    assert storage_of(x) != storage_of(x.clone())
    if torch.backends.mkldnn.is_available():
        opaque = x.to_mkldnn()
        assert storage_of(opaque) not in (storage_of(x), storage_of(x.to_mkldnn()))
