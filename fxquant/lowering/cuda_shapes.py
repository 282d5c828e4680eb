"""How ``cuda_stream``'s blocks are cut: what fits, and which cut is picked."""

from __future__ import annotations

from typing import NamedTuple

from ..scheme import Scheme
from .cuda_layout import TILE, Format, format_of
from .hopper import room, taken
from .tuning import measured_shape, remembered, tuned_shapes

BESIDE_CODES = 512
"""Bytes beside the codes that a block makes of its row: scale and zero point, and what they are found in."""

BUSY = 0.6
"""The part of the multiprocessors that must have a block: with fewer the cut of another layer is changed
for another. (On an H200 that gained up to 50 % below this and lost up to 20 % above.)"""


def whole_lines(size: int) -> int:
    return -(-size // 128) * 128


class Shape(NamedTuple):
    """How a block of threads is cut: the names are the constants in ``stream.cu``. fixed: 4-bit weights are
    multiplied by the one row's activations as fixed-point numbers (``fixed.cuh``), which takes fewer
    instructions for each weight and a moment more before the first."""

    warps_n: int
    warps_k: int
    row_tiles: int
    tokens: int
    step: int
    stages: int
    warpgroup: int = 0
    blocks: int = 1
    splits: int = 1
    fixed: int = 0

    @property
    def threads(self) -> int:
        return 32 * self.warps_n * self.warps_k

    @property
    def rows(self) -> int:
        return TILE * self.row_tiles * self.warps_n

    @property
    def one_row(self) -> bool:
        return self.tokens == 1 and not self.warpgroup

    def tile_bytes(self, form: Format) -> int:
        """Of the weight's tile in a stage, without gaps: whole units, or half a one."""
        return (
            self.step * TILE * form.bits // 8 + max(self.step // form.unit, 1) * form.qparam_bytes
        )

    def stage_bytes(self, form: Format, fetched: bool = False) -> int:
        """Bytes of one stage of the pipeline, ``fetched`` by the copy engine or in whole lines by threads."""
        row, tile = self.step * form.x_bits // 8, self.tile_bytes(form)
        if form.row_major:
            tile = TILE * (row if fetched or row % 128 == 0 else row + 16)
        elif not fetched:
            tile = whole_lines(tile)
        stage = self.warps_n * self.row_tiles * tile
        if not self.makes(form):
            stage += self.tokens * row if self.warpgroup else whole_lines(self.tokens * (row + 16))
        return -(-stage // 1024) * 1024 if self.warpgroup else stage

    def shared(self, form: Format) -> int:
        """Bytes of shared memory: the pipeline, or the partial sums that follow it."""
        sums = self.warps_k * max(self.tokens, 8) * (self.rows + 4) * 4
        return max(self.warps_k * self.stages * self.stage_bytes(form), sums)

    def makes(self, form: Format) -> bool:
        """Whether a block makes fixed-point numbers or codes of its row of activations."""
        return bool(self.fixed or form.x_type)

    def activations(self, form: Format, k: int) -> int:
        """Bytes of shared memory beside those, for what a block makes of its part of the activations."""
        if not self.makes(form):
            return 0
        steps = -(-k // (self.step * self.warps_k * self.splits)) * self.warps_k
        if self.fixed:
            return steps * (3 * self.step + 8 * self.step // form.unit)
        return BESIDE_CODES + steps * self.step

    def busy(self, n: int, rows: int) -> float:
        """The part of the multiprocessors that have a block, while the last blocks are computed too."""
        return taken(-(-n // self.rows) * -(-rows // self.tokens) * self.splits)

    def serves(self, form: Format, rows: int) -> bool:
        """Whether so many rows may be cut like this: one that the kernel quantizes comes alone."""
        return self.one_row if rows == 1 and form.x_bits == 8 else rows == 1 or self.tokens > 1

    def paired(self, form: Format, k: int) -> Shape:
        """The same with an even number of tiles, of which half are of each half of the channels (GATES)."""
        if self.warps_n * self.row_tiles % 2 == 0:
            return self
        pairs = self._replace(row_tiles=2 * self.row_tiles, warps_k=max(self.warps_k // 2, 1))
        return pairs if pairs.fits(form, k) else plain_shape(form, k, self.tokens)

    def fits(self, form: Format, k: int) -> bool:
        """Whether the kernel can be cut like this."""
        fits = k % self.step == 0 and self.step % form.unit == 0 and self.threads <= 1024
        fits = fits and self.step & (self.step - 1) == 0
        forms = (form, form._replace(x_type=1)) if self.one_row and form.x_bits == 8 else (form,)
        fits = fits and all(
            room(self.shared(f) + self.activations(f, k), self.blocks) for f in forms
        )
        if form.x_type:
            fits = fits and self.one_row
        if self.fixed:
            fits = fits and self.one_row and (form.bits, form.x_bits) == (4, 16) and form.chunk > 0
        return fits and (self.fits_wgmma(form) if self.warpgroup else self.stages >= 2)

    def fits_wgmma(self, form: Format, fetched: bool = False) -> bool:
        """Four warps a group, rows of 128 bytes, numbers of columns that the instruction has, and a stage
        more. Its float8 sums have 14 bits: those stay with mma, unless they are moved on in time."""
        row, columns = (
            self.step * form.x_bits // 8,
            8 if form.x_bits == 16 or self.tokens <= 32 else 16,
        )
        shaped = self.warps_n % 4 == 0 and row % 128 == 0 and self.tokens % columns == 0
        moved = fetched or not (form.float8 and form.x_bits == 8)
        return shaped and moved and self.stages >= 3


@remembered
def shape_for(scheme: Scheme, n: int, k: int, rows: int, device: str) -> Shape:
    """The cut for this many rows: measured for this layer, or else for the likest one whose blocks keep
    the multiprocessors of this one busy, or a plain one."""
    form = format_of(scheme)
    found = tuned_shapes(device, "shapes", scheme.name, scheme.family, n, k, rows)
    shapes = (Shape(*one) for one in found)
    fitting = [one for one in shapes if one.fits(form, k) and one.serves(form, rows)]
    if not fitting:
        return plain_shape(form, k, rows)
    measured = measured_shape(device, "shapes", scheme.name, n, k, rows)
    if measured is not None and fitting[0] == Shape(*measured):
        return fitting[0]
    narrow = (shape._replace(row_tiles=1) for shape in fitting)
    options = [*fitting[:1], *(shape for shape in narrow if shape.fits(form, k)), *fitting[1:]]
    full = (shape for shape in options if shape.busy(n, rows) > BUSY)
    return next(full, max(options, key=lambda shape: shape.busy(n, rows)))


def plain_shape(form: Format, k: int, rows: int) -> Shape:
    """A cut that serves any layer."""
    steps = (s for s in (128, 64, 32) if s % form.unit == 0)
    step = next(s for s in steps if k % s == 0)
    if rows == 1:
        return Shape(1, 4, 2, 1, step, 4)
    tokens = min(-(-rows // 8) * 8, 64)
    if tokens <= 16:
        return Shape(4, 2, 2, tokens, step, 4)
    return Shape(4, 1, 2, tokens, step, 3)
