"""Triton on Hopper, many rows: 8-bit times 8-bit, persistent, its operands fetched by the TMA unit.

    y[m, n] = epilogue(x_scale[m] * weight_scale[n] * sum_k x[m, k] * weight[n, k] + bias[n])

One program a multiprocessor walks over the tiles of the output. Tensor descriptors fetch operands
without registers for addresses and without masks: past every edge they read zeros. Triton waits for
each int8 product before it issues the next one (it overlaps only float32 sums), so the warps are
specialized: one group fetches, two multiply half a tile each, and while one of these waits or
writes, the other keeps the tensor cores busy. Int8 sums are exact: equal to ``triton_w8a8``'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import copy_context
from functools import lru_cache

import torch

from . import triton_fp8, triton_w8a8
from .dequantize import LAYOUT
from .kernel import Need, Problem, activations_in, has_feature, kernel, multiple_of
from .triton_launch import (
    EPILOGUES,
    HAS_TRITON,
    INTERPRET,
    Tile,
    activate,
    define,
    estimate,
    has_triton,
    input_is,
    jit,
    k_at_most,
    output,
    start,
    store,
    tile_of,
    tl,
    triton,
    weight_is,
)

COMPUTE = 1.03  # of the int8 rate: 1,186 TOPS at 128 x 256 x 128 without specialized warps
LAUNCH = 0.1  # of a launch beyond the plain kernel's: descriptors come before the first tile

INTEGER_TILES = (
    (Tile(128, 256, 128, 8, 3), 1.0),
    (Tile(128, 128, 128, 8, 4), 0.85),
    (Tile(64, 256, 128, 8, 4), 0.7),
)
FLOAT8_TILES = ((Tile(128, 128, 128, 8, 4), 1.0),)
"""With the rate of each beside the first while all multiprocessors are busy."""

NARROW = 128 * 128
"""Sums in a tile above which its end has few registers and little shared memory left."""

ALIGNMENT = 16
"""Bytes: what a descriptor asks of a tensor's start and of the distance of its rows."""


def specializes(version: str) -> bool:
    """Whether this release of Triton splits the tile over specialized warps on Hopper.

    The switch is a no-op or an error where it is not implemented, so it is on where it was checked.
    """
    major, minor = (int(part) for part in version.split(".")[:2])
    return (3, 6) <= (major, minor) <= (3, 9)


SPECIALIZED = HAS_TRITON and specializes(triton.__version__)


