"""Statistics of the values that pass ``observe`` nodes: what ranges and smoothing are chosen from.

Every observer is updated batch by batch, keeps a bounded amount of memory whatever the number and the
shapes of batches, and merges with another of its kind (that of another process, say). ``OBSERVERS``
names the kinds. Where values go is the caller's choice: ``collecting``; without it a node is a copy.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import torch

from ..errors import InvalidOption
from .base import Observer
from .extremes import ChannelMinMax, MinMax, MovingAverage, TokenRange
from .gram import GramMatrix
from .histogram import Histogram
from .sample import Sample
from .sink import collecting, send

OBSERVERS: dict[str, type[Observer]] = {
    one.kind: one
    for one in (MinMax, ChannelMinMax, MovingAverage, TokenRange, Histogram, Sample, GramMatrix)
}
"""The kinds of observers by name."""


def observer_of(kind: str | Observer) -> Observer:
    """An empty observer of a kind's name, or with the settings of another, which has seen nothing.
    Raises InvalidOption for anything else."""
    if isinstance(kind, str) and kind in OBSERVERS:
        return OBSERVERS[kind]()
    if isinstance(kind, Observer) and type(kind) in OBSERVERS.values() and not kind.batches:
        return copy.copy(kind)
    expected = f"among {', '.join(OBSERVERS)}, or an observer that has seen nothing"
    raise InvalidOption(name="kinds", value=kind, expected=expected)


def state_of(observer: Observer) -> Iterator[tuple[str, torch.Tensor]]:
    """Its fields as tensors: what ``restored`` makes an equal observer of."""
    for field in fields(observer):
        value = getattr(observer, field.name)
        if isinstance(value, torch.Tensor):
            yield field.name, value
        elif value is not None:
            yield field.name, torch.tensor(value, dtype=_DTYPES[type(value)])


_DTYPES: dict[type, torch.dtype] = {int: torch.int64, float: torch.float64}


def restored(kind: str, state: dict[str, torch.Tensor]) -> Observer:
    """The observer that ``state_of`` was read from. Raises InvalidOption for an unknown kind."""
    observer = observer_of(kind)
    for field in fields(observer):
        if field.name in state:
            plain = type(getattr(observer, field.name)) in _DTYPES
            value: Any = state[field.name]
            setattr(observer, field.name, value.item() if plain else value)
    return observer


__all__ = [
    "OBSERVERS",
    "ChannelMinMax",
    "GramMatrix",
    "Histogram",
    "MinMax",
    "MovingAverage",
    "Observer",
    "Sample",
    "TokenRange",
    "collecting",
    "observer_of",
    "restored",
    "send",
    "state_of",
]
