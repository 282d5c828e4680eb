"""affine.py against a float64 loop over blocks, and by its own laws."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxquant.affine import (
    bits_of,
    choose_qparams_affine,
    code_range,
    dequantize_affine,
    quantize_affine,
    storage_dtype,
)

from .affine_cases import (
    ASYMMETRIC,
    BLOCKS,
    EPS,
    EVERY,
    FLOAT8,
    REAL,
    SHAPE,
    SHIFTED,
    SIGNED,
    SYMMETRIC_INT,
    TINYGEMM,
    UNSIGNED,
    check_error,
    each_block,
    name,
    round_trip,
)


def test_code_range():
    ranges = [code_range(dtype) for dtype in (*SIGNED, *UNSIGNED, *FLOAT8)]
    signed = [(-1, 0), (-2, 1), (-4, 3), (-8, 7), (-16, 15), (-32, 31), (-64, 63), (-128, 127)]
    unsigned = [(0, high) for high in (1, 3, 7, 15, 31, 63, 127, 255)]
    assert ranges == [*signed, *unsigned, (-448, 448), (-57344, 57344)]
    assert [bits_of(dtype) for dtype in SIGNED + UNSIGNED] == [*range(1, 9)] * 2


def oracle(values, dtype, form):
    """One block in float64, from the definitions: scale, zero point, codes, dequantized values."""
    low_code, high_code = code_range(dtype)
    low, high = values.min().item(), values.max().item()
    middle = (low_code + high_code + 1) // 2
    if form is not TINYGEMM and form is not SHIFTED:
        low, high = min(low, 0.0), max(high, 0.0)
    if form["mapping"] == "asymmetric":
        scale = (high - low) / (high_code - low_code)
    elif form["mapping"] == "symmetric":
        scale = max(-low, high) / ((high_code - low_code) / 2)
    else:
        scale = max(low / (low_code - middle), high / (high_code - middle))
    if form is TINYGEMM:
        zero = low + (middle - low_code) * scale
        codes = torch.round((values - zero) / scale + middle).clamp(low_code, high_code)
        return scale, zero, codes, (codes - middle) * scale + zero
    zero = 0
    if form["mapping"] == "asymmetric":
        zero = low_code - round(low / scale)
    elif form["zero_point_domain"] == "int":
        zero = middle
    scaled = values / scale if dtype in FLOAT8 else values * (1 / scale)
    codes = (scaled if dtype in FLOAT8 else torch.round(scaled) + zero).clamp(low_code, high_code)
    if dtype in FLOAT8:
        codes = codes.to(dtype).double()
    return scale, zero, codes, (codes - zero) * scale


@pytest.mark.parametrize("dtype, form", EVERY, ids=name)
def test_equals_a_float64_loop_over_blocks(dtype, form):
    x = torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.3
    for block in BLOCKS.values():
        scale, zero, codes, values = round_trip(x, block, dtype, form)
        assert scale.dtype == torch.float64 and codes.dtype == storage_dtype(dtype)
        parts = (each_block(t, block) for t in (x, codes, values))
        for (index, part), (_, code), (_, value) in zip(*parts, strict=True):
            expected = oracle(part, dtype, form)
            assert scale[index].item() == pytest.approx(expected[0], rel=1e-14)
            if zero is not None:
                assert zero[index].item() == pytest.approx(expected[1], rel=1e-12, abs=1e-12)
            assert torch.equal(code.double(), expected[2])
            torch.testing.assert_close(value, expected[3], rtol=1e-12, atol=1e-12)


LARGE = st.floats(-(2.0**100), 2.0**100, width=32)
NUMBER = LARGE | st.floats(-4, 4, width=32) | st.integers(-9, 9)
COUNT_AND_EXTENT = st.tuples(st.integers(1, 2), st.integers(1, 4))


@settings(max_examples=500, derandomize=True, deadline=None)
@given(data=st.data(), rows=COUNT_AND_EXTENT, columns=COUNT_AND_EXTENT, case=st.sampled_from(EVERY))
def test_laws(data, rows, columns, case):
    """Codes in range and in the values' order; errors within half a step; requantizing is exact."""
    dtype, form = case
    shape, block = (rows[0] * rows[1], columns[0] * columns[1]), (rows[1], columns[1])
    count = shape[0] * shape[1]
    numbers = data.draw(st.lists(NUMBER, min_size=count, max_size=count))
    x = torch.tensor(numbers, dtype=torch.float32).view(shape)
    scale_dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    scale, zero, codes, values = round_trip(x, block, dtype, form, scale_dtype=scale_dtype)
    assert scale.shape == (rows[0], columns[0]) and (scale > 0).all()

    lowest, highest = code_range(dtype)
    plain = codes.double()
    assert lowest <= plain.min() and plain.max() <= highest
    domain = form["zero_point_domain"]
    again = quantize_affine(values, block, scale.double(), zero, dtype, zero_point_domain=domain)
    tensors = (x.double(), plain, values, again.double())
    for (index, part), *rest in zip(*(each_block(t, block) for t in tensors), strict=True):
        code, value, recoded = (values_of for _, values_of in rest)
        step = scale[index].double()
        slack = 4 * EPS * (part.abs().max() + step)
        reach = step / 2
        if dtype in FLOAT8:  # half a unit in the last place of a normal code, or of a subnormal one
            digits = torch.finfo(dtype)
            reach = step * digits.eps / 2 * code.abs().clamp(min=digits.tiny)
        error = (value - part).abs()
        # Only at an end may a value be farther off, and only if it lies beyond that end.
        assert ((error <= reach + slack) | (code == lowest) | (code == highest)).all()
        assert ((part <= value + reach + slack) | (code != lowest)).all()
        assert ((part >= value - reach - slack) | (code != highest)).all()
        assert (code.flatten()[part.flatten().argsort()].diff() >= 0).all()
        if scale_dtype == torch.float32:  # with it, the ends lose what rounding a zero point costs
            assert (error <= 2 * reach + slack).all()
        if part.abs().max() < 2**40 * step:  # else a step is too small a part of float64's digits
            assert torch.equal(recoded, code)


