"""What torch itself has for quantized linears on CUDA: tinygemm, cuBLASLt int8, scaled float8.

They compete with the Triton kernels on the same terms. The constants are fractions of the H200's
row in ``devices``, measured with torch 2.11 at 28672 x 4096.
"""

from __future__ import annotations

import sympy
import torch
import torch.nn.functional as F

from ..affine import code_range, pack_codes, storage_dtype, unpack_codes
from ..scheme import Quantized, Scheme
from .dequantize import LAYOUT
from .kernel import (
    Layout,
    M,
    Need,
    Problem,
    activations_in,
    has_feature,
    kernel,
    multiple_of,
)
from .triton_launch import LIBRARY, estimate, input_is, weight_is
from .triton_w4a16 import grouped

TINYGEMM_MEMORY = 0.45  # 35 us at one row
TINYGEMM_COMPUTE = 0.04  # 8.3 us for every row: each block of 8 columns reads x again
INT_MM_MEMORY = 0.68  # 40 us from 17 to 64 rows
INT_MM_COMPUTE = 0.6  # 694 us at 2048 rows, scales in a second pass
INT_MM_ROWS = 17  # cuBLASLt's int8 product refuses fewer
SCALED_MM_MEMORY = 0.58  # 47 us up to 64 rows
SCALED_MM_COMPUTE = 1.0  # 1,370 TFLOP/s at 2048 rows: at the rate in the device's row


def at_least_rows(least: int) -> Need:
    """At least ``least`` rows where their number is known; else ``cost`` has to keep them away."""
    return lambda p: None if p.m is None or p.m >= least else f"needs {least} rows, here {p.m}"


def inner_tiles(k: int) -> int:
    """k-tiles of 16 that tinygemm keeps together: the most that divide ``k``."""
    return next(tiles for tiles in (8, 4, 2) if k % (tiles * 16) == 0)


