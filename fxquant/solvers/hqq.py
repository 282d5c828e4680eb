"""Half-quadratic quantization: a zero point for few large errors rather than small ones everywhere.

Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models". Without data,
``sum |W - Q|^p`` with p < 1 is lowered over the zero points z, the scales staying as they are, by
splitting off a sparse error E: minimize ``|E|^p + beta/2 (E - (W - Q_z))^2`` over E, which is a
shrinkage, then over z, which is a mean, with beta growing.
"""

from __future__ import annotations

import torch

from ..errors import InvalidOption, UnsupportedSpec
from ..scheme import QuantSpec
from .gram import Gram, hessian_for
from .grid import Grid, check, group_size, qparams_of_range, quantized, row_slabs
from .objective import Solution, solution


@torch.no_grad()
def solve(
    weight: torch.Tensor,
    spec: QuantSpec,
    gram: Gram | None = None,
    *,
    p: float = 0.7,
    beta: float = 10.0,
    kappa: float = 1.01,
    iterations: int = 20,
    layer: str = "weight",
) -> Solution:
    """Codes of ``weight`` [n, k] on zero points of the least ``lp_error`` found, min-max scales.

    p, beta, kappa: the norm, the weight of the quadratic term, and its growth by iteration. Errors
        are counted in steps of the scale, so a weight in another unit gets the same codes.
    gram: only for the record, whose error may exceed round-to-nearest's: it is another objective.

    Each group keeps the best of its zero points, as rounded to what the spec stores; the min-max
    one is the first of them. Only zero points of the float domain: an integer one moves the codes
    by whole steps, which leaves every error as it was, and a symmetric spec has none.

    Raises UnsupportedSpec, UnsupportedDtype, InvalidBlockSize, NonFiniteWeight, InvalidOption,
    NoCalibrationData (a Gram without tokens), ShapeMismatch.
    """
    for name, value, low, high in (
        ("p", p, 0, 1),
        ("beta", beta, 0, None),
        ("kappa", kappa, 0, None),
    ):
        if not value > low or (high is not None and value > high):
            expected = f"above {low}" + ("" if high is None else f", at most {high}")
            raise InvalidOption(name=name, value=value, expected=expected)
    if spec.zero_point_domain != "float":
        reason = "it optimizes a zero point in the float domain, and this has none; use mse or gptq"
        raise UnsupportedSpec(layer=layer, solver="hqq", spec=spec, reason=reason)
    weight = check(weight, spec, solver="hqq", layer=layer)
    hessian = None if gram is None else hessian_for(gram, weight, solver="hqq", layer=layer)
    size = group_size(spec, weight.shape[1])
    parts = []
    for rows in row_slabs(weight):
        x = rows.reshape(len(rows), -1, size)
        scale, zero = qparams_of_range(x.amin(-1), x.amax(-1), spec)
        assert zero is not None
        parts.append((scale, _optimize(x, scale, zero, spec, p, beta, kappa, iterations)))
    scales, zeros = (torch.cat(part) for part in zip(*parts, strict=True))
    codes = {"hqq": quantized(weight, spec, scales, zeros)}
    tokens = 0 if gram is None else gram.tokens
    return solution("hqq", weight, spec, hessian, tokens, codes, choose=False)


def residual(x: torch.Tensor, grid: Grid) -> torch.Tensor:
    """What rounding to ``grid`` leaves of ``x``, in steps of the scale."""
    return (x - grid.values(grid.round(x))).div_(grid.scale)


def lp_error(x: torch.Tensor, grid: Grid, p: float = 0.7) -> torch.Tensor:
    """HQQ's objective, ``sum |x - q|^p`` over the last dimension, errors in steps of the scale."""
    return residual(x, grid).abs_().pow_(p).sum(-1)


def _optimize(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    spec: QuantSpec,
    p: float,
    beta: float,
    kappa: float,
    iterations: int,
) -> torch.Tensor:
    """Zero points [n, g] for the values x [n, g, size], of the dtype of ``zero``."""

    def grid(zero: torch.Tensor) -> Grid:
        return Grid(spec, scale[..., None], zero[..., None], x.dtype)

    best, least = zero, lp_error(x, grid(zero), p)
    free = zero.to(x.dtype)  # not rounded to what is stored: small moves would be lost
    for _ in range(iterations):
        steps = residual(x, grid(free))
        size = steps.abs()
        sparse = steps.sign() * (size - size.pow(p - 1) / beta).clamp_(min=0)
        free = free + (steps - sparse).mean(-1) * scale.to(x.dtype)
        stored = free.to(zero.dtype)
        error = lp_error(x, grid(stored), p)
        best = torch.where(error < least, stored, best)
        least = torch.minimum(error, least)
        beta *= kappa
    return best
