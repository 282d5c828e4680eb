"""Round to nearest: min-max is the spec's own; searched ranges never err more, so weighed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxquant.errors import InvalidOption, NoCalibrationData
from fxquant.solvers import SOLVERS, grid, rtn
from fxquant.solvers.rtn import choose_ranges

from .problems import SPECS, assert_canonical, assert_same, gram_of, problem, sym


def by_group(w, q, spec, importance) -> torch.Tensor:
    """Weighed squared error of each group, [n, k // group_size], in float64."""
    change = (w.double() - spec.dequantize(q, torch.float64)).square() * importance
    return change.reshape(*q.scale.shape, -1).sum(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["uint4-16-float", "int8-channel", "int3-32"])
def test_minmax_is_the_specs_own(name, dtype):
    w, x = problem(dtype=dtype)
    assert_same(rtn.solve(w, SPECS[name]).quantized, SPECS[name].quantize(w))
    assert_same(rtn.solve(w, SPECS[name], gram_of(x)).quantized, SPECS[name].quantize(w))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(sorted(SPECS)),
    seed=st.integers(0, 1 << 20),
    n=st.integers(1, 5),
    spread=st.sampled_from([0.0, 1.0, 3.0]),
    offset=st.sampled_from([0.0, 0.3, -5.0]),
    unit=st.sampled_from([1e-6, 1.0, 1e4]),
)
def test_searched_ranges_err_no_more_in_any_group(name, seed, n, spread, offset, unit):
    spec = SPECS[name]
    w, x = problem(seed, n=n, k=64, tokens=20, outliers=spread)
    w = (w.sign() * (10 * w.abs()).pow(1 + spread) + offset) * unit
    gram = gram_of(x)
    minmax = spec.quantize(w)
    for ranges, importance in (("mse", torch.ones(64)), ("mse-diag", gram.hessian.diagonal())):
        found = rtn.solve(w, spec, gram, ranges=ranges).quantized
        assert_canonical(found, w, spec)
        assert (found.scale <= minmax.scale).all()
        before = by_group(w, minmax, spec, importance.double())
        after = by_group(w, found, spec, importance.double())
        # where they differ by less than float32 can see, either may be taken
        size = (w.double().square() * importance).reshape(*after.shape, -1).sum(-1)
        assert (after <= before * (1 + 1e-5) + size * 1e-12).all(), ranges


@pytest.mark.parametrize("name", SPECS)
def test_two_and_three_bits_gain_much_and_eight_lose_nothing(name):
    spec = SPECS[name]
    w, _ = problem(n=64)
    record = rtn.solve(w, spec, ranges="mse").record
    floor = {2: 0.2, 3: 0.06, 4: 0.01}.get(spec.bits, 0.0)
    assert record.gain >= floor and record.rows == {"mse": 64}


def test_the_range_is_near_the_best_of_a_fine_search():
    """A factor of the search against a thousand of them."""
    spec = sym(torch.int3, 32)
    w, _ = problem(n=4, k=32)
    found = by_group(w, rtn.solve(w, spec, ranges="mse").quantized, spec, 1.0)[:, 0]
    best = torch.full((4,), torch.inf, dtype=torch.float64)
    _, widest, _ = spec.quantize(w)
    for factor in torch.linspace(0.2, 1, 1000):
        q = grid.quantized(w, spec, (widest * factor).to(spec.scale_dtype), None)
        best = torch.minimum(best, by_group(w, q, spec, 1.0)[:, 0])
    assert (found <= best * 1.1).all() and (found >= best).all()


def test_importance_protects_the_channels_that_matter():
    w, x = problem(n=16, k=64, outliers=0.0)
    spec = sym(torch.int3, 32)
    w[:, 0] = 2.0
    x[:, 0] *= 1e-3  # an outlier of the weight that no token ever uses
    plain, weighed = (rtn.solve(w, spec, gram_of(x), ranges=r) for r in ("mse", "mse-diag"))
    assert weighed.record.error < 0.2 * plain.record.error


def test_no_slab_and_no_factor_at_once_changes_a_bit(monkeypatch):
    w, x = problem(n=33)
    importance = gram_of(x).hessian.diagonal()
    for spec in (SPECS["uint4-16-float"], SPECS["int4-channel"], SPECS["uint4-32-int"]):
        whole = choose_ranges(w, spec, "mse-diag", importance)
        for room in (96, 1000, 5 * 33 * 96):
            monkeypatch.setattr(grid, "CACHED", room)
            parts = choose_ranges(w, spec, "mse-diag", importance)
            assert torch.equal(parts[0], whole[0])
            assert parts[1] is whole[1] is None or torch.equal(parts[1], whole[1])
        monkeypatch.undo()


@pytest.mark.parametrize("name", SPECS)
def test_constant_and_zero_groups_and_dead_inputs(name):
    spec = SPECS[name]
    w = torch.zeros(3, 64)
    w[1], w[2] = 0.25, -3.0
    gram = gram_of(torch.zeros(2, 64))
    for ranges in ("mse", "mse-diag"):
        found = rtn.solve(w, spec, gram, ranges=ranges).quantized
        assert_canonical(found, w, spec)
        assert (spec.dequantize(found, torch.float32)[0] == 0).all()
        if spec.zero_point_domain == "float":
            assert torch.equal(spec.dequantize(found, torch.float32), w)


def test_the_mean_square_needs_data_and_ranges_have_names():
    with pytest.raises(NoCalibrationData, match=r"^up: mse-diag works on"):
        SOLVERS["mse-diag"](torch.zeros(2, 64), SPECS["int4-16"], layer="up")
    with pytest.raises(InvalidOption, match="one of minmax, mse, mse-diag"):
        rtn.solve(torch.zeros(2, 64), SPECS["int4-16"], ranges="best")
