"""AWQ's search: which input channels to enlarge before rounding, so that the outputs err least.

Lin et al. 2023, arXiv 2306.00978. With scales s, ``W diag(s)`` is quantized and the inputs are
divided by s; s is ``mean|x|^alpha`` (equation 5), alpha searched over a grid from 0 to 1 (equation
4). Folding the division into what comes before is the caller's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..errors import InvalidOption
from ..scheme import QuantSpec
from .gram import Gram, hessian_for
from .grid import check, quantized
from .objective import energy
from .rtn import RANGES, Ranges, choose_ranges

WIDEST = 1e4
"""Scales lie between 1 / WIDEST and WIDEST."""


@dataclass(frozen=True, kw_only=True)
class ScaleSearch:
    """What the search found: multiply the weights' columns by ``scales``, divide the inputs by them.

    scales: [k] float32 on the weights' device, all 1 for alpha 0.
    error, baseline: squared output error of all linears with ``scales`` and with scales of 1,
        summed over tokens. signal: the squared outputs.
    """

    scales: torch.Tensor
    alpha: float
    tokens: int
    error: float
    baseline: float
    signal: float


@torch.no_grad()
def search_scales(
    weights: Sequence[torch.Tensor],
    gram: Gram | None,
    specs: Sequence[QuantSpec],
    *,
    steps: int = 20,
    ranges: Ranges = "minmax",
    layer: str = "weight",
) -> ScaleSearch:
    """The scales [k] of the inputs that linears share, of the least output error summed over them.

    weights: [n_i, k] each, of any floating dtype. gram: of the shared inputs, before any scaling.
    specs: the format of each weight. steps: alpha is 0, 1 / steps, ... 1.
    ranges: how the scaled weights are quantized, see ``rtn``.

    Alpha 0 is a scale of 1, so the result errs no more than that. Channels that were 0 in all
    tokens keep a scale of 1. The quantization of activations has no part in the error.

    Raises InvalidOption, NoCalibrationData, ShapeMismatch, and what ``rtn`` raises.
    """
    if steps < 1:
        raise InvalidOption(name="steps", value=steps, expected="1 or more")
    if ranges not in RANGES:
        raise InvalidOption(name="ranges", value=ranges, expected=f"one of {', '.join(RANGES)}")
    if not weights or len(weights) != len(specs):
        expected = f"a spec for each of the {len(weights)} weights, and at least one"
        raise InvalidOption(name="specs", value=len(specs), expected=expected)
    pairs = [
        (check(w, spec, solver="awq", layer=layer), spec)
        for w, spec in zip(weights, specs, strict=True)
    ]
    hessians = [hessian_for(gram, w, solver="awq", layer=layer).to(w.dtype) for w, _ in pairs]
    assert gram is not None
    alphas = [step / steps for step in range(steps + 1)]
    magnitude = gram.abs_mean.to(pairs[0][0].device, torch.float32)
    candidates = torch.stack([_scales(magnitude, alpha) for alpha in alphas])
    errors = torch.stack([_total(pairs, hessians, s, ranges) for s in candidates])
    errors = errors.nan_to_num(nan=torch.inf)
    best = errors.argmin()  # the first of equals: the smallest alpha
    energies = [energy(w, h).sum().double() for (w, _), h in zip(pairs, hessians, strict=True)]
    figures = [best.double(), errors[best], errors[0], torch.stack(energies).sum()]
    index, error, baseline, signal = torch.stack(figures).tolist()
    return ScaleSearch(
        scales=candidates[best],
        alpha=alphas[int(index)],
        tokens=gram.tokens,
        error=error,
        baseline=baseline,
        signal=signal,
    )


def _scales(magnitude: torch.Tensor, alpha: float) -> torch.Tensor:
    """``magnitude^alpha`` [k], around 1: the largest is the inverse of the smallest."""
    live = magnitude > 0
    logs = torch.where(live, magnitude, 1.0).log() * alpha
    largest = logs.masked_fill(~live, -torch.inf).amax()
    smallest = logs.masked_fill(~live, torch.inf).amin()
    scales = (logs - (largest + smallest) / 2).exp().clamp(1 / WIDEST, WIDEST)
    return torch.where(live, scales, 1.0)


def _total(
    pairs: Sequence[tuple[torch.Tensor, QuantSpec]],
    hessians: Sequence[torch.Tensor],
    scales: torch.Tensor,
    ranges: Ranges,
) -> torch.Tensor:
    """The squared output error of all linears with these scales [k], a float64 scalar."""
    errors = []
    for (weight, spec), hessian in zip(pairs, hessians, strict=True):
        s = scales.to(weight)
        scaled, importance = weight * s, hessian.diagonal() / s.square()
        codes = quantized(scaled, spec, *choose_ranges(scaled, spec, ranges, importance))
        change = weight - spec.dequantize(codes, weight.dtype) / s
        errors.append(energy(change, hessian).sum().double())
    return torch.stack(errors).sum()