def pack_tinygemm(scheme: Scheme, q: Quantized) -> list[torch.Tensor]:
    """words int32 [N / 8, K / (16 * tiles), 32, tiles / 2] and (scale, zero) pairs [K / g, N, 2].

    Code k = 8 p + 2 r + e of each 32 columns is nibble p + 4 e of the word of lane r; the four
    lanes of a row stand side by side.
    """
    dtype = scheme.weight.dtype
    u = (unpack_codes(q.codes, dtype) - code_range(dtype)[0]).to(torch.uint8)
    n, k = u.shape
    tiles = inner_tiles(k)
    lanes = u.reshape(n // 8, 8, k // (16 * tiles), tiles // 2, 4, 4, 2)
    nibbles = lanes.permute(0, 2, 1, 5, 3, 6, 4).reshape(n // 8, k // (16 * tiles), 32, -1, 8)
    words = (nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)).view(torch.int32).squeeze(-1)
    zero = torch.zeros_like(q.scale) if q.zero is None else q.zero
    return [words, torch.stack([q.scale.t(), zero.t()], -1).contiguous()]


def unpack_tinygemm(scheme: Scheme, tensors, n: int, k: int) -> Quantized:
    words, pairs = tensors
    tiles = inner_tiles(k)
    pair = words.unsqueeze(-1).view(torch.uint8)
    nibbles = torch.stack([pair & 15, pair >> 4], -1)
    lanes = nibbles.reshape(n // 8, k // (16 * tiles), 8, 4, tiles // 2, 2, 4)
    u = lanes.permute(0, 2, 1, 4, 6, 3, 5).reshape(n, k)
    spec = scheme.weight
    q = u.to(storage_dtype(spec.dtype)) + code_range(spec.dtype)[0]
    codes = pack_codes(q, spec.dtype)
    scale, zero = (pairs[..., i].t().contiguous() for i in (0, 1))
    return Quantized(codes, scale, None if spec.zero_point_domain == "none" else zero)


ALIGNMENT = 16
"""Bytes: tinygemm loads activations as vectors, and does not look where they start."""


def _tinygemm(x, words, group, pairs):
    x = x.contiguous()
    if x.data_ptr() % ALIGNMENT:
        x = x.clone()
    return torch.ops.aten._weight_int4pack_mm.default(x, words, group, pairs)


LIBRARY.define("tinygemm_mm(Tensor x, Tensor words, int group, Tensor pairs) -> Tensor")
LIBRARY.impl("tinygemm_mm", _tinygemm, "CUDA")


@torch.library.register_fake("fxquant::tinygemm_mm", lib=LIBRARY)
def _tinygemm_fake(x, words, group, pairs):
    return x.new_empty(x.shape[0], pairs.shape[1])


TINYGEMM = Layout(name="tinygemm", pack=pack_tinygemm, unpack=unpack_tinygemm)


def tinygemm_cost(p: Problem) -> sympy.Expr:
    return estimate(p, operations="bfloat16", memory=TINYGEMM_MEMORY, compute=TINYGEMM_COMPUTE)


@kernel(
    families=["w4a16"],
    device="cuda",
    layout=TINYGEMM,
    cost=tinygemm_cost,
    needs=[
        has_feature("sm80"),
        activations_in(torch.bfloat16),
        weight_is("group", "none", "float"),
        grouped(),
        multiple_of("n", 8),
    ],
    faults=[{"dtype": torch.float16}, {"n": 12}, {"k": 48}],
)
def tinygemm(scheme, x, packed, bias, epilogue):
    if x.shape[0] == 0:  # an empty grid is a launch failure
        return x.new_empty(0, packed[1].shape[1])
    words, pairs = packed
    group = scheme.weight.group_size
    y = torch.ops.fxquant.tinygemm_mm(x, words, group, pairs)
    return y if bias is None else y + bias.to(y.dtype)


def int_mm_cost(p: Problem) -> sympy.Expr:
    """Two launches, the second where the scales meet the sums; never chosen for too few rows."""
    product = estimate(p, operations="int8", memory=INT_MM_MEMORY, compute=INT_MM_COMPUTE)
    return sympy.Piecewise((sympy.oo, M < INT_MM_ROWS), (product + p.device.launch, True))


@kernel(
    families=["w8a8"],
    device="cuda",
    layout=LAYOUT,
    cost=int_mm_cost,
    needs=[
        has_feature("sm80"),
        at_least_rows(INT_MM_ROWS),
        activations_in(torch.bfloat16, torch.float16, torch.float32),
        weight_is("channel", "none"),
        input_is("none"),
        multiple_of("k", 8),
        multiple_of("n", 8),
    ],
    faults=[{"m": 16}, {"n": 12}, {"k": 36}],
)
def int_mm(scheme, x, packed, bias, epilogue):
    codes, scale, _ = scheme.input.quantize(x)
    weight, weight_scale = packed
    y = torch._int_mm(codes, weight.t()).float() * scale.float() * weight_scale.float().t()
    return (y if bias is None else y + bias.float()).to(x.dtype)


SLOW_ROWS, WHOLE_ROWS = range(129, 256), 256
"""cuBLASLt takes up to 83 us for so many rows of 28672 x 4096 (6144 x 4096: 21) and 54 (15) for 256."""

WORTH_PADDING = 1 << 24
"""Weights above which that gains more than the 5 us of padding codes and scales."""


def padded(t: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``t`` [rows, ...] with zeros behind it, if its number of rows is one of SLOW_ROWS."""
    rows = t.shape[0]
    if weight.numel() <= WORTH_PADDING or not isinstance(rows, int) or rows not in SLOW_ROWS:
        return t
    # float8 has no operator for it, but zero bytes are zeros
    return F.pad(t.view(torch.uint8), (0, 0, 0, WHOLE_ROWS - rows)).view(t.dtype)


def scaled_mm_cost(p: Problem) -> sympy.Expr:
    return estimate(p, operations="float8", memory=SCALED_MM_MEMORY, compute=SCALED_MM_COMPUTE)


@kernel(
    families=["wf8af8"],
    device="cuda",
    layout=LAYOUT,
    cost=scaled_mm_cost,
    needs=[
        has_feature("sm90"),
        activations_in(torch.bfloat16),  # scales per row and column give bfloat16 only
        weight_is("channel", "none"),
        input_is("none"),
        multiple_of("k", 16),
        multiple_of("n", 16),
    ],
    faults=[{"dtype": torch.float16}, {"n": 24}, {"k": 40}],
)
def scaled_mm(scheme, x, packed, bias, epilogue):
    codes, scale, _ = scheme.input.quantize(x)
    weight, weight_scale = packed
    if x.shape[0] == 0:
        return x.new_empty(0, weight.shape[0])
    y = torch._scaled_mm(
        padded(codes, weight),
        weight.t(),
        scale_a=padded(scale.expand(x.shape[0], 1).contiguous(), weight),
        scale_b=weight_scale.t().contiguous(),
        bias=None if bias is None else bias.to(x.dtype),
        out_dtype=x.dtype,
        use_fast_accum=False,  # else the sums stay in the tensor core's 14 bits
    )
    return y[: x.shape[0]]
