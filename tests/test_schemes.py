"""Each scheme's pinned floor: the measured signal-to-noise ratio of its output, less 0.5 dB."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import fxquant  # noqa: F401
from fxquant.lowering.kernel import KERNELS
from fxquant.ops import bundle
from fxquant.scheme import SCHEMES, QuantSpec

from .conftest import linear_on, sqnr


def measured(scheme: str) -> float:
    """Gaussian weights [512, 1024] and activations [256, 1024], seed 0, float64 products."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(512, 1024, generator=generator)
    x = torch.randn(256, 1024, generator=generator)
    q = bundle(torch.ops.fxquant.quantize(w, scheme, "weight"))
    y = linear_on(x.double(), q, None, scheme)
    return sqnr(y, x.double() @ w.double().T)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_floor(scheme):
    floor = SCHEMES[scheme].sqnr
    found = measured(scheme)
    assert floor <= found <= floor + 1.0, f"{scheme}: {found:.2f} dB, pinned {floor}"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_large_weights_are_quantized_in_slabs(scheme, monkeypatch):
    weight = torch.randn(100, 256, generator=torch.Generator().manual_seed(0))
    whole = SCHEMES[scheme].weight.quantize(weight)
    monkeypatch.setattr("fxquant.scheme.SLAB", 30 * 256)
    for a, b in zip(whole, SCHEMES[scheme].weight.quantize_weight(weight), strict=True):
        assert (a is None) == (b is None)
        assert a is None or (torch.equal(a.float(), b.float()) and a.dtype == b.dtype)


@pytest.mark.parametrize("scheme", ["int4wo-128", "int3wo-128", "int2wo-128"])
def test_small_columns_of_outlier_channels_are_small_errors(scheme):
    """0 has a code: half a step in a small column, times the outlier, would be most of the output."""
    generator = torch.Generator().manual_seed(0)
    w, x = (torch.randn(n, 1024, generator=generator) for n in (128, 64))
    w[:, :20] /= 64
    x[:, :20] *= 64
    q = bundle(torch.ops.fxquant.quantize(w, scheme, "weight"))
    y = linear_on(x.double(), q, None, scheme)
    found = sqnr(y, x.double() @ w.double().T)
    assert found > SCHEMES[scheme].sqnr - 6, "without it most of the output is error"


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_are_stored_in_what_the_spec_says(bits):
    spec = QuantSpec(dtype=getattr(torch, f"int{bits}"), granularity="channel")
    codes = spec.quantize(torch.randn(4, 16)).codes
    assert codes.dtype == spec.codes_dtype and codes.shape == (4, spec.stored_width(16))
    assert spec.stored_width(16) == (2 * bits if bits <= 4 else 16)
    assert spec.width(spec.stored_width(16)) == 16


def test_static_codes_are_multiplied_as_a_dynamic_schemes():
    """Same weight, same domain of codes: only where the scale of the input comes from differs."""
    found = {s.name: s.product.name for s in SCHEMES.values() if s.static}
    assert found == {"int8static": "int8dq", "int8static-sym": "int8dq", "fp8static": "fp8dq"}
    for name, product in found.items():
        static, dynamic = SCHEMES[name], SCHEMES[product]
        assert static.weight == dynamic.weight and not dynamic.static
        assert static.input.dtype == dynamic.input.dtype
        assert dynamic.input.zero_point_domain == "none"
        assert not any(static.family in kernel.families for kernel in KERNELS.values())


def test_every_other_scheme_has_kernels_of_its_own_but_3_bits():
    for scheme in SCHEMES.values():
        if scheme.weight.bits == 3:
            four = scheme.product
            assert four.name == scheme.name.replace("int3", "int4") and four.weight.bits == 4
            assert replace(four.weight, dtype=scheme.weight.dtype) == scheme.weight
        elif not scheme.static:
            assert scheme.product is scheme


@pytest.mark.parametrize("narrow, wide", [(torch.uint3, torch.uint4), (torch.int3, torch.int4)])
def test_codes_of_3_bits_stand_for_the_same_in_4(narrow, wide, monkeypatch):
    """Bit for bit, there and back, every code there is; in slabs too."""
    domain = "none" if narrow is torch.int3 else "float"
    mapping = "symmetric" if narrow is torch.int3 else "asymmetric"
    three, four = (
        QuantSpec(dtype=d, granularity="group", group_size=32, mapping=mapping, zero_point_domain=domain)
        for d in (narrow, wide)
    )  # fmt: skip
    q = three.quantize(torch.randn(50, 64, generator=torch.Generator().manual_seed(0)))
    q = q._replace(codes=torch.randint(256, q.codes.shape, dtype=torch.uint8))
    as_four = three.recoded(q, four)
    assert as_four.codes.shape == (50, 32)
    assert torch.equal(four.dequantize(as_four, torch.float64), three.dequantize(q, torch.float64))
    assert torch.equal(four.recoded(as_four, three).codes, q.codes)
    monkeypatch.setattr("fxquant.scheme.SLAB", 64 * 7)
    assert torch.equal(three.recoded(q, four).codes, as_four.codes)
