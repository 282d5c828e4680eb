"""Counts of values in bins: what percentiles and ranges of least squared error are read from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch

from ..affine import choose_qparams_affine, dequantize_affine, quantize_affine
from ..errors import EmptyObserver, InvalidOption, NonFiniteStatistics
from .base import Observer, require

SLAB = 1 << 22
"""Values that a histogram bins at once: indices take eight bytes each."""


@dataclass(eq=False)
class Histogram(Observer):
    """Counts of values in ``bins`` bins whose width is a power of two and whose edges are multiples of it.

    The width is the smallest with which all values seen so far fit. Where it grows, bins are joined
    whole, so a merged histogram equals that of all values at once, count by count. ``width`` is the
    power's exponent, ``origin`` the first bin's lower edge in units of the width.
    """

    bins: int = 2048
    width: int = 0
    origin: int = 0
    counts: torch.Tensor | None = None

    kind: ClassVar = "histogram"
    settings: ClassVar = ("bins",)

    def __post_init__(self) -> None:
        require(self.bins > 1, "bins", self.bins, "at least two")

    def update(self, x: torch.Tensor) -> None:
        """Raises NonFiniteStatistics: where a NaN belongs no histogram can say."""
        if x.numel() == 0:
            return
        low, high = torch.aminmax(x)
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            raise NonFiniteStatistics(name="a histogram", batch=self.batches + 1)
        self._extend(low, high)
        self._fit(x.device)
        assert self.counts is not None
        for part in x.detach().reshape(-1).split(SLAB):
            index = (part.double() * 2.0**-self.width).floor_().long()
            index = index.to(self.counts.device) - self.origin
            self.counts += torch.bincount(index, minlength=self.bins)
        self.batches += 1

    def _add(self, other: Self) -> None:
        self._extend(*other.range())
        assert other.counts is not None
        self._fit(other.counts.device)
        assert self.counts is not None
        self.counts += self._rebinned(other.counts.to(self.counts.device), other)
        self.batches += other.batches

    def _fit(self, device: torch.device) -> None:
        """Widen and shift the bins so that they hold ``low`` and ``high``."""
        low, high = (float(t) for t in self.range())
        before = Histogram(width=self.width, origin=self.origin)
        self.width = _width(low, high, self.bins)
        self.origin = math.floor(math.ldexp(low, -self.width))
        if self.counts is None:
            self.counts = torch.zeros(self.bins, dtype=torch.int64, device=device)
        else:
            self.counts = self._rebinned(self.counts, before)

    def _rebinned(self, counts: torch.Tensor, old: Histogram) -> torch.Tensor:
        """Counts in the bins of ``old``, which are no wider, in the present ones."""
        (used,) = counts.nonzero(as_tuple=True)
        index = ((used + old.origin) >> (self.width - old.width)) - self.origin
        return torch.zeros_like(counts).index_add_(0, index, counts[used])

    def centers(self) -> torch.Tensor:
        """The middle of every bin, float64 [bins]. Raises EmptyObserver."""
        if self.counts is None:
            raise EmptyObserver()
        places = torch.arange(self.bins, device=self.counts.device, dtype=torch.float64)
        return (places + self.origin + 0.5) * 2.0**self.width

    def percentile_range(self, percent: float = 99.99) -> tuple[torch.Tensor, torch.Tensor]:
        """Bounds that leave out at most ``100 - percent`` percent of the values at either end: outer
        edges of bins, never beyond the extremes. Raises EmptyObserver, InvalidOption."""
        if not 50.0 < percent <= 100.0:
            raise InvalidOption(name="percent", value=percent, expected="above 50 and up to 100")
        low, high = self.range()
        assert self.counts is not None
        below = self.counts.cumsum(0).double()
        cut = below[-1] * (1.0 - percent / 100.0)
        first = int((below <= cut).sum())
        last = int((below < below[-1] - cut).sum())
        edge = 2.0**self.width
        lower = torch.clamp(low, min=(first + self.origin) * edge)
        upper = torch.clamp(high, max=(last + 1 + self.origin) * edge)
        return lower, upper

    def mse_range(
        self, dtype: torch.dtype, mapping: str = "symmetric", steps: int = 100
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The extremes, shrunk towards zero to give codes of ``dtype`` the least squared error over the
        histogram: both by one factor of (0, 1], or for "asymmetric" each by its own, one after the
        other. Raises EmptyObserver."""
        low, high = self.range()
        x, count = self.centers(), self.counts
        assert count is not None
        x = torch.minimum(torch.maximum(x, low.double()), high.double())

        def error(f: tuple[float, float]) -> float:
            off = x - _rounded(x, low * f[0], high * f[1], dtype, mapping)
            return float((count * off**2).sum())

        grid = [1.0 - i / steps for i in range(steps)]
        if mapping != "asymmetric":
            best = min(((f, f) for f in grid), key=error)
        else:
            best = (1.0, 1.0)
            for _ in range(2):
                best = min(((best[0], f) for f in grid), key=error)
                best = min(((f, best[1]) for f in grid), key=error)
        return low * best[0], high * best[1]


def _rounded(
    x: torch.Tensor, low: torch.Tensor, high: torch.Tensor, dtype: torch.dtype, mapping: Any
) -> torch.Tensor:
    """``x`` [n] through codes of ``dtype`` that cover [low, high]."""
    domain: Any = "int" if mapping == "asymmetric" else "none"
    ends, block = torch.stack([low, high]).double(), [-1]
    scale, zero = choose_qparams_affine(
        ends, block, dtype, mapping=mapping, zero_point_domain=domain, scale_dtype=torch.float64
    )
    codes = quantize_affine(x, block, scale, zero, dtype, zero_point_domain=domain)
    return dequantize_affine(
        codes, block, scale, zero, dtype, zero_point_domain=domain, output_dtype=torch.float64
    )


def _width(low: float, high: float, bins: int) -> int:
    """The exponent of the smallest power of two with which [low, high] touches at most ``bins`` bins;
    no smaller than what tells neighbours of the largest magnitude apart in float32."""
    width = max(math.frexp(max(abs(low), abs(high)))[1], -125) - 24
    while math.floor(math.ldexp(high, -width)) - math.floor(math.ldexp(low, -width)) >= bins:
        width += 1
    return width
