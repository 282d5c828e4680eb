"""Number formats: ``QuantSpec`` for one tensor, ``Scheme`` for a linear, ``SCHEMES`` holds them all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from .affine import (
    WHOLE_BYTES,
    bits_of,
    choose_qparams_affine,
    code_range,
    dequantize_affine,
    pack_codes,
    quantize_affine,
    storage_dtype,
    unpack_codes,
)
from .errors import UnknownScheme

Granularity = Literal["tensor", "channel", "token", "group"]
Mapping = Literal["symmetric", "symmetric_no_clipping_err", "asymmetric"]
ZeroPointDomain = Literal["none", "int", "float"]


class Quantized(NamedTuple):
    """Canonical codes and qparams of one tensor.

    codes: int8, uint8 (sub-byte codes packed along the last dimension) or a float8 dtype.
    scale: one entry per block. zero: like scale, ``None`` for symmetric formats.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None

    def to(self, device: torch.device) -> Quantized:
        return Quantized(*(None if t is None else t.to(device) for t in self))  # type: ignore[arg-type]


SLAB = 1 << 23
"""Weights that are quantized at once: the arithmetic takes some twenty bytes for each."""


@dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """How one tensor is quantized, ``q = clamp(round(x / scale) + zero_point)``.

    With ``zero_point_domain="float"`` (tinygemm's convention) the zero point is the real value
    that the middle code stands for: ``x = (q - 2**(bits-1)) * scale + zero_point``. preserve_zero: see
    ``choose_qparams_affine``.
    """

    dtype: torch.dtype
    granularity: Granularity
    group_size: int | None = None
    mapping: Mapping = "symmetric"
    zero_point_domain: ZeroPointDomain = "none"
    scale_dtype: torch.dtype = torch.float32
    preserve_zero: bool | None = None

    @property
    def bits(self) -> int:
        return bits_of(self.dtype)

    @property
    def codes_dtype(self) -> torch.dtype:
        """What the codes are stored in: several to a byte in uint8."""
        return torch.uint8 if self.bits in WHOLE_BYTES else storage_dtype(self.dtype)

    def stored_width(self, k: int) -> int:
        """What ``k`` codes along the last dimension take there: up to 4 bits are packed."""
        return k * self.bits // 8 if self.bits in WHOLE_BYTES else k

    def width(self, stored: int) -> int:
        """The inverse of ``stored_width``."""
        return stored * 8 // self.bits if self.bits in WHOLE_BYTES else stored

    def block_size(self, rank: int) -> list[int]:
        """Block of values that share a scale; -1 stands for the whole dimension."""
        last = {"tensor": -1, "channel": -1, "token": -1, "group": self.group_size}[
            self.granularity
        ]
        lead = -1 if self.granularity == "tensor" else 1
        return [lead] * (rank - 1) + [int(last or -1)]

    def quantize(self, x: torch.Tensor) -> Quantized:
        """Codes (sub-byte ones packed) and qparams of ``x``, the scale rounded to scale_dtype first."""
        scale, zero = self.qparams(x)
        return Quantized(self.encode(x, scale, zero), scale, zero)

    def qparams(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scale and zero point for the blocks of ``x``, in its rank."""
        return choose_qparams_affine(
            x,
            self.block_size(x.dim()),
            self.dtype,
            mapping=self.mapping,
            zero_point_domain=self.zero_point_domain,
            scale_dtype=self.scale_dtype,
            preserve_zero=self.preserve_zero,
        )

    def encode(
        self, x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None
    ) -> torch.Tensor:
        """Codes of ``x`` (sub-byte ones packed) for given qparams; those of a tensor in any rank."""
        codes = quantize_affine(
            x,
            self.block_size(x.dim()),
            self._in_rank(scale, x.dim()),
            None if zero is None else self._in_rank(zero, x.dim()),
            self.dtype,
            zero_point_domain=self.zero_point_domain,
        )
        return pack_codes(codes, self.dtype)

    def recoded(self, q: Quantized, spec: QuantSpec) -> Quantized:
        """``q`` of a weight [N, K] in the codes of ``spec``, which differs from this one in bits alone.

        Counted from the middle a code stays what it is, so that scale and zero point stay too; from
        more bits back to fewer it gives what it was given.
        """
        if spec.dtype == self.dtype:
            return q
        shift = (sum(code_range(spec.dtype)) - sum(code_range(self.dtype))) // 2
        parts = q.codes.split(max(SLAB // self.width(q.codes.shape[1]), 1))
        codes = (unpack_codes(part, self.dtype).short() + shift for part in parts)
        packed = [pack_codes(part.to(storage_dtype(spec.dtype)), spec.dtype) for part in codes]
        return q._replace(codes=torch.cat(packed))

    def _in_rank(self, qparam: torch.Tensor, rank: int) -> torch.Tensor:
        return qparam.reshape([1] * rank) if self.granularity == "tensor" else qparam

    def quantize_weight(self, weight: torch.Tensor) -> Quantized:
        """``quantize`` of a weight [N, K] with room for SLAB values at a time, if rows allow it."""
        if self.granularity == "tensor" or weight.numel() <= SLAB:
            return self.quantize(weight)
        parts = [self.quantize(rows) for rows in weight.split(max(SLAB // weight.shape[1], 1))]
        zeros = [p.zero for p in parts if p.zero is not None]
        return Quantized(
            torch.cat([p.codes for p in parts]),
            torch.cat([p.scale for p in parts]),
            torch.cat(zeros) if zeros else None,
        )

    def dequantize(self, q: Quantized, dtype: torch.dtype) -> torch.Tensor:
        """Inverse of ``quantize``, computed in float32 (float64 when ``dtype`` is), rounded once."""
        codes = unpack_codes(q.codes, self.dtype)
        return dequantize_affine(
            codes,
            self.block_size(codes.dim()),
            self._in_rank(q.scale, codes.dim()),
            None if q.zero is None else self._in_rank(q.zero, codes.dim()),
            self.dtype,
            zero_point_domain=self.zero_point_domain,
            output_dtype=dtype,
        )


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """What a linear becomes. ``sqnr`` is the floor in dB of the scheme's output against float's.

    The floor is the measured value less 0.5 dB, for Gaussian weights and activations at
    K = 1024 (tests/test_schemes.py).

    ``served_as`` names another scheme whose kernels, layouts and measured tables serve this one. A
    ``static`` scheme takes the scale of its input from calibration; once that is chosen its codes are
    those of a dynamic scheme. Weights of 3 bits are, once packed, weights of 4 bits.
    """

    name: str
    weight: QuantSpec
    input: QuantSpec | None = None
    served_as: str = ""
    sqnr: float
    summary: str

    def __hash__(self) -> int:  # of what a launch looks up several times
        return hash(self.name)

    @property
    def static(self) -> bool:
        """Whether one scale, known beforehand, serves the whole input."""
        return self.input is not None and self.input.granularity == "tensor"

    @property
    def product(self) -> Scheme:
        """The scheme whose kernels multiply the codes: this one, unless ``served_as`` names another."""
        return SCHEMES[self.served_as] if self.served_as else self

    @property
    def family(self) -> str:
        """What a kernel is written for: weight and activation format, e.g. ``w4a16`` or ``wf8af8``.
        No kernel is written for ``s``, static activations, nor for 3 bits: see ``product``."""
        kind = {True: "f8", False: str(self.weight.bits)}[self.weight.dtype.is_floating_point]
        if self.input is None:
            return f"w{kind}a16"
        input_kind = "f8" if self.input.dtype.is_floating_point else self.input.bits
        return f"w{kind}{'s' if self.static else 'a'}{input_kind}"


def _int(dtype: torch.dtype, granularity: Granularity, **kw) -> QuantSpec:
    return QuantSpec(dtype=dtype, granularity=granularity, **kw)


def _group(dtype: torch.dtype, size: int, *, asymmetric: bool = False) -> QuantSpec:
    """Grouped weights keep bfloat16 qparams: at 32 values a group, float32 ones would add 2 bits.

    0 keeps a code: the columns of channels that carry outliers are small, and an error of half a step
    in each of them would be multiplied by the outliers.
    """
    domain: ZeroPointDomain = "float" if asymmetric else "none"
    return QuantSpec(
        dtype=dtype,
        granularity="group",
        group_size=size,
        mapping="asymmetric" if asymmetric else "symmetric",
        zero_point_domain=domain,
        scale_dtype=torch.bfloat16,
        preserve_zero=True if asymmetric else None,
    )


_CHANNEL_INT8 = _int(torch.int8, "channel")
_CHANNEL_FP8 = _int(torch.float8_e4m3fn, "channel")
_TOKEN_INT8 = _int(torch.int8, "token")
_TOKEN_INT8_ASYM = _int(torch.int8, "token", mapping="asymmetric", zero_point_domain="int")
_TOKEN_FP8 = _int(torch.float8_e4m3fn, "token")
_TENSOR_INT8 = _int(torch.int8, "tensor")
_TENSOR_INT8_ASYM = _int(torch.int8, "tensor", mapping="asymmetric", zero_point_domain="int")
_TENSOR_FP8 = _int(torch.float8_e4m3fn, "tensor")

SCHEMES: dict[str, Scheme] = {}


def register(scheme: Scheme) -> Scheme:
    """Make ``scheme`` known under its name; a kernel serves it if it serves its family."""
    SCHEMES[scheme.name] = scheme
    return scheme


_INT4_FLOORS = {  # group_size: (asymmetric, symmetric and 8da4w) in dB
    32: (21.3, 20.0),
    64: (20.3, 19.3),
    128: (19.5, 18.6),
    256: (18.7, 18.0),
}

register(Scheme(name="int8wo", weight=_CHANNEL_INT8, sqnr=41.6, summary="int8 weights per channel"))
register(
    Scheme(
        name="int8dq",
        weight=_CHANNEL_INT8,
        input=_TOKEN_INT8,
        sqnr=38.6,
        summary="int8 weights per channel, int8 activations per token, integer product",
    )
)
for _size, (_asymmetric, _symmetric) in _INT4_FLOORS.items():
    register(
        Scheme(
            name=f"int4wo-{_size}",
            weight=_group(torch.uint4, _size, asymmetric=True),
            sqnr=_asymmetric,
            summary=f"uint4 weights, groups of {_size}, float zero point (tinygemm)",
        )
    )
    register(
        Scheme(
            name=f"int4wo-{_size}-sym",
            weight=_group(torch.int4, _size),
            sqnr=_symmetric,
            summary=f"int4 weights, groups of {_size}, symmetric",
        )
    )
    register(
        Scheme(
            name=f"8da4w-{_size}",
            weight=_group(torch.int4, _size),
            input=_TOKEN_INT8_ASYM,
            sqnr=_symmetric,
            summary=f"int4 weights, groups of {_size}, int8 activations per token, integer product",
        )
    )
for _size, _floor in ((32, 14.7), (64, 13.7), (128, 12.8)):
    register(
        Scheme(
            name=f"int3wo-{_size}",
            weight=_group(torch.uint3, _size, asymmetric=True),
            served_as=f"int4wo-{_size}",
            sqnr=_floor,
            summary=f"uint3 weights, groups of {_size}, float zero point; 4 bits each once compiled",
        )
    )
for _size, _floor in ((32, 7.3), (64, 6.3), (128, 5.5)):
    register(
        Scheme(
            name=f"int2wo-{_size}",
            weight=_group(torch.uint2, _size, asymmetric=True),
            sqnr=_floor,
            summary=f"uint2 weights, groups of {_size}, float zero point",
        )
    )
register(Scheme(name="fp8wo", weight=_CHANNEL_FP8, sqnr=31.1, summary="e4m3 weights per channel"))
register(
    Scheme(
        name="fp8dq",
        weight=_CHANNEL_FP8,
        input=_TOKEN_FP8,
        sqnr=28.1,
        summary="e4m3 weights per channel, e4m3 activations per token",
    )
)
register(
    Scheme(
        name="int8static",
        weight=_CHANNEL_INT8,
        input=_TENSOR_INT8_ASYM,
        served_as="int8dq",
        sqnr=37.3,
        summary="int8 weights per channel, int8 activations per tensor (calibrated, asymmetric)",
    )
)
register(
    Scheme(
        name="int8static-sym",
        weight=_CHANNEL_INT8,
        input=_TENSOR_INT8,
        served_as="int8dq",
        sqnr=37.3,
        summary="int8 weights per channel, int8 activations per tensor (calibrated, symmetric)",
    )
)
register(
    Scheme(
        name="fp8static",
        weight=_CHANNEL_FP8,
        input=_TENSOR_FP8,
        served_as="fp8dq",
        sqnr=28.0,
        summary="e4m3 weights per channel, e4m3 activations per tensor (calibrated)",
    )
)

ALIASES = {
    "W8A16": "int8wo",
    "W8A8": "int8dq",
    "W4A16": "int4wo-128-sym",
    "W4A16_ASYM": "int4wo-128",
    "W4A8": "8da4w-128",
    "FP8": "fp8wo",
    "FP8_DYNAMIC": "fp8dq",
    "FP8_STATIC": "fp8static",
    "W8A8_STATIC": "int8static",
    "int4wo": "int4wo-128",
    "8da4w": "8da4w-32",
    "int3wo": "int3wo-32",
    "int2wo": "int2wo-32",
}


def get_scheme(name: str) -> Scheme:
    """The scheme called ``name`` or its alias. Raises UnknownScheme, which lists what exists."""
    try:
        return SCHEMES[ALIASES.get(name, name)]
    except (KeyError, TypeError):
        raise UnknownScheme(name=name, known=", ".join([*SCHEMES, *ALIASES])) from None
