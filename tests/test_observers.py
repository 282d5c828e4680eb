"""Observers against NumPy on streams of batches; merged ones equal those of all batches at once."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import fxquant
from fxquant.observers import (
    OBSERVERS,
    ChannelMinMax,
    Histogram,
    MinMax,
    MovingAverage,
    Sample,
    TokenRange,
    collecting,
    observer_of,
    restored,
    send,
    state_of,
)

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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
    return np.concatenate([b.double().reshape(-1, 8).numpy() for b in seen])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_extremes_of_all_values_and_of_channels(dtype):
    seen = [b.to(dtype) for b in batches()]
    low, high = fed("minmax", seen).range()
    assert (float(low), float(high)) == (rows(seen).min(), rows(seen).max())
    found = fed("channel", seen)
    assert np.array_equal(found.low.numpy(), rows(seen).min(0))
    assert np.array_equal(found.high.numpy(), rows(seen).max(0))
    assert np.array_equal(found.absmax.numpy(), np.abs(rows(seen)).max(0))
    assert found.batches == 4, "an empty batch does not count"


def test_a_stream_may_change_its_dtype():
    seen = [b.to(dtype) for b, dtype in zip(batches(), (*FLOATS, torch.float32), strict=True)]
    for kind in ("minmax", "histogram", "sample"):
        low, high = fed(kind, seen).range()
        assert (float(low), float(high)) == (rows(seen).min(), rows(seen).max()), kind
    assert np.array_equal(fed("channel", seen).low.numpy(), rows(seen).min(0))


@pytest.mark.parametrize("momentum", [0.99, 0.5, 0.0])
def test_moving_average(momentum):
    seen = batches()
    low = high = None
    for batch in (b.double().numpy() for b in seen if b.numel()):
        low = batch.min() if low is None else momentum * low + (1 - momentum) * batch.min()
        high = batch.max() if high is None else momentum * high + (1 - momentum) * batch.max()
    found = MovingAverage(momentum=momentum)
    for batch in seen:
        found.update(batch)
    np.testing.assert_allclose([found.low, found.high], [low, high], rtol=1e-5)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_tokens(dtype):
    seen = [b.to(dtype) for b in batches()]
    found, largest = fed("token", seen), np.abs(rows(seen)).max(1)
    assert (found.low, found.high, found.tokens) == (largest.min(), largest.max(), len(largest))
    np.testing.assert_allclose(found.mean, largest.mean(), rtol=1e-12)


def assert_equal(a, b):
    for (name, one), (_, other) in zip(state_of(a), state_of(b), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("kind", ["minmax", "channel", "histogram"])  # others: below
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
    with pytest.raises(fxquant.FxQuantError, match="'kind' is 'channel': expected minmax"):
        MinMax().merge(ChannelMinMax())
    with pytest.raises(fxquant.FxQuantError, match="bins"):
        Histogram().merge(Histogram(bins=64))
    with pytest.raises(fxquant.FxQuantError, match="momentum"):
        MovingAverage().merge(MovingAverage(momentum=0.5))
    with pytest.raises(fxquant.FxQuantError, match="size"):
        Sample().merge(Sample(size=3))


@pytest.mark.parametrize("kind", ["channel", "sample"])
def test_another_width_is_named_and_never_broadcast(kind):
    one, other = fed(kind, [torch.ones(2, 1)]), fed(kind, [torch.ones(2, 4)])
    with pytest.raises(fxquant.FxQuantError, match=r"has shape \(4,\), expected \(1,\)"):
        one.merge(other)
    with pytest.raises(fxquant.FxQuantError, match=r"has shape \(1,\), expected \(4,\)"):
        other.update(torch.ones(2, 1))


@pytest.mark.parametrize(
    ("kind", "setting", "value"),
    [
        (MovingAverage, "momentum", 1.0),
        (MovingAverage, "momentum", -0.1),
        (Histogram, "bins", 1),
        (Sample, "size", 0),
        (Sample, "seed", -1),
    ],
)
def test_settings_out_of_range_are_named(kind, setting, value):
    with pytest.raises(fxquant.FxQuantError, match=setting):
        kind(**{setting: value})


def test_an_observer_lends_its_settings_and_only_those():
    pattern = Histogram(bins=64)
    made = observer_of(pattern)
    made.update(torch.ones(1, 2))
    assert made.bins == 64 and pattern.batches == 0 and pattern.counts is None
    for wrong in (made, "nothing", Histogram, None):
        with pytest.raises(fxquant.FxQuantError, match="seen nothing"):
            observer_of(wrong)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("order", [1, -1])
def test_a_histogram_counts_what_numpy_counts(order, dtype):
    seen = [b.to(dtype) for b in batches()[::order]]
    found, x = fed("histogram", seen), rows(seen).ravel()
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


def test_a_histogram_of_tiny_values_may_grow_by_any_factor():
    """Bins 2**180 times as wide: the old ones end in the two about zero."""
    found = Histogram()
    for x in ([-1e-25, 1e-25, 3e-25], [1e30, -1e30]):
        found.update(torch.tensor([x]))
    edges = (torch.arange(found.bins) + found.origin) * 2.0**found.width
    zero = int((edges == 0).nonzero())
    assert (int(found.counts[zero - 1]), int(found.counts[zero])) == (1, 2)
    assert int(found.counts.sum()) == 5 and (found.counts.nonzero().numel(),) == (4,)


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
        codes = np.clip(np.round(values / span) + zero, 0, 15)
        return float((((codes - zero) * span - values) ** 2).sum())

    values = x.numpy()
    dtype = torch.uint4 if mapping == "asymmetric" else torch.int4
    low, high = found.mse_range(dtype, mapping)
    whole = error(float(x.min()), float(x.max()))
    grid = np.arange(0.01, 1.001, 0.01)
    one = [(f, f) for f in grid]
    pairs = [(a, b) for a in grid for b in grid] if mapping == "asymmetric" else one
    ends = float(x.min()), float(x.max())
    best = min(error(ends[0] * a, ends[1] * b) for a, b in pairs)
    assert best <= error(float(low), float(high)) * (1 + 1e-9) <= 1.05 * best < 0.4 * whole


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_nan_or_an_infinity_is_found_and_stays_found(bad):
    batch = torch.tensor([[1.0, bad]])
    with pytest.raises(fxquant.FxQuantError, match="NaN or an infinity, in batch 1"):
        Histogram().update(batch)
    for kind in OBSERVERS.keys() - {"histogram"}:
        observer = fed(kind, [torch.ones(1, 2), batch, torch.ones(1, 2)])
        assert not observer.finite(), kind


@pytest.mark.parametrize("kind", OBSERVERS)
def test_an_empty_observer_says_so_and_merges(kind):
    empty = fed(kind, [torch.ones(0, 8), torch.ones(2, 0, 8)])
    assert empty.batches == 0
    with pytest.raises(fxquant.FxQuantError, match="nothing was observed"):
        empty.range()
    whole = fed(kind, batches())
    expected = fed(kind, batches())
    whole.merge(empty)
    assert_equal(whole, expected)
    empty.merge(whole)
    assert_equal(empty, expected)


@pytest.mark.parametrize("read", [lambda: TokenRange().mean, lambda: Sample().rows])
def test_what_is_read_of_an_empty_observer(read):
    with pytest.raises(fxquant.FxQuantError, match="nothing was observed"):
        read()


@pytest.mark.parametrize("kind", OBSERVERS)
def test_one_token_a_constant_and_a_channel_of_zeros(kind):
    token = torch.full((8,), -2.5)
    token[3] = 0.0
    observer = fed(kind, [token])
    low, high = observer.range()
    assert observer.batches == 1 and observer.finite()
    expected = {"channel": (token, token), "token": (2.5, 2.5)}.get(kind, (-2.5, 0.0))
    assert all(
        torch.equal(a, torch.as_tensor(b)) for a, b in zip((low, high), expected, strict=True)
    )
    zeros = fed(kind, [torch.zeros(4, 8)])
    assert float(zeros.absmax.max()) == 0.0 and zeros.finite()


@pytest.mark.parametrize("value", [0.0, 3.5, -3.5])
def test_the_ranges_of_a_constant(value):
    found = fed("histogram", [torch.full((3, 8), value)])
    for low, high in (found.percentile_range(90.0), found.mse_range(torch.int8)):
        assert low <= high and float(low) == float(high)
    low, high = found.mse_range(torch.uint8, "asymmetric")
    assert torch.isfinite(low) and torch.isfinite(high) and abs(float(low)) <= abs(value)


@pytest.mark.parametrize("kind", OBSERVERS)
def test_state_makes_an_equal_observer(kind):
    observer = fed(kind, batches())
    again = restored(kind, dict(state_of(observer)))
    assert_equal(observer, again)
    observer.update(batches(1)[0])
    again.update(batches(1)[0])
    assert_equal(observer, again)


@pytest.mark.parametrize("kind", OBSERVERS)
def test_memory_is_bounded(kind):
    """As much as the settings say: 2048 bins, 512 rows of 7, whatever comes."""
    observer = OBSERVERS[kind]()
    for i in range(60):
        observer.update(torch.randn(i + 1, 7) * 1.5**i)
    held = {"histogram": 2048, "sample": 512 * 8, "channel": 14, "gram": 9 * 7}.get(kind, 0)
    assert sum(t.numel() for _, t in state_of(observer)) <= held + 8
    for _, tensor in state_of(observer):  # no view of something larger
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    if kind == "histogram":
        assert int(observer.counts.sum()) == 7 * 60 * 61 // 2


def test_batches_of_inference_mode_and_others_may_mix():
    for kind in OBSERVERS:
        observer = OBSERVERS[kind]()
        with torch.inference_mode():
            observer.update(torch.ones(2, 8))
        observer.update(torch.full((2, 8), 3.0))
        assert float(observer.high.max()) >= 1.0 and observer.batches == 2


def test_values_go_to_who_collects_and_nowhere_else():
    outer, inner = [], []
    send("a", torch.ones(1))
    with collecting(lambda name, x: outer.append(name)):
        send("b", torch.ones(1))
        with collecting(lambda name, x: inner.append(name)):
            send("c", torch.ones(1))
        send("d", torch.ones(1))
    assert (outer, inner) == (["b", "d"], ["c"])
