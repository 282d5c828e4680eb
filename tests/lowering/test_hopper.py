"""Where blocks find places on a Hopper GPU."""

from __future__ import annotations

import itertools

import pytest

from fxquant.lowering.hopper import CLUSTERED, MULTIPROCESSORS, places, room, spread


@pytest.mark.parametrize("units", [MULTIPROCESSORS, 114, 78])
def test_a_multiprocessor_has_room_for_an_even_share_and_no_more(units):
    sizes = (1024, 20_000, 60_000, 100_000, 116_000, 200_000)
    for shared, blocks, splits in itertools.product(
        sizes, (1, 97, 132, 133, 256, 264, 700), CLUSTERED
    ):
        share = -(-blocks // places(splits, units))
        found = spread(shared, blocks, splits, units)
        if not room(shared, share):
            assert found == shared, "there is more than one wave of them"
            continue
        assert found >= shared and room(found, share) and not room(found, share + 1)
        assert found == shared or room(found - 128, share + 1), "no more than that takes"


def test_clusters_find_fewer_places():
    assert places(1) == MULTIPROCESSORS and places(1, 114) == 114
    assert places(4) < MULTIPROCESSORS and places(8, 114) < places(8)
    assert places(8, 1) == 1 and spread(1000, 8, 8, 1) >= 1000
    # 64 clusters of four take three places on some multiprocessors, though two on all would do
    assert room(spread(30_000, 256, 4, MULTIPROCESSORS), 3)
