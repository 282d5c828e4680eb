"""Triton: int8 or float8 weights with one scale per channel, 16-bit activations.

Both kinds of codes are exact in float16 and bfloat16, so that the product is exact and the scale
is applied once, to the float32 sum.
"""

from __future__ import annotations

import torch

from .dequantize import LAYOUT
from .kernel import Problem, activations_in, has_feature, kernel
from .triton_launch import EPILOGUES, estimate, has_triton, weight_is

MEMORY = 0.54  # of the bandwidth: the conversion of the codes sets the pace, 2.3 TB/s
COMPUTE = 0.61  # of the bfloat16 rate: the weight passes through registers


def cost(p: Problem):
    return estimate(p, operations="bfloat16", memory=MEMORY, compute=COMPUTE)


def _linear(scheme, x, packed, bias, epilogue):
    op = torch.ops.fxquant.triton_channel_linear.default
    return op(x, None, packed[0], packed[1], bias, epilogue, x.dtype)


@kernel(
    families=["w8a16"],
    device="cuda",
    layout=LAYOUT,
    cost=cost,
    needs=[
        has_triton,
        has_feature("sm80"),
        activations_in(torch.bfloat16, torch.float16),
        weight_is("channel", "none"),
    ],
    epilogues=EPILOGUES,
    faults=[{"dtype": torch.float32}],
)
def triton_w8a16(scheme, x, packed, bias, epilogue):
    return _linear(scheme, x, packed, bias, epilogue)


@kernel(
    families=["wf8a16"],
    device="cuda",
    layout=LAYOUT,
    cost=cost,
    needs=[
        has_triton,
        has_feature("sm89"),
        activations_in(torch.bfloat16, torch.float16),
        weight_is("channel", "none"),
    ],
    epilogues=EPILOGUES,
    faults=[{"dtype": torch.float32}],
)
def triton_wf8a16(scheme, x, packed, bias, epilogue):
    return _linear(scheme, x, packed, bias, epilogue)
