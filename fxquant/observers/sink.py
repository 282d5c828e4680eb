"""Where observed values go: to whoever collects in this thread; without one they go nowhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

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
