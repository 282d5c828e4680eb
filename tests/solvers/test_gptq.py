"""GPTQ: the published algorithm's codes, never worse than round to nearest, defined at every edge."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxquant.affine import pack_codes, storage_dtype
from fxquant.errors import InvalidOption, NoCalibrationData, UnsolvableHessian
from fxquant.solvers import Gram, gptq, grid, rtn

from . import naive_gptq
from .problems import SPECS, assert_canonical, assert_same, gram_of, plain, problem, true_error

ORDERS = {
    "as-they-stand": {"act_order": False, "static_groups": False},
    "static": {"act_order": False, "static_groups": True},
    "act-order": {"act_order": True, "static_groups": True},
}
PURE = {"ranges": "minmax", "fallback": False}


def assert_published(found, spec, wanted) -> None:
    """The same codes; qparams too, of which float32 may have the last bit otherwise than float64."""
    codes, scale, zero = wanted
    rtol = 2.0**-22 if spec.scale_dtype == torch.float32 else 0.0
    torch.testing.assert_close(found.scale.double(), scale, rtol=rtol, atol=0)
    if found.zero is not None:
        atol = rtol * 2**spec.bits * float(scale.max()) if spec.zero_point_domain == "float" else 0
        torch.testing.assert_close(found.zero.double(), zero, rtol=0, atol=atol)
    differing = int((plain(found, spec) != codes).sum())
    assert differing == 0, f"{differing} of {codes.numel()} codes differ"


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_codes_are_those_of_the_published_algorithm(name, order, dtype):
    spec = SPECS[name]
    w, x = problem(seed=1, dtype=dtype)
    gram = gram_of(x)
    found = gptq.solve(w, spec, gram, **ORDERS[order], **PURE).quantized
    assert_canonical(found, w, spec)
    wanted = naive_gptq.gptq(w, spec, gram.hessian, 0.01, **ORDERS[order])
    assert_published(found, spec, wanted)


@pytest.mark.parametrize("name", ["int4-16", "uint2-32-float", "int8-channel"])
@pytest.mark.parametrize("block_size", [1, 7, 16, 33, 40, 96, 1000])
def test_blocks_of_any_size_give_the_same_codes(name, block_size):
    spec = SPECS[name]
    w, x = problem(seed=2, dtype=torch.float64)
    gram = gram_of(x)
    for order in ORDERS.values():
        found = gptq.solve(w, spec, gram, block_size=block_size, **order, **PURE).quantized
        assert_published(found, spec, naive_gptq.gptq(w, spec, gram.hessian, 0.01, **order))


@pytest.mark.parametrize("damping", [1e-4, 0.1, 1.0])
def test_damping_is_relative_to_the_mean_of_the_diagonal(damping):
    spec = SPECS["uint4-16-float"]
    w, x = problem(seed=3, dtype=torch.float64)
    order = ORDERS["act-order"]
    for unit in (1e-12, 1.0, 1e12):
        gram = gram_of(x * unit)
        codes, record = gptq.solve(w, spec, gram, damping=damping, **order, **PURE)
        assert record.damping == damping
        assert_published(
            codes, spec, naive_gptq.gptq(w, spec, gram_of(x).hessian, damping, **order)
        )


@pytest.mark.parametrize("name", SPECS)
def test_the_order_of_columns_is_undone(name):
    """Inputs without correlation: each weight is on its own, and one of the grid is found exactly."""
    spec = SPECS[name]
    g = torch.Generator().manual_seed(0)
    k = 64
    w, _ = problem(n=8, k=k)
    _, scale, zero = spec.quantize(w)
    if spec.dtype.is_floating_point:
        codes = (torch.randint(-15, 16, (8, k), generator=g) * 28.0).to(spec.dtype)
        codes[:, 0] = 448.0
    else:
        low, high = naive_gptq.ends(spec)
        codes = torch.randint(low, high + 1, (8, k), generator=g).to(storage_dtype(spec.dtype))
    exact = type(spec.quantize(w))(pack_codes(codes, spec.dtype), scale, zero)
    w = spec.dequantize(exact, torch.float32)
    wanted = grid.quantized(w, spec, *rtn.choose_ranges(w, spec))
    size = torch.rand(k, generator=g)
    for diagonal in (size, torch.arange(1.0, k + 1), torch.arange(k, 0.0, -1)):
        gram = gram_of(torch.diag(diagonal.sqrt()))
        found = gptq.solve(w, spec, gram, act_order=True, block_size=16, **PURE).quantized
        assert_same(found, wanted)


@pytest.mark.parametrize("ranges", ["minmax", "mse", "mse-diag"])
@pytest.mark.parametrize("name", SPECS)
def test_without_correlation_it_is_rounding_to_nearest(name, ranges):
    """Whatever the order and the blocks: ranges belong to their columns, and no error moves on."""
    spec = SPECS[name]
    w, _ = problem(n=8)
    size = torch.rand(96, generator=torch.Generator().manual_seed(1)) * 100
    gram = gram_of(torch.diag(size))
    wanted = rtn.solve(w, spec, gram, ranges=ranges).quantized
    for order in ORDERS.values():
        options = {"block_size": 24, "ranges": ranges, "fallback": False}
        assert_same(gptq.solve(w, spec, gram, **order, **options).quantized, wanted)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(sorted(SPECS)),
    seed=st.integers(0, 1 << 20),
    n=st.integers(1, 6),
    groups=st.integers(1, 3),
    tokens=st.sampled_from([1, 2, 17, 200]),
    spread=st.sampled_from([0.0, 1.0, 4.0]),
    order=st.sampled_from(sorted(ORDERS)),
    ranges=st.sampled_from(["minmax", "mse", "mse-diag"]),
)
def test_never_worse_than_round_to_nearest(name, seed, n, groups, tokens, spread, order, ranges):
    spec = SPECS[name]
    w, x = problem(seed, n=n, k=32 * groups, tokens=tokens, outliers=spread)
    codes, record = gptq.solve(w, spec, gram_of(x), ranges=ranges, **ORDERS[order])
    assert_canonical(codes, w, spec)
    assert record.error <= record.baseline
    slack = 1e-5 * float((x.double() @ w.double().T).square().sum())
    baseline = true_error(w, spec.quantize(w), spec, x)
    assert true_error(w, codes, spec, x) <= baseline * (1 + 1e-4) + slack
    assert sum(record.rows.values()) == n and set(record.rows) <= {"rtn", ranges, "gptq"}


@pytest.mark.parametrize("name", SPECS)
def test_wins_half_of_what_rounding_loses_on_correlated_inputs(name):
    spec = SPECS[name]
    w, x = problem(n=32)
    record = gptq.solve(w, spec, gram_of(x)).record
    assert record.gain > 0.5 and record.rows == {"gptq": 32}, record


def test_rows_where_nearest_is_better_fall_back_and_are_counted():
    """Two bits, columns as they stand, min-max ranges: making up for errors runs out of codes."""
    spec = SPECS["int2-16"]
    w, x = problem(seed=6, n=24)
    gram, order = gram_of(x), ORDERS["as-they-stand"]
    own = gptq.solve(w, spec, gram, **order, **PURE)
    both = gptq.solve(w, spec, gram, ranges="minmax", **order)
    assert own.record.rows == {"gptq": 24}
    assert 0 < both.record.rows["rtn"] < 24 and sum(both.record.rows.values()) == 24
    nearest = spec.quantize(w)
    values = [spec.dequantize(q, torch.float64) for q in (own.quantized, nearest)]
    ours, theirs = ((x.double() @ (w - value).T).square().sum(0) for value in values)
    fallen = theirs <= ours
    assert both.record.rows["rtn"] == int(fallen.sum())
    wanted = torch.where(fallen[:, None], values[1], values[0])
    assert torch.equal(spec.dequantize(both.quantized, torch.float64), wanted)
    assert both.record.error == pytest.approx(float(torch.minimum(ours, theirs).sum()), rel=1e-4)


def test_a_dead_channel_has_no_influence_and_the_code_of_zero():
    for name in ("int4-16", "uint4-32-int", "uint4-16-float", "int8-channel"):
        spec = SPECS[name]
        w, x = problem(seed=6)
        x[:, [3, 50]] = 0.0
        found, record = gptq.solve(w, spec, gram_of(x), **PURE)
        assert record.dead == 2
        wild = w.clone()
        wild[:, 3], wild[:, 50] = 1e6, -77.0
        assert_same(gptq.solve(wild, spec, gram_of(x), **PURE).quantized, found)
        nearest = rtn.solve(w * 0, spec).quantized if spec.zero_point_domain == "none" else None
        if nearest is not None:
            assert (plain(found, spec)[:, [3, 50]] == 0).all()
        value = spec.dequantize(found, torch.float64)[:, [3, 50]]
        step = found.scale.double().repeat_interleave(96 // found.scale.shape[1], 1)[:, [3, 50]]
        assert (value.abs() <= step / 2).all()
        wanted = naive_gptq.gptq(w, spec, gram_of(x).hessian, 0.01, True, True)
        assert_published(found, spec, wanted)


def test_without_any_signal_it_rounds_to_nearest():
    spec = SPECS["uint4-16-float"]
    w, _ = problem()
    codes, record = gptq.solve(w, spec, gram_of(torch.zeros(5, 96)))
    assert_same(codes, spec.quantize(w))
    assert record.rows == {"rtn": 6} and record.error == 0.0 and record.dead == 96


@pytest.mark.parametrize("name", ["int4-16", "uint4-channel-float"])
@pytest.mark.parametrize(
    "inputs",
    [torch.randn(1, 96), torch.ones(7, 96), torch.randn(5, 96), torch.eye(96)[:4].repeat(9, 1)],
    ids=["one token", "constant", "few tokens", "few channels"],
)
@pytest.mark.parametrize("damping", [0.01, 1e-9])
def test_a_hessian_without_full_rank_has_a_result(name, inputs, damping):
    spec = SPECS[name]
    w, _ = problem()
    for order in (ORDERS["as-they-stand"], ORDERS["act-order"]):
        codes, record = gptq.solve(w, spec, gram_of(inputs), damping=damping, **order)
        assert_canonical(codes, w, spec)
        assert record.error <= record.baseline and record.damping >= damping
        again = gptq.solve(w, spec, gram_of(inputs), damping=damping, **order)
        assert_same(again.quantized, codes)
        assert again.record == record


def test_one_token_is_matched_far_better_than_by_rounding():
    """There the errors of a row need only cancel in one sum."""
    spec = SPECS["int4-channel"]
    w, x = problem(tokens=1, n=16)
    assert gptq.solve(w, spec, gram_of(x)).record.gain > 0.95


def damaged(matrix: torch.Tensor) -> Gram:
    state = gram_of(torch.ones(3, len(matrix))).state_dict()
    return Gram.from_state_dict({**state, "hessian": matrix})


def test_damping_is_raised_tenfold_until_the_factor_exists():
    w, _ = problem(k=32)
    vectors, _ = torch.linalg.qr(problem(n=32, k=32)[0])
    values = torch.full((32,), 1.0)
    values[5] = -0.03  # indefinite: damping must outweigh it
    matrix = vectors * values @ vectors.T
    record = gptq.solve(w, SPECS["int4-16"], damaged(matrix), damping=0.001).record
    assert record.damping == pytest.approx(0.1)
    assert gptq.solve(w, SPECS["int4-16"], damaged(matrix), damping=0.5).record.damping == 0.5


@pytest.mark.parametrize("value", [5.0, float("nan"), float("inf")])
def test_beyond_the_limit_it_is_a_named_error(value):
    matrix = torch.eye(32)
    matrix[3, 7] = matrix[7, 3] = value
    w, _ = problem(k=32)
    for order in ORDERS.values():
        with pytest.raises(UnsolvableHessian, match=r"^up: the Hessian of 3 tokens .* of 1\.0: "):
            gptq.solve(w, SPECS["int4-16"], damaged(matrix), layer="up", **order)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["uint4-16-float", "int8-channel"])
def test_half_precision_weights_are_those_values_in_float32(name, dtype):
    w, x = problem(dtype=dtype)
    gram = gram_of(x)
    found, wanted = (gptq.solve(v, SPECS[name], gram) for v in (w, w.float()))
    assert_same(found.quantized, wanted.quantized)
    assert found.record == wanted.record


def test_the_weight_and_the_gram_stay_as_they_were():
    w, x = problem()
    gram = gram_of(x)
    before = {name: t.clone() for name, t in gram.state_dict().items()}
    weight = torch.nn.Parameter(w.clone())
    with torch.inference_mode():
        inside = gptq.solve(weight, SPECS["int4-16"], gram).quantized
    outside = gptq.solve(weight, SPECS["int4-16"], gram).quantized
    assert_same(inside, outside)
    assert not outside.scale.requires_grad
    assert torch.equal(weight, w)
    assert all(torch.equal(t, before[name]) for name, t in gram.state_dict().items())
    turned = w.T.contiguous().T
    assert_same(gptq.solve(turned, SPECS["int4-16"], gram).quantized, outside)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ["int4-16", "uint4-32-int", "uint4-channel-float"])
def test_rows_solved_in_pieces_or_stacked_are_the_same(name, order, monkeypatch):
    w, x = problem(n=7, dtype=torch.float64)
    gram = gram_of(x)
    whole = gptq.solve(w, SPECS[name], gram, **ORDERS[order]).quantized
    monkeypatch.setattr(gptq, "ROWS_AT_ONCE", 3 * 96)
    assert_same(gptq.solve(w, SPECS[name], gram, **ORDERS[order]).quantized, whole)


def test_sizes_of_one():
    spec = SPECS["int8-channel"]
    for shape in ((1, 1), (1, 96), (5, 1)):
        w, x = problem(n=shape[0], k=shape[1])
        codes, record = gptq.solve(w, spec, gram_of(x))
        assert_canonical(codes, w, spec)
        assert record.error <= record.baseline


def test_options_out_of_range_are_named():
    w, x = problem()
    gram, spec = gram_of(x), SPECS["int4-16"]
    for options, pattern in (
        ({"act_order": True, "static_groups": False}, "'static_groups' is False.*act_order"),
        ({"damping": 0.0}, r"'damping' is 0\.0: expected in \(0, 1\]"),
        ({"damping": 2.0}, "'damping'"),
        ({"block_size": 0}, "'block_size' is 0"),
        ({"ranges": "best"}, "'ranges' is 'best'"),
    ):
        with pytest.raises(InvalidOption, match=pattern):
            gptq.solve(w, spec, gram, **options)
    # channels have one range, which no order disturbs
    gptq.solve(w, SPECS["int4-channel"], gram, act_order=True, static_groups=False)
    with pytest.raises(NoCalibrationData, match=r"^up: gptq works"):
        gptq.solve(w, spec, layer="up")
