"""Statistics of the values that pass ``observe`` nodes: what ranges and smoothing are chosen from.

Every observer is updated batch by batch, keeps a bounded amount of memory whatever the number and the
shapes of batches, and merges with another of its kind (that of another process, say). ``OBSERVERS``
names the kinds. Where values go is the caller's choice: ``collecting``; without it a node is a copy.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, ClassVar, Self

import torch

from .affine import choose_qparams_affine, dequantize_affine, quantize_affine
from .errors import EmptyObserver, InvalidOption, NonFiniteStatistics


def _wide(x: torch.Tensor) -> torch.Tensor:
    """float64 stays, everything else becomes float32, which holds it exactly."""
    return x if x.dtype == torch.float64 else x.float()


@dataclass(eq=False)
class Observer(ABC):
    """The extremes that every kind knows. low, high: one value, or one for each channel."""

    low: torch.Tensor | None = None
    high: torch.Tensor | None = None
    batches: int = 0

    settings: ClassVar[tuple[str, ...]] = ()
    """Fields that say what is observed, not what was seen: merged observers agree in them."""

    @abstractmethod
    def update(self, x: torch.Tensor) -> None:
        """Add the values of ``x`` [..., channels]; an empty one changes nothing."""

    def merge(self, other: Self) -> None:
        """Add what ``other`` has seen. Raises InvalidOption where the two observe differently."""
        for name in self.settings:
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise InvalidOption(name=name, value=theirs, expected=f"{mine}, as in the other")
        if other.batches:
            self._add(other)

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
        low, high = _wide(low.detach()), _wide(high.detach())
        if self.low is not None and self.high is not None:  # NaN stays: minimum propagates it
            low = torch.minimum(self.low, low.to(self.low.device))
            high = torch.maximum(self.high, high.to(self.high.device))
        self.low, self.high = low, high


@dataclass(eq=False)
class MinMax(Observer):
    """Running extremes of all values, or of each channel (the last dimension)."""

    per_channel: bool = False

    settings: ClassVar = ("per_channel",)

    def update(self, x: torch.Tensor) -> None:
        if x.numel() == 0:
            return
        if self.per_channel:
            rows = x.reshape(-1, x.shape[-1])
            self._extend(rows.amin(0), rows.amax(0))
        else:
            self._extend(*torch.aminmax(x))
        self.batches += 1

    def _add(self, other: Self) -> None:
        self._extend(*other.range())
        self.batches += other.batches


@dataclass(eq=False)
class MovingAverage(Observer):
    """Exponential moving average of each batch's extremes: ``momentum`` of the old, the rest new
    (Jacob et al. 2018, section 3.1). Merged averages are weighted by their numbers of batches."""

    momentum: float = 0.99

    settings: ClassVar = ("momentum",)

    def update(self, x: torch.Tensor) -> None:
        if x.numel() == 0:
            return
        low, high = (_wide(t.detach()) for t in torch.aminmax(x))
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

    def update(self, x: torch.Tensor) -> None:
        if x.numel() == 0:
            return
        largest = _wide(x.detach()).reshape(-1, x.shape[-1]).abs().amax(1)
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


SLAB = 1 << 22
"""Values that a histogram bins at once: indices take eight bytes each."""


@dataclass(eq=False)
class Histogram(Observer):
    """Counts of values in ``bins`` bins whose width is a power of two and whose edges are multiples of it.

    The width is the smallest with which all values seen so far fit. Where it grows, bins are joined
    whole, so a merged histogram equals that of all values at once, count by count. ``width`` is the
    power's exponent, ``origin`` the first bin's lower edge in units of the width.
    """

    bins: int = 2048
    width: int = 0
    origin: int = 0
    counts: torch.Tensor | None = None

    settings: ClassVar = ("bins",)

    def update(self, x: torch.Tensor) -> None:
        """Raises NonFiniteStatistics: where a NaN belongs no histogram can say."""
        if x.numel() == 0:
            return
        low, high = torch.aminmax(x)
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            raise NonFiniteStatistics(name="a histogram", batch=self.batches + 1)
        self._extend(low, high)
        self._fit(x.device)
        assert self.counts is not None
        for part in x.detach().reshape(-1).split(SLAB):
            index = (part.double() * 2.0**-self.width).floor_().long()
            index = index.to(self.counts.device) - self.origin
            self.counts += torch.bincount(index, minlength=self.bins)
        self.batches += 1

    def _add(self, other: Self) -> None:
        self._extend(*other.range())
        assert other.counts is not None
        self._fit(other.counts.device)
        assert self.counts is not None
        self.counts += self._rebinned(other.counts.to(self.counts.device), other)
        self.batches += other.batches

    def _fit(self, device: torch.device) -> None:
        """Widen and shift the bins so that they hold ``low`` and ``high``."""
        low, high = (float(t) for t in self.range())
        before = Histogram(width=self.width, origin=self.origin)
        self.width = _width(low, high, self.bins)
        self.origin = math.floor(math.ldexp(low, -self.width))
        if self.counts is None:
            self.counts = torch.zeros(self.bins, dtype=torch.int64, device=device)
        else:
            self.counts = self._rebinned(self.counts, before)

    def _rebinned(self, counts: torch.Tensor, old: Histogram) -> torch.Tensor:
        """Counts in the bins of ``old``, which are no wider, in the present ones."""
        (used,) = counts.nonzero(as_tuple=True)
        index = ((used + old.origin) >> (self.width - old.width)) - self.origin
        return torch.zeros_like(counts).index_add_(0, index, counts[used])

    def centers(self) -> torch.Tensor:
        """The middle of every bin, float64 [bins]. Raises EmptyObserver."""
        if self.counts is None:
            raise EmptyObserver()
        places = torch.arange(self.bins, device=self.counts.device, dtype=torch.float64)
        return (places + self.origin + 0.5) * 2.0**self.width

    def percentile_range(self, percent: float = 99.99) -> tuple[torch.Tensor, torch.Tensor]:
        """Bounds that leave out at most ``100 - percent`` percent of the values at either end: outer
        edges of bins, never beyond the extremes. Raises EmptyObserver, InvalidOption."""
        if not 50.0 < percent <= 100.0:
            raise InvalidOption(name="percent", value=percent, expected="above 50 and up to 100")
        low, high = self.range()
        assert self.counts is not None
        below = self.counts.cumsum(0).double()
        cut = below[-1] * (1.0 - percent / 100.0)
        first = int((below <= cut).sum())
        last = int((below < below[-1] - cut).sum())
        edge = 2.0**self.width
        lower = torch.clamp(low, min=(first + self.origin) * edge)
        upper = torch.clamp(high, max=(last + 1 + self.origin) * edge)
        return lower, upper

    def mse_range(
        self, dtype: torch.dtype, mapping: str = "symmetric", steps: int = 100
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The extremes, shrunk towards zero to give codes of ``dtype`` the least squared error over the
        histogram: both by one factor of (0, 1], or for "asymmetric" each by its own, one after the
        other. Raises EmptyObserver."""
        low, high = self.range()
        x, count = self.centers(), self.counts
        assert count is not None
        x = torch.minimum(torch.maximum(x, low.double()), high.double())

        def error(f: tuple[float, float]) -> float:
            off = x - _rounded(x, low * f[0], high * f[1], dtype, mapping)
            return float((count * off**2).sum())

        grid = [1.0 - i / steps for i in range(steps)]
        if mapping != "asymmetric":
            best = min(((f, f) for f in grid), key=error)
        else:
            best = (1.0, 1.0)
            for _ in range(2):
                best = min(((best[0], f) for f in grid), key=error)
                best = min(((f, best[1]) for f in grid), key=error)
        return low * best[0], high * best[1]


