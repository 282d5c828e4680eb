"""AWQ's scales: never worse than none, the error that of the scaled layer, nothing undefined."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxquant.errors import InvalidOption, NoCalibrationData, NonFiniteWeight, ShapeMismatch
from fxquant.solvers import Gram, rtn, search_scales

from .problems import SPECS, gram_of, problem


def scaled_error(weights, specs, x, scales, ranges="minmax") -> float:
    """Squared error of the outputs of folded layers, from the inputs, in float64."""
    total = 0.0
    for w, spec in zip(weights, specs, strict=True):
        gram = gram_of(x).divided(scales)
        q = rtn.solve(w.float() * scales, spec, gram, ranges=ranges).quantized
        found = (x.double() / scales.double()) @ spec.dequantize(q, torch.float64).T
        total += float((found - x.double() @ w.double().T).square().sum())
    return total


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(sorted(SPECS)),
    seed=st.integers(0, 1 << 20),
    spread=st.sampled_from([0.0, 1.0, 4.0]),
    tokens=st.sampled_from([1, 40]),
    ranges=st.sampled_from(["minmax", "mse-diag"]),
)
def test_never_worse_than_no_scales(name, seed, spread, tokens, ranges):
    spec = SPECS[name]
    w, x = problem(seed, n=4, k=64, tokens=tokens, outliers=spread)
    found = search_scales([w], gram_of(x), [spec], ranges=ranges, steps=4)
    assert found.error <= found.baseline and found.tokens == tokens
    assert found.scales.shape == (64,) and found.scales.dtype == torch.float32
    assert torch.isfinite(found.scales).all() and (found.scales > 0).all()
    for scales, error in ((found.scales, found.error), (torch.ones(64), found.baseline)):
        wanted = scaled_error([w], [spec], x, scales, ranges)
        assert error == pytest.approx(wanted, rel=1e-3, abs=1e-5 * found.signal)


def test_channels_with_large_inputs_are_enlarged_and_it_pays():
    spec = SPECS["uint4-16-float"]
    w, x = problem(n=32, outliers=0.0)
    x[:, [7, 40]] *= 30.0
    found = search_scales([w], gram_of(x), [spec])
    others = [i for i in range(96) if i not in (7, 40)]
    assert found.alpha > 0 and found.error < 0.6 * found.baseline
    assert found.scales[[7, 40]].amin() > 1 > found.scales[others].amax()


def test_scales_are_powers_of_the_mean_around_one():
    w, x = problem(n=8)
    found = search_scales([w], gram_of(x), [SPECS["int3-32"]])
    mean = x.abs().mean(0) ** found.alpha
    assert 0 < found.alpha <= 1
    wanted = mean / (mean.amax() * mean.amin()).sqrt()
    torch.testing.assert_close(found.scales, wanted, rtol=1e-4, atol=0)
    torch.testing.assert_close(found.scales.amax() * found.scales.amin(), torch.tensor(1.0))


def test_the_grid_is_searched_to_its_best():
    w, x = problem(n=8)
    spec = SPECS["int3-32"]
    mean, errors = x.abs().mean(0), []
    for step in range(11):
        scales = mean ** (step / 10)
        errors.append(scaled_error([w], [spec], x, scales / (scales.amax() * scales.amin()).sqrt()))
    found = search_scales([w], gram_of(x), [spec], steps=10)
    assert found.alpha == min(range(11), key=errors.__getitem__) / 10
    assert found.error == pytest.approx(min(errors), rel=1e-4)


def test_linears_that_share_inputs_share_scales():
    (q, x), (k, _), (v, _) = (problem(seed, n=n) for seed, n in ((0, 8), (1, 4), (2, 12)))
    weights = [q, k.bfloat16(), 5 * v.double()]
    specs = [SPECS["int4-16"], SPECS["uint4-16-float"], SPECS["int3-32"]]
    found = search_scales(weights, gram_of(x), specs, steps=8)
    assert found.error == pytest.approx(scaled_error(weights, specs, x, found.scales), rel=1e-3)
    alone = [
        search_scales([w], gram_of(x), [s], steps=8) for w, s in zip(weights, specs, strict=True)
    ]
    assert found.baseline == pytest.approx(sum(a.baseline for a in alone))
    assert found.error >= sum(a.error for a in alone) * (1 - 1e-9)
    assert found.error < found.baseline


def test_equal_channels_and_zero_error_keep_scales_of_one():
    spec = SPECS["int8-channel"]
    for w in (torch.zeros(3, 8), torch.tensor([[127.5, 1.0, 2.0, 3.0]]).repeat(2, 2)):
        found = search_scales([w * 0], gram_of(torch.randn(9, 8)), [spec])
        assert found.alpha == 0.0 and torch.equal(found.scales, torch.ones(8))
        found = search_scales([w], gram_of(torch.ones(9, 8)), [spec])
        assert found.alpha == 0.0 and torch.equal(found.scales, torch.ones(8))


def test_dead_and_tiny_channels_have_scales():
    w, x = problem(n=4, k=32)
    x[:, 3] = 0.0
    x[:, 9] = 1e-25
    found = search_scales([w], gram_of(x), [SPECS["int4-16"]])
    assert found.scales[3] == 1.0
    assert torch.isfinite(found.scales).all() and found.scales.amin() >= 1e-4
    silent = search_scales([w], gram_of(x * 0), [SPECS["int4-16"]])
    assert torch.equal(silent.scales, torch.ones(32)) and silent.error == 0.0


def test_bad_input_is_named():
    w, x = problem()
    spec, gram = SPECS["int4-16"], gram_of(x)
    for weights, specs in (([], []), ([w], []), ([w], [spec, spec])):
        with pytest.raises(InvalidOption, match=r"'specs' is .*a spec for each"):
            search_scales(weights, gram, specs)
    with pytest.raises(InvalidOption, match="'steps' is 0"):
        search_scales([w], gram, [spec], steps=0)
    with pytest.raises(InvalidOption, match="'ranges' is 'best'"):
        search_scales([w], gram, [spec], ranges="best")
    with pytest.raises(NoCalibrationData, match=r"^up: awq works on"):
        search_scales([w], Gram(96), [spec], layer="up")
    with pytest.raises(ShapeMismatch, match=r"^up: "):
        search_scales([w, w[:, :48]], gram, [spec, spec], layer="up")
    w[2, 2] = float("inf")
    with pytest.raises(NonFiniteWeight, match=r"^up: .*inf at \(2, 2\)"):
        search_scales([w], gram, [spec], layer="up")
