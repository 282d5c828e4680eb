"""Wall-clock comparison of callables: interleaved rounds, medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def interleaved(
    runs: Mapping[str, Callable[[], object]], *, rounds: int = 15, repeat: int = 1, warmup: int = 2
) -> dict[str, float]:
    """Median seconds per call of each run, all taken in turn so that drift hits them alike."""
    for run in runs.values():
        for _ in range(warmup):
            run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            synchronize()
            started = time.perf_counter()
            for _ in range(repeat):
                run()
            synchronize()
            times[name].append((time.perf_counter() - started) / repeat)
    return {name: statistics.median(t) for name, t in times.items()}
