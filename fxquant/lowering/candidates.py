"""The ways to cut the CUDA C++ kernels' blocks that are worth a measurement (``tuner.py``)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from ..scheme import Scheme
from . import cuda_cuts, cuda_layout
from .cuda_cuts import Cut
from .cuda_shapes import Shape
from .hopper import MULTIPROCESSORS, taken

_FEW = [  # warps_n, warps_k, row_tiles, step, stages, warpgroup, blocks
    *((2, 4, 1, 256, 3, 0, 1), (1, 4, 2, 256, 3, 0, 1), (1, 8, 2, 128, 3, 0, 1)),
    *((4, 2, 1, 256, 4, 0, 1), (4, 2, 2, 128, 4, 0, 1), (4, 2, 2, 128, 6, 0, 1)),
    *((1, 8, 1, 256, 3, 0, 1), (1, 16, 1, 128, 3, 0, 1), (2, 4, 2, 128, 4, 0, 1)),
    *((8, 1, 1, 256, 4, 0, 1), (4, 1, 2, 256, 4, 0, 1), (2, 2, 2, 256, 4, 0, 1)),
    *((1, 4, 1, 64, 6, 0, 1), (4, 1, 1, 32, 6, 0, 1), (1, 4, 2, 512, 3, 0, 1)),
]
_SOME = [
    *((4, 1, 2, 256, 3, 0, 1), (4, 2, 2, 128, 4, 0, 1), (8, 2, 2, 128, 3, 0, 1)),
    *((8, 1, 2, 128, 4, 0, 1), (1, 8, 1, 128, 3, 0, 1), (4, 4, 1, 128, 3, 0, 1)),
    *((4, 2, 1, 256, 3, 0, 1), (2, 4, 2, 128, 4, 0, 1), (4, 1, 1, 32, 6, 0, 1)),
    *((4, 2, 2, 128, 4, 1, 1), (8, 1, 1, 256, 4, 1, 1), (4, 2, 1, 128, 5, 1, 1)),
    *((8, 1, 1, 128, 5, 1, 1), (4, 4, 1, 128, 4, 1, 1), (4, 2, 1, 64, 6, 1, 1)),
]
_MANY = [
    *((8, 1, 2, 256, 3, 1, 1), (8, 1, 2, 128, 4, 1, 1), (8, 1, 1, 128, 4, 1, 1)),
    *((4, 1, 2, 128, 4, 1, 1), (4, 1, 2, 256, 3, 1, 1), (8, 1, 1, 128, 3, 1, 2)),
    *((4, 1, 1, 128, 3, 1, 3), (4, 1, 1, 128, 4, 1, 2), (4, 1, 2, 128, 3, 1, 2)),
    *((8, 1, 1, 64, 4, 1, 2), (4, 1, 1, 64, 4, 1, 4), (8, 1, 2, 64, 4, 1, 1)),
    *((4, 2, 1, 128, 3, 1, 1), (4, 4, 1, 64, 4, 1, 1), (12, 1, 1, 128, 3, 1, 1)),
    *((16, 1, 1, 128, 3, 1, 1), (4, 1, 2, 128, 3, 0, 1), (8, 1, 2, 128, 3, 0, 1)),
]

_STEPS = ((128, 3), (128, 4), (128, 6), (256, 3), (256, 4))
"""Values of k in a stage, and stages."""


def _even_waves(n: int) -> list[tuple[int, ...]]:
    """Cuts like those of _FEW whose blocks keep all multiprocessors busy to the end: one or two for each,
    few left idle. (28672 channels are 256 blocks of 112: seven tiles.)"""
    filled = {}
    for warps_n, tiles in itertools.product(range(1, 9), (1, 2)):
        blocks = -(-n // (cuda_layout.TILE * warps_n * tiles))
        if blocks <= 2 * MULTIPROCESSORS:
            filled[warps_n, tiles] = taken(blocks)
    best = sorted(filled, key=lambda cut: -filled[cut])[:3]
    return [
        (warps_n, warps_k, tiles, step, stages, 0, 1)
        for (warps_n, tiles), warps_k, (step, stages) in itertools.product(
            best, (1, 2, 4, 8), _STEPS
        )
        if filled[warps_n, tiles] > 0.85 and 4 <= warps_n * warps_k <= 16
    ]


def stream_cuts(scheme: Scheme, n: int, k: int, rows: int) -> list[Shape]:
    """The ways to cut ``cuda_stream``'s blocks that are worth a measurement: none for many rows."""
    if rows > 256:
        return []
    form, even = cuda_layout.format_of(scheme), _even_waves(n)
    parts: dict[int, Sequence[tuple[int, ...]]]
    if rows > 16:
        tokens = (128, 256) if rows > 128 else (min(-(-rows // 16) * 16, 128),)
        parts = {count: _MANY for count in tokens}
    elif rows > 1:
        parts = {-(-rows // 8) * 8: [*_SOME, *even]}
    else:  # or eight tokens by wgmma, which the kernel does not quantize
        eight = [part for part in _SOME if part[5]] if form.x_bits == 16 else []
        parts = {1: [*_FEW, *even], 8: eight}
    pairs = [(count, part) for count in parts for part in dict.fromkeys(parts[count])]
    found = []
    for count, (warps_n, warps_k, tiles, step, stages, group, blocks) in pairs:
        registers = tiles * count / 2 * (2 if form.chunk and form.x_bits == 8 and group else 1)
        if registers > 128:
            continue
        one = Shape(warps_n, warps_k, tiles, count, step, stages, group, blocks)
        programs = -(-n // one.rows) * -(-rows // count)
        for splits, fixed in itertools.product((1, 2, 4), (0, 1)):
            shape = one._replace(splits=splits, fixed=fixed)
            if (splits == 1 or programs * splits <= 2 * MULTIPROCESSORS) and shape.fits(form, k):
                found.append(shape)
    return found


TRIED = 24
"""Cuts of ``cuda_pipeline`` that are worth a measurement. (Of 41 readings of few rows on an H200 the best of
them was at most 4 % slower than the best of all, 0.1 % on average.)"""


def pipeline_cuts(scheme: Scheme, n: int, k: int, rows: int, widened: bool = False) -> list[Cut]:
    """The ways to cut ``cuda_pipeline``'s blocks that are worth a measurement."""
    form = cuda_layout.format_of(scheme)
    form = form.taking(torch.bfloat16) if widened else form
    few = rows < cuda_cuts.BY_MODEL
    tokens = (-(-rows // 16) * 16,) if few else cuda_cuts.token_counts(rows)
    return cuda_cuts.cuts(form, n, k, rows, tokens)[:TRIED]
