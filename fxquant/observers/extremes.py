"""Extremes: of all values, of channels, of tokens, and averaged over batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch

from ..errors import EmptyObserver
from .base import Observer, require, wide


@dataclass(eq=False)
class MinMax(Observer):
    """Running extremes of all values."""

    kind: ClassVar = "minmax"

    def update(self, x: torch.Tensor) -> None:
        if x.numel() == 0:
            return
        self._extend(*self._extremes(x))
        self.batches += 1

    @staticmethod
    def _extremes(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.aminmax(x)

    def _add(self, other: Self) -> None:
        self._extend(*other.range())
        self.batches += other.batches


@dataclass(eq=False)
class ChannelMinMax(MinMax):
    """Running extremes of each channel, the last dimension; ``absmax`` is what SmoothQuant divides by."""

    kind: ClassVar = "channel"

    @staticmethod
    def _extremes(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = x.reshape(-1, x.shape[-1])
        return rows.amin(0), rows.amax(0)


@dataclass(eq=False)
class MovingAverage(Observer):
    """Exponential moving average of each batch's extremes: ``momentum`` of the old, the rest new
    (Jacob et al. 2018, section 3.1). Merged averages are weighted by their numbers of batches."""

    momentum: float = 0.99

    kind: ClassVar = "moving_average"
    settings: ClassVar = ("momentum",)

    def __post_init__(self) -> None:
        require(0.0 <= self.momentum < 1.0, "momentum", self.momentum, "from 0 to below 1")

    def update(self, x: torch.Tensor) -> None:
        if x.numel() == 0:
            return
        low, high = (wide(t.detach()) for t in torch.aminmax(x))
        if self.batches:
            self._mix(low, high, 1.0 - self.momentum)
        else:
            self.low, self.high = low, high
        self.batches += 1

    def _add(self, other: Self) -> None:
        if self.batches:
            self._mix(*other.range(), other.batches / (self.batches + other.batches))
        else:
            self.low, self.high = other.low, other.high
        self.batches += other.batches

    def _mix(self, low: torch.Tensor, high: torch.Tensor, share: float) -> None:
        old_low, old_high = self.range()
        self.low = old_low + share * (low.to(old_low.device) - old_low)
        self.high = old_high + share * (high.to(old_high.device) - old_high)


@dataclass(eq=False)
class TokenRange(Observer):
    """How large single tokens (rows) are: what a per-token scale will meet.

    low and high: the smallest and the largest ``max |x|`` of a token; total: their sum.
    """

    total: torch.Tensor | None = None
    tokens: int = 0

    kind: ClassVar = "token"

    def update(self, x: torch.Tensor) -> None:
        if x.numel() == 0:
            return
        largest = wide(x.detach()).reshape(-1, x.shape[-1]).abs().amax(1)
        self._extend(largest.amin(), largest.amax())
        self._count(largest.double().sum(), largest.numel())
        self.batches += 1

    def _add(self, other: Self) -> None:
        self._extend(*other.range())
        self._count(other.total, other.tokens)
        self.batches += other.batches

    def _count(self, total: torch.Tensor | None, tokens: int) -> None:
        assert total is not None
        self.total = total if self.total is None else self.total + total.to(self.total.device)
        self.tokens += tokens

    @property
    def mean(self) -> torch.Tensor:
        """Mean of ``max |x|`` over tokens. Raises EmptyObserver."""
        if self.total is None:
            raise EmptyObserver()
        return self.total / self.tokens
