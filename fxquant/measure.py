"""Timing: interleaved rounds on the wall clock, replays of CUDA graphs; medians."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle, islice

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


COLD_BYTES = 160e6
"""Weights in rotation hold at least this: well over any GPU's second-level cache."""


def copies(tensors: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
    """``tensors`` as often as it takes to overflow the cache."""
    size = sum(t.numel() * t.element_size() for t in tensors)
    count = min(max(2, math.ceil(COLD_BYTES / size)), 64)
    return [list(tensors)] + [[t.clone() for t in tensors] for _ in range(count - 1)]


def repeated(
    calls: Sequence[Callable[[], object]], seconds: float, span: float
) -> list[Callable[[], object]]:
    """``calls`` over and over, as many as take ``span`` at so many ``seconds`` each: so long that a graph's
    launch, some microseconds, does not count. Two at least, and at most 1024."""
    return list(islice(cycle(calls), max(2, min(int(span / seconds), 1024))))


def replayed(
    calls: Sequence[Callable[[], object]], *, span: float = 3e-3, rounds: int = 9
) -> float:
    """Median seconds of one of ``calls``, all captured in one CUDA graph of about ``span`` seconds."""
    return alternating([calls], span=span, rounds=rounds)[0]


def alternating(
    runs: Sequence[Sequence[Callable[[], object]]], *, span: float = 3e-3, rounds: int = 9
) -> list[float]:
    """``replayed`` of each of ``runs``, their graphs, of one memory pool, in turns: what heats the GPU until
    its clocks fall (large products do after 150 ms on an H200, from 1965 to 1545 MHz) slows all alike."""
    stream, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def timed(run: Callable[[], object]) -> float:
            begin.record()
            run()
            end.record()
            stream.synchronize()
            return begin.elapsed_time(end) * 1e-3

        def captured(calls: Sequence[Callable[[], object]]) -> Callable[[], float]:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool, stream):
                for call in calls:
                    call()
            timed(graph.replay)
            return lambda: timed(graph.replay) / len(calls)

        def lasting(calls: Sequence[Callable[[], object]]) -> Callable[[], float]:
            calls[0]()
            stream.synchronize()
            return captured(repeated(calls, captured(calls[:2])(), span))

        graphs = [lasting(calls) for calls in runs]
        readings = [[graph() for graph in graphs] for _ in range(rounds)]
    return [statistics.median(of_one) for of_one in zip(*readings, strict=True)]
