"""Triton: 4-bit weights in groups times int8 activations per token, multiplied as integers.

    y[m, n] = epilogue(x_scale[m] * (sum_g scale[n, g] * sum_k xq[m, k] * q[n, k]
                                     - x_zero[m] * weight_sum[n]) + bias[n])

The inner sums are exact int32; ``weight_sum[n] = sum_g scale[n, g] * sum_k q[n, k]`` is packed.
"""

from __future__ import annotations

import torch

from ..affine import unpack_codes
from ..scheme import Quantized, Scheme
from .kernel import Layout, Problem, activations_in, has_feature, kernel
from .triton_launch import EPILOGUES, estimate, has_triton, input_is, weight_is
from .triton_w4a16 import grouped

MEMORY = 0.25  # of the bandwidth in groups of 128, 57 us for 28672 x 4096 (0.16 in 32)
COMPUTE = 0.34  # of the int8 rate in groups of 128: each int32 sum is scaled (0.13 in 32)


def pack(scheme: Scheme, q: Quantized) -> list[torch.Tensor]:
    """codes, scale [K / g, N], weight_sum [N] (float32, summed in float64)."""
    codes = unpack_codes(q.codes, scheme.weight.dtype).to(torch.int32)
    groups = codes.reshape(*q.scale.shape, -1).sum(-1)
    weight_sum = (groups.double() * q.scale.double()).sum(-1).float()
    return [q.codes, q.scale.t().contiguous(), weight_sum]


def unpack(scheme: Scheme, tensors, n: int, k: int) -> Quantized:
    return Quantized(tensors[0], tensors[1].t().contiguous(), None)


GROUPED_SUM = Layout(name="grouped_sum", pack=pack, unpack=unpack)


def cost(p: Problem):
    return estimate(p, operations="int8", memory=MEMORY, compute=COMPUTE)


@kernel(
    families=["w4a8"],
    device="cuda",
    layout=GROUPED_SUM,
    cost=cost,
    needs=[
        has_triton,
        has_feature("sm80"),
        activations_in(torch.bfloat16, torch.float16, torch.float32),
        weight_is("group", "none"),
        input_is("none", "int"),
        grouped(),
    ],
    epilogues=EPILOGUES,
    faults=[{"dtype": torch.float64}, {"k": 48}],
)
def triton_w4a8(scheme, x, packed, bias, epilogue):
    codes, scale, weight_sum = packed
    q = scheme.input.quantize(x)
    w = scheme.weight
    return torch.ops.fxquant.triton_group_linear.default(
        q.codes, q.scale, q.zero, codes, scale, None, weight_sum, bias,
        w.bits, w.group_size, epilogue, x.dtype,
    )  # fmt: skip
