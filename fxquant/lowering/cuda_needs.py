"""What the CUDA C++ kernels ask of a problem."""

from __future__ import annotations

import torch

from . import nvrtc
from .cuda_layout import BLOCK
from .kernel import Problem, activations_in, has_feature, multiple_of
from .triton_launch import input_is, k_at_most, weight_bytes, weight_is


def compiles(p: Problem) -> str | None:
    return nvrtc.refusal()


GROUPS = (32, 64, 128, 256)


def grouped(p: Problem) -> str | None:
    """Groups that the stream holds, which divide k."""
    size = p.scheme.weight.group_size
    if size not in GROUPS or p.scheme.weight.scale_dtype != torch.bfloat16:
        return f"takes groups of {', '.join(map(str, GROUPS))} with bfloat16 scales, not {size}"
    return None if p.k % size == 0 else f"k = {p.k} is not a multiple of group_size {size}"


def stream_holds(p: Problem) -> str | None:
    """The weight is of a form that the stream has."""
    w = p.scheme.weight
    if w.granularity == "channel":
        return None if w.zero_point_domain == "none" else "takes no zero points per channel"
    return grouped(p)


HALF = activations_in(torch.bfloat16, torch.float16)
ANY_FLOAT = activations_in(torch.bfloat16, torch.float16, torch.float32)


def addressable(p: Problem) -> str | None:
    """Offsets in the stream have 32 bits."""
    size = weight_bytes(p)
    return None if size < 1 << 32 else f"takes weights under 4 GiB, not {size / 2**30:.1f}"


COMMON = (compiles, has_feature("hopper"), multiple_of("k", BLOCK), addressable)

UNZEROED = (
    weight_is("channel", "none"),
    input_is("none"),
    k_at_most(131071, "the int32 sum could overflow"),
)
"""Sums of 8-bit products that a scale of each row and channel makes the result."""
