"""Round to nearest, on min-max ranges or on those whose squared error is least."""

from __future__ import annotations

from typing import Literal

import torch

from ..errors import InvalidOption
from ..scheme import QuantSpec
from .gram import Gram, hessian_for
from .grid import Grid, check, group_size, qparams_of_range, quantized, room, row_slabs
from .objective import Solution, solution

Ranges = Literal["minmax", "mse", "mse-diag"]
RANGES = ("minmax", "mse", "mse-diag")

COARSE = tuple(1 - step / 20 for step in range(17))
"""What a range is shrunk to, the widest first: 1.00, 0.95, ... 0.20 (two bits take about 0.6)."""

FINE = (0.04, 0.03, 0.02, 0.01, -0.01, -0.02, -0.03, -0.04)
"""What is tried around the best of these."""


@torch.no_grad()
def solve(
    weight: torch.Tensor,
    spec: QuantSpec,
    gram: Gram | None = None,
    *,
    ranges: Ranges = "minmax",
    layer: str = "weight",
) -> Solution:
    """Each value of ``weight`` [n, k] becomes its nearest code, and no other value knows of it.

    ranges: ``minmax`` is ``spec.quantize_weight`` itself. ``mse`` shrinks each group's range by the
        one of COARSE and FINE with the least squared error; ``mse-diag`` weighs input channels in it by
        their mean square, the diagonal of the Hessian. Neither errs more, so weighed, than minmax.
    gram: the record's error is on its data; ``mse-diag`` cannot do without.

    Raises UnsupportedDtype, UnsupportedSpec, InvalidBlockSize, NonFiniteWeight, ShapeMismatch,
    InvalidOption (ranges), NoCalibrationData.
    """
    if ranges not in RANGES:
        raise InvalidOption(name="ranges", value=ranges, expected=f"one of {', '.join(RANGES)}")
    name = "rtn" if ranges == "minmax" else ranges
    weight = check(weight, spec, solver=name, layer=layer)
    hessian = None
    if gram is not None or ranges == "mse-diag":
        hessian = hessian_for(gram, weight, solver=name, layer=layer)
    codes = spec.quantize_weight(weight)
    if ranges != "minmax":
        importance = hessian.diagonal() if hessian is not None and ranges == "mse-diag" else None
        codes = quantized(weight, spec, *choose_ranges(weight, spec, ranges, importance))
    tokens = gram.tokens if gram is not None else 0
    return solution(name, weight, spec, hessian, tokens, {name: codes}, choose=False)


def choose_ranges(
    weight: torch.Tensor,
    spec: QuantSpec,
    ranges: Ranges = "minmax",
    importance: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale and zero point of each group of ``weight`` [n, k], both [n, k // group_size].

    weight: float32 or float64. importance: weights [k] of the squared errors in ``mse-diag``.
    """
    size = group_size(spec, weight.shape[1])
    parts = []
    if ranges == "mse-diag" and importance is not None:
        # Of any unit: the mean is 1, so that squares stay in range.
        importance = importance / importance.mean().clamp(min=torch.finfo(importance.dtype).tiny)
        importance = importance.to(weight.dtype).reshape(-1, size)
    else:
        importance = None
    for rows in row_slabs(weight):
        x = rows.reshape(len(rows), -1, size)
        low, high = x.amin(-1), x.amax(-1)
        if ranges == "minmax":
            parts.append(qparams_of_range(low, high, spec))
        else:
            parts.append(_least_squares(x, low, high, spec, importance))
    zeros = [zero for _, zero in parts if zero is not None]
    return torch.cat([scale for scale, _ in parts]), torch.cat(zeros) if zeros else None


def _least_squares(
    x: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    spec: QuantSpec,
    importance: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Qparams [n, g] of the ranges of x [n, g, size] with the least squared error."""
    # A range that must hold 0 shrinks towards it, a free one towards the mean of its values.
    free = spec.zero_point_domain == "float" and not spec.preserve_zero
    center = x.mean(-1) if free else torch.zeros_like(low)

    def shrunk(factor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        # Written so that a factor of 1 gives the range itself, bit for bit.
        ends = [end * factor + center * (1 - factor) for end in (low, high)]
        return qparams_of_range(ends[0], ends[1], spec)

    def search(factors: torch.Tensor, best: tuple[torch.Tensor, torch.Tensor]):
        for some in factors.split(max(room(x) // max(x.numel(), 1), 1)):
            scale, zero = (None if t is None else t[..., None] for t in shrunk(some))
            assert scale is not None
            grid = Grid(spec, scale, zero, x.dtype)
            error = (grid.values(grid.round(x)).sub_(x)).square_()
            error = (error if importance is None else error.mul_(importance)).sum(-1)
            first = error.argmin(0, keepdim=True)
            error = error.gather(0, first)[0]
            better = error < best[0]  # among equals the one before, so the widest, stays
            found = some.expand(len(some), *low.shape).gather(0, first)[0]
            best = torch.where(better, error, best[0]), torch.where(better, found, best[1])
        return best

    nothing = torch.full_like(low, torch.inf), torch.ones_like(low)
    best = search(x.new_tensor(COARSE)[:, None, None], nothing)
    fine = (best[1] + x.new_tensor(FINE)[:, None, None]).clamp(max=1)
    return shrunk(search(fine, best)[1])
