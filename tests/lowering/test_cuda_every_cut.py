"""Every way to cut the CUDA C++ kernels' blocks: those a tuner would try, and those of the shipped table."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
import torch

from fxquant import tuner
from fxquant.lowering import tuning
from fxquant.lowering.cuda_cuts import Cut
from fxquant.lowering.cuda_layout import Format
from fxquant.lowering.cuda_shapes import Shape
from fxquant.lowering.kernel import KERNELS
from fxquant.scheme import get_scheme
from tests import oracles

from .test_cuda_kernels import needs_hopper


@needs_hopper
@pytest.mark.parametrize(
    "scheme", ["int4wo-64", "int8wo", "fp8wo", "8da4w-32", "8da4w-128", "int8dq", "fp8dq"]
)
@torch.no_grad()
def test_every_cut_is_exact_and_repeats_itself(scheme):
    row = get_scheme(scheme)
    names = [name for name in tuner.CUTTERS if row.family in KERNELS[name].families]
    n, k = 208, 1024
    for rows, name in itertools.product((1, 13, 40, 200), names):
        cutter = tuner.CUTTERS[name]
        sample = oracles.exact_sample(row, rows, n, k, torch.bfloat16)
        expected = oracles.reference(sample, device="cuda").float().bfloat16()
        on = sample.to("cuda")
        packed = KERNELS[name].layout.pack(row, on.weight)
        x, scale, zero = cutter.operands(row, on.x)
        cuts = cutter.cuts(row, n, k, rows)
        tuner.build(cutter, row, cuts, x.device)
        for cut in cuts:
            arguments = (row, cut, x, scale, zero, packed, None, n, "", torch.bfloat16)
            y = cutter.run(*arguments)
            oracles.assert_equal(y.cpu(), expected, f"{scheme}, {rows} rows, {cut}")
            assert torch.equal(y, cutter.run(*arguments)), "bit-identical from run to run"


def shipped_cuts() -> dict[tuple[str, str], list[Shape | Cut]]:
    """By kernel and scheme, every cut of the H200's table."""
    found: dict[tuple[str, str], dict[Shape | Cut, None]] = {}
    content = json.loads(tuning.shipped_table("NVIDIA H200").read_text())
    for name, cutter in tuner.CUTTERS.items():
        make = Shape if cutter.section == "shapes" else Cut
        for layer, steps in content[cutter.section].items():
            scheme = layer.split()[0]
            if get_scheme(scheme).family in KERNELS[name].families:
                cuts = found.setdefault((name, scheme), {})
                cuts |= dict.fromkeys(make(*numbers) for _, numbers in steps)
    return {key: list(cuts) for key, cuts in found.items()}


SHIPPED = shipped_cuts()


def values_for(cut: Shape | Cut, form: Format) -> int:
    """k that the cut takes, an odd number of the longest stages."""
    return next(k for k in (1280, 1536) if cut.fits(form, k))


def test_every_shipped_cut_fits_a_layer_that_is_tried():
    assert sum(map(len, SHIPPED.values())) > 1000 and len(SHIPPED) == 18
    for (kernel, scheme), cuts in SHIPPED.items():
        assert cuts
        for cut in cuts:
            assert values_for(cut, tuner.CUTTERS[kernel].types(get_scheme(scheme), cut)[1])


@needs_hopper
@pytest.mark.parametrize("kernel, scheme", SHIPPED)
@torch.no_grad()
def test_every_shipped_cut_satisfies_the_oracles(kernel, scheme):
    """Exact, within bounds, as little noise as the scheme promises, the same from run to run: a tile that
    is full and one that is not, of tokens and of channels."""
    row, cutter, cuts = get_scheme(scheme), tuner.CUTTERS[kernel], SHIPPED[kernel, scheme]
    tuner.build(cutter, row, cuts, torch.device("cuda", 0))
    for cut in cuts:
        k, n = values_for(cut, cutter.types(row, cut)[1]), max(cut.rows, 512) + 40

        def compute(scheme, x, packed, bias, epilogue, cut=cut, n=n):
            given = (*cutter.operands(scheme, x), packed, bias, n, epilogue, x.dtype)
            y = cutter.run(scheme, cut, *given)
            assert torch.equal(y, cutter.run(scheme, cut, *given)), f"{cut}: bit-identical"
            return y

        one = replace(KERNELS[kernel], name=f"{kernel} {tuple(cut)}", compute=compute)
        for rows in (1,) if cut.tokens == 1 else (cut.tokens, cut.tokens + 3):
            if (kernel, scheme) == ("cuda_pipeline_w8a8", "fp8dq"):
                oracles.narrow_float8_probe(one, rows, n, k, torch.bfloat16, "cuda")
            else:
                oracles.exact_probe(one, scheme, rows, n, k, torch.bfloat16, device="cuda")
            oracles.elementwise_bound(one, scheme, rows, n, k, torch.bfloat16, device="cuda")
        rows = 1 if cut.tokens == 1 else 64
        oracles.recipe_sqnr(one, scheme, torch.bfloat16, "cuda", rows, n, k)
