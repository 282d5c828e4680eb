"""What torch itself has for quantized linears on CUDA: tinygemm, cuBLASLt int8, scaled float8.

They compete with the Triton kernels on the same terms. The constants are fractions of the
datasheet's rates (H200: 4.8 TB/s, 989 bfloat16, 1979 int8 and float8 TFLOP/s) that were measured
with torch 2.11 at 28672 x 4096.
"""

from __future__ import annotations

import sympy
import torch

from ..affine import pack_codes, unpack_codes
from ..scheme import Quantized, Scheme
from .kernel import Layout, Need, Problem, activations_in, has_feature, kernel, multiple_of
from .triton_launch import input_is, roofline, weight_is
from .triton_w4a16 import grouped
from .triton_w8a8 import CHANNEL

TINYGEMM_MEMORY = 0.40  # 35 us at one row
TINYGEMM_COMPUTE = 0.028  # 8.3 us more for every row: each block of 8 columns reads x again
INT_MM_MEMORY = 0.65  # 35 us up to 64 rows
INT_MM_COMPUTE = 0.23  # 850 TOPS alone, 460 with the scales applied in a second pass
SCALED_MM_MEMORY = 0.55  # 38 to 48 us up to 16 rows
SCALED_MM_COMPUTE = 0.55


def at_least_rows(least: int) -> Need:
    """The number of rows is known and at least ``least``."""

    def need(p: Problem) -> str | None:
        found = "an unknown number" if p.m is None else p.m
        return None if p.m is not None and p.m >= least else f"needs {least} rows, here {found}"

    return need


def inner_tiles(k: int) -> int:
    """k-tiles of 16 that tinygemm keeps together: the most that divide ``k``."""
    return next(tiles for tiles in (8, 4, 2) if k % (tiles * 16) == 0)


def pack_tinygemm(scheme: Scheme, q: Quantized) -> list[torch.Tensor]:
    """words int32 [N / 8, K / (16 * tiles), 32, tiles / 2] and (scale, zero) pairs [K / g, N, 2].

    Code k = 8 p + 2 r + e of each 32 columns is nibble p + 4 e of the word of lane r; the four
    lanes of a row stand side by side.
    """
    u = unpack_codes(q.codes, scheme.weight.dtype)
    if u.dtype == torch.int8:
        u = (u + 8).to(torch.uint8)
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
    codes = pack_codes(u.to(torch.int8) - 8 if spec.dtype == torch.int4 else u, spec.dtype)
    scale, zero = (pairs[..., i].t().contiguous() for i in (0, 1))
    return Quantized(codes, scale, None if spec.zero_point_domain == "none" else zero)


TINYGEMM = Layout(name="tinygemm", pack=pack_tinygemm, unpack=unpack_tinygemm)


def tinygemm_cost(p: Problem) -> sympy.Expr:
    return roofline(p, peak="bfloat16", memory=TINYGEMM_MEMORY, compute=TINYGEMM_COMPUTE)


@kernel(
    families=["w4a16"],
    device="cuda",
    layout=TINYGEMM,
    cost=tinygemm_cost,
    needs=[
        has_feature("sm80"),
        at_least_rows(1),
        activations_in(torch.bfloat16),
        weight_is("group", "none", "float"),
        grouped(),
        multiple_of("n", 8),
    ],
    faults=[{"dtype": torch.float16}, {"n": 12}, {"k": 48}],
)
def tinygemm(scheme, x, packed, bias, epilogue):
    words, pairs = packed
    group = scheme.weight.group_size
    y = torch.ops.aten._weight_int4pack_mm.default(x.contiguous(), words, group, pairs)
    return y if bias is None else y + bias.to(y.dtype)


def int_mm_cost(p: Problem) -> sympy.Expr:
    """A second launch where the scales meet the int32 sums."""
    product = roofline(p, peak="int8", memory=INT_MM_MEMORY, compute=INT_MM_COMPUTE)
    return product + p.device.launch


@kernel(
    families=["w8a8"],
    device="cuda",
    layout=CHANNEL,
    cost=int_mm_cost,
    needs=[
        has_feature("sm80"),
        at_least_rows(17),  # cuBLASLt's int8 product refuses fewer
        activations_in(torch.bfloat16, torch.float16, torch.float32),
        weight_is("channel", "none"),
        input_is("none"),
        multiple_of("k", 8),
        multiple_of("n", 8),
    ],
    faults=[{"m": 16}, {"n": 12}, {"k": 36}, {"m": None}],
)
def int_mm(scheme, x, packed, bias, epilogue):
    codes, scale, _ = scheme.input.quantize(x)
    weight, weight_scale = packed
    y = torch._int_mm(codes, weight.t()).float() * scale.float() * weight_scale.float().t()
    return (y if bias is None else y + bias.float()).to(x.dtype)


def scaled_mm_cost(p: Problem) -> sympy.Expr:
    return roofline(p, peak="float8", memory=SCALED_MM_MEMORY, compute=SCALED_MM_COMPUTE)


@kernel(
    families=["wf8af8"],
    device="cuda",
    layout=CHANNEL,
    cost=scaled_mm_cost,
    needs=[
        has_feature("sm90"),
        at_least_rows(1),
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
    return torch._scaled_mm(
        codes,
        weight.t(),
        scale_a=scale.expand(x.shape[0], 1).contiguous(),
        scale_b=weight_scale.t().contiguous(),
        bias=None if bias is None else bias.to(x.dtype),
        out_dtype=x.dtype,
        use_fast_accum=False,  # else the sums stay in the tensor core's 14 bits
    )
