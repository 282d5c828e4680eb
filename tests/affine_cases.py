"""Formats, blocks and inputs that the tests of affine.py share."""

from __future__ import annotations

import itertools

import torch

from fxquant.affine import (
    bits_of,
    choose_qparams_affine,
    dequantize_affine,
    quantize_affine,
)

SIGNED = [getattr(torch, f"int{bits}") for bits in range(1, 9)]
UNSIGNED = [getattr(torch, f"uint{bits}") for bits in range(1, 9)]
FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2]
REAL = [torch.float32, torch.bfloat16, torch.float16]
EPS = torch.finfo(torch.float32).eps

BLOCKS = {
    "tensor": (-1, -1, -1),
    "channel": (1, -1, -1),
    "token": (1, 1, -1),
    "group": (1, 1, 8),
    "block": (1, 2, 8),
    "column": (-1, -1, 1),
}
SHAPE = (3, 4, 16)

SYMMETRIC = dict(mapping="symmetric", zero_point_domain="none")
SYMMETRIC_INT = dict(mapping="symmetric", zero_point_domain="int")
NO_CLIPPING = dict(mapping="symmetric_no_clipping_err", zero_point_domain="none")
NO_CLIPPING_INT = dict(mapping="symmetric_no_clipping_err", zero_point_domain="int")
ASYMMETRIC = dict(mapping="asymmetric", zero_point_domain="int")
SHIFTED = dict(mapping="asymmetric", zero_point_domain="int", preserve_zero=False)
TINYGEMM = dict(mapping="asymmetric", zero_point_domain="float")


def legal_forms(dtype):
    """Every way to quantize to ``dtype``."""
    if dtype in FLOAT8:
        return [SYMMETRIC, NO_CLIPPING]
    forms = [SYMMETRIC_INT, ASYMMETRIC, SHIFTED, TINYGEMM]
    if bits_of(dtype) > 1:
        forms.append(NO_CLIPPING_INT)
    if dtype in SIGNED:
        forms += [SYMMETRIC] + [NO_CLIPPING] * (dtype != torch.int1)
    return forms


EVERY = [(d, f) for d in SIGNED + UNSIGNED + FLOAT8 for f in legal_forms(d)]


def name(value):
    """Test id of a dtype or a form."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return "-".join(map(str, value.values())) if isinstance(value, dict) else None


def sample(shape=SHAPE, seed=0):
    """Gaussian values, some on halves, some 0, one outlier; every other one is negative."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).abs()
    flat = x.view(-1)
    flat[1::7] = (flat[1::7] * 2).round() / 2
    flat[5] = 40.0
    for dim, size in enumerate(shape):
        x = x * torch.tensor([1, -1] * size)[:size].view([-1] + [1] * (len(shape) - dim - 1))
    x.view(-1)[3::11] = 0
    return x


def sizes(block, shape):
    """``block`` with every -1 spelled out."""
    return [size if b == -1 else b for b, size in zip(block, shape, strict=True)]


def each_block(x, block):
    """(index of the block, its values), one by one: the meaning of block_size, spelled out."""
    extents = sizes(block, x.shape)
    for index in itertools.product(*(range(n // b) for n, b in zip(x.shape, extents, strict=True))):
        slices = (slice(i * b, (i + 1) * b) for i, b in zip(index, extents, strict=True))
        yield index, x[tuple(slices)]


def round_trip(x, block, dtype, form, output_dtype=torch.float64, **options):
    """Ours: scale, zero, codes and the values they stand for."""
    domain = form["zero_point_domain"]
    scale, zero = choose_qparams_affine(x, block, dtype, **form, **options)
    codes = quantize_affine(x, block, scale, zero, dtype, zero_point_domain=domain)
    values = dequantize_affine(
        codes, block, scale, zero, dtype, zero_point_domain=domain, output_dtype=output_dtype
    )
    return scale, zero, codes, values


def same(ours, theirs):
    """Equal bit for bit, in dtype, shape and values."""
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    if ours.dtype in FLOAT8:
        ours, theirs = ours.view(torch.uint8), theirs.view(torch.uint8)
    assert torch.equal(ours, theirs)


def check_error(x, block, dtype, form, steps=0.5, **options):
    """Every value of ``x`` comes back within half a step (and float32's rounding).

    One step where the zero point is an integer: rounding it can push one end out of the codes.
    """
    scale, _, _, values = round_trip(x, block, dtype, form, **options)
    assert torch.isfinite(values).all()
    for index, part in each_block(values - x.double(), block):
        slack = 4 * EPS * x.double().abs().max()
        assert part.abs().max() <= steps * scale[index].double() + slack