def _rounded(
    x: torch.Tensor, low: torch.Tensor, high: torch.Tensor, dtype: torch.dtype, mapping: Any
) -> torch.Tensor:
    """``x`` [n] through codes of ``dtype`` that cover [low, high]."""
    domain: Any = "int" if mapping == "asymmetric" else "none"
    ends, block = torch.stack([low, high]).double(), [-1]
    scale, zero = choose_qparams_affine(
        ends, block, dtype, mapping=mapping, zero_point_domain=domain, scale_dtype=torch.float64
    )
    codes = quantize_affine(x, block, scale, zero, dtype, zero_point_domain=domain)
    return dequantize_affine(
        codes, block, scale, zero, dtype, zero_point_domain=domain, output_dtype=torch.float64
    )


def _width(low: float, high: float, bins: int) -> int:
    """The exponent of the smallest power of two with which [low, high] touches at most ``bins`` bins;
    no smaller than what tells neighbours of the largest magnitude apart in float32."""
    width = max(math.frexp(max(abs(low), abs(high)))[1], -125) - 24
    while math.floor(math.ldexp(high, -width)) - math.floor(math.ldexp(low, -width)) >= bins:
        width += 1
    return width


OBSERVERS: dict[str, Callable[[], Observer]] = {
    "minmax": MinMax,
    "channel": partial(MinMax, per_channel=True),
    "moving_average": MovingAverage,
    "token": TokenRange,
    "histogram": Histogram,
}
"""The kinds of observers by name."""


def state_of(observer: Observer) -> Iterator[tuple[str, torch.Tensor]]:
    """Its fields as tensors: what ``restored`` makes an equal observer of."""
    for field in fields(observer):
        value = getattr(observer, field.name)
        if isinstance(value, torch.Tensor):
            yield field.name, value
        elif value is not None:
            yield field.name, torch.tensor(value, dtype=_DTYPES[type(value)])


_DTYPES = {bool: torch.bool, int: torch.int64, float: torch.float64}


def restored(kind: str, state: dict[str, torch.Tensor]) -> Observer:
    """The observer that ``state_of`` was read from. Raises InvalidOption for an unknown kind."""
    if kind not in OBSERVERS:
        raise InvalidOption(name="kind", value=kind, expected=f"one of {', '.join(OBSERVERS)}")
    observer = OBSERVERS[kind]()
    for field in fields(observer):
        if field.name in state:
            plain = type(getattr(observer, field.name)) in _DTYPES
            value = state[field.name]
            setattr(observer, field.name, value.item() if plain else value)
    return observer


Sink = Callable[[str, torch.Tensor], None]
_SINK: ContextVar[Sink | None] = ContextVar("fxquant_sink", default=None)


@contextmanager
def collecting(sink: Sink) -> Iterator[None]:
    """Within, ``sink(name, value)`` gets what passes the ``observe`` nodes that this thread runs."""
    token = _SINK.set(sink)
    try:
        yield
    finally:
        _SINK.reset(token)


def send(name: str, x: torch.Tensor) -> None:
    """Give ``x`` to whoever collects."""
    sink = _SINK.get()
    if sink is not None:
        sink(name, x)
