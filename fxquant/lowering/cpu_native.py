"""Kernels on any CPU: quantized weights by the C++ of ``native/``, one layout for all rows.

Activations are quantized in Inductor's loops, those that produce them (``loops.py``).
Rates were measured on two Zen 4 cores, against oneDNN at its best: 8-bit formats reach it, groups
cost a tenth. A few rows are limited by the weight's bytes, in every format.
"""

from __future__ import annotations

import torch

from . import native
from .cost import roofline
from .kernel import Problem, activations_in, kernel, multiple_of
from .native_linear import ACTIVATIONS, LAYOUT, REAL

EPILOGUES = tuple(name for name in ACTIVATIONS if name)
GROUPED = 0.9
"""Rate of grouped weights over the others': a scale for every group of the sum."""


def _built(problem: Problem) -> str | None:
    return native.refusal()


def _int32_suffices(problem: Problem) -> str | None:
    limit = 2**31 // (128 * 128)
    return None if problem.k < limit else f"k = {problem.k}: an int32 sum holds k below {limit}"


def _whole_groups(problem: Problem) -> str | None:
    return multiple_of("k", problem.scheme.weight.group_size or 1)(problem)


def _cost(problem: Problem):
    spec, features = problem.scheme.weight, problem.device.features
    operations = "float32"  # whatever has no instruction of its own
    if problem.scheme.input is not None and problem.scheme.input.dtype == torch.int8:
        operations = "vector_int8" if "avx512_vnni" in features else operations
    elif problem.dtype == torch.bfloat16 or problem.scheme.input is not None:
        operations = "vector_bfloat16" if "avx512_bf16" in features else operations
    bits: float = spec.bits
    if spec.group_size is not None:
        bits += 16 * (2 if spec.zero_point_domain == "float" else 1) / spec.group_size
    return roofline(
        problem,
        weight_bytes=problem.n * problem.k * bits / 8,
        operations=operations,
        efficiency=1.0 if spec.group_size is None else GROUPED,
    )


@kernel(
    families=("w8a8",),
    device="cpu",
    layout=LAYOUT,
    cost=_cost,
    needs=(activations_in(*REAL), _int32_suffices, _built),
    epilogues=EPILOGUES,
    faults=({"dtype": torch.float64}, {"k": 2**17}),
)
def native_w8a8(scheme, x, packed, bias, epilogue):
    """An exact integer product, rescaled by row and channel."""
    codes, scale, zero = scheme.input.quantize(x)
    return torch.ops.fxquant.native_linear(
        codes, scale, zero, packed, bias, scheme.name, epilogue, x.dtype
    )


@kernel(
    families=("w4a8",),
    device="cpu",
    layout=LAYOUT,
    cost=_cost,
    needs=(activations_in(*REAL), _whole_groups, _built),
    epilogues=EPILOGUES,
    faults=({"dtype": torch.float64}, {"k": 48}),
)
def native_w4a8(scheme, x, packed, bias, epilogue):
    """An exact integer product within each group, the groups added up in float32."""
    codes, scale, zero = scheme.input.quantize(x)
    return torch.ops.fxquant.native_linear(
        codes, scale, zero, packed, bias, scheme.name, epilogue, x.dtype
    )


@kernel(
    families=("w8a16", "wf8a16"),
    device="cpu",
    layout=LAYOUT,
    cost=_cost,
    needs=(activations_in(*REAL), _built),
    epilogues=EPILOGUES,
    faults=({"dtype": torch.float64},),
)
def native_w8a16(scheme, x, packed, bias, epilogue):
    """Codes are exact in the type of the product; the channel's scale comes last."""
    return torch.ops.fxquant.native_linear(
        x, None, None, packed, bias, scheme.name, epilogue, x.dtype
    )


@kernel(
    families=("w4a16", "w2a16"),
    device="cpu",
    layout=LAYOUT,
    cost=_cost,
    needs=(activations_in(*REAL), _whole_groups, _built),
    epilogues=EPILOGUES,
    faults=({"dtype": torch.float64}, {"k": 48}),
)
def native_w4a16(scheme, x, packed, bias, epilogue):
    """Codes are exact in the type of the product; scale and zero point meet each group's sum."""
    return torch.ops.fxquant.native_linear(
        x, None, None, packed, bias, scheme.name, epilogue, x.dtype
    )


@kernel(
    families=("wf8af8",),
    device="cpu",
    layout=LAYOUT,
    cost=_cost,
    needs=(activations_in(*REAL), _built),
    epilogues=EPILOGUES,
    faults=({"dtype": torch.float64},),
)
def native_wf8af8(scheme, x, packed, bias, epilogue):
    """Both operands are exact in bfloat16, and so is each of their products in float32."""
    codes, scale, _ = scheme.input.quantize(x)
    return torch.ops.fxquant.native_linear(
        codes.to(torch.bfloat16), scale, None, packed, bias, scheme.name, epilogue, x.dtype
    )
