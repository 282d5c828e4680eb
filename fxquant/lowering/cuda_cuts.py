"""How ``cuda_pipeline``'s blocks are cut: what fits, what a cut takes, and which is picked."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import NamedTuple

import torch

from ..scheme import Scheme
from .cuda_layout import Format, format_of
from .cuda_shapes import BUSY, Shape
from .hopper import CLUSTERED, room
from .tuning import measured_shape, proven_shapes, remembered, tuned_shapes

SPARE = 40
"""Registers beside the sums: the weights being unpacked, addresses."""


UNPACKING, READING, ADDING, ALONE, APART = 40, 80, 0.1, 1.2, 1.05
"""What it takes to unpack a weight, or to read one of 8 bits again for a product that is twice as fast, in
tokens that are multiplied meanwhile; to add up a split tile, as part of the tile; a warpgroup that no other
one works beside, and blocks that each fetch for themselves, as multiples. (Fitted to 7355 and 5000 readings
on an H200, 64 to 4096 rows of nine layers: what they pick takes 4 % more than the fastest on average, 10 %
for float8.)"""


class Cut(NamedTuple):
    """How a block of threads is cut. warpgroups: that multiply, each ``64 * row_tiles`` channels; step:
    values of k in a stage, whole units of the weight or half a one; blocks: on a multiprocessor; splits:
    blocks of a cluster that share k, of all tiles where they find places at once, or of the last ones, which
    do not fill a wave."""

    warpgroups: int
    row_tiles: int
    tokens: int
    step: int
    stages: int
    blocks: int = 1
    splits: int = 1

    @property
    def shape(self) -> Shape:
        """The same in the constants of the sources that ``stream.cu`` shares."""
        warps = 4 * self.warpgroups
        return Shape(
            warps,
            1,
            self.row_tiles,
            self.tokens,
            self.step,
            self.stages,
            1,
            self.blocks,
            self.splits,
        )

    @property
    def threads(self) -> int:
        return 128 * (self.warpgroups + 1)

    @property
    def equal_registers(self) -> int:
        """Of each thread when the kernel starts: a part of a scheduler's 512."""
        return min(512 // ((self.warpgroups + 1) * self.blocks) // 8 * 8, 240)

    @property
    def registers(self) -> int:
        """Of a thread that multiplies, once the fetching group has kept 40."""
        rest = self.equal_registers * (self.warpgroups + 1) - 40
        return min(rest // self.warpgroups // 8 * 8, 240)

    @property
    def rows(self) -> int:
        """Channels of a tile."""
        return 64 * self.row_tiles * self.warpgroups

    def shared(self, form: Format) -> int:
        """Bytes of shared memory: the ring, what is being written, and the barriers; or partial sums."""
        stage = self.shape.stage_bytes(form, fetched=True)
        part = (32 if self.tokens % 32 == 0 else 16) * (128 * self.row_tiles + 16)
        ring = self.stages * stage + self.warpgroups * part + 16 * self.stages
        return max(ring, self.tokens * (self.rows + 4) * 4 if self.splits > 1 else 0)

    def sums(self, form: Format) -> int:
        """Registers of a thread that hold sums, those included that are still being made of integers or
        float8."""
        apart = form.x_bits == 8 and (form.chunk or form.float8)
        parts = (2 if self.tokens <= 64 else 1) if apart else 0
        return (self.row_tiles + parts) * self.tokens // 2

    def tiles(self, n: int, rows: int) -> int:
        """Of the result."""
        return -(-n // self.rows) * -(-rows // self.tokens)

    @property
    def places(self) -> int:
        """For blocks, on all multiprocessors at once."""
        return CLUSTERED[self.splits] * self.blocks

    def waves(self, n: int, rows: int) -> int:
        """How often a place for a block on a multiprocessor is taken, at most."""
        return -(-self.tiles(n, rows) // self.places)

    def busy(self, n: int, rows: int) -> float:
        """The part of those places that have a block, on average over the waves."""
        whole, left = divmod(self.tiles(n, rows), self.places)
        left *= self.splits if self.shares(n, rows) else 1
        return (whole + left / self.places) / self.waves(n, rows)

    def shares(self, n: int, rows: int) -> bool:
        """Whether there are tiles that all blocks of a cluster work on."""
        left = self.tiles(n, rows) % self.places
        return self.splits > 1 and 0 < left * self.splits <= self.places

    def work(self, form: Format, rows: int) -> float:
        """Of a multiprocessor in one wave of whole tiles, in tokens of a channel."""
        loading = READING if form.row_major else UNPACKING
        alone = APART if self.blocks > 1 else ALONE if self.warpgroups == 1 else 1.0
        return alone * self.blocks * self.rows * (min(self.tokens, rows) + loading)

    def time(self, form: Format, n: int, rows: int) -> float:
        """What all waves take, in products of a token and a channel for each k on one multiprocessor."""
        whole, left = divmod(self.tiles(n, rows), self.places)
        last = 1 / self.splits + ADDING if self.shares(n, rows) else min(left, 1)
        return (whole + last) * self.work(form, rows)

    def fits(self, form: Format, k: int) -> bool:
        """Whether the kernel can be cut like this."""
        halved = form.unit == 2 * self.step and form.x_bits == 16 and k % form.unit == 0
        fits = k % self.step == 0 and (self.step % form.unit == 0 or halved)
        fits = fits and self.shape.fits_wgmma(form, fetched=True) and self.tokens % 16 == 0
        fits = fits and self.row_tiles * self.warpgroups <= 8 and self.tokens <= 256
        fits = fits and self.sums(form) + SPARE <= self.registers
        fits = (
            fits and self.tokens // 2 + 40 <= self.equal_registers
        )  # with fewer, ptxas serializes
        return fits and room(self.shared(form), self.blocks)


GROUPS = ((1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (4, 1), (4, 2))
"""Warpgroups that multiply, and tiles of each."""

STEPS = (256, 128, 64)
"""k of a stage, the largest first."""

LARGEST_STAGE = 48 * 1024
"""Bytes of a stage's activations above which a smaller step is likelier to be the faster one."""

BY_MODEL = 33
"""Rows from which on ``Cut.time`` tells cuts apart; below it is bytes that count, not products."""


def token_counts(rows: int) -> Iterable[int]:
    """Of a tile, up to one that holds all rows."""
    return range(32, min(max(-(-rows // 16) * 16, 32), 256) + 1, 16)


def cuts(form: Format, n: int, k: int, rows: int, tokens: Iterable[int]) -> list[Cut]:
    """What fits, with as many stages as do and as many blocks as have a place at once where k is split;
    by ``Cut.time``, the shortest first."""
    found = []
    # the unpacking of few tokens' weights waits more than it computes: more blocks hide that
    sizes = [(count, blocks) for count in tokens for blocks in range(1, 5 if count <= 32 else 3)]
    for (groups, tiles), (count, blocks), step in itertools.product(GROUPS, sizes, STEPS):
        deepest = (Cut(groups, tiles, count, step, stages, blocks) for stages in (6, 5, 4, 3))
        for cut in [cut for cut in deepest if cut.fits(form, k)][:1]:
            found += splits_of(cut, form, n, k, rows)

    def likeliness(cut: Cut) -> tuple[float, bool]:
        return cut.time(form, n, rows), cut.tokens * cut.step * form.x_bits // 8 > LARGEST_STAGE

    return sorted(found, key=likeliness)


def splits_of(cut: Cut, form: Format, n: int, k: int, rows: int) -> list[Cut]:
    """The same with k split in every way that fits, of all tiles or of the last."""
    splits = (cut._replace(splits=parts) for parts in (1, 2, 4, 8))
    fitting = [one for one in splits if one.fits(form, k)]
    return [one for one in fitting if one.splits == 1 or one.shares(n, rows)]


SMALL = 64
"""Tokens of a tile below which it is for few rows: many are not cut like that, though nothing larger was
measured."""

UNPROVEN = 1.15
"""What a cut that was nowhere the fastest is thought to take beyond its ``time``."""


LIKE = (*range(16, 257, 16), *(part << power for power in range(6, 13) for part in (5, 6, 7, 8)))
"""Numbers of rows. All between two of these are cut as the larger: each cut is a kernel to compile."""

PLAIN = (Cut(2, 2, 64, 128, 4), Cut(2, 1, 256, 64, 5), Cut(2, 2, 128, 128, 3), Cut(2, 1, 64, 64, 4))
"""One of them fits whatever k the needs let through."""


def cut_for(scheme: Scheme, n: int, k: int, rows: int, device: str) -> Cut:
    """The cut for this many rows: measured for this layer, with tiles that suit them; or the one which
    ``Cut.time`` says is the fastest, or, of few rows, that of the likest layer; or a plain one. Its tiles
    have no more tokens than an even share of the rows asks for."""
    return _picked("pipelines", format_of(scheme), scheme, n, k, rows, device)


def widened_cut_for(scheme: Scheme, n: int, k: int, rows: int, device: str) -> Cut:
    """``cut_for`` where 8-bit activations come as bfloat16."""
    form = format_of(scheme).taking(torch.bfloat16)
    return _picked("widened", form, scheme, n, k, rows, device)


@remembered
def _picked(
    section: str, form: Format, scheme: Scheme, n: int, k: int, rows: int, device: str
) -> Cut:
    found = tuned_shapes(device, section, scheme.name, scheme.family, n, k, rows)
    tuned = (Cut(*measured) for measured in found)
    plain = sorted(PLAIN, key=lambda cut: abs(cut.tokens - rows))
    cut = next(cut for cut in (*tuned, *plain) if cut.fits(form, k))
    measured = measured_shape(device, section, scheme.name, n, k, rows)
    known = measured is not None and cut == Cut(*measured)
    suited = evened(cut, rows) == cut and (cut.tokens >= SMALL or rows <= 2 * cut.tokens)
    if rows >= BY_MODEL and not (known and suited):
        likely = next(most for most in itertools.chain(LIKE, (rows,)) if most >= rows)
        cut = _by_model(section, form, scheme.family, n, k, likely, device)
    elif not known and cut.busy(n, rows) < BUSY:
        cut = _spread(cut, form, n, k, rows)
    return evened(cut, rows)


@remembered
def _by_model(
    section: str, form: Format, family: str, n: int, k: int, rows: int, device: str
) -> Cut:
    """What should take least time."""
    proven = {_work_of(Cut(*shape)) for shape in proven_shapes(device, section, family)}

    def cost(cut: Cut) -> tuple[float, int]:
        doubt = 1 if _work_of(cut) in proven else UNPROVEN
        return cut.time(form, n, rows) * doubt, -cut.rows * cut.tokens

    # of equal ones the first, whose step is the likeliest
    return min(cuts(form, n, k, rows, token_counts(rows)), key=cost)


def _work_of(cut: Cut) -> tuple[int, ...]:
    return cut.warpgroups, cut.row_tiles, -(-cut.tokens // 32), cut.blocks


def _spread(cut: Cut, form: Format, n: int, k: int, rows: int) -> Cut:
    """A cut for few rows changed so that more multiprocessors have work, all at once."""
    options = (
        split
        for groups in dict.fromkeys((cut[:2], (1, 1)))
        for split in splits_of(
            cut._replace(warpgroups=groups[0], row_tiles=groups[1]), form, n, k, rows
        )
    )
    at_once = [one for one in (evened(one, rows) for one in options) if one.waves(n, rows) == 1]
    return min(at_once, key=lambda one: one.time(form, n, rows), default=cut)


def evened(cut: Cut, rows: int) -> Cut:
    """The same number of tiles, with as many tokens each, in steps of 16."""
    share = -(-rows // -(-rows // cut.tokens))
    return cut._replace(tokens=min(cut.tokens, -(-share // 16) * 16))
