"""Stats: kinds with settings, ranges, merged and saved; without a model."""

from __future__ import annotations

import pytest
import torch

import fxquant
from fxquant import Stats
from fxquant.observers import OBSERVERS, Histogram, MovingAverage, Sample, state_of

ALL = {port: tuple(OBSERVERS) for port in ("input", "output", "weight")}


def filled(kinds=ALL, scale: float = 1.0) -> Stats:
    stats = Stats(kinds)
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    for batch in range(3):
        random = torch.Generator().manual_seed(batch + 1)
        for layer in ("up", "blocks.0.down|odd"):
            x = torch.randn(2 + batch, 4, generator=random) * scale
            stats.add(f"{layer}:input", x)
            stats.add(f"{layer}:weight", weight)
            stats.add(f"{layer}:output", x @ weight.t())
    return stats


def assert_equal(a: Stats, b: Stats):
    assert list(a) == list(b)
    for name in a:
        assert list(a[name]) == list(b[name])
        for kind in a[name]:
            states = (dict(state_of(s[name][kind])) for s in (a, b))
            one, other = states
            assert one.keys() == other.keys()
            assert all(torch.equal(one[k], other[k]) for k in one), (name, kind)


def test_a_file_holds_every_kind_at_every_port(tmp_path):
    stats = filled()
    stats.missed = ["never"]
    stats.save(tmp_path / "all.safetensors")
    again = Stats.load(tmp_path / "all.safetensors")
    assert_equal(again, stats)
    assert again.missed == ["never"] and str(again) == str(stats)
    assert again.reached == {"up", "blocks.0.down|odd"}
    for one in (stats, again):
        one.add("up:input", torch.full((1, 4), 9.0))
    assert_equal(again, stats)


def test_settings_are_taken_kept_in_the_file_and_hold_for_layers_yet_to_come(tmp_path):
    kinds = {"input": (MovingAverage(momentum=0.5), Histogram(bins=64), Sample(size=3, seed=7))}
    stats = filled(kinds)
    stats.save(tmp_path / "some.safetensors")
    again = Stats.load(tmp_path / "some.safetensors")
    for one in (stats, again):
        one.add("late:input", torch.ones(5, 4))
        one.add("late:input", torch.full((5, 4), 2.0))
        found = one["late:input"]
        assert float(found["moving_average"].high) == 1.5
        assert found["histogram"].bins == 64 and len(found["sample"].rows) == 3
    assert_equal(again, stats)
    assert stats["late:input"]["sample"].seed == 7
    assert stats["late:input"]["sample"] is not stats["up:input"]["sample"]
    assert kinds["input"][0].batches == 0, "the caller's own observer is a pattern"


def test_a_weight_is_counted_once_by_output_channel():
    stats, again = filled(), filled()
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    stats.merge(again)
    found = stats["up:weight"]
    assert int(found["histogram"].counts.sum()) == weight.numel()
    assert {observer.batches for observer in found.values()} == {1}
    assert torch.equal(found["channel"].absmax, weight.abs().amax(1)), "as its scales are"
    assert torch.equal(found["sample"].rows.sort(0).values, weight.t().sort(0).values)
    assert stats["up:input"]["minmax"].batches == 6


