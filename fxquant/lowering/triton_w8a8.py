"""Triton: weights with one scale per channel. int8 x int8 here; ``triton_w8a16`` and ``triton_fp8``
launch the same kernel on other operand types.

    y[m, n] = epilogue(x_scale[m] * weight_scale[n] * sum_k x[m, k] * weight[n, k] + bias[n])
"""

from __future__ import annotations

import torch

from .dequantize import LAYOUT
from .kernel import Problem, activations_in, has_feature, kernel
from .triton_launch import (
    EPILOGUES,
    Tile,
    define,
    estimate,
    has_triton,
    input_is,
    jit,
    k_at_most,
    operand,
    output,
    pick,
    start,
    store,
    tile_of,
    tl,
    weight_is,
)

MEMORY = 0.87  # of the bandwidth on wide layers; few columns leave multiprocessors idle
COMPUTE = 0.94  # of the int8 rate: the largest tile, plain pointers, 1,085 of 1,150 TOPS

INTEGER_TILES = (
    (16, Tile(16, 64, 256, 4, 4)),
    (32, Tile(32, 64, 256, 4, 4)),
    (64, Tile(64, 64, 128, 4, 4)),
    (256, Tile(64, 128, 128, 4, 4)),
    (None, Tile(128, 256, 128, 8, 3)),
)
FLOAT_TILES = (
    (16, Tile(16, 64, 128, 4, 6)),
    (32, Tile(32, 64, 128, 4, 5)),
    (64, Tile(64, 64, 128, 4, 3)),
    (None, Tile(128, 128, 64, 8, 4)),
)
SWAP_UP_TO = 32
"""Up to this many rows a tile the weight is the left operand, so that its 64 rows fill wgmma."""


@jit
def channel_linear_kernel(
    x, x_scale, weight, weight_scale, bias, y, M: int, N, K, stride_xm,
    HAS_X_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, EPILOGUE: tl.constexpr,
    OPERAND: tl.constexpr, ACC: tl.constexpr, IMPRECISE: tl.constexpr,
    SWAP: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N))
    offs_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    # Columns past the edge read the last row again: no mask on the weight, and never stored.
    rows_n = tl.minimum(offs_n, N - 1)
    x_at = x + offs_m.to(tl.int64)[:, None] * stride_xm + offs_k[None, :]
    w_at = weight + rows_n.to(tl.int64)[:, None] * K + offs_k[None, :]
    in_m = offs_m[:, None] < M

    acc = tl.zeros((BLOCK_N, BLOCK_M), ACC) if SWAP else tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for k in range(0, K, BLOCK_K):
        if EVEN_K:
            a = tl.load(x_at + k, in_m, other=0.0)
            w = tl.load(w_at + k)
        else:
            in_k = offs_k[None, :] < K - k
            a = tl.load(x_at + k, in_m & in_k, other=0.0)
            w = tl.load(w_at + k, in_k, other=0.0)
        a, w = a.to(OPERAND), w.to(OPERAND)
        if SWAP:
            acc = tl.dot(w, tl.trans(a), acc, out_dtype=ACC, max_num_imprecise_acc=IMPRECISE)
        else:
            acc = tl.dot(a, tl.trans(w), acc, out_dtype=ACC, max_num_imprecise_acc=IMPRECISE)
    if SWAP:
        acc = tl.trans(acc)

    out = acc.to(tl.float32)
    if HAS_X_SCALE:
        out *= tl.load(x_scale + tl.minimum(offs_m, M - 1)).to(tl.float32)[:, None]
    out *= tl.load(weight_scale + rows_n).to(tl.float32)[None, :]
    store(out, y, bias, offs_m, offs_n, M, N, HAS_BIAS, EPILOGUE)


def _fake(x, x_scale, weight, weight_scale, bias, epilogue, dtype):
    return x.new_empty(x.shape[0], weight.shape[0], dtype=dtype)


@define(
    "triton_channel_linear(Tensor x, Tensor? x_scale, Tensor weight, Tensor weight_scale,"
    " Tensor? bias, str epilogue, ScalarType dtype) -> Tensor",
    _fake,
)
def launch(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    epilogue: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    """x[M, K] times weight[N, K]: both int8, both float8, or x 16-bit; y in ``dtype``."""
    (rows, k), n = x.shape, weight.shape[0]
    y = output(x, rows, n, dtype)
    if y.numel() == 0:
        return y.to(dtype)
    integer, float8 = x.dtype == torch.int8, x.dtype == torch.float8_e4m3fn
    tile = pick(INTEGER_TILES if x.dtype.itemsize == 1 else FLOAT_TILES, rows)
    x = x if x.stride(1) == 1 else x.contiguous()
    weight = weight.contiguous()
    if x_scale is not None:
        x_scale = x_scale.expand(rows, 1).contiguous()
    scale = weight_scale.contiguous()
    arguments = (x, x_scale, weight, scale, bias, y, rows, n, k, x.stride(0))
    constants = {
        "HAS_X_SCALE": x_scale is not None,
        "HAS_BIAS": bias is not None,
        "EPILOGUE": epilogue,
        "OPERAND": operand(x.dtype),
        "ACC": tl.int32 if integer else tl.float32,
        # Hopper sums float8 products in 14 bits: move them into float32 after every step.
        "IMPRECISE": tile.k if float8 else None,
        "SWAP": x.dtype.itemsize != 1 or tile.m <= SWAP_UP_TO,
        "EVEN_K": k % tile.k == 0,
        **tile.constants,
    }
    start(channel_linear_kernel, tile.programs(rows, n), arguments, constants, **tile.options)
    return y.to(dtype)


def cost(p: Problem):
    return estimate(p, operations="int8", memory=MEMORY, compute=COMPUTE)


@kernel(
    families=["w8a8"],
    device="cuda",
    layout=LAYOUT,
    cost=cost,
    needs=[
        has_triton,
        has_feature("sm80"),
        activations_in(torch.bfloat16, torch.float16, torch.float32),
        weight_is("channel", "none"),
        input_is("none"),
        k_at_most(131071, "the int32 sum could overflow"),
    ],
    epilogues=EPILOGUES,
    faults=[{"dtype": torch.float64}, {"k": 131072}],
)
def triton_w8a8(scheme, x, packed, bias, epilogue):
    codes, scale, _ = scheme.input.quantize(x)
    op = torch.ops.fxquant.triton_channel_linear.default
    return op(codes, scale, packed[0], packed[1], bias, epilogue, x.dtype)
