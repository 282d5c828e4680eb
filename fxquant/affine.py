"""Affine quantization, ``q = clamp(round(x / scale) + zero_point)``, over blocks of a tensor.

A ``block_size`` has one entry per dimension of ``x``: the extent that shares one scale, -1 for the
whole dimension. ``[-1, -1]`` is per tensor, ``[1, -1]`` per row (channel of a weight, token of an
activation), ``[1, 32]`` grouped, ``[128, 128]`` two-dimensional. Scales and zero points have the
rank of ``x`` and one entry per block: ``[N, K // 32]`` for grouped, ``[N, 1]`` for rows.

Everything here is plain torch ops on shapes: it runs eagerly, under fake tensors, and traces with
symbolic sizes. Arithmetic is float32, or float64 where an input is float64; halves round to even.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce
from itertools import zip_longest
from operator import or_
from typing import Literal

import torch

from .errors import InvalidBlockSize, InvalidOption, ShapeMismatch, UnsupportedDtype

Mapping = Literal["symmetric", "symmetric_no_clipping_err", "asymmetric"]
ZeroPointDomain = Literal["none", "int", "float"]

_SIGNED = {getattr(torch, f"int{bits}"): bits for bits in range(1, 9)}
_UNSIGNED = {getattr(torch, f"uint{bits}"): bits for bits in range(1, 9)}
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_REAL = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _choice(name: str, value: object, known: Sequence[object]) -> None:
    if value not in known:
        raise InvalidOption(name=name, value=value, expected=f"one of {', '.join(map(str, known))}")


def bits_of(dtype: torch.dtype) -> int:
    """Bits of one code: 1 to 8 for ``int1``..``int8`` and ``uint1``..``uint8``, 8 for float8.

    Raises InvalidOption for a dtype that holds no codes.
    """
    _choice("dtype", dtype, [*_SIGNED, *_UNSIGNED, *_FLOAT8])
    return 8 if dtype in _FLOAT8 else _SIGNED.get(dtype) or _UNSIGNED[dtype]


def code_range(dtype: torch.dtype) -> tuple[int, int]:
    """Smallest and largest code of ``dtype``; the finite range for float8 (-448 to 448 in e4m3)."""
    bits = bits_of(dtype)
    if dtype in _FLOAT8:
        return int(torch.finfo(dtype).min), int(torch.finfo(dtype).max)
    return (-(1 << bits - 1), (1 << bits - 1) - 1) if dtype in _SIGNED else (0, (1 << bits) - 1)


def storage_dtype(dtype: torch.dtype) -> torch.dtype:
    """What unpacked codes of ``dtype`` are held in: int8, uint8, or the float8 type itself."""
    bits_of(dtype)
    return dtype if dtype in _FLOAT8 else torch.int8 if dtype in _SIGNED else torch.uint8


def _range(
    dtype: torch.dtype, quant_min: float | None, quant_max: float | None
) -> tuple[float, float, float]:
    """The codes to use, by default all of ``dtype``, and the code in their middle (0 if signed).

    Between two codes for a custom range: the float domain takes that as it is, others cut it off.
    """
    low, high = code_range(dtype)
    qmin = low if quant_min is None else quant_min
    qmax = high if quant_max is None else quant_max
    if not low <= qmin < qmax <= high:
        raise InvalidOption(
            name="quant_min, quant_max",
            value=(qmin, qmax),
            expected=f"{low} <= quant_min < quant_max <= {high} for {dtype}",
        )
    return qmin, qmax, (qmax + qmin + 1) / 2


class _Blocks:
    """A shape cut into blocks. A dimension cut in several becomes two: their count, their extent.

    Sizes known as plain ints are checked; a symbolic one is left to the reshape, unspecialized.
    """

    def __init__(self, shape: Sequence[int], block_size: Sequence[int]):
        self.counts: list[int] = []  # blocks along each dimension: the shape of a scale
        self.view: list[int] = []  # the shape, with the dimensions that were cut as two
        self.within: list[int] = []  # the dimensions of the view that lie within a block
        if len(block_size) != len(shape):
            raise InvalidBlockSize(block_size=tuple(block_size), shape=tuple(shape))
        for size, block in zip(shape, block_size, strict=True):
            if block == -1:
                self.within.append(len(self.view))
                self.counts.append(1)
                self.view.append(size)
            elif block == 1:
                self.counts.append(size)
                self.view.append(size)
            elif block < 1 or (isinstance(size, int) and isinstance(block, int) and size % block):
                raise InvalidBlockSize(block_size=tuple(block_size), shape=tuple(shape))
            else:
                self.within.append(len(self.view) + 1)
                self.counts.append(size // block)
                self.view += [size // block, block]

    def split(self, x: torch.Tensor) -> torch.Tensor:
        return x if len(self.view) == x.dim() else x.reshape(self.view)

    def join(self, x: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        return x if len(self.view) == len(shape) else x.reshape(shape)

    def spread(self, qparam: torch.Tensor, dtype: torch.dtype, what: str) -> torch.Tensor:
        """A scale or zero point in ``dtype``, in a shape that broadcasts over the view."""
        pairs = list(zip_longest(qparam.shape, self.counts, fillvalue=-1))
        if any(f != c for f, c in pairs if isinstance(f, int) and isinstance(c, int)):
            raise ShapeMismatch(what=what, found=tuple(qparam.shape), expected=tuple(self.counts))
        if len(self.view) != qparam.dim():
            ones = [1 if dim in self.within else size for dim, size in enumerate(self.view)]
            qparam = qparam.reshape(ones)
        return qparam.to(dtype)

    def reduce(self, x: torch.Tensor, reduction: Callable[..., torch.Tensor]) -> torch.Tensor:
        """One value of each block, as ``torch.amin`` or ``amax``; 0 for a block without values."""
        if any(isinstance(self.view[dim], int) and self.view[dim] == 0 for dim in self.within):
            return x.new_zeros(self.counts)
        if not self.within:  # where amin would reduce over everything
            return x
        return self.join(reduction(self.split(x), self.within, keepdim=True), self.counts)


def _compute_dtype(*tensors: torch.Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in [t.dtype for t in tensors] else torch.float32


def _check_domain(zero_point: torch.Tensor | None, domain: str, dtype: torch.dtype) -> None:
    _choice("zero_point_domain", domain, ["none"] if dtype in _FLOAT8 else ["none", "int", "float"])
    if (zero_point is None) != (domain == "none"):
        raise InvalidOption(
            name="zero_point",
            value=zero_point if zero_point is None else "a tensor",
            expected=f"{'None' if domain == 'none' else 'a tensor'} in domain {domain!r}",
        )


def choose_qparams_affine(
    x: torch.Tensor,
    block_size: Sequence[int],
    dtype: torch.dtype,
    *,
    mapping: Mapping = "symmetric",
    zero_point_domain: ZeroPointDomain = "none",
    scale_dtype: torch.dtype | None = None,
    zero_point_dtype: torch.dtype | None = None,
    eps: float | None = None,
    quant_min: float | None = None,
    quant_max: float | None = None,
    preserve_zero: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale and zero point for each block of ``x``, from its smallest and largest value.

    mapping:
        ``symmetric``: ``scale = max|x| / ((quant_max - quant_min) / 2)``.
        ``symmetric_no_clipping_err``: the smallest scale at which neither end clips.
        ``asymmetric``: ``scale = (max - min) / (quant_max - quant_min)``.
    zero_point_domain:
        ``none``: codes stand for ``q * scale``; symmetric mappings only.
        ``int``: ``(q - zero_point) * scale``; the middle code where the mapping is symmetric.
        ``float`` (tinygemm): ``(q - middle) * scale + zero_point``; asymmetric only.
    scale_dtype: default ``x.dtype``. The scale is rounded to it before anything else uses it.
    zero_point_dtype: default int32 in the int domain, ``scale_dtype`` in the float domain.
    eps: smallest scale of a block that is not zero; never below the smallest normal number.
    preserve_zero: widen the range to hold 0, which then has a code (a float zero point is rounded).
        Otherwise an int zero point may lie outside the codes. Default: in the int domain alone.

    Returns (scale, zero_point or None), one entry per block, in the rank of ``x``.

    An all-zero block has scale 1; a constant one is exact, up to the rounding of its qparams, where the range
    is not widened. Scales are clamped to the normal numbers of ``scale_dtype``. One that holds NaN or an
    infinity has a NaN scale, so that all of it dequantizes to NaN.

    Raises InvalidBlockSize, InvalidOption, UnsupportedDtype (``x`` is not floating point).
    """
    qmin, qmax, middle = _range(dtype, quant_min, quant_max)
    center = int(middle)
    _check_mapping(mapping, zero_point_domain, dtype, qmin, qmax, center)
    if x.dtype not in _REAL:
        raise UnsupportedDtype(layer="x", dtype=x.dtype, choices=", ".join(map(str, _REAL)))
    scale_dtype = scale_dtype or x.dtype
    _choice("scale_dtype", scale_dtype, _REAL)
    limits = torch.finfo(scale_dtype)
    preserve_zero = zero_point_domain == "int" if preserve_zero is None else preserve_zero
    widen = mapping != "asymmetric" or (zero_point_domain != "none" and preserve_zero)

    compute, blocks = _compute_dtype(x), _Blocks(x.shape, block_size)
    if mapping == "symmetric":  # few ops: a compiler sees them at every linear
        radius = blocks.reduce(x.abs(), torch.amax).to(compute)
    else:
        low, high = (blocks.reduce(x, end).to(compute) for end in (torch.amin, torch.amax))
        low, high = (low.clamp(max=0), high.clamp(min=0)) if widen else (low, high)
        # Halving is exact: (max - min) / (qmax - qmin) bit for bit, without its overflow.
        radius = high / 2 - low / 2 if mapping == "asymmetric" else torch.maximum(-low, high)
    scale = radius / ((qmax - qmin) / 2)
    if mapping == "symmetric_no_clipping_err":
        scale = torch.maximum(low / (qmin - center), high / (qmax - center))
    if zero_point_domain == "int" and not widen:
        # A range far from 0 has a large zero point, which float32 must still hold exactly.
        radius = torch.maximum(-low, high)
        scale = torch.maximum(scale, radius * 2.0**-22)
    # Without extent any scale will do but 0, by which quantization could not divide.
    scale = torch.where(radius == 0, 1.0, scale).clamp(max(eps or 0.0, limits.tiny), limits.max)
    scale = torch.where(radius < math.inf, scale, math.nan).to(scale_dtype)
    if zero_point_domain == "none":
        return scale, None

    step = scale.to(compute)
    if zero_point_domain == "float":
        zero_point_dtype = zero_point_dtype or scale_dtype
        _choice("zero_point_dtype", zero_point_dtype, _REAL)
        limits = torch.finfo(zero_point_dtype)
        # Adding half of that scale to the value of a constant block would cost it digits.
        zero = low + step * (middle - qmin)
        if preserve_zero:
            zero = step * (middle - (qmin - torch.round(low / step)).clamp(qmin, qmax))
        zero = torch.where(radius == 0, low, zero)
        return scale, zero.clamp(limits.min, limits.max).to(zero_point_dtype)
    zero_point_dtype = zero_point_dtype or torch.int32
    if mapping == "asymmetric":
        first, last = (qmin, qmax) if preserve_zero else (-(1 << 23), 1 << 23)
        zero = (qmin - torch.round(low / step)).clamp(first, last)
        zero = torch.where(torch.isnan(zero), center, zero)
    else:
        first, last = center, center
        zero = torch.full_like(step, center)
    _check_holds(zero_point_dtype, first, last)
    return scale, zero.to(zero_point_dtype)