@pytest.mark.parametrize("saved", [False, True])
def test_merged_equals_whole(saved, tmp_path):
    whole, parts = Stats(ALL), [Stats(ALL), Stats(ALL), Stats(ALL)]
    for i in range(9):
        x = torch.randn(i, 4) * (i + 1)
        for stats in (whole, parts[i // 3]):
            stats.add("up:input", x)
            stats.add("up:weight", torch.ones(6, 4))
    first = parts[0]
    for i, part in enumerate(parts[1:]):
        if saved:
            part.save(tmp_path / f"{i}.safetensors")
            part = Stats.load(tmp_path / f"{i}.safetensors")
        first.merge(part)
    one, other = first["up:input"], whole["up:input"]
    for kind in ("minmax", "channel", "histogram"):
        a, b = dict(state_of(one[kind])), dict(state_of(other[kind]))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), kind
    assert one["token"].tokens == other["token"].tokens == 36
    torch.testing.assert_close(one["token"].mean, other["token"].mean, rtol=1e-12, atol=0)
    rows = [found["sample"].rows.sort(0).values for found in (one, other)]
    assert torch.equal(*rows), "36 tokens are fewer than 512"
    assert first["up:weight"]["minmax"].batches == 1


def test_what_cannot_be_merged_changes_nothing():
    stats, before = filled(), filled()
    for other, match in (
        (filled({"input": (MovingAverage(momentum=0.5),)}), "momentum"),
        (filled({"output": ("minmax", Histogram(bins=8))}), "bins"),
    ):
        with pytest.raises(fxquant.FxQuantError, match=match):
            stats.merge(other)
        assert_equal(stats, before)
    other = Stats({"input": ["minmax", "channel"]})
    other.add("up:input", torch.ones(1, 4))
    other.add("blocks.0.down|odd:input", torch.ones(1, 5))
    with pytest.raises(fxquant.FxQuantError, match=r"has shape \(5,\), expected \(4,\)"):
        stats.merge(other)
    assert_equal(stats, before)


def test_another_kind_and_port_are_added():
    stats = filled({"input": ("minmax",)})
    stats.merge(filled({"input": (Histogram(bins=32),), "output": ("token",)}))
    assert set(stats["up:input"]) == {"minmax", "histogram"}
    assert set(stats["up:output"]) == {"token"}
    stats.add("late:input", torch.ones(2, 4))
    assert stats["late:input"]["histogram"].bins == 32


def test_ranges_of_every_way():
    stats = filled()
    found = stats["up:output"]
    ways = {
        ("minmax",): found["minmax"].range(),
        ("moving_average",): found["moving_average"].range(),
        ("percentile", ("percent", 80.0)): found["histogram"].percentile_range(80.0),
        ("percentile",): found["histogram"].percentile_range(99.99),
        ("mse", ("dtype", torch.int4)): found["histogram"].mse_range(torch.int4),
        ("mse", ("dtype", torch.uint4), ("mapping", "asymmetric")): found["histogram"].mse_range(
            torch.uint4, "asymmetric"
        ),
    }
    for (how, *settings), expected in ways.items():
        assert stats.range("up:output", how, **dict(settings)) == expected
    assert len({tuple(map(float, r)) for r in ways.values()}) >= 5, "ways that differ"


def test_a_missing_range_says_what_to_calibrate_with():
    stats = filled({"input": ("minmax",), "weight": ("channel",)})
    with pytest.raises(fxquant.FxQuantError, match=r"kinds=\{'input': \('histogram',\)\}"):
        stats.range("up:input", "mse")
    with pytest.raises(fxquant.FxQuantError, match=r"kinds=\{'weight': \('minmax',\)\}"):
        stats.range("up:weight")
    with pytest.raises(fxquant.FxQuantError, match=r"'up:output'.*kinds=\{'output': \('minmax',"):
        stats.range("up:output")
    with pytest.raises(fxquant.FxQuantError, match="one of minmax, moving_average, percentile"):
        stats.range("up:input", "median")
    with pytest.raises(fxquant.FxQuantError, match="percent"):
        filled().range("up:input", "percentile", percent=20.0)
    stats.add("empty:input", torch.ones(0, 4))
    with pytest.raises(fxquant.FxQuantError, match="nothing was observed"):
        stats.range("empty:input")


@pytest.mark.parametrize(
    "kinds",
    [
        {},
        [],
        "input",
        {"input": "minmax"},
        {"input": []},
        {"inputs": ["minmax"]},
        {"input": ["minmaxx"]},
        {"input": [MovingAverage]},
        {"input": [MovingAverage(), MovingAverage(momentum=0.5)]},
        {"weight": ["minmax"], "bias": ["minmax"]},
    ],
    ids=str,
)
def test_kinds_that_there_are_none_of_are_named(kinds):
    with pytest.raises(fxquant.FxQuantError, match="kinds"):
        Stats(kinds)


def test_only_a_layer_with_values_at_every_port_is_reached():
    stats = Stats({"input": ["minmax"], "weight": ["minmax"]})
    for layer, rows in (("expert", 0), ("up", 3)):
        stats.add(f"{layer}:weight", torch.ones(2, 4))
        stats.add(f"{layer}:input", torch.ones(rows, 4))
    assert stats.reached == {"up"}
