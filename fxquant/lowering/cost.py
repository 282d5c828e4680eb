"""The roofline of a kernel as an expression in the number of rows, and where two of them cross."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import sympy

from .kernel import M, Problem

LARGEST = 1 << 16
"""Rows beyond which the ranking no longer changes."""


def roofline(
    problem: Problem,
    *,
    weight_bytes: float,
    operations: str,
    efficiency: float = 1.0,
    launches: int = 1,
    extra_bytes: float | sympy.Expr = 0,
) -> sympy.Expr:
    """Seconds for M rows: the larger of moving the bytes and doing the operations, and launches.

    weight_bytes: bytes of the packed weight. operations: the operand type whose peak counts.
    efficiency: the part of that peak which the kernel reaches. extra_bytes: further traffic.
    """
    device = problem.device
    item = problem.dtype.itemsize
    moved = weight_bytes + extra_bytes + item * M * (problem.n + problem.k)
    work = 2 * M * problem.n * problem.k
    peak = device.peak.get(operations, device.peak["float32"]) * efficiency
    return launches * device.launch + sympy.Max(moved / device.bandwidth, work / peak)


def crossovers(costs: Sequence[sympy.Expr]) -> list[tuple[int, int]]:
    """The cheapest of ``costs`` for each stretch of M, as (index, first M); the first stretch is 0."""
    functions = [_compiled(cost) for cost in costs]

    def best(rows: int) -> int:
        return min(range(len(functions)), key=lambda i: functions[i](rows))

    found = [(best(1), 0)]
    low = 1
    while low < LARGEST:
        high = low * 2
        low_rows = low
        while best(high) != found[-1][0]:
            first = _bisect(best, low_rows, high, found[-1][0])
            found.append((best(first), first))
            low_rows = first
        low = high
    return found


def _bisect(best, low: int, high: int, current: int) -> int:
    """The first M in (low, high] at which ``current`` is no longer the cheapest."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if best(middle) == current else (low, middle)
    return high


@lru_cache(maxsize=4096)
def _compiled(cost: sympy.Expr):
    return sympy.lambdify(
        M, cost, modules=[{"Max": max, "ceiling": lambda v: -int(-v // 1)}, "math"]
    )
