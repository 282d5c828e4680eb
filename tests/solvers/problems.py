"""Small linears with inputs whose channels are correlated and of different size; specs of all kinds."""

from __future__ import annotations

import torch

from fxquant.affine import unpack_codes
from fxquant.scheme import Quantized, QuantSpec
from fxquant.solvers import Gram


def sym(dtype: torch.dtype, group: int | None = None, **kw) -> QuantSpec:
    scale = {"scale_dtype": torch.bfloat16} if group else {}
    kind = "group" if group else "channel"
    return QuantSpec(dtype=dtype, granularity=kind, group_size=group, **{**scale, **kw})


def asym(dtype: torch.dtype, group: int | None = None, domain: str = "float") -> QuantSpec:
    return sym(dtype, group, mapping="asymmetric", zero_point_domain=domain)


SPECS = {
    "int8-channel": sym(torch.int8),
    "uint8-channel-int": asym(torch.uint8, domain="int"),
    "int4-channel": sym(torch.int4),
    "uint4-channel-float": asym(torch.uint4),
    "int4-16": sym(torch.int4, 16),
    "int4-16-no-clipping": sym(torch.int4, 16, mapping="symmetric_no_clipping_err"),
    "uint4-16-float": asym(torch.uint4, 16),
    "int4-32-float": asym(torch.int4, 32),
    "uint4-32-int": asym(torch.uint4, 32, "int"),
    "int3-32": sym(torch.int3, 32),
    "uint3-16-int": asym(torch.uint3, 16, "int"),
    "int2-16": sym(torch.int2, 16),
    "uint2-32-float": asym(torch.uint2, 32),
    "int5-32": sym(torch.int5, 32),
    "uint6-channel-float": asym(torch.uint6),
    "int7-16": sym(torch.int7, 16),
    "e4m3-channel": sym(torch.float8_e4m3fn),
}


def problem(
    seed: int = 0,
    n: int = 6,
    k: int = 96,
    tokens: int = 300,
    dtype: torch.dtype = torch.float32,
    outliers: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """weight [n, k] and inputs x [tokens, k]; ``outliers`` is the spread of the channels' size."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=g, dtype=torch.float64) * 0.1
    x = torch.randn(tokens, k, generator=g, dtype=torch.float64)
    x = x @ (torch.eye(k) + torch.randn(k, k, generator=g) * 1.5 * k**-0.5).double()
    x = x * torch.exp(outliers * torch.randn(k, generator=g)).double()
    return w.to(dtype), x.to(dtype)


def gram_of(x: torch.Tensor) -> Gram:
    """In x's dtype, at least float32."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return Gram(x.shape[-1], dtype=dtype).add(x)


def true_error(w: torch.Tensor, q: Quantized, spec: QuantSpec, x: torch.Tensor) -> float:
    """The squared error of the outputs themselves, in float64 and without a Gram."""
    change = w.double() - spec.dequantize(q, torch.float64)
    return float((x.double() @ change.T).square().sum())


def assert_same(found: Quantized, wanted: Quantized) -> None:
    """Codes, scale and zero equal bit for bit, in dtype and shape too."""
    for name, a, b in zip(Quantized._fields, found, wanted, strict=True):
        assert (a is None) == (b is None), name
        if a is not None and b is not None:
            assert (a.dtype, a.shape) == (b.dtype, b.shape), name
            assert a.is_contiguous() == b.is_contiguous(), name
            assert torch.equal(a.double(), b.double()), name


def assert_canonical(q: Quantized, w: torch.Tensor, spec: QuantSpec) -> None:
    """``q`` is laid out like the spec's own quantization of ``w``; its qparams are finite."""
    own = spec.quantize_weight(w)
    for name, a, b in zip(Quantized._fields, q, own, strict=True):
        assert (a is None) == (b is None), name
        if a is not None and b is not None:
            assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride()), name
            assert torch.isfinite(a.double()).all(), name
    assert (q.scale > 0).all()


def plain(q: Quantized, spec: QuantSpec) -> torch.Tensor:
    """Codes [n, k], unpacked, as float64."""
    return unpack_codes(q.codes, spec.dtype).double()
