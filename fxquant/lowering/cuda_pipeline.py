"""CUDA C++: packed weights times many tokens, without writing the weight out (``cuda/pipeline.cu``).

The same bytes as ``cuda_stream``'s (``cuda_layout``), unpacked in registers while the tensor cores are
busy with what was unpacked before.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import sympy
import torch

from ..ops import outputs
from ..scheme import Scheme
from . import nvrtc
from .cuda_layout import STREAM, Format, format_of
from .cuda_stream import (
    BUSY,
    COMMON,
    FINISHES,
    HALF,
    Shape,
    compile_linear,
    define_linear,
    stream_holds,
    text_of,
    warpgroup_product,
)
from .devices import device_row
from .hopper import MULTIPROCESSORS, SHARED_LIMIT, taken
from .kernel import Problem, kernel
from .triton_launch import estimate, input_is
from .tuning import is_measured, remembered, tuned_shapes

SOURCES = (
    "constants.cuh",
    "ptx.cuh",
    "unpack.cuh",
    "multiply.cuh",
    "epilogue.cuh",
    "pipeline.cu",
)

SPARE = 40
"""Registers beside the sums: the weights being unpacked, addresses."""


UNPACKING, ADDING, ALONE = 64, 0.1, 1.6
"""What it takes to unpack a weight, in tokens that are multiplied meanwhile; to add up a split tile, as
part of the tile; and a warpgroup that no other one works beside, as a multiple."""


class Cut(NamedTuple):
    """How a block of threads is cut. warpgroups: that multiply, each ``64 * row_tiles`` channels; step:
    values of k in a stage; blocks: on a multiprocessor; splits: blocks of a cluster that share k."""

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
        stage = self.shape.stage_bytes(form)
        part = (32 if self.tokens % 32 == 0 else 16) * (128 * self.row_tiles + 16)
        ring = self.stages * stage + self.warpgroups * part + 16 * self.stages
        return max(ring, self.tokens * (self.rows + 4) * 4 if self.splits > 1 else 0)

    def sums(self, form: Format) -> int:
        """Registers of a thread that hold sums, those still being made of integers included."""
        parts = (2 if self.tokens <= 64 else 1) if form.chunk and form.x_bits == 8 else 0
        return (self.row_tiles + parts) * self.tokens // 2

    def tiles(self, n: int, rows: int) -> int:
        """Of the result, each computed by a cluster of ``splits`` blocks."""
        return -(-n // self.rows) * -(-rows // self.tokens)

    def waves(self, n: int, rows: int) -> int:
        """How often a place for a block on a multiprocessor is taken, at most."""
        return -(-self.tiles(n, rows) * self.splits // (MULTIPROCESSORS * self.blocks))

    def busy(self, n: int, rows: int) -> float:
        """The part of those places that have a block, on average over the waves."""
        return taken(self.tiles(n, rows) * self.splits, MULTIPROCESSORS * self.blocks)

    def work(self, rows: int) -> float:
        """Of a multiprocessor in one wave, in tokens of a channel."""
        part = 1.0 if self.splits == 1 else 1 / self.splits + ADDING
        alone = ALONE if self.blocks * self.warpgroups == 1 else 1.0
        return part * alone * self.blocks * self.rows * (min(self.tokens, rows) + UNPACKING)

    def fits(self, form: Format, k: int) -> bool:
        """Whether the kernel can be cut like this."""
        fits = k % self.step == 0 and self.step % form.unit == 0 and not form.row_major
        fits = fits and self.shape.fits_wgmma(form) and self.tokens % 16 == 0
        fits = fits and self.row_tiles * self.warpgroups <= 8 and self.tokens <= 256
        fits = fits and self.sums(form) + SPARE <= self.registers
        fits = (
            fits and self.tokens // 2 + 40 <= self.equal_registers
        )  # with fewer, ptxas serializes
        return fits and self.shared(form) * self.blocks <= SHARED_LIMIT


PLAIN = (Cut(2, 2, 64, 128, 4), Cut(2, 1, 256, 64, 5), Cut(2, 2, 128, 128, 3), Cut(2, 1, 64, 64, 4))
"""One of them fits whatever k the needs let through."""


@remembered
def cut_for(scheme: Scheme, n: int, k: int, rows: int, device: str) -> Cut:
    """The cut for this many rows: measured for this layer, or for the likest one that was (adapted, where
    it leaves multiprocessors without work), or a plain one. Its tiles have no more tokens than an even
    share of the rows asks for."""
    form = format_of(scheme)
    found = tuned_shapes(device, "pipelines", scheme.name, scheme.family, n, k, rows)
    tuned = (Cut(*measured) for measured in found)
    plain = sorted(PLAIN, key=lambda cut: abs(cut.tokens - rows))
    cut = next(cut for cut in (*tuned, *plain) if cut.fits(form, k))
    if not is_measured(device, "pipelines", scheme.name, n, k) and cut.busy(n, rows) < BUSY:
        options = (
            cut._replace(warpgroups=groups, row_tiles=tiles, tokens=tokens, splits=splits)
            for groups, tiles in dict.fromkeys((cut[:2], (1, 1)))
            for tokens in dict.fromkeys((cut.tokens, 128, 64))
            for splits in (1, 2, 4, 8)
            if tokens <= cut.tokens
        )
        fitting = [evened(one, rows) for one in options if one.fits(form, k)]
        at_once = [one for one in fitting if one.waves(n, rows) == 1]
        cut = min(at_once, key=lambda one: one.work(rows), default=cut)
    return evened(cut, rows)


def evened(cut: Cut, rows: int) -> Cut:
    """The same number of tiles, with as many tokens each, in steps of 32: few variants to compile."""
    share = -(-rows // -(-rows // cut.tokens))
    return cut._replace(tokens=min(cut.tokens, 16 if share <= 16 else -(-share // 32) * 32))


def source(form: Format, cut: Cut, half: bool) -> str:
    """The text of ``pipeline_linear``."""
    return warpgroup_product(form, cut.tokens, half) + text_of(*SOURCES)


@lru_cache(maxsize=4096)
def compiled(
    form: Format,
    cut: Cut,
    x: torch.dtype,
    y: torch.dtype,
    bias: torch.dtype | None,
    epilogue: str,
    device: int,
) -> nvrtc.Function:
    """The kernel for these types, built unless the cache has it."""
    text = source(form, cut, x == torch.float16)
    return compile_linear(
        text, "pipeline_linear", form, cut.shape, x, y, bias, epilogue, device,
        threads=cut.threads, shared=cut.shared(form),
    )  # fmt: skip


@lru_cache(maxsize=1024)
def tensor_map(address: int, rows: int, row_bytes: int, box_rows: int) -> bytes:
    """The descriptor with which the copy engine fetches 128 bytes of ``box_rows`` rows, swizzled."""
    driver, _ = nvrtc.bindings()
    size = driver.cuuint64_t
    one = driver.cuuint32_t(1)
    made = nvrtc.checked(
        driver.cuTensorMapEncodeTiled(
            driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_UINT8,
            2,
            address,
            [size(row_bytes), size(rows)],
            [size(row_bytes)],
            [driver.cuuint32_t(128), driver.cuuint32_t(box_rows)],
            [one, one],
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        ),
        "tensor map",
    )
    return ctypes.string_at(int(made.getPtr()), 128)


def run(
    scheme: Scheme,
    cut: Cut,
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    x_zero: torch.Tensor | None,
    packed: Sequence[torch.Tensor],
    bias: torch.Tensor | None,
    n: int,
    epilogue: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    """One launch, cut as ``cut``: y[m, n] (of GATES [m, n / 2]) of contiguous x[m, k], x_scale and x_zero
    float32 [m]."""
    form, (m, k) = format_of(scheme), x.shape
    per_row = packed[1]
    w_scale, w_sum = (None, per_row) if form.x_zero else (per_row, None)
    device = x.device.index
    types = (x.dtype, dtype, None if bias is None else bias.dtype)
    call = compiled(form, cut, *types, epilogue, device)
    y = x.new_empty(m, outputs(n, epilogue), dtype=dtype)
    box = tensor_map(x.data_ptr(), m, k * x.element_size(), cut.tokens)
    pointers = (x_scale, x_zero, packed[0], w_scale, w_sum, bias, y)
    addresses = (0 if t is None else t.data_ptr() for t in pointers)
    arguments = box + struct.pack("<7Q3i", *addresses, m, n, k)
    arguments += bytes(-len(arguments) % 64)  # the map aligns the whole
    tiles = cut.tiles(n, m)
    blocks = device_row(x.device).units * cut.blocks
    grid = min(tiles, blocks) if cut.splits == 1 else tiles * cut.splits
    with torch.cuda.device(device):
        call.launch((grid, 1, 1), arguments)
    return y


define_linear("pipeline_linear", cut_for, run)


def whole_rows(p: Problem) -> str | None:
    """k of a stage's activations is rows of 128 bytes."""
    row = 1024 // format_of(p.scheme).x_bits
    return None if p.k % row == 0 else f"k = {p.k} is not a multiple of {row}"


