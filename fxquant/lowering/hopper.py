"""What a Hopper GPU has, for which the blocks of the CUDA C++ kernels are cut."""

from __future__ import annotations

MULTIPROCESSORS = 132

SHARED_LIMIT = 227 * 1024
"""Bytes of shared memory that one block may use."""


def taken(blocks: int, places: int = MULTIPROCESSORS) -> float:
    """The part of ``places`` that ``blocks`` take, on average over their waves."""
    return blocks / (-(-blocks // places) * places)
