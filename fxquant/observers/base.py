"""What every observer does: it is updated batch by batch, merges, and knows the extremes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Self

import torch

from ..errors import EmptyObserver, InvalidOption, ShapeMismatch


def wide(x: torch.Tensor) -> torch.Tensor:
    """float64 stays, everything else becomes float32, which holds it exactly."""
    return x if x.dtype == torch.float64 else x.float()


def require(holds: bool, name: str, value: object, expected: str) -> None:
    """Raises InvalidOption where a setting does not hold."""
    if not holds:
        raise InvalidOption(name=name, value=value, expected=expected)


@dataclass(eq=False)
class Observer(ABC):
    """The extremes that every kind knows. low, high: one value, or one for each channel."""

    low: torch.Tensor | None = None
    high: torch.Tensor | None = None
    batches: int = 0

    kind: ClassVar[str]
    """The name that ``kinds`` and files know it by."""
    settings: ClassVar[tuple[str, ...]] = ()
    """Fields that say what is observed, not what was seen: merged observers agree in them."""

    @abstractmethod
    def update(self, x: torch.Tensor) -> None:
        """Add the values of ``x`` [..., channels]; an empty one changes nothing."""

    def merge(self, other: Self) -> None:
        """Add what ``other`` has seen. Raises InvalidOption where the two observe differently, and
        ShapeMismatch where what they saw differs in width."""
        self.check_alike(other)
        if other.batches:
            self._add(other)

    def check_alike(self, other: Observer) -> None:
        """Raises InvalidOption where ``other`` is of another kind or another setting."""
        for name in ("kind", *self.settings):
            mine, theirs = getattr(self, name), getattr(other, name)
            require(mine == theirs, name, theirs, f"{mine}, as in the other")

    @abstractmethod
    def _add(self, other: Self) -> None:
        """``merge``, where ``other`` has seen something."""

    def range(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The smallest and largest value. Raises EmptyObserver."""
        if self.low is None or self.high is None:
            raise EmptyObserver()
        return self.low, self.high

    @property
    def absmax(self) -> torch.Tensor:
        """The largest magnitude. Raises EmptyObserver."""
        low, high = self.range()
        return torch.maximum(low.abs(), high.abs())

    def finite(self) -> bool:
        """Whether NaN and infinities have been absent; looks at the device."""
        low, high = self.range()
        return bool(torch.isfinite(low).all() and torch.isfinite(high).all())

    def _extend(self, low: torch.Tensor, high: torch.Tensor) -> None:
        low, high = wide(low.detach()), wide(high.detach())
        if self.low is not None and self.high is not None:  # NaN stays: minimum propagates it
            if low.shape != self.low.shape:  # or a single channel would be broadcast to all
                found, expected = tuple(low.shape), tuple(self.low.shape)
                raise ShapeMismatch(what=f"{self.kind} statistics", found=found, expected=expected)
            low = torch.minimum(self.low, low.to(self.low.device))
            high = torch.maximum(self.high, high.to(self.high.device))
        self.low, self.high = low, high
