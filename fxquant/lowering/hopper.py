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


def taken(blocks: int, places: int = MULTIPROCESSORS) -> float:
    """The part of ``places`` that ``blocks`` take, on average over their waves."""
    return blocks / (-(-blocks // places) * places)
