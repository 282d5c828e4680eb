"""Triton: rows of activations quantized per token, each read once.

What Inductor makes of ``fxquant.quantize`` is fused with the norm before it, which for few rows is
worth more than this. Of many rows it reads each three times, and took 100 us for 2048 x 14336 on an
H200 and 20 for 2048 x 4096, where the bytes alone take 21 and 6. With nothing to fuse, behind another
kernel or at the beginning of a graph, it takes 1 to 2 us more of few rows of 4096 values and 5 to 10 of
14336.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch

from ..ops import GATES, outputs, quantize_fake
from ..scheme import QuantSpec, Scheme, get_scheme
from .devices import device_row
from .triton_launch import (
    HAS_TRITON,
    INTERPRET,
    activate,
    define,
    jit,
    overlaps,
    start,
    tl,
    wait_for_previous_kernel,
)
from .triton_widen import in_lanes

LEAST = 1 << 20
"""Values, from which on a kernel of its own is faster."""

PLACES = ("cuda",)
"""Not the CPU, where only the interpreter would run it."""

WIDEST = 1 << 15
"""Values of a row that one program holds."""

INT8 = torch.iinfo(torch.int8)
FLOAT8_LARGEST = torch.finfo(torch.float8_e4m3fn).max

SMALLEST = torch.finfo(torch.float32).tiny
LARGEST = torch.finfo(torch.float32).max


@jit
def nearest(x):
    """``x`` rounded to an integer, halves to even ones; |x| below 2**22, products not contracted."""
    return (x + 12582912.0) - 12582912.0


@jit
def divided(x, y, FUSED: tl.constexpr):
    """``x / y``, rounded once, for all quotients but subnormal ones: the product with the reciprocal, and
    what is left of ``x``, exactly, times it again (Markstein 1990, IBM J. Res. Dev. 34)."""
    if FUSED:
        inverse = tl.math.div_rn(tl.full((), 1.0, tl.float32), y) + tl.zeros_like(x)
        y += tl.zeros_like(x)
        near = x * inverse
        found = tl.fma(tl.fma(-near, y, x), inverse, near)
    else:  # the interpreter's fma rounds twice
        found = tl.math.div_rn(x, y + tl.zeros_like(x))
    return found


@jit
def loaded(x, row, at, K, GATE: tl.constexpr):
    """The columns ``at`` of x[row, :K], or of what the activation GATE makes of it, times x[row, K : 2 K]."""
    inside = at < K
    if GATE == "":
        values = tl.load(x + row * K + at, inside, 0.0).to(tl.float32)
    else:
        first = tl.load(x + row * 2 * K + at, inside, 0.0).to(tl.float32)
        second = tl.load(x + row * 2 * K + K + at, inside, 0.0).to(tl.float32)
        values = (activate(first, GATE) * second).to(x.dtype.element_ty).to(tl.float32)
    return values


@jit
def largest_of(values):
    """Without their sign, bits order all numbers as integers; those of a NaN are larger."""
    return tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)


@jit
def coded(values, step, center, FLOAT8: tl.constexpr, FUSED: tl.constexpr):
    """Codes before they are cast; ``center``: the zero point, which a NaN gets too."""
    if FLOAT8:
        found = divided(values, step, FUSED)
        clamped = tl.minimum(tl.maximum(found, -448.0), 448.0)
        found = tl.where(found != found, found, clamped)
    else:
        found = nearest(values * tl.math.div_rn(tl.full((), 1.0, tl.float32), step))
        found = tl.where(found != found, center, found + center)
        found = tl.minimum(tl.maximum(found, -128.0), 127.0)
    return found


@jit
def quantize_rows_kernel(
    x, codes, scale, zero, K,
    INVERSE: tl.constexpr, ASYMMETRIC: tl.constexpr, FLOAT8: tl.constexpr, BLOCK: tl.constexpr,
    REST: tl.constexpr, SMALLEST: tl.constexpr, LARGEST: tl.constexpr, GATE: tl.constexpr,
    FUSED: tl.constexpr, WIDENED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """codes[row, :] of x[row, :K] (or of what GATE makes of it: ``loaded``) with the row's scale and zero
    point. INVERSE: of half the codes' range. WIDENED: codes are those less the zero point, as
    ``fxquant.widen`` has them. The program holds BLOCK values of the row, and REST more, if any."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    wait_for_previous_kernel(OVERLAP)
    values = loaded(x, row, at, K, GATE)
    bits = largest_of(values)
    low, high = tl.min(values, 0), tl.max(values, 0)
    if REST > 0:
        rest_at = BLOCK + tl.arange(0, REST)
        rest = loaded(x, row, rest_at, K, GATE)
        bits = tl.maximum(bits, largest_of(rest))
        low, high = tl.minimum(low, tl.min(rest, 0)), tl.maximum(high, tl.max(rest, 0))
    largest = bits.to(tl.float32, bitcast=True)
    radius = largest
    if ASYMMETRIC:
        low = tl.minimum(low, 0.0)
        radius = tl.maximum(high, 0.0) / 2 - low / 2
    step = tl.where(radius == 0, 1.0, radius * INVERSE)
    step = tl.minimum(tl.maximum(step, SMALLEST), LARGEST)
    step = tl.where(largest <= LARGEST, step, float("nan"))
    tl.store(scale + row, step)
    center = 0.0
    if ASYMMETRIC:
        center = tl.minimum(tl.maximum(-128.0 - nearest(tl.math.div_rn(low, step)), -128.0), 127.0)
        center = tl.where(step != step, 0.0, center)
        if not WIDENED:
            tl.store(zero + row, center.to(tl.int32))
    found = coded(values, step, center, FLOAT8, FUSED)
    if WIDENED:
        found = in_lanes(found - center, BLOCK)
    tl.store(codes + row * K + at, found.to(codes.dtype.element_ty), at < K)
    if REST > 0:
        found = coded(rest, step, center, FLOAT8, FUSED)
        if WIDENED:
            found = in_lanes(found - center, REST)
        tl.store(codes + row * K + rest_at, found.to(codes.dtype.element_ty), rest_at < K)


