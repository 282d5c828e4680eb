"""A sample of tokens: what AWQ and error measurements run a layer on, long after the batches are gone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
import torch

from ..errors import EmptyObserver, ShapeMismatch
from .base import Observer, require


@dataclass(eq=False)
class Sample(Observer):
    """``size`` of the tokens (rows) seen, each with the same chance, whatever the batches they came in.

    A token's priority is a hash of the seed and of its number in the stream; the ``size`` smallest stay.
    So the same tokens in the same order give the same sample, and so do all layers that see the same
    tokens. Merged samples keep the smallest of both, a sample of all tokens where the seeds differ (give
    each process its own); with one seed, tokens of equal number are kept or dropped together, and at the
    very edge those of ``other`` go first.

    kept: [n <= size, channels] as observed, on the CPU, in the order of priorities: any first rows of it
    are a smaller sample. priorities: int64 [n]. Bytes: size * (channels * bytes of a value + 8), about
    4 MiB for 512 bfloat16 tokens of 4096 channels.
    """

    size: int = 512
    seed: int = 0
    tokens: int = 0
    kept: torch.Tensor | None = None
    priorities: torch.Tensor | None = None

    kind: ClassVar = "sample"
    settings: ClassVar = ("size",)

    def __post_init__(self) -> None:
        require(self.size > 0, "size", self.size, "at least one token")
        require(0 <= self.seed < 1 << 63, "seed", self.seed, "from 0 to below 2**63")

    @property
    def rows(self) -> torch.Tensor:
        """The tokens, [n <= size, channels] on the CPU. Raises EmptyObserver."""
        if self.kept is None:
            raise EmptyObserver()
        return self.kept

    def update(self, x: torch.Tensor) -> None:
        """Raises ShapeMismatch for tokens of another width."""
        if x.numel() == 0:
            return
        rows = x.detach().reshape(-1, x.shape[-1])
        self._keep(rows, priorities(self.seed, self.tokens, len(rows)))
        self._extend(*torch.aminmax(x))
        self.tokens += len(rows)
        self.batches += 1

    def _add(self, other: Self) -> None:
        assert other.priorities is not None
        self._keep(other.rows, other.priorities)
        self._extend(*other.range())
        self.tokens += other.tokens
        self.batches += other.batches

    def _keep(self, rows: torch.Tensor, order: torch.Tensor) -> None:
        """The ``size`` smallest of ``order`` and what is kept; no other row leaves its device."""
        if self.kept is None or self.priorities is None:
            self.kept = torch.empty(0, rows.shape[1], dtype=rows.dtype)
            self.priorities = torch.empty(0, dtype=torch.int64)
        if rows.shape[1] != self.kept.shape[1]:
            found, expected = rows.shape[1], self.kept.shape[1]
            raise ShapeMismatch(what="a sampled token", found=(found,), expected=(expected,))
        before = len(self.priorities)
        both = torch.cat([self.priorities, order])
        chosen = both.argsort(stable=True)[: self.size]
        new = chosen >= before
        if not new.any():
            return
        dtype = torch.promote_types(self.kept.dtype, rows.dtype)
        kept = torch.empty(len(chosen), rows.shape[1], dtype=dtype)
        kept[~new] = self.kept[chosen[~new]].to(dtype)
        kept[new] = rows[(chosen[new] - before).to(rows.device)].cpu().to(dtype)
        self.kept, self.priorities = kept, both[chosen]


def priorities(seed: int, first: int, count: int) -> torch.Tensor:
    """Of tokens ``first`` to ``first + count``: int64 [count], evenly spread over [0, 2**63).

    SplitMix64 (Steele, Lea and Flood 2014) from a state that is a hash of the seed itself, so that
    seeds next to each other do not walk the same path.
    """
    start = _mixed(np.array([seed], dtype=np.uint64) + GAMMA)
    number = np.arange(first + 1, first + count + 1, dtype=np.uint64)
    return torch.from_numpy((_mixed(start + number * GAMMA) >> np.uint64(1)).astype(np.int64))


GAMMA = np.uint64(0x9E3779B97F4A7C15)
MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))
"""Shifts and factors of SplitMix64's finalizer; sums and products wrap around at 2**64."""


def _mixed(z: np.ndarray) -> np.ndarray:
    for shift, factor in MIX:
        z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
    return z