@jit
def persistent_linear_kernel(
    x, x_scale, weight, weight_scale, bias, y, M: int, N, K,
    HAS_BIAS: tl.constexpr, EPILOGUE: tl.constexpr, ACC: tl.constexpr, IMPRECISE: tl.constexpr,
    DESCRIBED: tl.constexpr, SPECIALIZED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    x = tl.make_tensor_descriptor(x, [M, K], [K, 1], [BLOCK_M, BLOCK_K])
    weight = tl.make_tensor_descriptor(weight, [N, K], [K, 1], [BLOCK_N, BLOCK_K])
    if DESCRIBED:
        y_tiles = tl.make_tensor_descriptor(y, [M, N], [N, 1], [BLOCK_M, BLOCK_N])
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first, step = tl.program_id(0), tl.num_programs(0)
    steps = tl.cdiv(K, BLOCK_K)
    # The end of a tile counts for itself: flattened, the loop fetches for the next tile by then.
    done = first - step
    for tile in tl.range(
        first, tiles_m * tiles_n, step, flatten=not SPECIALIZED, warp_specialize=SPECIALIZED
    ):
        tile_m, tile_n = tile_of(tile, tiles_m, tiles_n)
        acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
        for i in range(steps):
            a = x.load([tile_m * BLOCK_M, i * BLOCK_K])
            w = weight.load([tile_n * BLOCK_N, i * BLOCK_K])
            acc = tl.dot(a, w.T, acc, out_dtype=ACC, max_num_imprecise_acc=IMPRECISE)

        done += step
        tile_m, tile_n = tile_of(done, tiles_m, tiles_n)
        offs_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        in_n = tl.minimum(offs_n, N - 1)
        out = acc.to(tl.float32)
        out *= tl.load(x_scale + tl.minimum(offs_m, M - 1)).to(tl.float32)[:, None]
        out *= tl.load(weight_scale + in_n).to(tl.float32)[None, :]
        if DESCRIBED:
            if HAS_BIAS:
                out += tl.load(bias + in_n).to(tl.float32)[None, :]
            out = activate(out, EPILOGUE).to(y.dtype.element_ty)
            y_tiles.store([tile_m * BLOCK_M, tile_n * BLOCK_N], out)
        else:
            store(out, y, bias, offs_m, offs_n, M, N, HAS_BIAS, EPILOGUE)


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; under the interpreter three, so that a program walks over several tiles."""
    if device.type != "cuda":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count


def quickest(tiles: Sequence[tuple[Tile, float]], rows: int, n: int, units: int) -> Tile:
    """The tile of ``tiles`` with which ``units`` multiprocessors finish first."""

    def time(entry: tuple[Tile, float]) -> float:
        tile, rate = entry
        return -(-tile.programs(rows, n) // units) * tile.m * tile.n / rate

    return min(tiles, key=time)[0]


def descriptors(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    """Where a launch keeps its tensor descriptors."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def aligned(t: torch.Tensor) -> torch.Tensor:
    """``t`` with dense rows, starting where a descriptor may."""
    t = t.contiguous()
    return t if t.data_ptr() % ALIGNMENT == 0 else t.clone()


def launch_tile(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    epilogue: str,
    dtype: torch.dtype,
    tile: Tile | None = None,
    *,
    specialized: bool = SPECIALIZED,
    described: bool = True,
) -> torch.Tensor:
    """``launch`` with a given tile; ``tile.warps`` are those that multiply.

    specialized: other warps fetch; else all do both, over the flattened loop. described: y is
    written by the TMA unit where its rows are aligned; else by masked stores.
    """
    (rows, k), n = x.shape, weight.shape[0]
    y = output(x, rows, n, dtype)
    if y.numel() == 0:
        return y.to(dtype)
    float8, units = x.dtype == torch.float8_e4m3fn, multiprocessors(x.device)
    described = described and n * dtype.itemsize % ALIGNMENT == 0
    if tile is None:
        roomy = described and dtype.itemsize == 2 and epilogue != "gelu"
        tiles = [
            entry
            for entry in (FLOAT8_TILES if float8 else INTEGER_TILES)
            if roomy or entry[0].m * entry[0].n <= NARROW
        ]
        tile = quickest(tiles, rows, n, units)
    specialized = specialized and (tile.m >= 128 or tile.n >= 256)  # halves that fill a wgmma
    x, weight = aligned(x), aligned(weight)
    x_scale = x_scale.expand(rows, 1).contiguous()
    arguments = (x, x_scale, weight, weight_scale.contiguous(), bias, y, rows, n, k)
    constants = {
        "HAS_BIAS": bias is not None,
        "EPILOGUE": epilogue,
        "ACC": tl.float32 if float8 else tl.int32,
        # Hopper sums float8 products in 14 bits: move them into float32 after every step.
        "IMPRECISE": tile.k if float8 else None,
        "DESCRIBED": described,
        "SPECIALIZED": specialized,
        **tile.constants,
    }
    # Triton's count is that of one of the two groups that multiply.
    options = tile._replace(warps=tile.warps // 2).options if specialized else tile.options

    def run() -> None:
        if not INTERPRET:
            triton.set_allocator(descriptors)
        programs = min(tile.programs(rows, n), units)
        start(persistent_linear_kernel, programs, arguments, constants, **options)

    copy_context().run(run)  # the allocator is set in this context alone
    return y.to(dtype)


def _fake(x, x_scale, weight, weight_scale, bias, epilogue, dtype):
    return x.new_empty(x.shape[0], weight.shape[0], dtype=dtype)


@define(
    "triton_persistent_linear(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale,"
    " Tensor? bias, str epilogue, ScalarType dtype) -> Tensor",
    _fake,
)
def launch(x, x_scale, weight, weight_scale, bias, epilogue, dtype) -> torch.Tensor:
    """x[M, K] times weight[N, K], both int8 or both float8, K a multiple of 16; y in ``dtype``."""
    return launch_tile(x, x_scale, weight, weight_scale, bias, epilogue, dtype)


def is_hopper(p: Problem) -> str | None:
    """The tiles fill the shared memory and the wgmma instructions of this generation."""
    newer = "sm100" in p.device.features or "sm120" in p.device.features
    return f"is written for Hopper, not {p.device.name}" if newer else None


NEEDS: tuple[Need, ...] = (
    has_triton,
    has_feature("sm90"),
    is_hopper,
    weight_is("channel", "none"),
    input_is("none"),
    multiple_of("k", ALIGNMENT),
)


def integer_cost(p: Problem):
    product = estimate(p, operations="int8", memory=triton_w8a8.MEMORY, compute=COMPUTE)
    return product + LAUNCH * p.device.launch


def float8_cost(p: Problem):
    """As the plain kernel's, which it replaces once it is measured to be faster."""
    return triton_fp8.cost(p) + LAUNCH * p.device.launch


@kernel(
    families=["w8a8"],
    device="cuda",
    layout=LAYOUT,
    cost=integer_cost,
    needs=[
        *NEEDS,
        activations_in(torch.bfloat16, torch.float16, torch.float32),
        k_at_most(131071, "the int32 sum could overflow"),
    ],
    epilogues=EPILOGUES,
    faults=[{"dtype": torch.float64}, {"k": 40}, {"k": 131072}],
)
def triton_w8a8_persistent(scheme, x, packed, bias, epilogue):
    codes, scale, _ = scheme.input.quantize(x)
    op = torch.ops.fxquant.triton_persistent_linear.default
    return op(codes, scale, packed[0], packed[1], bias, epilogue, x.dtype)


@kernel(
    families=["wf8af8"],
    device="cuda",
    layout=LAYOUT,
    cost=float8_cost,
    needs=[*NEEDS, activations_in(torch.bfloat16, torch.float16)],  # float8 sums have 14 bits
    epilogues=EPILOGUES,
    faults=[{"dtype": torch.float32}, {"k": 40}],
)
def triton_fp8_persistent(scheme, x, packed, bias, epilogue):
    codes, scale, _ = scheme.input.quantize(x)
    op = torch.ops.fxquant.triton_persistent_linear.default
    return op(codes, scale, packed[0], packed[1], bias, epilogue, x.dtype)
