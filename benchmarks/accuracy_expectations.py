"""What was expected of the numbers, as data, and the bootstrap that says how sure they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

RESAMPLES = 2000


class Missing(Exception):
    """A row that a figure needs was not run, or failed."""


class Losses:
    """Losses by row, each [seeds, items]: the same held-out items for every row and seed. A row may have been
    measured with the first seeds alone.

    Items are drawn with replacement RESAMPLES times, the same ones for every row: differences between
    rows are paired. A figure is a vector of its value and then its values on the resamples.
    """

    def __init__(self, values: Mapping[str, np.ndarray], base: str):
        self.values, self.base = values, base
        items = values[base].shape[1]
        self._drawn = np.random.default_rng(0).integers(items, size=(RESAMPLES, items))

    def of(self, name: str) -> np.ndarray:
        """The losses of a row. Raises Missing."""
        if name not in self.values:
            raise Missing(name)
        return self.values[name]

    def delta(self, name: str) -> np.ndarray:
        """The mean loss of a row less that of the base, over seeds and items [1 + RESAMPLES]."""
        return self.deltas(name)[0]

    def deltas(self, *names: str) -> list[np.ndarray]:
        """The same of several rows, over the seeds that all of them have."""
        rows = [self.of(name) for name in (self.base, *names)]
        seeds = min(map(len, rows))
        base, *changed = (row[:seeds].mean(0) for row in rows)
        return [
            np.concatenate([[c.mean()], c[self._drawn].mean(1)])
            for c in (r - base for r in changed)
        ]


def interval(figure: np.ndarray) -> tuple[float, float]:
    """Where 95 % of the resamples lie."""
    low, high = np.quantile(figure[1:] if len(figure) > 1 else figure, (0.025, 0.975))
    return float(low), float(high)


Figure = Callable[[Losses], np.ndarray]


def growth(name: str, tokens: int = 1) -> Figure:
    """By how many per cent the perplexity grows; of units of ``tokens`` bytes, if more than one."""
    return lambda losses: 100 * np.expm1(tokens * losses.delta(name))


def excess(name: str, over: str) -> Figure:
    """The loss of a row less another one's, in thousandths of a nat."""
    return lambda losses: 1e3 * np.subtract(*losses.deltas(name, over))


def recovered(name: str, of: str) -> Figure:
    """How many per cent of a row's added loss another one avoids."""
    return lambda losses: 100 * (1 - np.divide(*losses.deltas(name, of)))


def worst_cosine(name: str) -> Figure:
    """MiniLM's loss is 1 - cosine. A minimum has no bootstrap: the value alone."""
    return lambda losses: np.array([1 - losses.of(name).max()])


@dataclass(frozen=True)
class Expectation:
    """A figure of a subject and its bound: at most, or at least."""

    name: str
    subject: str
    figure: Figure
    unit: str
    at_most: float = float("inf")
    at_least: float = float("-inf")

    def check(self, subjects: Mapping[str, Losses]) -> dict[str, Any]:
        """The value, its interval, and whether it was met; "within noise" where the interval has both."""
        found: dict[str, Any] = {"name": self.name, "subject": self.subject, "unit": self.unit}
        found["bound"] = (
            f"<= {self.at_most:g}" if self.at_most < float("inf") else f">= {self.at_least:g}"
        )
        try:
            if self.subject not in subjects:
                raise Missing(self.subject)
            figure = self.figure(subjects[self.subject])
        except Missing as error:
            return found | {"verdict": "not measured", "missing": str(error)}
        low, high = interval(figure)
        met = self._holds(figure[0])
        unclear = self._holds(low) != self._holds(high)
        verdict = ("met" if met else "missed") + (", within noise" if unclear else "")
        return found | {"value": float(figure[0]), "interval": [low, high], "verdict": verdict}

    def _holds(self, value: float) -> bool:
        return bool(self.at_least <= value <= self.at_most)


WORST_COSINES = {
    "int8wo": 0.9993,
    "int8dq": 0.9972,
    "int8dq smooth 0.6": 0.9989,
    "int8dq smooth auto": 0.9990,
}
"""MiniLM's at least, of 16 texts."""


