"""Observers against NumPy on streams of batches; merged ones equal those of all batches at once."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import fxquant
from fxquant.observers import (
    OBSERVERS,
    Histogram,
    MinMax,
    MovingAverage,
    TokenRange,
    collecting,
    restored,
    send,
    state_of,
)


def batches(seed: int = 0) -> list[torch.Tensor]:
    """Ragged shapes, growing and shrinking ranges, an empty one."""
    random = torch.Generator().manual_seed(seed)
    shapes = [(3, 8), (1, 2, 8), (0, 8), (5, 8), (2, 3, 4, 8)]
    sizes = (0.1, 4.0, 1.0, 0.01, 30.0)
    return [torch.randn(s, generator=random) * z + 0.3 for s, z in zip(shapes, sizes, strict=True)]


def fed(kind: str, seen: list[torch.Tensor]):
    observer = OBSERVERS[kind]()
    for batch in seen:
        observer.update(batch)
    return observer


def rows(seen: list[torch.Tensor]) -> np.ndarray:
    return np.concatenate([b.reshape(-1, 8).numpy() for b in seen])


def test_extremes_of_all_values_and_of_channels():
    seen = batches()
    low, high = fed("minmax", seen).range()
    assert (low, high) == (rows(seen).min(), rows(seen).max())
    found = fed("channel", seen)
    assert np.array_equal(found.low.numpy(), rows(seen).min(0))
    assert np.array_equal(found.high.numpy(), rows(seen).max(0))
    assert np.array_equal(found.absmax.numpy(), np.abs(rows(seen)).max(0))
    assert found.batches == 4, "an empty batch does not count"


def test_moving_average():
    seen = batches()
    low = high = None
    for batch in (b.numpy() for b in seen if b.numel()):
        low = batch.min() if low is None else 0.99 * low + 0.01 * batch.min()
        high = batch.max() if high is None else 0.99 * high + 0.01 * batch.max()
    found = fed("moving_average", seen)
    np.testing.assert_allclose([found.low, found.high], [low, high], rtol=1e-6)


def test_tokens():
    seen = batches()
    found, largest = fed("token", seen), np.abs(rows(seen)).max(1)
    assert (found.low, found.high, found.tokens) == (largest.min(), largest.max(), len(largest))
    np.testing.assert_allclose(found.mean, largest.astype(np.float64).mean(), rtol=1e-12)


def assert_equal(a, b):
    for (name, one), (_, other) in zip(state_of(a), state_of(b), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("kind", ["minmax", "channel", "histogram"])
@pytest.mark.parametrize("cut", [0, 1, 3, 5])
def test_merged_equals_whole(kind, cut):
    seen = batches()
    whole, first, second = fed(kind, seen), fed(kind, seen[:cut]), fed(kind, seen[cut:])
    first.merge(second)
    assert_equal(first, whole)


def test_merged_tokens_and_averages():
    seen = batches()
    first = fed("token", seen[:2])
    first.merge(fed("token", seen[2:]))
    whole = fed("token", seen)
    assert (first.low, first.high, first.tokens) == (whole.low, whole.high, whole.tokens)
    torch.testing.assert_close(first.mean, whole.mean, rtol=1e-12, atol=0)
    a, b = MovingAverage(), MovingAverage()
    a.update(torch.tensor([[0.0, 1.0]]))
    for _ in range(3):
        b.update(torch.tensor([[-4.0, 5.0]]))
    a.merge(b)
    assert (float(a.low), float(a.high), a.batches) == (-3.0, 4.0, 4), "weighted 1 to 3"


def test_observers_that_look_for_different_things_do_not_merge():
    with pytest.raises(fxquant.FxQuantError, match="per_channel"):
        MinMax().merge(MinMax(per_channel=True))
    with pytest.raises(fxquant.FxQuantError, match="bins"):
        Histogram().merge(Histogram(bins=64))


@pytest.mark.parametrize("order", [1, -1])
def test_a_histogram_counts_what_numpy_counts(order):
    seen = batches()[::order]
    found, x = fed("histogram", seen), rows(seen).astype(np.float64).ravel()
    step = 2.0**found.width
    edges = (np.arange(found.bins + 1) + found.origin) * step
    expected = np.bincount(np.floor(x / step).astype(int) - found.origin, minlength=found.bins)
    assert np.array_equal(found.counts.numpy(), expected) and expected.sum() == x.size
    assert edges[0] <= x.min() and x.max() < edges[-1]
    used = math.floor(x.max() / (step / 2)) - math.floor(x.min() / (step / 2)) + 1
    assert used > found.bins, "no finer bins would do"


@pytest.mark.parametrize("x", [[0.0, 0.0], [3.5, 3.5], [-1e-30, 1e30], [-7.0], [1e-42, 2e-42]])
def test_constant_tiny_and_huge_values_have_a_histogram(x):
    found = Histogram()
    found.update(torch.tensor([x]))
    assert int(found.counts.sum()) == len(x)
    low, high = found.percentile_range(100.0)
    assert (low, high) == (torch.tensor(x).min(), torch.tensor(x).max())


def test_percentiles_keep_the_promised_share():
    x = torch.randn(20000, generator=torch.Generator().manual_seed(0))
    x[:3] = torch.tensor([100.0, -90.0, 80.0])
    found = fed("histogram", [x[:7000, None], x[7000:, None]])
    low, high = found.percentile_range(99.9)
    exact = np.quantile(x.numpy(), [0.001, 0.999])
    step = 2.0**found.width
    assert exact[0] - step <= low <= exact[0] + step / 4
    assert exact[1] - step / 4 <= high <= exact[1] + step
    assert ((x < low).sum() <= 20) and ((x > high).sum() <= 20)
    assert found.percentile_range(100.0) == (x.min(), x.max())
    with pytest.raises(fxquant.FxQuantError, match="percent"):
        found.percentile_range(40.0)


@pytest.mark.parametrize("mapping", ["symmetric", "asymmetric"])
def test_the_range_of_least_squared_error(mapping):
    """Against the same search on the values themselves."""
    x = torch.randn(4000, generator=torch.Generator().manual_seed(1)).double()
    x[0] = 12.0
    found = Histogram(bins=8192)
    found.update(x[:, None])

    def error(low, high):
        span = (high - low) / 15 if mapping == "asymmetric" else max(-low, high) / 7.5
        zero = round(-low / span) if mapping == "asymmetric" else 8
        codes = (torch.round(x / span) + zero).clamp(0, 15)
        return float((((codes - zero) * span - x) ** 2).sum())

    dtype = torch.uint4 if mapping == "asymmetric" else torch.int4
    low, high = found.mse_range(dtype, mapping)
    whole = error(float(x.min()), float(x.max()))
    grid = np.arange(0.01, 1.001, 0.01)
    one = [(f, f) for f in grid]
    pairs = [(a, b) for a in grid for b in grid] if mapping == "asymmetric" else one
    ends = float(x.min()), float(x.max())
    best = min(error(ends[0] * a, ends[1] * b) for a, b in pairs)
    assert best <= error(float(low), float(high)) * (1 + 1e-9) <= 1.05 * best < 0.4 * whole


def test_a_nan_is_found_and_an_empty_observer_says_so():
    bad = torch.tensor([[1.0, float("nan")]])
    with pytest.raises(fxquant.FxQuantError, match="NaN"):
        Histogram().update(bad)
    for kind in ("minmax", "channel", "token"):
        observer = fed(kind, [torch.ones(1, 2), bad, torch.ones(1, 2)])
        assert not observer.finite(), kind
        with pytest.raises(fxquant.FxQuantError, match="nothing was observed"):
            OBSERVERS[kind]().range()
    with pytest.raises(fxquant.FxQuantError, match="nothing was observed"):
        TokenRange().mean  # noqa: B018


@pytest.mark.parametrize("kind", OBSERVERS)
def test_state_makes_an_equal_observer(kind):
    observer = fed(kind, batches())
    again = restored(kind, dict(state_of(observer)))
    assert_equal(observer, again)
    observer.update(batches(1)[0])
    again.update(batches(1)[0])
    assert_equal(observer, again)


def test_memory_is_bounded():
    observer = Histogram()
    for i in range(50):
        observer.update(torch.randn(i + 1, 7) * 1.5**i)
    assert sum(t.numel() for _, t in state_of(observer)) < observer.bins + 16
    assert int(observer.counts.sum()) == 7 * 50 * 51 // 2


def test_values_go_to_who_collects_and_nowhere_else():
    outer, inner = [], []
    send("a", torch.ones(1))
    with collecting(lambda name, x: outer.append(name)):
        send("b", torch.ones(1))
        with collecting(lambda name, x: inner.append(name)):
            send("c", torch.ones(1))
        send("d", torch.ones(1))
    assert (outer, inner) == (["b", "d"], ["c"])
