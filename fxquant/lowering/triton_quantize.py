"""Triton: rows of activations quantized per token, each read once.

What Inductor makes of ``fxquant.quantize`` is fused with the norm before it, which is worth more than
this for few rows, and for many where a program holds a row (``expansion``). Else it reads each of many
rows three times, and took 100 us for 2048 x 14336 on an H200, where the bytes alone take 21. With nothing
to fuse, behind another kernel or at the beginning of a graph, it takes 1 to 2 us more of few rows of 4096
values and 5 to 10 of 14336.
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
def in_byte(x):
    """Integers from -128 to 127 as int8: the last byte of a sum, which needs no conversion."""
    return (x + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


@jit
def divided(x, y, NATIVE: tl.constexpr):
    """``x / y``, rounded once, for all quotients but subnormal ones: the product with the reciprocal, and
    what is left of ``x``, exactly, times it again (Markstein 1990, IBM J. Res. Dev. 34)."""
    if NATIVE:
        inverse = tl.math.div_rn(tl.full((), 1.0, tl.float32), y) + tl.zeros_like(x)
        y += tl.zeros_like(x)
        near = x * inverse
        found = tl.fma(tl.fma(-near, y, x), inverse, near)
    else:  # the interpreter's fma rounds twice
        found = tl.math.div_rn(x, y + tl.zeros_like(x))
    return found


@jit
def logistic(x):
    """``1 / (1 + exp(-x))`` in four instructions, within its last bits; 0 below -87.3, where it is subnormal
    or nearly."""
    return tl.inline_asm_elementwise(
        "{ .reg .f32 e; mul.f32 e, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 e, e;"
        " add.f32 e, e, 0f3F800000; rcp.approx.ftz.f32 $0, e; }",
        "=r,r",
        [x],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )


@jit
def as_bfloat16(x):
    """``x`` rounded to bfloat16, two at a time, as float32. (Triton converts one by one.)"""
    return tl.inline_asm_elementwise(
        "{ .reg .b32 both; cvt.rn.bf16x2.f32 both, $3, $2;"
        " shl.b32 $0, both, 16; and.b32 $1, both, 0xffff0000; }",
        "=r,=r,r,r",
        [x],
        dtype=tl.float32,
        is_pure=True,
        pack=2,
    )


@jit
def gated(first, second, GATE: tl.constexpr, NATIVE: tl.constexpr):
    """The activation GATE of ``first`` times ``second``, in float32."""
    fast = NATIVE and GATE == "silu"
    return (first * logistic(first) if fast else activate(first, GATE)) * second


@jit
def loaded(x, row, at, K, GATE: tl.constexpr, NATIVE: tl.constexpr):
    """The columns ``at`` of x[row, :K], or of what the activation GATE makes of it, times x[row, K : 2 K],
    rounded to the type of x."""
    inside = at < K
    if GATE == "":
        values = tl.load(x + row * K + at, inside, 0.0).to(tl.float32)
    else:
        first = tl.load(x + row * 2 * K + at, inside, 0.0).to(tl.float32)
        second = tl.load(x + row * 2 * K + K + at, inside, 0.0).to(tl.float32)
        values = gated(first, second, GATE, NATIVE)
        if NATIVE and x.dtype.element_ty == tl.bfloat16:
            values = as_bfloat16(values)
        else:
            values = values.to(x.dtype.element_ty).to(tl.float32)
    return values


@jit
def largest_of(values):
    """Without their sign, bits order all numbers as integers; those of a NaN are larger."""
    return tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)


@jit
def coded(values, step, center, FLOAT8: tl.constexpr, NATIVE: tl.constexpr):
    """Codes before they are cast; ``center``: the zero point, which a NaN gets too."""
    if FLOAT8:
        found = divided(values, step, NATIVE)
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
    INVERSE: tl.constexpr, ASYMMETRIC: tl.constexpr, FLOAT8: tl.constexpr, PARTS: tl.constexpr,
    SMALLEST: tl.constexpr, LARGEST: tl.constexpr, GATE: tl.constexpr, NATIVE: tl.constexpr,
    WIDENED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """codes[row, :] of x[row, :K] (or of what GATE makes of it: ``loaded``) with the row's scale and zero
    point. INVERSE: of half the codes' range. WIDENED: codes are those less the zero point, as
    ``fxquant.widen`` has them. The program holds the row in PARTS of so many values. NATIVE: on a GPU with
    these instructions (from sm80 on)."""
    row = tl.program_id(0).to(tl.int64)
    wait_for_previous_kernel(OVERLAP)
    held = ()
    bits, low, high = tl.full((), 0, tl.int32), 0.0, 0.0
    offset = 0
    for i in tl.static_range(len(PARTS)):
        values = loaded(x, row, offset + tl.arange(0, PARTS[i]), K, GATE, NATIVE)
        bits = tl.maximum(bits, largest_of(values))
        if ASYMMETRIC:
            low = tl.minimum(low, tl.min(values, 0))
            high = tl.maximum(high, tl.max(values, 0))
        held += (values,)  # type: ignore[assignment]
        offset += PARTS[i]
    largest = bits.to(tl.float32, bitcast=True)
    radius = largest
    if ASYMMETRIC:
        radius = high / 2 - low / 2
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
    offset = 0
    for i in tl.static_range(len(PARTS)):
        at = offset + tl.arange(0, PARTS[i])
        found = coded(held[i], step, center, FLOAT8, NATIVE)
        if WIDENED:
            found = in_lanes(found - center, PARTS[i]).to(codes.dtype.element_ty)
        elif FLOAT8:
            found = found.to(codes.dtype.element_ty)
        else:
            found = in_byte(found)
        tl.store(codes + row * K + at, found, at < K)
        offset += PARTS[i]


def parts_of(k: int) -> tuple[int, ...]:
    """Powers of two that together hold ``k`` values: the least one, or where that saves a fourth of it, half
    of it and the least that holds the rest. (Three for 14336, 2048 rows on an H200: 35.8 us and not 26.2.)"""
    whole = max(_least(k), 64)
    half = whole // 2
    rest = max(_least(k - half), 32)
    return (half, rest) if rest <= whole // 4 else (whole,)


def _least(k: int) -> int:
    """The least power of two that is not below ``k``."""
    return 1 << max(k - 1, 0).bit_length()


def warps_for(values: int, few: bool, share: int = 2048) -> int:
    """Of a program that holds ``values``, a ``share`` for each, in a power of two. Where a ``few``
    multiprocessors have a row it has more: else several programs of few warps hide what one waits for.
    (2048 rows on an H200, 4 to 32 warps: of 4096 values 7.4, 7.9, 9.3 and 13.8 us; of 14336, held as 16384,
    26.2 with 8 and 28.7 with 16.)"""
    many = 4 if values <= 4096 else max(values // share, 8)
    wanted = max(_least(values) // 512, 4) if few else many
    return min(1 << (wanted.bit_length() - 1), 32)


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
    parts = parts_of(k)
    constants = {
        "INVERSE": 1 / half,
        "ASYMMETRIC": asymmetric,
        "FLOAT8": float8,
        "PARTS": parts,
        "SMALLEST": SMALLEST,
        "LARGEST": LARGEST,
        "GATE": GATES.get(gate, ""),
        "NATIVE": not INTERPRET and "sm80" in device_row(device).features,
        "WIDENED": widened,
        "OVERLAP": overlaps(device),
    }
    # A gate computes more than it waits, where registers allow it. (2048 rows on an H200, 8, 16 and 32
    # warps: of 14336 values 44.4, 44.7 and 39.5 us, in float8 48.5, 46.2 and 41.6, asymmetric 53.1, 47.7 and
    # 67.1; of 11008 36.8, 34.3 and 38.5, in float8 38.2, 34.8 and 41.6, asymmetric 40.7 and 46.6 with 16.)
    values, share = sum(parts) * (2 if gate else 1), 1024 if gate and not asymmetric else 2048
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
