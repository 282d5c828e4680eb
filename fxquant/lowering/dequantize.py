"""dequantize: any scheme, any device, any layout: the weight in the activations' dtype, then linear.

The last candidate of every scheme: at many rows the product dominates and this is the float linear
plus a few passes over the weight.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..scheme import Quantized
from .cost import roofline
from .kernel import CANONICAL, Layout, Problem, kernel


def _identity_pack(scheme, q: Quantized) -> list[torch.Tensor]:
    return [t for t in q if t is not None]


def _identity_unpack(scheme, packed, n: int, k: int) -> Quantized:
    return Quantized(packed[0], packed[1], packed[2] if len(packed) > 2 else None)


LAYOUT = Layout(name=CANONICAL, pack=_identity_pack, unpack=_identity_unpack)

UNPACK = {"cpu": 64, "cuda": 40}
"""Bytes' worth of time that unpacking and writing one weight costs, pass by pass, before the product. From
the layout of the CPU's kernels 3.2 ns for a code of 8 bits and 5.4 of 4, on one Zen 4 core."""


def _cost(problem: Problem):
    weights, device = problem.n * problem.k, problem.device
    operand = "float32" if problem.dtype == torch.float32 else "bfloat16"
    unpacking = UNPACK.get(device.type, UNPACK["cpu"]) * weights / device.bandwidth
    return unpacking + roofline(problem, weight_bytes=2 * weights, operations=operand)


@kernel(
    families=("w8a8", "w4a8", "w8a16", "w4a16", "w3a16", "w2a16", "wf8a16", "wf8af8"),
    device="any",
    layout=LAYOUT,
    cost=_cost,
)
def dequantize(scheme, x, packed, bias, epilogue):
    """``x @ dequantize(packed).T + bias``; dynamic activations are quantized and dequantized."""
    if bias is not None and bias.dtype.itemsize > x.dtype.itemsize:
        # it holds what a zero point added to the sum, which must not be rounded before
        return dequantize(scheme, x.to(bias.dtype), packed, bias, epilogue).to(x.dtype)
    if scheme.input is not None:
        x = scheme.input.dequantize(scheme.input.quantize(x), x.dtype)
    w = scheme.weight.dequantize(_identity_unpack(scheme, packed, 0, 0), x.dtype)
    return F.linear(x, w, bias)