COMPUTE = {"w4a16": 0.66, "w2a16": 0.66, "w8a16": 0.68, "wf8a16": 0.66, "w4a8": 0.6}
"""Fraction of the peak by family, 2048 x 28672 x 4096 on an H200."""


def cost(p: Problem) -> sympy.Expr:
    operations = "bfloat16" if p.scheme.input is None else "int8"
    compute = COMPUTE[p.scheme.family]
    if p.scheme.weight.group_size == 32 and p.scheme.input is not None:
        compute *= 0.6  # a sum leaves the tensor core after every 32 products
    return estimate(p, operations=operations, memory=0.45, compute=compute)


NEEDS = (*COMMON, HALF, stream_holds, whole_rows)


@kernel(
    families=["w4a16", "w2a16", "w8a16", "wf8a16"],
    device="cuda",
    layout=STREAM,
    cost=cost,
    needs=NEEDS,
    epilogues=FINISHES,
    faults=[{"dtype": torch.float32}, {"k": 40}, {"k": 96}],
)
def cuda_pipeline(scheme, x, packed, bias, epilogue):
    op = torch.ops.fxquant.pipeline_linear.default
    n = packed[1].numel()
    return op(x, None, None, packed, bias, scheme.name, epilogue, n, x.dtype)


@kernel(
    families=["w4a8"],
    device="cuda",
    layout=STREAM,
    cost=cost,
    needs=[*NEEDS, input_is("int")],
    epilogues=FINISHES,
    faults=[{"dtype": torch.float32}, {"k": 48}, {"k": 96}],
)
def cuda_pipeline_w4a8(scheme, x, packed, bias, epilogue):
    q, n = scheme.input.quantize(x), packed[1].numel()
    op = torch.ops.fxquant.pipeline_linear.default
    zero = q.zero.float()  # here, where Inductor fuses it with the quantization
    return op(q.codes, q.scale, zero, packed, bias, scheme.name, epilogue, n, x.dtype)