def _check_holds(dtype: torch.dtype, first: float, last: float) -> None:
    """An integer zero point of ``dtype`` can be anything from ``first`` to ``last``."""
    floating = dtype.is_floating_point or dtype.is_complex or dtype == torch.bool
    if floating or first < torch.iinfo(dtype).min or torch.iinfo(dtype).max < last:
        raise InvalidOption(
            name="zero_point_dtype", value=dtype, expected=f"integers from {first} to {last}"
        )


def _check_mapping(
    mapping: str, domain: str, dtype: torch.dtype, qmin: float, qmax: float, center: int
) -> None:
    _choice("mapping", mapping, ["symmetric", "symmetric_no_clipping_err", "asymmetric"])
    if dtype in _FLOAT8:
        _choice("mapping", mapping, ["symmetric", "symmetric_no_clipping_err"])
        domains = ["none"]
    elif mapping == "asymmetric":
        domains = ["int", "float"]
    else:
        # Without a zero point, codes that do not lie around 0 would lose one sign altogether.
        domains = ["int"] if center else ["none", "int"]
    _choice("zero_point_domain", domain, domains)
    if mapping == "symmetric_no_clipping_err" and not qmin < center < qmax:
        raise InvalidOption(
            name="mapping", value=mapping, expected="at least one code on either side of zero"
        )


