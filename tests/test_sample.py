"""The sample of tokens: fair, deterministic, the same however the tokens came, merged and bounded."""

from __future__ import annotations

import pytest
import torch

from fxquant.observers import Sample, restored, state_of
from fxquant.observers.sample import priorities

WHOLE = 1 << 64


def splitmix(state: int) -> int:
    """One output of SplitMix64, in Python's integers."""
    z = state % WHOLE
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % WHOLE
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % WHOLE
    return z ^ (z >> 31)


GAMMA = 0x9E3779B97F4A7C15


def fed(x: torch.Tensor, *cuts: int, **settings: int) -> Sample:
    """A sample of ``x``'s rows, in batches of these sizes and one of what is left."""
    found = Sample(**settings)
    for batch in x.split([*cuts, len(x) - sum(cuts)]):
        found.update(batch)
    return found


def numbered(count: int, first: int = 0) -> torch.Tensor:
    """Tokens [count, 3] that tell their number."""
    number = torch.arange(first, first + count, dtype=torch.float32)
    return torch.stack([number, -number, number / 2], 1)


def numbers(sample: Sample) -> list[int]:
    assert torch.equal(sample.rows[:, 1], -sample.rows[:, 0]), "a row is torn apart"
    return [int(n) for n in sample.rows[:, 0]]


@pytest.mark.parametrize("seed", [0, 1, (1 << 63) - 1])
def test_priorities_are_those_of_splitmix(seed):
    assert splitmix(GAMMA) == 0xE220A8397B1DCDAF, "the first output that everyone gets for seed 0"
    start = splitmix(seed + GAMMA)
    expected = [splitmix(start + (i + 1) * GAMMA) >> 1 for i in range(5, 12)]
    assert priorities(seed, 5, 7).tolist() == expected


@pytest.mark.parametrize("cuts", [(), (1,) * 40, (17, 0, 80), (99,), (3, 64)])
def test_the_same_tokens_give_the_same_sample_however_they_came(cuts):
    x = numbered(100)
    found = fed(x, *cuts, size=16, seed=3)
    best = priorities(3, 0, 100).argsort()[:16]
    assert numbers(found) == best.tolist() and found.tokens == 100
    assert (found.low, found.high) == (-99.0, 99.0), "of all tokens, not of the sample"


def test_shapes_do_not_matter_and_few_tokens_are_all_kept():
    x = torch.randn(24, 3).bfloat16()
    found = fed(x, size=64)
    nested = Sample(size=64)
    nested.update(x.view(2, 3, 4, 3))
    assert found.rows.dtype == torch.bfloat16 and torch.equal(found.rows, nested.rows)
    assert sorted(found.rows.tolist()) == sorted(x.tolist())


def test_every_token_has_the_same_chance():
    """400 seeds: 100 of them are expected to keep a token, give or take 8.7."""
    kept = torch.zeros(64)
    for seed in range(400):
        kept[numbers(fed(numbered(64), 5, 30, size=16, seed=seed))] += 1
    assert kept.sum() == 400 * 16
    assert ((kept - 100).abs() < 4.5 * 8.7).all()
    assert 0.6 < ((kept - 100) / 8.7).square().mean() < 1.5, "no more even than chance"


def test_a_merged_sample_is_one_of_all_tokens():
    kept = torch.zeros(64)
    for seed in range(400):
        one = fed(numbered(48), size=16, seed=seed)
        one.merge(fed(numbered(16, first=48), 7, size=16, seed=1000 + seed))
        assert one.tokens == 64 and len(one.rows) == 16
        kept[numbers(one)] += 1
    assert ((kept - 100).abs() < 4.5 * 8.7).all(), "also of those in the smaller part"


def test_merging_keeps_the_smallest_of_both_and_goes_on():
    one, other = fed(numbered(40), size=8, seed=1), fed(numbered(30, first=40), size=8, seed=2)
    one.merge(other)
    order = torch.cat([priorities(1, 0, 40), priorities(2, 0, 30)])
    assert numbers(one) == order.argsort()[:8].tolist()
    one.update(numbered(20, first=70))
    order = torch.cat([order, priorities(1, 70, 20)])
    assert numbers(one) == order.argsort()[:8].tolist()


def test_equal_seeds_merge_too():
    one, other = fed(numbered(9), size=5, seed=4), fed(numbered(9, first=100), size=5, seed=4)
    best = priorities(4, 0, 9).argsort()[:3].tolist()
    one.merge(other)
    assert numbers(one) == [best[0], best[0] + 100, best[1], best[1] + 100, best[2]]


def test_the_sample_is_its_own_and_goes_on_after_a_save():
    x = numbered(40)
    found = fed(x[:30], 11, size=8)
    again = restored("sample", dict(state_of(found)))
    x[:30] = 0
    assert max(numbers(found)) > 0, "not a view of the batch"
    for sample in (found, again):
        sample.update(x[30:])
    assert numbers(found) == numbers(again) == priorities(0, 0, 40).argsort()[:8].tolist()
    assert found.rows.device.type == "cpu"
