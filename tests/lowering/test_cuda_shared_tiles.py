"""Tiles that do not fill a wave: clusters that split k share them."""

from __future__ import annotations

import pytest
import torch

from fxquant import tuner
from fxquant.lowering import cuda_cuts
from fxquant.lowering.kernel import KERNELS
from fxquant.scheme import Quantized, get_scheme
from tests import oracles
from tests.lowering.test_cuda_kernels import needs_hopper

SHARED = ("int4wo-64", "int4wo-128", "int8wo", "8da4w-32", "8da4w-128", "int8dq", "fp8dq")

GATED = ("int4wo-64", "int4wo-128", "int8dq")


@needs_hopper
@pytest.mark.parametrize(
    "scheme, gate",
    [*((scheme, "") for scheme in SHARED), *((scheme, "silu_mul") for scheme in GATED)],
)
@torch.no_grad()
def test_the_last_tiles_are_shared(scheme, gate):
    """By clusters, where they leave multiprocessors idle: after one wave or two, few left or many. (Halves
    that a gate joins are rounded before where a tile is whole.)"""
    row, k = get_scheme(scheme), 512
    names = ("cuda_pipeline", "cuda_pipeline_w4a8", "cuda_pipeline_w8a8")
    name = next(n for n in names if row.family in KERNELS[n].families)
    cutter = tuner.CUTTERS[name]
    step = 64 if scheme == "int4wo-128" else 128  # half a group
    kinds = [(1, 1, 64, step, 4, 1), (2, 1, 80, step, 4, 1), (1, 1, 32, step, 4, 2)]
    cuts = [cuda_cuts.Cut(*kind, splits) for kind in kinds for splits in (2, 4, 8)]
    cuts = [cut for cut in cuts if cut.fits(cutter.types(row)[1], k)]
    sizes = [
        (cut, cut.rows * (cut.places * waves + left) // 2 - 32)
        for cut in cuts
        for waves, left in [(1, 2), (2, cut.places // cut.splits // 2 * 2)]
    ]
    largest = max(n for _, n in sizes)
    sample = oracles.exact_sample(row, 2 * 80 - 3, largest, k, torch.bfloat16).to("cuda")
    for cut, n in sizes:
        rows = 2 * cut.tokens - 3
        assert cut.shares(n, rows) and cut.tiles(n, rows) > cut.places, (cut, n)
        weight = Quantized(*(None if t is None else t[:n] for t in sample.weight))
        packed = KERNELS[name].layout.pack(row, weight)
        operands = cutter.operands(row, sample.x[:rows].contiguous())
        rest = (*operands, packed, None, n, gate, torch.bfloat16)
        shared = cutter.run(row, cut, *rest)
        whole = cutter.run(row, cut._replace(splits=1), *rest)
        # Halves are rounded before the gate, which silu makes 1 + |x| times as much, and so is the product.
        allowed = torch.zeros((), device="cuda")
        if gate:
            halves = cutter.run(row, cut._replace(splits=1), *rest[:-2], "", torch.bfloat16)
            allowed = (4 + halves[:, : n // 2].float().abs()) * 2.0**-8 * whole.float().abs()
        difference = (shared.float() - whole.float()).abs()
        assert (difference <= allowed).all(), (cut, n)
        assert torch.equal(cutter.run(row, cut, *rest), shared), "bit-identical from run to run"
