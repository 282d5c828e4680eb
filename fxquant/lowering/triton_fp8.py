"""Triton: float8 weights per channel times float8 activations per token."""

from __future__ import annotations

import torch

from .dequantize import LAYOUT
from .kernel import Problem, activations_in, has_feature, kernel
from .triton_launch import EPILOGUES, estimate, has_triton, input_is, weight_is

MEMORY = 0.85  # of the bandwidth: 31 us for 28672 x 4096 at one row on an H200
COMPUTE = 0.43  # of the float8 rate: sums leave the tensor core after every step


def cost(p: Problem):
    return estimate(p, operations="float8", memory=MEMORY, compute=COMPUTE)


@kernel(
    families=["wf8af8"],
    device="cuda",
    layout=LAYOUT,
    cost=cost,
    needs=[
        has_triton,
        has_feature("sm89"),
        activations_in(torch.bfloat16, torch.float16),  # float8 sums have 14 bits
        weight_is("channel", "none"),
        input_is("none"),
    ],
    epilogues=EPILOGUES,
    faults=[{"dtype": torch.float32}],
)
def triton_fp8(scheme, x, packed, bias, epilogue):
    codes, scale, _ = scheme.input.quantize(x)
    op = torch.ops.fxquant.triton_channel_linear.default
    return op(codes, scale, packed[0], packed[1], bias, epilogue, x.dtype)
