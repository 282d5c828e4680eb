"""The layout of the CUDA C++ kernels: a weight as the lanes of a warp hold it for ``mma``.

Tiles of 16 output channels; in a tile, blocks of 32 values of k; after each chunk of k its scales (and
zero points). A tile is one contiguous stream of bytes. All formats share it; 8-bit products alone
keep their weight [n, k].
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, reduce
from operator import or_
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..affine import code_range, pack_codes, storage_dtype, unpack_codes
from ..scheme import Quantized, Scheme
from .kernel import Layout

TILE = 16
"""Output channels of a tile: the rows of one mma."""

BLOCK = 32
"""Values of k that a warp takes at once: eight of each lane, for each of two rows."""


class Format(NamedTuple):
    """What the kernel is compiled for: the names are the constants in ``stream.cu``."""

    bits: int
    float8: bool
    x_bits: int
    chunk: int
    zero: bool
    x_zero: bool
    widened: bool = False
    x_type: int = 0

    def taking(self, x: torch.dtype) -> Format:
        """The same for activations that come as ``x``: 8-bit codes may be 16-bit floats by now, less their
        zero point ("widened")."""
        if x.itemsize * 8 == self.x_bits:
            return self
        return self._replace(x_bits=16, x_zero=False, widened=True)

    @property
    def row_major(self) -> bool:
        """The weight stays [n, k]: 8-bit products need no unpacking."""
        return self.bits == self.x_bits == 8

    @property
    def unit(self) -> int:
        """Values of k in one repetition of a tile's stream."""
        return self.chunk or BLOCK

    @property
    def qparam_bytes(self) -> int:
        """Of a tile, for one unit."""
        return (64 if self.zero else 32) if self.chunk else 0

    @property
    def unit_bytes(self) -> int:
        return self.unit * TILE * self.bits // 8 + self.qparam_bytes


@lru_cache
def format_of(scheme: Scheme) -> Format:
    weight, x = scheme.weight, scheme.input
    return Format(
        bits=weight.bits,
        float8=weight.dtype.is_floating_point,
        x_bits=16 if x is None else 8,
        chunk=min(weight.group_size or 0, 128),
        zero=weight.zero_point_domain != "none",
        x_zero=x is not None and x.zero_point_domain != "none",
    )


COLUMNS = {16: (4, 2), 8: (2, 4)}
"""Bits of an activation -> (columns of a block of 32 k, values of k that a lane holds in each)."""

_EIGHT = [0, 2, 1, 3, 4, 6, 5, 7]
SLOTS: dict[tuple[int, int], list[int]] = {
    # (bits of a weight, of an activation): which of a lane's 2 x 8 weights (row * 8 + k) lies where,
    # from the lowest bit up. 16-bit products take pairs out of the two halves of a word; 8-bit ones
    # take bytes, 4-bit codes from their high halves first.
    (8, 16): [row + k for row in (0, 8) for k in _EIGHT],
    (4, 16): [row + k for row in (0, 8) for k in (0, 2, 4, 6, 1, 3, 5, 7)],
    (4, 8): [row + k for row in (0, 8) for k in (4, 0, 5, 1, 6, 2, 7, 3)],
    (2, 16): [row + k + odd for odd in (0, 1) for row in (0, 8) for k in (0, 2, 4, 6)],
}


SLAB = 1 << 23
"""Codes that are packed at once: the scratch memory is a few bytes for each."""