def _of_weights(subject: str) -> list[Expectation]:
    """What is expected of solvers and group sizes, of the loss or of the divergence."""
    found = []
    for bits in (4, 3):
        name, figure = f"int{bits}wo-128", recovered(f"int{bits}wo-128 gptq", f"int{bits}wo-128")
        about = f"{name}: GPTQ recovers of round-to-nearest's loss"
        found.append(Expectation(about, subject, figure, "%", at_least=40))
    gains = {"a larger part": (recovered, "points"), "more": (_gained, "mnat")}
    for what, (figure_of, unit) in gains.items():
        figure = _more_at_three_bits(figure_of)
        about = f"GPTQ recovers {what} at int3 than at int4"
        found.append(Expectation(about, subject, figure, unit, at_least=0))
    for solver in ("awq", "hqq"):
        for size in (128, 64, 32):
            better, worse = f"int4wo-{size} {solver}", f"int4wo-{size}"
            about = f"{better} less round-to-nearest"
            figure = excess(better, worse)
            found.append(Expectation(about, subject, figure, "mnat", at_most=0))
    for small, large in ((32, 64), (64, 128)):
        about, figure = (
            f"int4wo-{small} less int4wo-{large}",
            excess(f"int4wo-{small}", f"int4wo-{large}"),
        )
        found.append(Expectation(about, subject, figure, "mnat", at_most=0))
    return found


def _gained(name: str, over: str) -> Figure:
    return excess(over, name)


def _more_at_three_bits(figure: Callable[[str, str], Figure]) -> Figure:
    """What GPTQ gains over round-to-nearest at int3 less what it gains at int4."""

    def less(losses: Losses) -> np.ndarray:
        three, four = (figure(f"int{b}wo-128 gptq", f"int{b}wo-128")(losses) for b in (3, 4))
        return three - four

    return less


EXPECTATIONS = (
    Expectation("int8wo: perplexity", "plain", growth("int8wo"), "%", at_most=0.1),
    Expectation("int8dq: perplexity", "plain", growth("int8dq"), "%", at_most=0.5),
    Expectation("int8wo: perplexity of 4 bytes", "plain", growth("int8wo", 4), "%", at_most=0.1),
    Expectation("int8dq: perplexity of 4 bytes", "plain", growth("int8dq", 4), "%", at_most=0.5),
    Expectation("int8dq suffers from outliers", "outliers", growth("int8dq"), "%", at_least=0.5),
    *(
        Expectation(
            f"int8dq: smoothing, {how}, recovers",
            "outliers",
            recovered(f"int8dq smooth {how}", "int8dq"),
            "%",
            at_least=80,
        )
        for how in ("0.5", "auto", "0.5 compiled")
    ),
    Expectation(
        "int8dq smooth 0.5 less torchao's SmoothQuant",
        "outliers",
        excess("int8dq smooth 0.5", "torchao int8dq smoothquant"),
        "mnat",
        at_most=0.5,
    ),
    *_of_weights("plain"),
    *_of_weights("plain divergence"),
    *(
        Expectation(
            f"{scheme} compiled less the reference",
            "plain",
            lambda losses, s=scheme: np.abs(excess(f"{s} compiled", s)(losses)),
            "mnat, absolute",
            at_most=1,
        )
        for scheme in ("int8dq", "int4wo-128")
    ),
    *(
        Expectation(f"{name}: worst cosine", "minilm", worst_cosine(name), "", at_least=least)
        for name, least in WORST_COSINES.items()
    ),
)

PAIRS = {
    "int8wo": "torchao int8wo",
    "int8wo gptq": "torchao int8wo gptq",
    "int8dq": "torchao int8dq",
    "int8dq smooth 0.5": "torchao int8dq smoothquant",
    "int8dq smooth auto": "torchao int8dq smoothquant",
    "int8dq smooth 0.5 compiled": "torchao int8dq smoothquant",
    "int8dq smooth auto compiled": "torchao int8dq smoothquant",
    "fp8wo": "torchao fp8wo",
    "fp8dq": "torchao fp8dq",
    **{f"8da4w-{size}": f"torchao 8da4w-{size}" for size in (128, 64, 32)},
    **{f"int4wo-{size}": f"torchao int4-{size}" for size in (128, 64, 32)},
    **{
        f"int{bits}wo-{size}": f"torchao int{bits}-{size}"
        for bits in (4, 3, 2)
        for size in (128, 64, 32)
    },
    **{
        f"int4wo-{size} {how}": f"torchao int4wo-{size} {how}"
        for size in (128, 64, 32)
        for how in ("hqq", "awq")
    },
}
"""fxquant's row and torchao's that does the same."""


def side_by_side(losses: Losses) -> list[dict[str, Any]]:
    """fxquant's loss less torchao's, for the pairs that both ran, with the interval."""
    found = []
    for ours, theirs in PAIRS.items():
        if ours in losses.values and theirs in losses.values:
            figure = np.subtract(*losses.deltas(ours, theirs))
            found.append(
                {
                    "fxquant": ours,
                    "torchao": theirs,
                    "difference": float(figure[0]),
                    "interval": list(interval(figure)),
                }
            )
    return found
