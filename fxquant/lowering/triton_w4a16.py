"""Triton: 4-bit and 2-bit weights in groups, 16-bit activations. ``triton_w4a8`` launches the same
kernel on int8 activations.

    y[m, n] = epilogue(sum_g (scale[n, g] * sum_k x[m, k] * (u[n, k] - mid)
                              + zero[n, g] * sum_k x[m, k]) + bias[n])

The codes are read as they are stored, ``per`` of them in a byte. Code ``i`` of byte ``j`` meets
activation ``per * j + i``, so the activations are read as words of ``per`` elements, and each
byte plane is a dot of its own with the matching plane of the words: nothing is interleaved.
"""

from __future__ import annotations

import torch

from ..scheme import Quantized, Scheme
from .kernel import Layout, Need, Problem, activations_in, has_feature, kernel
from .triton_launch import (
    EPILOGUES,
    Tile,
    define,
    estimate,
    has_triton,
    jit,
    operand,
    output,
    pick,
    start,
    store,
    tile_of,
    tl,
    weight_is,
)

MEMORY = 0.17  # of the bandwidth, 92 us for 28672 x 4096: unpacking sets the pace
COMPUTE = 0.22  # of the bfloat16 rate: unpacking, and a scale for every group of the sum

TILES = (  # the depth comes from the group size
    (16, Tile(16, 64, 0, 4, 5)),
    (32, Tile(32, 64, 0, 4, 4)),
    (64, Tile(64, 64, 0, 4, 4)),
    (None, Tile(128, 128, 0, 8, 3)),
)
WORDS = {(1, 2): torch.int16, (2, 2): torch.int32, (2, 4): torch.int64}
"""(bytes of an activation, codes in a byte) -> the word that holds the activations of a byte."""