def pack(scheme: Scheme, q: Quantized) -> list[torch.Tensor]:
    """The stream uint8 [ceil(n / 16), k / unit, unit_bytes] and a float32 [n]: the scale of each row;
    of grouped weights its power of two; for activations with a zero point its sum of weights."""
    form, n = format_of(scheme), q.codes.shape[0]
    k = q.codes.shape[1] * 8 // form.bits
    per_row = q.scale.float().reshape(-1)
    if form.chunk and form.x_bits == 16:
        per_row = row_power(q.scale)
        q = Quantized(q.codes, *_normalized(q.scale, q.zero, per_row))
    rows = max(SLAB // k // TILE, 1) * TILE
    slabs = [
        Quantized(q.codes[at], q.scale[at], None if q.zero is None else q.zero[at])
        for at in (slice(first, first + rows) for first in range(0, n, rows))
    ]
    if form.x_zero:
        sums = [scheme.weight.dequantize(slab, torch.float64).sum(1).float() for slab in slabs]
        per_row = torch.cat(sums)
    shape = (-(-n // TILE), k // form.unit, form.unit_bytes)
    stream = torch.empty(shape, dtype=torch.uint8, device=q.codes.device)
    for first, slab in zip(range(0, shape[0], rows // TILE), slabs, strict=True):
        tiles = _stream(scheme, slab, k)  # not all of them at once beside their copy
        stream[first : first + len(tiles)] = tiles
    return [stream, per_row]


def row_power(scale: torch.Tensor) -> torch.Tensor:
    """Powers of two float32 [n] which bring the largest scale of each row to [2**-10, 2**-9)."""
    _, exponent = torch.frexp(scale.float().abs().amax(1))
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent + 9)


def _normalized(scale, zero, power):
    """Scales and zero points as the stream holds them; exact, as are the products that undo it."""
    scale = (scale.double() / power[:, None]).to(scale.dtype)
    return scale, None if zero is None else (zero.double() / power[:, None]).to(zero.dtype)


def _restored(scale, zero, power):
    scale = (scale.double() * power[:, None]).to(scale.dtype)
    return scale, None if zero is None else (zero.double() * power[:, None]).to(zero.dtype)


def _stream(scheme: Scheme, q: Quantized, k: int) -> torch.Tensor:
    form, codes = format_of(scheme), _unsigned(scheme, q.codes)
    missing = -codes.shape[0] % TILE
    tiles = -(-codes.shape[0] // TILE)
    codes = F.pad(codes, (0, 0, 0, missing))
    columns, width = COLUMNS[form.x_bits]
    fragments = codes.view(tiles, 2, 8, k // BLOCK, columns, 4, width)
    lanes = fragments.permute(0, 3, 2, 5, 1, 4, 6).reshape(-1, 16)
    slots = lanes[:, SLOTS[form.bits, form.x_bits]].view(-1, form.bits * 2, 8 // form.bits)
    parts = [slots[:, :, i] << (form.bits * i) for i in range(slots.shape[2])]
    data = reduce(or_, parts).view(tiles, k // form.unit, -1)
    if not form.chunk:
        return data
    qparams = torch.stack([t for t in (q.scale, q.zero) if t is not None], -1)
    qparams = F.pad(qparams, (0, 0, 0, 0, 0, missing))
    qparams = qparams.repeat_interleave((scheme.weight.group_size or 0) // form.chunk, 1)
    qparams = qparams.view(tiles, TILE, k // form.chunk, -1).transpose(1, 2).contiguous()
    return torch.cat([data, qparams.view(torch.uint8).view(tiles, k // form.chunk, -1)], -1)


def unpack(scheme: Scheme, packed: Sequence[torch.Tensor], n: int, k: int) -> Quantized:
    form, stream = format_of(scheme), packed[0]
    tiles, units = stream.shape[:2]
    code_bytes = form.unit * TILE * form.bits // 8
    data, tail = stream.split([code_bytes, stream.shape[2] - code_bytes], -1)
    mask = (1 << form.bits) - 1
    parts = [(data >> (form.bits * i)) & mask for i in range(8 // form.bits)]
    order = SLOTS[form.bits, form.x_bits]
    place = [order.index(i) for i in range(16)]
    columns, width = COLUMNS[form.x_bits]
    lanes = torch.stack(parts, -1).reshape(-1, 16)[:, place]
    fragments = lanes.view(tiles, k // BLOCK, 8, 4, 2, columns, width)
    codes = fragments.permute(0, 4, 2, 1, 5, 3, 6).reshape(tiles * TILE, k)[:n]
    if not form.chunk:
        scale = packed[1].view(n, 1).to(scheme.weight.scale_dtype)
        return Quantized(_canonical(scheme, codes), scale, None)
    qparams = tail.contiguous().view(scheme.weight.scale_dtype).view(tiles, units, TILE, -1)
    qparams = qparams.transpose(1, 2).reshape(tiles * TILE, units, -1)[:n]
    qparams = qparams[:, :: (scheme.weight.group_size or 0) // form.chunk]
    keep = torch.contiguous_format  # a new tensor: no strides of the stream remain
    scale, *zeros = (t.clone(memory_format=keep) for t in qparams.unbind(-1))
    zero = zeros[0] if zeros else None
    if form.x_bits == 16:
        scale, zero = _restored(scale, zero, packed[1])
    return Quantized(_canonical(scheme, codes), scale, zero)


def _unsigned(scheme: Scheme, codes: torch.Tensor) -> torch.Tensor:
    """One uint8 for each code: what the kernel finds in the stream. Integers count from the lowest for
    16-bit activations; all others keep their bits."""
    dtype, form = scheme.weight.dtype, format_of(scheme)
    if form.float8:
        return codes.view(torch.uint8)
    low = code_range(dtype)[0] if form.x_bits == 16 else 0
    return ((unpack_codes(codes, dtype).short() - low) & ((1 << form.bits) - 1)).to(torch.uint8)


def _canonical(scheme: Scheme, u: torch.Tensor) -> torch.Tensor:
    dtype, form = scheme.weight.dtype, format_of(scheme)
    if form.float8:
        return u.contiguous().view(dtype)
    low, high = code_range(dtype)
    codes = u.to(torch.int16) + (low if form.x_bits == 16 else 0)
    codes = torch.where(codes > high, codes - (1 << form.bits), codes)
    return pack_codes(codes.to(storage_dtype(dtype)), dtype)


STREAM = Layout(name="stream", pack=pack, unpack=unpack)
