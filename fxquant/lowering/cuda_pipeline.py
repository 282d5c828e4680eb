"""CUDA C++: packed weights times many tokens, without writing the weight out (``cuda/pipeline.cu``).

The same bytes as ``cuda_stream``'s (``cuda_layout``), unpacked in registers while the tensor cores are
busy with what was unpacked before; of 8-bit products the weight as it is, out of shared memory.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import sympy
import torch

from ..ops import GATES, outputs
from ..scheme import Scheme
from . import nvrtc
from .cuda_cuts import Cut, cut_for, widened_cut_for
from .cuda_layout import STREAM, TILE, Format, format_of
from .cuda_needs import COMMON, HALF, UNZEROED, grouped, stream_holds
from .cuda_stream import (
    FINISHES,
    compile_linear,
    define_linear,
    text_of,
)
from .cuda_wgmma import warpgroup_product
from .dequantize import LAYOUT as ROW_MAJOR
from .devices import device_row
from .hopper import places, spread
from .kernel import Problem, activations_in, kernel, multiple_of
from .triton_launch import estimate, input_is


def source(form: Format, cut: Cut, half: bool) -> str:
    """The text of ``pipeline_linear``."""
    multiply = "multiply_whole.cuh" if form.row_major else "multiply.cuh"
    product = warpgroup_product(form, cut.tokens, half, form.row_major)
    return f"#define FETCHED 1\n{product}" + text_of(
        "constants.cuh",
        "ptx.cuh",
        "unpack.cuh",
        "products.cuh",
        multiply,
        "epilogue.cuh",
        "pipeline.cu",
    )


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
        text, "pipeline_linear", form, cut.shape, x, y, bias, epilogue, device, threads=cut.threads
    )


def tensor_map(
    address: int,
    unit: int,
    sizes: Sequence[int],
    strides: Sequence[int],
    box: Sequence[int],
    *,
    swizzled: bool,
) -> bytes:
    """The descriptor with which the copy engine fetches a box of a tensor at ``address``, in elements of
    ``unit`` bytes, 1 or 8, whose strides but the first are given in bytes."""
    driver, _ = nvrtc.bindings()
    types, swizzles = driver.CUtensorMapDataType, driver.CUtensorMapSwizzle
    size, count = driver.cuuint64_t, driver.cuuint32_t
    made = nvrtc.checked(
        driver.cuTensorMapEncodeTiled(
            getattr(types, f"CU_TENSOR_MAP_DATA_TYPE_UINT{8 * unit}"),
            len(sizes),
            address,
            [size(n) for n in sizes],
            [size(n) for n in strides],
            [count(n) for n in box],
            [count(1)] * len(sizes),
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            getattr(swizzles, f"CU_TENSOR_MAP_SWIZZLE_{'128B' if swizzled else 'NONE'}"),
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        ),
        "tensor map",
    )
    return ctypes.string_at(int(made.getPtr()), 128)


@lru_cache(maxsize=4096)
def map_of_rows(address: int, rows: int, row_bytes: int, box_rows: int, box_bytes: int) -> bytes:
    """Of rows as they lie: a box is so many, and ``box_bytes`` of each, 128 after 128, swizzled."""
    sizes, strides = (128, rows, row_bytes // 128), (row_bytes, 128)
    return tensor_map(address, 1, sizes, strides, (128, box_rows, box_bytes // 128), swizzled=True)


@lru_cache(maxsize=1 << 14)  # one for each weight of a large model
def map_of_weight(address: int, n: int, k: int, step: int, gated: bool) -> bytes:
    """Of a weight of 8 bits [n, k]: a box is 64 of its rows, as of ``map_of_rows``; gated, 16 of each half in
    turns."""
    if gated:
        sizes, strides = (128, TILE, 2, n // (2 * TILE), k // 128), (k, n // 2 * k, TILE * k, 128)
        box = (128, TILE, 2, 2, step // 128)
    else:
        sizes, strides = (128, n, 1, 1, k // 128), (k, n * k, n * k, 128)
        box = (128, 4 * TILE, 1, 1, step // 128)
    return tensor_map(address, 1, sizes, strides, box, swizzled=True)


@lru_cache(maxsize=1 << 14)
def map_of_tiles(address: int, form: Format, cut: Cut, n: int, k: int, gated: bool) -> bytes:
    """Of a stream (``cuda_layout``): a box is what a stage has of a block's tiles, one after another; gated,
    of both halves in turns. A box has up to 256 elements, of 8 bytes, in each dimension: those of a stage
    come in pieces."""
    halves, tiles, of_block = 1 + gated, -(-n // TILE), cut.rows // TILE
    tile_bytes, stage = k // form.unit * form.unit_bytes, cut.shape.tile_bytes(form)
    if cut.step < form.unit:
        piece, pieces = form.unit_bytes, 1
        box = stage
    else:
        pieces = next(p for p in range(1, stage) if stage <= 2048 * p and stage % (16 * p) == 0)
        box = piece = stage // pieces
    sizes = (piece // 8, tile_bytes // piece, halves, tiles // halves)
    strides = (piece, tiles // halves * tile_bytes, tile_bytes)
    boxes = (box // 8, pieces, halves, of_block // halves)
    return tensor_map(address, 8, sizes, strides, boxes, swizzled=False)


def blocks_of(cut: Cut, tiles: int, units: int) -> int:
    """Blocks for that many tiles on that many multiprocessors: whole clusters, as many as find places."""
    return min(tiles, max(places(cut.splits, units) * cut.blocks // cut.splits, 1)) * cut.splits


@lru_cache(maxsize=4096)
def launch_of(
    scheme: Scheme,
    cut: Cut,
    n: int,
    m: int,
    types: tuple[torch.dtype, torch.dtype, torch.dtype | None],
    epilogue: str,
    device: int,
    units: int,
) -> Callable[[bytes], None]:
    """To be called with the arguments: the kernel for these types, its blocks and their shared memory."""
    form = format_of(scheme).taking(types[0])
    blocks = blocks_of(cut, cut.tiles(n, m), units)
    shared = spread(cut.shared(form), blocks, cut.splits, units)
    call = compiled(form, cut, *types, epilogue, device)
    return partial(call.launch, (blocks, 1, 1), shared)


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
    """One launch, cut as ``cut``: y[m, n] (of GATES [m, n / 2]) of contiguous x[m, k], x_scale float32 [m]
    and x_zero int32 [m]."""
    m, k = x.shape
    types = (x.dtype, dtype, None if bias is None else bias.dtype)
    where = x.device.index, device_row(x.device).units
    launch = launch_of(scheme, cut, n, m, types, epilogue, *where)
    form, per_row = format_of(scheme), packed[1].float()
    w_scale, w_sum = (None, per_row) if form.x_zero else (per_row, None)
    y = x.new_empty(m, outputs(n, epilogue), dtype=dtype)
    size, w = x.element_size(), packed[0].data_ptr()
    maps = map_of_rows(x.data_ptr(), m, k * size, cut.tokens, cut.step * size)
    if form.row_major:
        maps += map_of_weight(w, n, k, cut.step, epilogue in GATES)
    else:
        maps += map_of_tiles(w, form, cut, n, k, epilogue in GATES)
    pointers = (x_scale, x_zero, w_scale, w_sum, bias, y)
    addresses = (0 if t is None else t.data_ptr() for t in pointers)
    arguments = maps + struct.pack("<6Q3i", *addresses, m, n, k)
    arguments += bytes(-len(arguments) % 64)  # the maps align the whole
    launch(arguments)
    return y


define_linear("pipeline_linear", cut_for, run)
define_linear("widened_linear", widened_cut_for, run)


def whole_rows(p: Problem) -> str | None:
    """A stage's k, of activations and of weights that stay as they are, is rows of 128 bytes."""
    row = 1024 // format_of(p.scheme).x_bits
    return None if p.k % row == 0 else f"k = {p.k} is not a multiple of {row}"