def parts_of(k: int) -> tuple[int, int]:
    """Powers of two that together hold ``k`` values: the least one, or where that saves a fourth of it, the
    one below and the least that holds the rest."""
    whole = max(1 << (k - 1).bit_length(), 64)
    rest = max(1 << max(k - whole // 2 - 1, 0).bit_length(), 32)
    return (whole // 2, rest) if whole // 2 + rest <= 0.75 * whole else (whole, 0)


def warps_for(values: int, few: bool, share: int = 2048) -> int:
    """Of a program that holds ``values``, a ``share`` for each. Where a ``few`` multiprocessors have a row it
    has more: else several programs of few warps hide what one waits for. (2048 rows on an H200, 4 to 32
    warps: of 4096 values 7.4, 7.9, 9.3 and 13.8 us; of 14336, held as 16384, 35.1, 30.3, 34.6 and 36.7 in one
    run, 27.1, 29.3, 27.1 and 29.9 in another.)"""
    many = 4 if values <= 4096 else max(values // share, 8)
    wanted = max(values // 512, 4) if few else many
    # Triton's number of warps is a power of two, which values in two parts are not
    return min(1 << (wanted - 1).bit_length(), 32)


def _fake(
    x: torch.Tensor, scheme: str, gate: str = "", widened: bool = False
) -> list[torch.Tensor]:
    found = quantize_fake(x, scheme, "input", gate)
    return [torch.empty_like(found[0], dtype=torch.bfloat16), found[1]] if widened else found


@define('quantize_rows(Tensor x, str scheme, str gate="", bool widened=False) -> Tensor[]', _fake)
def quantize_rows(
    x: torch.Tensor, scheme: str, gate: str = "", widened: bool = False
) -> list[torch.Tensor]:
    """Codes, scale and, for schemes that have one, zero point of x[rows, k], or, with one of GATES, of
    x[rows, 2 k], as ``fxquant.quantize``; what the gate makes is rounded once, to x's type. widened: what
    ``fxquant.widen`` makes of codes and zero point instead of them, k a multiple of 32."""
    rows, k = x.shape[0], outputs(x.shape[1], gate)
    few = rows < device_row(x.device).units
    plan = _plan(get_scheme(scheme), gate, widened, few, k, x.device)
    codes = x.new_empty((rows, k), dtype=plan.codes)
    found = [codes, x.new_empty((rows, 1), dtype=torch.float32)]
    if plan.zero:
        found.append(x.new_empty((rows, 1), dtype=torch.int32))
    if rows and k:
        arguments = (x.contiguous(), codes, found[1], found[-1], k)
        start(quantize_rows_kernel, rows, arguments, plan.constants, **plan.options)
    if INTERPRET and not widened:
        found[0] = codes.to(get_scheme(scheme).input.codes_dtype)  # type: ignore[union-attr]
    return found


class Plan(NamedTuple):
    """How rows are quantized: the type of their codes, whether they have zero points, and the launch."""

    codes: torch.dtype
    zero: bool
    constants: dict[str, Any]
    options: dict[str, Any]


@lru_cache(maxsize=4096)
def _plan(
    scheme: Scheme, gate: str, widened: bool, few: bool, k: int, device: torch.device
) -> Plan:
    spec = scheme.input
    assert spec is not None
    float8, asymmetric = spec.dtype.is_floating_point, spec.mapping == "asymmetric"
    codes = torch.bfloat16 if widened else spec.codes_dtype
    if INTERPRET and float8:  # it does not round to float8 as a GPU does
        codes = torch.float32
    half = FLOAT8_LARGEST if float8 else (INT8.max - INT8.min) / 2
    block, rest = parts_of(k)
    constants = {
        "INVERSE": 1 / half,
        "ASYMMETRIC": asymmetric,
        "FLOAT8": float8,
        "BLOCK": block,
        "REST": rest,
        "SMALLEST": SMALLEST,
        "LARGEST": LARGEST,
        "GATE": GATES.get(gate, ""),
        "FUSED": not INTERPRET,
        "WIDENED": widened,
        "OVERLAP": overlaps(device),
    }
    # A gate computes more than it waits, where registers allow it. (As above with 4 to 32 warps, gated: 75.9,
    # 53.0, 51.5 and 48.3 us, float8 81.6, 58.4, 55.6 and 48.5; asymmetric 85, 61, 56 and 74.)
    values, share = (block + rest) * (2 if gate else 1), 1024 if gate and not asymmetric else 2048
    warps = warps_for(values, few, share)
    options = {"num_warps": warps, "enable_fp_fusion": False}
    return Plan(codes, asymmetric and not widened, constants, options)


KNOWN = (
    # dtype, mapping, domain of the zero point
    (torch.int8, "symmetric", "none"),
    (torch.int8, "asymmetric", "int"),
    (torch.float8_e4m3fn, "symmetric", "none"),
)


def are_known(spec: QuantSpec) -> bool:
    """Whether the arithmetic here is that of ``spec``, but for what shares a scale."""
    known = (spec.dtype, spec.mapping, spec.zero_point_domain) in KNOWN
    return known and spec.scale_dtype == torch.float32 and spec.preserve_zero is not False


def is_served(x: torch.Tensor, spec: QuantSpec, gate: str = "") -> bool:
    """Whether this kernel can quantize ``x``, a fake one maybe, or what ``gate`` makes of it."""
    if not HAS_TRITON or x.device.type not in PLACES or x.dim() != 2:
        return False
    k = outputs(x.shape[1], gate)
    if x.dtype == torch.float64:  # its arithmetic is float64
        return False
    if spec.dtype.is_floating_point and x.is_cuda and "sm89" not in device_row(x.device).features:
        return False
    token = spec.granularity == "token" and are_known(spec)
    return token and isinstance(k, int) and 0 < k <= WIDEST


def are_many(x: torch.Tensor, gate: str = "") -> bool:
    """Whether it is better at it than what is fused: for an unknown number of rows too."""
    rows, k = x.shape
    return not isinstance(rows, int) or rows * outputs(k, gate) >= LEAST