@pytest.mark.parametrize("dtype, form", EVERY, ids=name)
def test_zero_block(dtype, form):
    """Scale 1, exact zeros, and the block beside it untouched."""
    x = torch.cat([torch.zeros(1, 8), torch.linspace(-1, 1, 8)[None]])
    for scale_dtype in REAL:
        scale, _, _, values = round_trip(x, [1, -1], dtype, form, scale_dtype=scale_dtype)
        assert scale[0] == 1 and torch.equal(values[0], torch.zeros(8, dtype=torch.float64))
        alone = round_trip(x[1:], [1, -1], dtype, form, scale_dtype=scale_dtype)
        assert torch.equal(values[1:], alone[3]) and torch.equal(scale[1:], alone[0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_block(bad):
    """NaN or an infinity makes its whole block NaN, no other, and its codes are defined."""
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    x[1, 3] = bad
    for dtype, form in EVERY:
        scale, zero, codes, values = round_trip(x, [1, -1], dtype, form)
        assert scale[1].isnan() and values[1].isnan().all()
        assert scale[[0, 2]].isfinite().all() and values[[0, 2]].isfinite().all()
        if dtype not in FLOAT8:
            assert len(codes[1].unique()) == 1
        if zero is not None and not zero.is_floating_point():
            assert code_range(dtype)[0] <= zero[1] <= code_range(dtype)[1]


@pytest.mark.parametrize("dtype, form", EVERY, ids=name)
def test_underflowing_scale(dtype, form):
    """A block too small for the scale's type keeps finite, small values."""
    for scale_dtype, size in ((torch.float16, 1e-8), (torch.bfloat16, 1e-39)):
        x = size * torch.linspace(-1, 1, 8)[None]
        scale, _, _, values = round_trip(x, [1, -1], dtype, form, scale_dtype=scale_dtype)
        assert scale == torch.finfo(scale_dtype).tiny
        assert (values - x.double()).abs().max() <= scale.double() / 2 + size


@pytest.mark.parametrize("constant", [5.3, -5.3, 1e-3, 1e6, 1e38, -1e-30])
def test_constant_block(constant):
    """Exact where zero need not be a code, and half a step off at most where it must."""
    x = torch.full((1, 8), constant)
    for dtype in UNSIGNED + SIGNED:
        for form in (TINYGEMM, SHIFTED):
            _, _, _, values = round_trip(x, [1, -1], dtype, form)
            torch.testing.assert_close(values, x.double(), rtol=EPS, atol=0)
        for form in (SYMMETRIC_INT, ASYMMETRIC):
            check_error(x, [1, -1], dtype, form)


def test_range_far_from_zero():
    """A zero point stays small enough for float32: the step grows to the values' own precision."""
    x = torch.tensor([[1000.0, 1000.0001, 1000.0002, 1000.0004]])
    scale, zero, _, values = round_trip(x, [1, -1], torch.uint8, SHIFTED)
    assert zero.abs() <= 2**22 + 255 and scale == 1000.0004 * 2**-22
    assert (values - x.double()).abs().max() <= scale


@pytest.mark.parametrize("form", [SYMMETRIC_INT, ASYMMETRIC, TINYGEMM], ids=name)
def test_the_whole_float32_range(form):
    """max - min overflows float32; half of it does not."""
    x = torch.tensor([[-3e38, 3e38, 0.0, 1e38]])
    scale, _ = choose_qparams_affine(x, [1, -1], torch.uint8, **form)
    torch.testing.assert_close(scale, torch.full((1, 1), 6e38 / 255))


def test_halves_round_to_even():
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5]])
    codes = quantize_affine(x, [1, -1], torch.ones(1, 1), None, torch.int8)
    assert codes.tolist() == [[0, 2, 2, 0, -2, -2]]
    zero = torch.full((1, 1), 3, dtype=torch.int32)  # added after rounding: odd, and yet even
    codes = quantize_affine(x, [1, -1], torch.ones(1, 1), zero, torch.int8, zero_point_domain="int")
    assert codes.tolist() == [[3, 5, 5, 3, 1, 1]]


