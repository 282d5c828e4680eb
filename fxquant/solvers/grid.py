"""The values that a spec's codes can stand for, and the codes next to given values."""

from __future__ import annotations

import torch

from ..affine import choose_qparams_affine, code_range, pack_codes, quantize_affine
from ..errors import (
    InvalidBlockSize,
    NonFiniteWeight,
    ShapeMismatch,
    UnsupportedDtype,
    UnsupportedSpec,
)
from ..scheme import SLAB, Quantized, QuantSpec

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

CACHED = 1 << 18
"""Three times as fast as SLAB in a search over ranges, which goes over its values again and again."""


class Grid:
    """``quantize_affine`` and ``dequantize_affine`` with the work on the qparams done beforehand.

    scale, zero: in any shape that broadcasts over the values; ``zero`` None as in the spec.
    dtype: that of the values, float32 or float64. Codes are values of ``dtype`` too.

    Bit for bit what fxquant.affine computes: a solver's codes dequantize to what it has seen.
    """

    def __init__(
        self,
        spec: QuantSpec,
        scale: torch.Tensor,
        zero: torch.Tensor | None,
        dtype: torch.dtype = torch.float32,
    ):
        low, high = code_range(spec.dtype)
        self.spec, self.low, self.high = spec, low, high
        self.middle = (low + high + 1) / 2
        self.scale = scale.to(dtype)
        self.zero = None if zero is None else zero.to(dtype)
        if spec.zero_point_domain == "float":
            assert self.zero is not None
            self.base = self.zero - self.scale * (self.middle - low)  # the value of the lowest code
        else:
            self.base = 1 / self.scale

    def __getitem__(self, index: torch.Tensor) -> Grid:
        """The grid of some entries along the first dimension of scale and zero."""
        zero = None if self.zero is None else self.zero[index]
        return self._with(self.scale[index], self.base[index], zero)

    def unbind(self) -> list[Grid]:
        """One grid for each entry along the first dimension of scale and zero."""
        zeros = [None] * len(self.scale) if self.zero is None else self.zero.unbind()
        parts = zip(self.scale.unbind(), self.base.unbind(), zeros, strict=True)
        return [self._with(*part) for part in parts]

    def _with(self, scale: torch.Tensor, base: torch.Tensor, zero: torch.Tensor | None) -> Grid:
        part = object.__new__(Grid)
        part.__dict__.update(self.__dict__)
        part.scale, part.base, part.zero = scale, base, zero
        return part

    def round(self, x: torch.Tensor) -> torch.Tensor:
        """The codes of ``x``, saturated at the ends."""
        if self.spec.dtype.is_floating_point:
            codes = (x / self.scale).clamp_(self.low, self.high)
            return codes.to(self.spec.dtype).to(x.dtype)
        if self.zero is None:
            codes = (x * self.base).round_()
        elif self.spec.zero_point_domain == "int":
            codes = (x * self.base).round_().add_(self.zero)
        else:
            codes = (x - self.base).div_(self.scale).round_()  # low is 0 in most formats
            codes = codes.add_(self.low) if self.low else codes
        return codes.clamp_(self.low, self.high)

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """What ``codes`` stand for."""
        if self.zero is None:
            return codes * self.scale
        if self.spec.zero_point_domain == "int":
            return (codes - self.zero).mul_(self.scale)
        return (codes - self.middle).mul_(self.scale).add_(self.zero)


def check(weight: torch.Tensor, spec: QuantSpec, *, solver: str, layer: str) -> torch.Tensor:
    """``weight`` [n, k] as a solver takes it: float64 as it is, other floats in float32.

    Raises UnsupportedDtype, InvalidBlockSize (rank, or k in no whole groups), ShapeMismatch (no
    values), UnsupportedSpec (one scale for all rows) and NonFiniteWeight.
    """
    if weight.dtype not in FLOATS:
        choices = ", ".join(map(str, FLOATS))
        raise UnsupportedDtype(layer=layer, dtype=weight.dtype, choices=choices)
    shape = tuple(weight.shape)
    if len(shape) != 2 or shape[1] % group_size(spec, shape[1]):
        raise InvalidBlockSize(block_size=tuple(spec.block_size(2)), shape=shape)
    if weight.numel() == 0:
        expected = "at least one row and one column"
        raise ShapeMismatch(what=f"{layer}: the weight", found=shape, expected=expected)
    if spec.granularity == "tensor":
        reason = "rows that share one scale cannot be solved one by one; quantize per channel"
        raise UnsupportedSpec(layer=layer, solver=solver, spec=spec, reason=reason)
    weight = weight.detach()
    if not bool(torch.isfinite(weight).all()):
        index = tuple(int(i) for i in (~torch.isfinite(weight)).nonzero()[0])
        raise NonFiniteWeight(layer=layer, value=float(weight[index]), index=index)
    return weight if weight.dtype == torch.float64 else weight.float()


def group_size(spec: QuantSpec, features: int) -> int:
    """How many consecutive values of a row of ``features`` share a scale; at least 1."""
    size = spec.block_size(2)[1]
    return max(features, 1) if size == -1 else size


def qparams_of_range(
    low: torch.Tensor, high: torch.Tensor, spec: QuantSpec
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The scale and zero point that ``spec`` gives blocks reaching from ``low`` to ``high``.

    low, high: of one shape, which the results have too.
    """
    ends = torch.stack([low, high], -1).flatten(-2)
    return choose_qparams_affine(
        ends,
        [1] * (ends.dim() - 1) + [2],
        spec.dtype,
        mapping=spec.mapping,
        zero_point_domain=spec.zero_point_domain,
        scale_dtype=spec.scale_dtype,
        preserve_zero=spec.preserve_zero,
    )


def room(x: torch.Tensor) -> int:
    """How many values to work on at once where ``x`` lies: on a CPU, what its cache holds."""
    return CACHED if x.device.type == "cpu" else SLAB


def row_slabs(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """``weight`` [n, k] in pieces of as many values as there is room for, whole rows each."""
    return weight.split(max(room(weight) // max(weight.shape[1], 1), 1))


def quantized(
    weight: torch.Tensor, spec: QuantSpec, scale: torch.Tensor, zero: torch.Tensor | None
) -> Quantized:
    """``weight`` [n, k] rounded to nearest on given qparams [n, k // group_size]."""
    rows = max(SLAB // max(weight.shape[1], 1), 1)
    zeros = scale.split(rows) if zero is None else zero.split(rows)
    codes = [
        quantize_affine(
            w,
            spec.block_size(2),
            s,
            None if zero is None else z,
            spec.dtype,
            zero_point_domain=spec.zero_point_domain,
        )
        for w, s, z in zip(weight.split(rows), scale.split(rows), zeros, strict=True)
    ]
    return Quantized(pack_codes(torch.cat(codes), spec.dtype), scale, zero)
