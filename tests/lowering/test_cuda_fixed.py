"""One row of activations as fixed-point numbers (``cuda/fixed.cuh``)."""

from __future__ import annotations

import itertools

import pytest
import torch

from fxquant.lowering import cuda_layout, cuda_stream
from fxquant.lowering.cuda_shapes import Shape
from fxquant.scheme import get_scheme
from tests.lowering.test_cuda_kernels import needs_hopper


@needs_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", ["int4wo-32", "int4wo-64", "int4wo-128"])
@torch.no_grad()
def test_one_row_loses_nothing_as_fixed_point_numbers(scheme, dtype):
    """Six orders of magnitude in every group, very large and very small ones: what is lost is 2^-22 of a
    group's largest activation for each of its weights, beside the rounding of float32 sums."""
    row, n, k = get_scheme(scheme), 200, 1280
    generator = torch.Generator().manual_seed(0)
    weight = row.weight.quantize(torch.randn(n, k, generator=generator))
    wide = row.weight.dequantize(weight, torch.float64)
    packed = [t.cuda() for t in cuda_layout.pack(row, weight)]
    cuts = [
        Shape(1, 4, 2, 1, 128, 3),
        Shape(2, 2, 1, 1, 128, 4),
        Shape(4, 1, 1, 1, 128, 3, splits=2),
    ]

    def product(x, cut, y=torch.float32):
        rest = (None, None, packed, None, n, "", y)
        return cuda_stream.run(row, cut._replace(fixed=1), x.cuda(), *rest).cpu()

    powers = (0, 12, -12) if dtype == torch.float16 else (0, 100, -100)
    for power, cut in itertools.product(powers, cuts):
        spread = 10.0 ** (6 * torch.rand(1, k, generator=generator) - 5)
        x = (torch.randn(1, k, generator=generator) * spread).double() * 2.0**power
        x = x.clamp(-6e4, 6e4).to(dtype) if dtype == torch.float16 else x.to(dtype)
        groups = x.double().abs().reshape(-1, row.weight.group_size).amax(1)
        lost = groups * wide.abs().reshape(n, -1, row.weight.group_size).sum(2) * 2.0**-22
        sums = x.double().abs() @ wide.abs().t() * 2.0**-20
        error = (product(x, cut).double() - x.double() @ wide.t()).abs()
        assert (error <= lost.sum(1) + sums).all(), (power, cut)
        x[0, 77] = torch.inf
        assert product(x, cut).isnan().all(), "nothing that is not finite is lost"
    assert not product(torch.zeros(1, k, dtype=dtype), cuts[0], dtype).any()