@jit
def group_linear_kernel(
    x, x_scale, x_zero, weight, scale, zero, weight_sum, bias, y, M: int, N, KB,
    ELEMENT: tl.constexpr, OPERAND: tl.constexpr, HAS_X_SCALE: tl.constexpr,
    HAS_X_ZERO: tl.constexpr, HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr,
    EPILOGUE: tl.constexpr, ACC: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """``x`` points to words, ``KB`` counts bytes of a row; ``GROUP`` is in bytes as well."""
    PER: tl.constexpr = 8 // BITS
    SPAN: tl.constexpr = (BLOCK_B + GROUP - 1) // GROUP  # groups in a step
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N))
    offs_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_b = tl.arange(0, BLOCK_B)
    rows_n = tl.minimum(offs_n, N - 1)
    x_at = x + offs_m.to(tl.int64)[:, None] * KB + offs_b[None, :]
    w_at = weight + rows_n.to(tl.int64)[:, None] * KB + offs_b[None, :]
    in_m = offs_m[:, None] < M

    # The weight is the left operand: it goes from registers into the tensor core, and 16 rows of
    # activations make a full wgmma.
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for b in range(0, KB, BLOCK_B):
        if EVEN:
            words = tl.load(x_at + b, in_m, other=0)
            codes = tl.load(w_at + b)
        else:
            in_b = offs_b[None, :] < KB - b
            words = tl.load(x_at + b, in_m & in_b, other=0)
            codes = tl.load(w_at + b, in_b, other=0)
        for s in tl.static_range(SPAN):
            part = tl.zeros((BLOCK_N, BLOCK_M), ACC)
            x_sum = tl.zeros((BLOCK_M,), tl.float32)
            for i in tl.static_range(PER):
                u = (codes >> (BITS * i)) & ((1 << BITS) - 1)
                w = (u.to(tl.int8) - (1 << (BITS - 1))).to(OPERAND)
                if tl.int8 == ELEMENT:
                    a = (words >> (8 * i)).to(tl.int8)
                else:
                    a = (words >> (16 * i)).to(tl.int16).to(ELEMENT, bitcast=True).to(OPERAND)
                if SPAN > 1:  # the tensor core's shortest dot is longer than a group: one at a time
                    a = tl.where((offs_b // GROUP == s)[None, :], a, tl.zeros_like(a))
                part = tl.dot(w, tl.trans(a), part, out_dtype=ACC)
                if HAS_ZERO:
                    x_sum += tl.sum(a.to(tl.float32), 1)
            # A step may end past the last group: it adds nothing there, with any scale.
            g = tl.minimum(b // GROUP + s, KB // GROUP - 1)
            at = g.to(tl.int64) * N + rows_n
            acc += part.to(tl.float32) * tl.load(scale + at).to(tl.float32)[:, None]
            if HAS_ZERO:
                acc += tl.load(zero + at).to(tl.float32)[:, None] * x_sum[None, :]

    out = tl.trans(acc)
    rows_m = tl.minimum(offs_m, M - 1)
    if HAS_X_ZERO:
        shift = tl.load(x_zero + rows_m).to(tl.float32)
        out -= shift[:, None] * tl.load(weight_sum + rows_n)[None, :]
    if HAS_X_SCALE:
        out *= tl.load(x_scale + rows_m).to(tl.float32)[:, None]
    store(out, y, bias, offs_m, offs_n, M, N, HAS_BIAS, EPILOGUE)


def _fake(
    x, x_scale, x_zero, weight, scale, zero, weight_sum, bias, bits, group_size, epilogue, dtype
):
    return x.new_empty(x.shape[0], weight.shape[0], dtype=dtype)


@define(
    "triton_group_linear(Tensor x, Tensor? x_scale, Tensor? x_zero, Tensor weight, Tensor scale,"
    " Tensor? zero, Tensor? weight_sum, Tensor? bias, int bits, int group_size, str epilogue,"
    " ScalarType dtype) -> Tensor",
    _fake,
)
def launch(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    x_zero: torch.Tensor | None,
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    weight_sum: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    group_size: int,
    epilogue: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    """x[M, K] (16-bit float or int8) times weight[N, K * bits / 8]; scale, zero [K / g, N]."""
    rows, (n, bytes_) = x.shape[0], weight.shape
    y = output(x, rows, n, dtype)
    if y.numel() == 0:
        return y.to(dtype)
    per = 8 // bits
    integer = x.dtype == torch.int8
    group = group_size // per
    depth = max(32 if integer else 16, min(group, 64))
    tile = pick(TILES, rows)
    x = x.contiguous()
    if x.storage_offset() % per:  # a word must not straddle
        x = x.clone()
    if x_scale is not None:
        x_scale = x_scale.expand(rows, 1).contiguous()
    if x_zero is not None:
        x_zero = x_zero.expand(rows, 1).contiguous()
    element = tl.bfloat16 if x.dtype == torch.bfloat16 else operand(x.dtype)
    arguments = (
        *(x.view(WORDS[x.dtype.itemsize, per]), x_scale, x_zero, weight.contiguous()),
        *(scale.contiguous(), None if zero is None else zero.contiguous(), weight_sum, bias, y),
        *(rows, n, bytes_),
    )
    constants = {
        "ELEMENT": element,
        "OPERAND": operand(x.dtype),
        "HAS_X_SCALE": x_scale is not None,
        "HAS_X_ZERO": x_zero is not None,
        "HAS_ZERO": zero is not None,
        "HAS_BIAS": bias is not None,
        "EPILOGUE": epilogue,
        "ACC": tl.int32 if integer else tl.float32,
        "BITS": bits,
        "GROUP": group,
        "EVEN": bytes_ % depth == 0,
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
        "BLOCK_B": depth,
    }
    start(group_linear_kernel, tile.programs(rows, n), arguments, constants, **tile.options)
    return y.to(dtype)


def pack(scheme: Scheme, q: Quantized) -> list[torch.Tensor]:
    extras = [q.scale] if q.zero is None else [q.scale, q.zero]
    return [q.codes, *(t.t().contiguous() for t in extras)]


def unpack(scheme: Scheme, tensors, n: int, k: int) -> Quantized:
    codes, scale, *zero = tensors
    return Quantized(codes, scale.t().contiguous(), zero[0].t().contiguous() if zero else None)


GROUPED = Layout(name="grouped", pack=pack, unpack=unpack)
"""codes as they are; scale and zero as [K / g, N], so that the scales of a step are contiguous."""


def grouped() -> Need:
    """Groups of a power of two, which divide k."""

    def need(p: Problem) -> str | None:
        size = p.scheme.weight.group_size
        if size not in (32, 64, 128, 256):
            return f"takes groups of 32, 64, 128 or 256, not {size}"
        return None if p.k % size == 0 else f"k = {p.k} is not a multiple of group_size {size}"

    return need


def cost(p: Problem):
    return estimate(p, operations="bfloat16", memory=MEMORY, compute=COMPUTE)


@kernel(
    families=["w4a16", "w2a16"],
    device="cuda",
    layout=GROUPED,
    cost=cost,
    needs=[
        has_triton,
        has_feature("sm80"),
        activations_in(torch.bfloat16, torch.float16),
        weight_is("group", "none", "float"),
        grouped(),
    ],
    epilogues=EPILOGUES,
    faults=[{"dtype": torch.float32}, {"k": 48}],
)
def triton_w4a16(scheme, x, packed, bias, epilogue):
    codes, scale, *zero = packed
    w = scheme.weight
    return torch.ops.fxquant.triton_group_linear.default(
        x, None, None, codes, scale, zero[0] if zero else None, None, bias,
        w.bits, w.group_size, epilogue, x.dtype,
    )  # fmt: skip