def quantize_affine(
    x: torch.Tensor,
    block_size: Sequence[int],
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    dtype: torch.dtype,
    *,
    zero_point_domain: ZeroPointDomain = "none",
    quant_min: float | None = None,
    quant_max: float | None = None,
) -> torch.Tensor:
    """Codes of ``x``, in its shape and contiguous: int8, uint8 or float8, saturated at the ends.

    ``scale`` and ``zero_point``: those of ``choose_qparams_affine``. Integer codes multiply by ``1 / scale``
    rounded to float32 (a symmetric block's largest value lies on a half, where that decides); float8 and the
    float domain divide by it. NaN stays NaN in float8; as an integer it becomes the code of zero (or of a
    float zero point).

    Raises InvalidBlockSize, InvalidOption, ShapeMismatch.
    """
    qmin, qmax, middle = _range(dtype, quant_min, quant_max)
    _check_domain(zero_point, zero_point_domain, dtype)
    compute = _compute_dtype(x, scale)
    blocks = _Blocks(x.shape, block_size)
    values = blocks.split(x.to(compute))
    scale = blocks.spread(scale, compute, "scale")

    center: torch.Tensor | float = 0
    if dtype in _FLOAT8:
        codes = values / scale
    elif zero_point is None:
        codes = torch.round(values * scale.reciprocal())
    elif zero_point_domain == "int":
        center = blocks.spread(zero_point, compute, "zero_point")
        codes = torch.round(values * scale.reciprocal()) + center
    else:
        center = middle
        lowest = blocks.spread(zero_point, compute, "zero_point") - scale * (middle - qmin)
        codes = torch.round((values - lowest) / scale) + qmin
    if dtype not in _FLOAT8:
        # Casting NaN to an integer is undefined, and differs between devices.
        codes = torch.where(torch.isnan(codes), center, codes)
    # Clamped before the cast, which does not saturate everywhere.
    codes = blocks.join(codes.clamp(qmin, qmax), x.shape)
    return codes.to(storage_dtype(dtype), memory_format=torch.contiguous_format)


