"""What a Hopper GPU has, for which the blocks of the CUDA C++ kernels are cut."""

from __future__ import annotations

MULTIPROCESSORS = 132

SHARED, RESERVED = 228 * 1024, 1024
"""Bytes of shared memory of a multiprocessor, and those that each block on it takes beside its own."""


def room(shared: int, blocks: int) -> bool:
    """Whether so many blocks of so much shared memory find room on a multiprocessor."""
    return (shared + RESERVED) * blocks <= SHARED


CLUSTERED = {1: MULTIPROCESSORS, 2: MULTIPROCESSORS, 4: 120, 8: 104}
"""Multiprocessors on which clusters of so many blocks, one to each, find places at once. (They may not cross
from one group of 16 or 18 to another; on an H200 32 clusters of 4 took two turns, 14 of 8 too.)"""


def places(splits: int, units: int = MULTIPROCESSORS) -> int:
    """Of ``units`` multiprocessors those on which clusters of ``splits`` blocks, one to each, find places."""
    return max(units * CLUSTERED[splits] // MULTIPROCESSORS, 1)


def spread(shared: int, blocks: int, splits: int, units: int) -> int:
    """Bytes of shared memory, ``shared`` at least, with which a multiprocessor has room for an even share of
    the blocks and no more.

    A kernel that begins before the one ahead of it has ended (programmatic dependent launch) gets places as
    they become free: several of its blocks would go to the first multiprocessors, and none to the last. (On
    an H200: int8dq, one row of 11008 x 4096, 19.6 us as they come and 14.2 spread; int4wo-64, 16 rows of
    4096 x 4096, 7.4 and 6.7.)
    """
    share = -(-blocks // places(splits, units))
    too_much = SHARED // (share + 1) - RESERVED + 1  # for one block more
    padded = max(shared, -(-too_much // 128) * 128)
    return padded if room(padded, share) else shared


def taken(blocks: int, places: int = MULTIPROCESSORS) -> float:
    """The part of ``places`` that ``blocks`` take, on average over their waves."""
    return blocks / (-(-blocks // places) * places)
