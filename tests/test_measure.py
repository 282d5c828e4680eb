"""Timing: what is put into one graph."""

from __future__ import annotations

import pytest

from fxquant.measure import repeated


@pytest.mark.parametrize(
    "count, seconds, span, times",
    [(3, 1e-5, 1e-3, 100), (3, 1e-3, 1e-3, 2), (1, 2e-3, 1e-3, 2), (64, 1e-6, 3e-3, 1024)],
)
def test_calls_are_repeated_until_they_last(count, seconds, span, times):
    calls = [lambda i=i: i for i in range(count)]
    found = [call() for call in repeated(calls, seconds, span)]
    assert found == [i % count for i in range(times)]