def dequantize_affine(
    codes: torch.Tensor,
    block_size: Sequence[int],
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    dtype: torch.dtype,
    *,
    zero_point_domain: ZeroPointDomain = "none",
    quant_min: float | None = None,
    quant_max: float | None = None,
    output_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The values that ``codes`` (unpacked) stand for, in their shape.

    Computed in float32, or float64 if ``output_dtype`` is, and rounded once to ``output_dtype``.

    Raises InvalidBlockSize, InvalidOption, ShapeMismatch.
    """
    _, _, middle = _range(dtype, quant_min, quant_max)
    _check_domain(zero_point, zero_point_domain, dtype)
    _choice("dtype of codes", codes.dtype, [storage_dtype(dtype)])
    compute = torch.float64 if output_dtype == torch.float64 else torch.float32
    blocks = _Blocks(codes.shape, block_size)
    values = blocks.split(codes.to(compute))
    scale = blocks.spread(scale, compute, "scale")
    if zero_point is None:
        values = values * scale
    else:
        offset = blocks.spread(zero_point, compute, "zero_point")
        if zero_point_domain == "int":
            values = (values - offset) * scale
        else:
            values = (values - middle) * scale + offset
    return blocks.join(values, codes.shape).to(output_dtype)


WHOLE_BYTES = {1: (8, 1), 2: (4, 1), 3: (8, 3), 4: (2, 1)}
"""By bits of a code: the fewest codes that fill whole bytes, and those bytes. Others are not packed."""


def pack_codes(codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Codes of 1 to 4 bits as uint8 ``[..., K * bits / 8]``; others are returned as they are.

    A stream of bits along the last dimension: consecutive codes, the first in the lowest bits of the
    first byte, as ``q - quant_min`` (offset binary), so signed and unsigned formats share one layout.
    Codes of 3 bits straddle bytes, eight of them in three.

    Raises ShapeMismatch if the last dimension does not fill whole bytes.
    """
    bits = bits_of(dtype)
    if bits not in WHOLE_BYTES:
        return codes
    _choice("dtype of codes", codes.dtype, [storage_dtype(dtype)])
    count, octets = WHOLE_BYTES[bits]
    *lead, last = codes.shape
    if isinstance(last, int) and last % count:
        raise ShapeMismatch(
            what=f"codes of {dtype}",
            found=tuple(codes.shape),
            expected=f"a last dimension that is a multiple of {count}",
        )
    offset = (codes - code_range(dtype)[0]).to(torch.uint8 if octets == 1 else torch.int32)
    places = offset.reshape([*lead, last // count, count]).unbind(-1)
    word = reduce(or_, [place << (bits * i) for i, place in enumerate(places)])
    if octets == 1:
        return word
    parts = [(word >> (8 * i)) & 255 for i in range(octets)]
    return torch.stack(parts, dim=-1).to(torch.uint8).flatten(-2)


def unpack_codes(packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The exact inverse of ``pack_codes``: int8 codes of a signed ``dtype``, uint8 otherwise."""
    bits = bits_of(dtype)
    if bits not in WHOLE_BYTES:
        return packed
    _choice("dtype of packed codes", packed.dtype, [torch.uint8])
    count, octets = WHOLE_BYTES[bits]
    word = packed
    if octets > 1:
        *lead, last = packed.shape
        parts = packed.to(torch.int32).reshape([*lead, last // octets, octets]).unbind(-1)
        word = reduce(or_, [part << (8 * i) for i, part in enumerate(parts)])
    mask = (1 << bits) - 1
    places = torch.stack([(word >> (bits * i)) & mask for i in range(count)], dim=-1)
    codes = places.to(storage_dtype(dtype)) + code_range(dtype)[0]
    return codes.flatten(-2)
