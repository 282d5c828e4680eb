"""What the copy engine fetches for a stage of the pipeline, read as its maps say from bytes on the CPU."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pytest
import torch

from fxquant.lowering import cuda_layout, cuda_pipeline
from fxquant.lowering.cuda_cuts import Cut
from fxquant.scheme import get_scheme

N, K = 352, 1024  # blocks of two and of four groups of 64 channels end beyond it


class Map(NamedTuple):
    """The arguments of ``tensor_map``."""

    unit: int
    sizes: Sequence[int]
    strides: Sequence[int]
    box: Sequence[int]
    swizzled: bool

    def fetched(self, memory: np.ndarray, at: Sequence[int]) -> np.ndarray:
        """The box at these coordinates, the first dimension the fastest; zeros beyond the tensor."""
        steps = (self.unit, *self.strides)
        found = np.zeros((*reversed(self.box), self.unit), np.uint8)
        for index in itertools.product(*map(range, self.box)):
            place = [a + i for a, i in zip(at, index, strict=True)]
            if all(p < size for p, size in zip(place, self.sizes, strict=True)):
                byte = sum(p * step for p, step in zip(place, steps, strict=True))
                found[tuple(reversed(index))] = memory[byte : byte + self.unit]
        return found.reshape(-1)


@pytest.fixture(autouse=True)
def maps(monkeypatch):
    def kept(address, unit, sizes, strides, box, *, swizzled):
        assert all(0 < count <= 256 for count in box), "as the driver wants it"
        assert box[0] * unit % 16 == 0 and all(step % 16 == 0 for step in strides)
        assert not swizzled or box[0] * unit == 128
        return Map(unit, sizes, strides, box, swizzled)

    monkeypatch.setattr(cuda_pipeline, "tensor_map", kept)
    for make in ("map_of_rows", "map_of_weight", "map_of_tiles"):
        monkeypatch.setattr(cuda_pipeline, make, getattr(cuda_pipeline, make).__wrapped__)


def bytes_of(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(1, 256, count, dtype=np.uint8)


def tile_at(tile: int, gated: bool) -> int:
    """As in ``constants.cuh``."""
    return tile % 2 * (N // 32) + tile // 2 if gated else tile


CUTS = [
    ("int4wo-64", Cut(2, 1, 64, 256, 4)),
    ("int4wo-64", Cut(1, 2, 64, 64, 4)),
    ("int4wo-128", Cut(2, 2, 64, 128, 4)),
    ("int4wo-128", Cut(2, 1, 64, 64, 4)),  # half a group
    ("int4wo-128-sym", Cut(1, 1, 64, 64, 4)),
    ("int4wo-32", Cut(1, 1, 64, 256, 4)),
    ("int2wo-32", Cut(2, 1, 64, 128, 4)),
    ("int8wo", Cut(2, 1, 32, 256, 4)),
    ("8da4w-32", Cut(1, 2, 64, 256, 4)),
    ("8da4w-128", Cut(2, 1, 64, 64, 4)),  # on widened activations
]
PIECES = {2304: 2, 2176: 2, 4096: 2, 2560: 2}
"""Of a tile's bytes in a stage: as few as have 2048 bytes at most, and a multiple of 16 (``pieces``)."""


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("scheme", "cut"), CUTS)
def test_a_stage_has_the_streams_of_a_blocks_tiles(scheme, cut, gated):
    form = cuda_layout.format_of(get_scheme(scheme))
    assert cut.fits(form, K) or cut.fits(form.taking(torch.bfloat16), K)
    of_stream = K // form.unit * form.unit_bytes
    stream = bytes_of(-(-N // 16) * of_stream).reshape(-1, of_stream)
    found = cuda_pipeline.map_of_tiles(0, form, cut, N, K, gated)
    tiles, stage = cut.rows // 16, cut.shape.tile_bytes(form)
    halved, half = cut.step < form.unit, cut.step * 16 * form.bits // 8
    assert found.box[1] == PIECES.get(stage, 1), "as the kernel steps over them"
    for block, i in itertools.product(range(-(-N // cut.rows)), range(K // cut.step)):
        if halved:  # the second half and the qparams, then the first half
            start = i // 2 * form.unit_bytes + (half if i % 2 == 0 else 0)
            at, used = (half // 8 if i % 2 == 0 else 0, i // 2), stage if i % 2 == 0 else half
        else:
            start, at, used = i * stage, (0, i * found.box[1]), stage
        got = found.fetched(stream.reshape(-1), (*at, 0, block * tiles // (2 if gated else 1)))
        for t, mine in enumerate(got.reshape(tiles, stage)):
            tile = tile_at(block * tiles + t, gated)
            inside = block * tiles + t < len(stream)
            expected = stream[tile, start : start + used] if inside else np.zeros(used)
            assert (mine[:used] == expected).all(), (block, i, t)


@pytest.mark.parametrize(("n", "gated"), [(N, False), (N - 13, False), (N, True)])
@pytest.mark.parametrize("step", [128, 256])
def test_a_stage_has_64_rows_of_an_8_bit_weight(step, n, gated):
    weight = bytes_of(n * K).reshape(n, K)
    found = cuda_pipeline.map_of_weight(0, n, K, step, gated)
    assert found.swizzled
    for tile, i in itertools.product(range(0, -(-n // 16), 4), range(K // step)):
        at = (0, 0 if gated else tile * 16, 0, tile // 2 if gated else 0, i * (step // 128))
        got = found.fetched(weight.reshape(-1), at).reshape(step // 128, 64, 128)
        rows = np.zeros((64, step), np.uint8)
        for t in range(4):
            if (tile + t) * 16 < n:
                first = tile_at(tile + t, gated) * 16
                mine = weight[first : first + 16, i * step : (i + 1) * step]
                rows[16 * t : 16 * t + len(mine)] = mine
        assert (got == rows.reshape(64, -1, 128).swapaxes(0, 1)).all(), (tile, i)


def test_a_stage_has_the_tokens_of_a_tile():
    rows, row_bytes, tokens, step = 70, 2 * K, 48, 256
    x = bytes_of(rows * row_bytes).reshape(rows, row_bytes)
    found = cuda_pipeline.map_of_rows(0, rows, row_bytes, tokens, 2 * step)
    got = found.fetched(x.reshape(-1), (0, tokens, 3 * (2 * step // 128))).reshape(-1, tokens, 128)
    expected = np.zeros((tokens, 2 * step), np.uint8)
    expected[: rows - tokens] = x[tokens:, 3 * 2 * step : 4 * 2 * step]
    assert (got == expected.reshape(tokens, -1, 128).swapaxes(0, 1)).all()
