"""What the solvers minimize and report: the error of a linear's output on the data it was given.

With weight W [n, k], its quantized values Q and H = sum x^T x over tokens, the squared error of
all outputs is ``tr((W - Q) H (W - Q)^T)`` (Frantar et al. 2022, arXiv 2210.17323, equation 1); of
a float linear's outputs it is compared with ``tr(W H W^T)``. Without data, H is the identity.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..scheme import SLAB, Quantized, QuantSpec


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a solver has done to one linear. Errors are sums over tokens and outputs.

    solver: its name. tokens: how many the errors are over; 0 means without data.
    error, baseline: that of the codes returned, and of round-to-nearest on min-max ranges.
    signal: the squared outputs themselves, ``tr(W H W^T)``.
    rows: how many output rows hold the codes of which solver, where more than one was tried.
    damping: the relative damping that the Cholesky factor took, where one was made.
    dead: input channels that were 0 in all tokens, where the solver looked.
    """

    solver: str
    tokens: int
    error: float
    baseline: float
    signal: float
    rows: Mapping[str, int]
    damping: float | None = None
    dead: int = 0

    @property
    def relative(self) -> float:
        """error / signal; 0 for a layer whose outputs are all 0."""
        return self.error / self.signal if self.signal else 0.0

    @property
    def gain(self) -> float:
        """The share of round-to-nearest's error that is gone: 0 for none, 1 for all of it."""
        return 1 - self.error / self.baseline if self.baseline else 0.0


class Solution(NamedTuple):
    """Codes and qparams just as ``QuantSpec.quantize`` holds them, and how they came about."""

    quantized: Quantized
    record: Record


def energy(rows: torch.Tensor, hessian: torch.Tensor | None) -> torch.Tensor:
    """``r H r^T`` of each row r of ``rows`` [n, k]: squares of its outputs, summed over tokens, [n].

    hessian: [k, k], or None for the identity. Computed in the dtype of ``rows``, in slabs; what
    rounding makes negative (H is not) is 0.
    """
    if hessian is None:
        return rows.square().sum(1)
    parts = rows.split(max(SLAB // max(rows.shape[1], 1), 1))
    hessian = hessian.to(rows.dtype)
    return torch.cat([((part @ hessian) * part).sum(1) for part in parts]).clamp_(min=0)


def output_error(
    weight: torch.Tensor, quantized: Quantized, spec: QuantSpec, hessian: torch.Tensor | None
) -> torch.Tensor:
    """The squared output error of each row of ``weight`` [n, k], summed over tokens, [n]."""
    return energy(weight - spec.dequantize(quantized, weight.dtype), hessian)


def best_rows(
    candidates: Mapping[str, Quantized], errors: Mapping[str, torch.Tensor]
) -> tuple[Quantized, torch.Tensor, dict[str, torch.Tensor]]:
    """Of each row the candidate with the least error; among equals (or with NaN) the earlier one.

    errors: [n] for each candidate. Returns the codes, their errors [n], and how many rows come from
    which candidate, as scalar tensors.
    """
    (first, best), *others = candidates.items()
    error = errors[first]
    winner = torch.zeros_like(error, dtype=torch.long)
    for index, (name, other) in enumerate(others, 1):
        better = errors[name] < error
        winner = torch.where(better, index, winner)
        error = torch.where(better, errors[name], error)
        best = Quantized(*(_where(better, new, old) for new, old in zip(other, best, strict=True)))
    return best, error, {name: (winner == index).sum() for index, name in enumerate(candidates)}


def _where(rows: torch.Tensor, new: torch.Tensor | None, old: torch.Tensor | None):
    if new is None or old is None:
        return None
    if new.dtype.itemsize == 1:  # float8 has no ``where`` everywhere
        mixed = torch.where(rows[:, None], new.view(torch.uint8), old.view(torch.uint8))
        return mixed.view(new.dtype)
    return torch.where(rows[:, None], new, old)


def solution(
    solver: str,
    weight: torch.Tensor,
    spec: QuantSpec,
    hessian: torch.Tensor | None,
    tokens: int,
    candidates: Mapping[str, Quantized],
    *,
    choose: bool,
    damping: float | None = None,
    dead: torch.Tensor | None = None,
) -> Solution:
    """The solution whose codes are the last candidate's, or with ``choose`` the best of each row.

    candidates: by name; ``rtn`` among them, or it is made for the record. The one place where a
    solver waits for its device.
    """
    errors = {name: output_error(weight, q, spec, hessian) for name, q in candidates.items()}
    baseline = errors.get("rtn")
    if baseline is None:
        baseline = output_error(weight, spec.quantize_weight(weight), spec, hessian)
    if choose:
        codes, error, rows = best_rows(candidates, errors)
    else:
        name = list(candidates)[-1]
        codes, error = candidates[name], errors[name]
        rows = {name: torch.tensor(len(weight), device=weight.device)}
    figures = [*(t.double().sum() for t in (error, baseline, energy(weight, hessian)))]
    figures += [*rows.values(), weight.new_zeros(()) if dead is None else dead.sum()]
    error_, baseline_, signal, *counts, dead_ = torch.stack([f.double() for f in figures]).tolist()
    record = Record(
        solver=solver,
        tokens=tokens,
        error=error_,
        baseline=baseline_,
        signal=signal,
        rows={name: int(count) for name, count in zip(rows, counts, strict=True) if count},
        damping=damping,
        dead=int(dead_),
    )
    return Solution(codes, record)
