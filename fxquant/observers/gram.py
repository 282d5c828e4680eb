"""The Gram matrix of a linear's inputs: what GPTQ needs where a model cannot be solved layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch

from ..errors import EmptyObserver, ShapeMismatch
from .base import Observer, wide


@dataclass(eq=False)
class GramMatrix(Observer):
    """Sums over all tokens x [channels] seen, in float32 (float64 for float64 values), where they are.

    hessian [channels, channels]: of ``x^T x``. abs_sum, abs_max [channels]: sum and largest of ``|x|``.
    Bytes: 4 * channels**2, 64 MiB for 4096 channels, kept for every layer at once.
    """

    hessian: torch.Tensor | None = None
    abs_sum: torch.Tensor | None = None
    abs_max: torch.Tensor | None = None
    tokens: int = 0

    kind: ClassVar = "gram"

    def update(self, x: torch.Tensor) -> None:
        """Raises ShapeMismatch for tokens of another width."""
        if x.numel() == 0:
            return
        rows = wide(x.detach().reshape(-1, x.shape[-1]))
        size = rows.abs()
        self._extend(*torch.aminmax(rows))
        self._count(rows.T @ rows, size.sum(0), size.amax(0), len(rows))
        self.batches += 1

    def _add(self, other: Self) -> None:
        self._extend(*other.range())
        self._count(*other.state(), other.tokens)
        self.batches += other.batches

    def state(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(hessian, abs_sum, abs_max). Raises EmptyObserver."""
        if self.hessian is None or self.abs_sum is None or self.abs_max is None:
            raise EmptyObserver()
        return self.hessian, self.abs_sum, self.abs_max

    def _count(
        self, hessian: torch.Tensor, total: torch.Tensor, largest: torch.Tensor, tokens: int
    ) -> None:
        if self.hessian is not None:
            mine = self.state()
            if hessian.shape != mine[0].shape:
                found, expected = tuple(hessian.shape), tuple(mine[0].shape)
                raise ShapeMismatch(what="a Gram matrix", found=found, expected=expected)
            hessian = mine[0] + hessian.to(mine[0])
            total = mine[1] + total.to(mine[1])
            largest = torch.maximum(mine[2], largest.to(mine[2]))
        self.hessian, self.abs_sum, self.abs_max = hessian, total, largest
        self.tokens += tokens