RATES = {
    # family: (fraction of the bandwidth, of the operands' peak), 28672 x 4096 on an H200, 16 and 2048 rows;
    # less of the bandwidth where weights are unpacked: few rows are then better off with cuda_stream
    **{"w4a16": (0.45, 0.66), "w2a16": (0.45, 0.66), "w8a16": (0.45, 0.68), "wf8a16": (0.45, 0.66)},
    **{"w4a8": (0.45, 0.6), "w8a8": (0.93, 1.2), "wf8af8": (0.93, 0.9)},
}


def cost(p: Problem) -> sympy.Expr:
    x = p.scheme.input
    operations = "bfloat16" if x is None else "float8" if x.dtype.is_floating_point else "int8"
    memory, compute = RATES[p.scheme.family]
    if p.scheme.weight.group_size == 32 and x is not None:
        compute *= 0.42  # a sum leaves the tensor core after every 32 products
    return estimate(p, operations=operations, memory=memory, compute=compute)


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
    return op(q.codes, q.scale, q.zero, packed, bias, scheme.name, epilogue, n, x.dtype)


def widened_cost(p: Problem) -> sympy.Expr:
    memory, compute = RATES["w4a16"]
    return estimate(p, operations="bfloat16", memory=memory, compute=compute)


@kernel(
    families=["w4a8"],
    device="cuda",
    layout=STREAM,
    cost=widened_cost,
    needs=[
        *COMMON,
        activations_in(torch.bfloat16),
        grouped,
        multiple_of("k", 64),
        input_is("int"),
    ],
    epilogues=FINISHES,
    faults=[{"dtype": torch.float16}, {"k": 48}, {"k": 96}],
)
def cuda_pipeline_w4a8_widened(scheme, x, packed, bias, epilogue):
    """Integer sums of small groups leave the tensor core too often for many rows: bfloat16 holds the
    activations' integers exactly, and weights are scaled before the product."""
    q, n = scheme.input.quantize(x), packed[1].numel()
    op = torch.ops.fxquant.widened_linear.default
    codes = torch.ops.fxquant.widen.default(q.codes, q.zero)
    return op(codes, q.scale, None, packed, bias, scheme.name, epilogue, n, x.dtype)


@kernel(
    families=["w8a8", "wf8af8"],
    device="cuda",
    layout=ROW_MAJOR,
    cost=cost,
    needs=[*COMMON, HALF, whole_rows, *UNZEROED],
    epilogues=FINISHES,
    faults=[{"dtype": torch.float32}, {"k": 131072}, {"k": 64}],
)
def cuda_pipeline_w8a8(scheme, x, packed, bias, epilogue):
    q, n = scheme.input.quantize(x), packed[0].shape[0]
    op = torch.ops.fxquant.pipeline_linear.default
    return op(q.codes, q.scale, None, packed, bias, scheme.name, epilogue, n, x.dtype)
