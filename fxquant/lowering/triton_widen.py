"""Triton: quantized activations as the bfloat16 integers that ``cuda_pipeline_w4a8_widened`` multiplies.

In each block of 32 k the four of a lane, for each half, lie as 16-bit products take weights out of a word:
the even ones, then the odd. (On an H200 what torch and Inductor make of this took 11 us for 2048 x 4096 and
37 for 2048 x 14336.)
"""

from __future__ import annotations

import torch

from ..ops import define
from .triton_launch import HAS_TRITON, LIBRARY, jit, overlaps, start, tl, wait_for_previous_kernel

BLOCK = (2, 4, 2, 2)
"""Of k: the half, the lane, the pair, and which of the pair."""


@define("widen(Tensor codes, Tensor zero) -> Tensor")
def widen(codes: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """``codes`` [m, k] int8 less ``zero`` [m, 1], in the lanes' order: integers up to 255, which bfloat16
    holds. k is a multiple of 32."""
    blocks = codes.unflatten(-1, (-1, *BLOCK))
    lanes = blocks.permute(0, 1, 5, 2, 3, 4).flatten(1)
    return lanes - zero.to(torch.bfloat16)


@jit
def in_lanes(values, COUNT: tl.constexpr):
    """``values`` [COUNT] of consecutive k in the lanes' order."""
    blocks = tl.reshape(values, (COUNT // 32, 2, 4, 2, 2))
    return tl.reshape(tl.permute(blocks, (0, 4, 1, 2, 3)), (COUNT,))


@jit
def widen_kernel(codes, zero, out, K, COUNT: tl.constexpr, OVERLAP: tl.constexpr):
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, COUNT)
    wait_for_previous_kernel(OVERLAP)
    values = tl.load(codes + row * K + at, at < K, 0).to(tl.float32) - tl.load(zero + row)
    tl.store(out + row * K + at, in_lanes(values, COUNT).to(out.dtype.element_ty), at < K)


def launch(codes: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """``widen`` in one kernel, where torch's own operators take three."""
    rows, k = codes.shape
    out = torch.empty(codes.shape, dtype=torch.bfloat16, device=codes.device)
    if out.numel():
        count = 1 << (k - 1).bit_length()
        zero = zero.expand(rows, 1).contiguous()
        constants = {"COUNT": count, "OVERLAP": overlaps(codes.device)}
        warps = min(max(count // 1024, 4), 16)
        start(widen_kernel, rows, (codes.contiguous(), zero, out, k), constants, num_warps=warps)
    return out


if HAS_TRITON:  # torch's operators serve without it
    LIBRARY.impl("widen", launch, "CUDA")
