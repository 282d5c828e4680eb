"""Grid is fxquant.affine bit for bit; weights that no solver can take are named."""

from __future__ import annotations

import pytest
import torch

from fxquant.affine import dequantize_affine, quantize_affine
from fxquant.errors import (
    InvalidBlockSize,
    NonFiniteWeight,
    ShapeMismatch,
    UnsupportedDtype,
    UnsupportedSpec,
)
from fxquant.solvers import SOLVERS, grid
from fxquant.solvers.grid import Grid, check, qparams_of_range, quantized

from .problems import SPECS, assert_same, gram_of, problem, sym


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_rounds_and_restores_as_affine_does(spec, dtype):
    w, _ = problem(n=32, dtype=dtype)
    w[0], w[1, :48], w[2, 5] = 0.0, 3.0, 40.0
    scale, zero = (t for t in spec.quantize(w)[1:])
    # Also beyond the ends, and halfway between two codes, where the last bit decides.
    groups = (*scale.shape, -1)
    own = Grid(spec, scale[..., None], None if zero is None else zero[..., None], dtype)
    steps = torch.arange(96, dtype=dtype).expand(32, 96).reshape(groups) % 2**spec.bits + 0.5
    halves = own.values(steps + max(own.low, -128)).reshape(32, 96)
    far = torch.cat([w, w * 3, -w, w + 0.7, halves])
    scale, zero = (None if t is None else t.repeat(5, 1) for t in (scale, zero))
    block = spec.block_size(2)
    kw = {"zero_point_domain": spec.zero_point_domain}
    codes = quantize_affine(far, block, scale, zero, spec.dtype, **kw)
    values = dequantize_affine(codes, block, scale, zero, spec.dtype, output_dtype=dtype, **kw)

    x = far.reshape(len(far), scale.shape[1], -1)
    own = Grid(spec, scale[..., None], None if zero is None else zero[..., None], dtype)
    assert torch.equal(own.round(x).reshape(far.shape), codes.to(dtype))
    assert torch.equal(own.values(own.round(x)).reshape(far.shape), values)
    low, high = codes.to(dtype).aminmax()
    assert (low, high) == (own.low, own.high), "the sample does not reach both ends"


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_parts_of_a_grid(spec):
    w, _ = problem()
    _, scale, zero = spec.quantize(w)
    whole = Grid(spec, scale, zero)
    index = torch.tensor([3, 0, 3])
    for at, part in zip(index, whole[index].unbind(), strict=True):
        one = Grid(spec, scale[at], None if zero is None else zero[at])
        assert torch.equal(part.values(part.round(w[0, :1])), one.values(one.round(w[0, :1])))


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_ranges_and_codes_are_the_specs_own(spec, monkeypatch):
    w, _ = problem(n=9)
    groups = w.reshape(9, spec.quantize(w).scale.shape[1], -1)
    qparams = qparams_of_range(groups.amin(-1), groups.amax(-1), spec)
    monkeypatch.setattr(grid, "SLAB", 2 * 96)
    assert_same(quantized(w, spec, *qparams), spec.quantize(w))


@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_names_the_layer_and_what_is_wrong(name):
    spec = SPECS["uint4-16-float"]
    solve = SOLVERS[name]
    w, x = problem()
    gram = gram_of(x)
    w[3, 5] = float("nan")
    with pytest.raises(NonFiniteWeight, match=r"^up: .*nan at \(3, 5\)"):
        solve(w, spec, gram, layer="up")
    with pytest.raises(UnsupportedDtype, match=r"^up: .*int32"):
        solve(torch.zeros(3, 96, dtype=torch.int32), spec, gram, layer="up")
    with pytest.raises(InvalidBlockSize, match=r"\(6, 90\)"):
        solve(torch.zeros(6, 90), spec, gram, layer="up")
    with pytest.raises(InvalidBlockSize):
        solve(torch.zeros(6, 96, 1), spec, gram, layer="up")
    for shape in ((0, 96), (6, 0)):
        with pytest.raises(ShapeMismatch, match=r"^up: the weight has shape .*at least one row"):
            solve(torch.zeros(shape), spec, gram, layer="up")


def test_one_scale_for_all_rows_is_refused():
    spec = sym(torch.int8)
    spec = type(spec)(**{**vars(spec), "granularity": "tensor"})
    with pytest.raises(UnsupportedSpec, match=r"^up: mse cannot solve QuantSpec.*per channel"):
        check(torch.zeros(3, 4), spec, solver="mse", layer="up")
