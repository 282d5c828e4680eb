"""Statistics of the values that pass an ``observe`` node, by observer name (``layer:port``)."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class MinMax:
    """Running extremes of every finite value seen, and how many batches they come from."""

    min: float = float("inf")
    max: float = float("-inf")
    batches: int = 0

    def update(self, x: torch.Tensor) -> None:
        if x.numel() == 0:
            return
        low, high = torch.aminmax(x.detach())
        self.min = min(self.min, float(low))
        self.max = max(self.max, float(high))
        self.batches += 1


_OBSERVERS: dict[str, MinMax] = {}


def update(name: str, x: torch.Tensor) -> None:
    """Add ``x`` to the observer called ``name``, made at its first value."""
    _OBSERVERS.setdefault(name, MinMax()).update(x)


def observed() -> dict[str, MinMax]:
    """Every observer by name."""
    return dict(_OBSERVERS)


def reset() -> None:
    """Forget everything observed."""
    _OBSERVERS.clear()