def test_eps_bounds_the_scale():
    x = torch.tensor([[1e-3, -1e-3], [1.0, -1.0]])
    scale, _ = choose_qparams_affine(x, [1, -1], torch.int8, eps=1e-3)
    torch.testing.assert_close(scale, torch.tensor([[1e-3], [1 / 127.5]]), rtol=1e-6, atol=0)


def test_a_float_zero_point_may_keep_a_code_for_zero():
    x, form = torch.tensor([[-1.0, 0.25, 2.0], [1.0, 2.0, 4.0]]), dict(preserve_zero=True)
    scale, zero = choose_qparams_affine(x, [1, -1], torch.uint4, **TINYGEMM, **form)
    assert torch.allclose(scale, torch.tensor([[3 / 15], [4 / 15]])), "both ranges hold 0"
    assert torch.allclose(zero, torch.tensor([[8 - 5.0], [8.0]]) * scale)
    codes = quantize_affine(x * 0, [1, -1], scale, zero, torch.uint4, zero_point_domain="float")
    values = dequantize_affine(codes, [1, -1], scale, zero, torch.uint4, zero_point_domain="float")
    assert codes.tolist() == [[5] * 3, [0] * 3] and values.abs().max() < 1e-6
    bare = choose_qparams_affine(x, [1, -1], torch.uint4, **TINYGEMM)[1]
    assert torch.allclose(bare, torch.tensor([[-1 + 1.6], [1 + 1.6]])), (
        "tinygemm's own, if not asked"
    )
    scale, zero = choose_qparams_affine(0 * x, [1, -1], torch.uint4, **TINYGEMM, **form)
    assert scale.tolist() == [[1], [1]] and zero.tolist() == [[0], [0]], (
        "the middle code, no sums to cancel"
    )
    broken = x.clone()
    broken[0, 1] = torch.nan
    scale, zero = choose_qparams_affine(broken, [1, -1], torch.uint4, **TINYGEMM, **form)
    assert scale[0].isnan() and scale[1].isfinite()


def test_a_range_of_codes():
    """quant_min and quant_max narrow the codes, in all three functions."""
    x, block, narrow = (
        torch.tensor([[-1.0, 0.25, 2.0]]),
        [1, -1],
        dict(quant_min=-127, quant_max=127),
    )
    scale, zero = choose_qparams_affine(x, block, torch.int8, **narrow)
    assert zero is None and scale == torch.tensor(2.0) / 127
    assert quantize_affine(-x, block, scale / 2, None, torch.int8, **narrow).tolist() == [
        [127, -32, -127]
    ]
    narrow = dict(quant_min=2, quant_max=5)  # the middle is code 4
    scale, zero = choose_qparams_affine(x, block, torch.uint8, **TINYGEMM, **narrow)
    assert (scale, zero) == (1, 1)
    domain = dict(zero_point_domain="float")
    codes = quantize_affine(x, block, scale, zero, torch.uint8, **narrow, **domain)
    assert codes.tolist() == [[2, 3, 5]]
    values = dequantize_affine(codes, block, scale, zero, torch.uint8, **narrow, **domain)
    assert values.tolist() == [[-1, 0, 2]]


def test_values_are_rounded_once():
    """float32 arithmetic, then one rounding: in bfloat16 throughout, 3 * 1.0078125 + 300 is 304."""
    codes, scale, zero = (
        torch.tensor([[11]]).byte(),
        torch.tensor([[1.0078125]]),
        torch.tensor([[300.0]]),
    )
    values = dequantize_affine(
        codes, [1, 1], scale.bfloat16(), zero.bfloat16(), torch.uint4,
        zero_point_domain="float", output_dtype=torch.bfloat16,
    )  # fmt: skip
    assert values.dtype == torch.bfloat16 and values == torch.tensor(303.0234375).bfloat16()
    double = dequantize_affine(
        codes, [1, 1], scale / 3, None, torch.uint4, output_dtype=torch.float64
    )
    assert double == (scale / 3).double() * 11
