"""affine.py against torchao 0.18: equal wherever torchao is right, and where it is not, why."""

from __future__ import annotations

import pytest
import torch
from torchao.quantization import quant_primitives as ao

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
    FLOAT8,
    NO_CLIPPING,
    NO_CLIPPING_INT,
    REAL,
    SHAPE,
    SHIFTED,
    SIGNED,
    SYMMETRIC,
    TINYGEMM,
    UNSIGNED,
    check_error,
    each_block,
    legal_forms,
    name,
    round_trip,
    same,
    sample,
    sizes,
)


def torchao_forms(dtype):
    """Those in which torchao 0.18 is right; the tests of its errors show why not the others."""
    wrong = [TINYGEMM] if dtype in SIGNED else [NO_CLIPPING_INT]
    return [form for form in legal_forms(dtype) if form not in wrong]


AGREED = [(d, f) for d in SIGNED + UNSIGNED for f in torchao_forms(d)]
SYMMETRIC_FORMS = [(d, f) for d, f in AGREED if f["mapping"] != "asymmetric"]


class Torchao:
    """torchao 0.18 behind our signature; signed sub-byte codes live in int8 with a range."""

    def __init__(self, dtype, form, block):
        self.low, self.high = code_range(dtype)
        self.dtype, self.form, self.block = storage_dtype(dtype), form, list(block)
        self.domain = form["zero_point_domain"]

    def qparams(self, x, **options):
        choose = {
            ("float", True): ao._choose_qparams_affine_tinygemm,
            ("int", False): ao._choose_qparams_affine_dont_preserve_zero,
        }.get((self.domain, self.form.get("preserve_zero", True)), ao.choose_qparams_affine)
        mapping = ao.MappingType[self.form["mapping"].upper()]
        block = sizes(self.block, x.shape)
        scale, zero = choose(x, mapping, block, self.dtype, self.low, self.high, **options)
        counts = [size // b for size, b in zip(x.shape, block, strict=True)]
        return scale.view(counts), None if self.domain == "none" else zero.view(counts)

    def quantize(self, x, scale, zero):
        function = {
            "none": ao._quantize_affine_no_zero_point,
            "int": ao.quantize_affine,
            "float": ao._quantize_affine_tinygemm,
        }[self.domain]
        block = sizes(self.block, x.shape)
        return function(x, block, scale, zero, self.dtype, self.low, self.high)

    def dequantize(self, codes, scale, zero, output_dtype=torch.float32):
        function = {
            "none": ao._dequantize_affine_no_zero_point,
            "int": ao.dequantize_affine,
            "float": ao._dequantize_affine_tinygemm,
        }[self.domain]
        block = sizes(self.block, codes.shape)
        args = (codes, block, scale, zero, self.dtype, self.low, self.high)
        return function(*args, output_dtype=output_dtype)


# ---------------------------------------------------------------------------- equal to torchao


@pytest.mark.parametrize("dtype, form", AGREED, ids=name)
def test_equals_torchao(dtype, form):
    for block in BLOCKS.values():
        theirs, domain = Torchao(dtype, form, block), form["zero_point_domain"]
        for real in REAL:
            x = sample().to(real)
            scale, zero, codes, values = round_trip(
                x, block, dtype, form, torch.float32, scale_dtype=torch.float32
            )
            # Ours works in float32 whatever the input; torchao does so for float32 inputs only.
            their_scale, their_zero = theirs.qparams(x.float())
            same(scale, their_scale)
            if zero is not None:
                same(zero, their_zero)
            same(codes, theirs.quantize(x.float(), scale, zero))
            same(values, theirs.dequantize(codes, scale, zero))
            if domain != "float":  # there torchao rounds to the output dtype twice
                out = dequantize_affine(
                    codes, block, scale, zero, dtype, zero_point_domain=domain, output_dtype=real
                )
                same(out, theirs.dequantize(codes, scale, zero, real))


@pytest.mark.parametrize("real", REAL, ids=name)
@pytest.mark.parametrize("dtype, form", SYMMETRIC_FORMS, ids=name)
def test_symmetric_qparams_equal_torchao_in_the_input_dtype(dtype, form, real):
    for block in BLOCKS.values():
        x = sample().to(real)
        scale, zero = choose_qparams_affine(x, block, dtype, **form)
        their_scale, their_zero = Torchao(dtype, form, block).qparams(x)
        same(scale, their_scale)
        if zero is not None:
            same(zero, their_zero)


@pytest.mark.parametrize("dtype, form", AGREED, ids=name)
def test_the_scale_is_rounded_before_it_is_used(dtype, form):
    """Zero points and codes follow from the stored qparams, not from ones of more digits."""
    for block in BLOCKS.values():
        x = sample((4, 4, 32))
        scale, zero, codes, _ = round_trip(x, block, dtype, form, scale_dtype=torch.bfloat16)
        theirs = Torchao(dtype, form, block)
        same(scale, theirs.qparams(x, scale_dtype=torch.bfloat16)[0])
        stored = zero.float() if zero is not None and zero.is_floating_point() else zero
        same(codes, theirs.quantize(x, scale.float(), stored))
        for index, values in each_block(x, block):
            low, step = values.min(), scale[index].float()
            if form is TINYGEMM:
                assert zero[index] == (low + step * 2 ** (bits_of(dtype) - 1)).to(torch.bfloat16)
            elif form["mapping"] == "asymmetric":
                assert zero[index] == code_range(dtype)[0] - torch.round(low / step)


@pytest.mark.parametrize("dtype", FLOAT8, ids=name)
def test_float8_equals_torchao(dtype):
    for block in BLOCKS.values():
        for real in REAL:
            x = (64 * sample()).to(real)  # keeps the scale of e5m2 among float16's normal numbers
            scale, _, codes, _ = round_trip(x, block, dtype, SYMMETRIC, scale_dtype=torch.float32)
            same(scale, ao._choose_scale_float8(x.float(), sizes(block, SHAPE), dtype))
            same(codes, ao._quantize_affine_float8(x, scale, dtype))
            values = dequantize_affine(codes, block, scale, None, dtype, output_dtype=real)
            same(values, ao._dequantize_affine_float8(codes, scale, real))
            native, _ = choose_qparams_affine(x, block, dtype)
            same(native.float(), ao._choose_scale_float8(x, sizes(block, SHAPE), dtype))


@pytest.mark.parametrize("dtype", FLOAT8, ids=name)
def test_float8_divides_by_the_scale(dtype):
    """On the halves between two codes a product with 1 / scale would go either way."""
    codes = torch.arange(1, 256, 2, dtype=torch.float32)
    scale = torch.rand(64, 1, generator=torch.Generator().manual_seed(0)) + 0.1
    ours = quantize_affine(codes * scale, [1, -1], scale, None, dtype)
    same(ours, ao._quantize_affine_float8(codes * scale, scale, dtype))


# --------------------------------------------------------------------- where torchao is wrong


@pytest.mark.parametrize("form", [ASYMMETRIC, TINYGEMM], ids=name)
def test_float16_range_does_not_overflow(form):
    x = torch.tensor([[-60000.0, 60000.0, 100.0, 0.0]], dtype=torch.float16)
    check_error(x, [1, -1], torch.uint8, form, steps=1 if form is ASYMMETRIC else 0.5)
    assert Torchao(torch.uint8, form, [1, -1]).qparams(x)[0].isinf().all()


@pytest.mark.parametrize("form", [SYMMETRIC, NO_CLIPPING, ASYMMETRIC, TINYGEMM], ids=name)
def test_scale_beyond_float16_saturates(form):
    x = torch.tensor([[1e9, 0.0, -1e9, 1.0]])
    options = dict(scale_dtype=torch.float16)
    dtype = torch.uint8 if form is TINYGEMM else torch.int8
    scale, _, _, values = round_trip(x, [1, -1], dtype, form, **options)
    assert scale == torch.finfo(torch.float16).max
    assert torch.isfinite(values).all() and values[0, 2] < -4e6
    assert values[0, 0] > 4e6 or form is ASYMMETRIC  # its zero point is the highest code
    assert Torchao(dtype, form, [1, -1]).qparams(x, **options)[0].isinf().all()


def test_zero_block_in_torchao():
    x = torch.zeros(2, 8)
    scale, _ = Torchao(torch.int8, SYMMETRIC, [1, -1]).qparams(x, scale_dtype=torch.float16)
    assert not scale.any()  # and 1 / scale is infinite
    scale = ao._choose_scale_float8(x, [1, 8], torch.float8_e4m3fn)
    assert ao._quantize_affine_float8(x, scale, torch.float8_e4m3fn).float().isnan().all()


def test_nan_under_a_known_scale():
    """With a static scale NaN takes the code of zero; torchao's cast makes a large value of it."""
    x = torch.tensor([[float("nan"), 0.0, float("inf"), float("-inf")]])
    scale, zero = torch.ones(1, 1), torch.full((1, 1), 128, dtype=torch.int32)
    domain = dict(zero_point_domain="int")
    codes = quantize_affine(x, [1, -1], scale, zero, torch.uint8, **domain)
    assert codes.tolist() == [[128, 128, 255, 0]]
    theirs = Torchao(torch.uint8, ASYMMETRIC, [1, -1])
    assert theirs.dequantize(theirs.quantize(x, scale, zero), scale, zero)[0, 0] != 0
    codes = quantize_affine(x, [1, -1], scale, None, torch.int8)
    assert codes.tolist() == [[0, 0, 127, -128]]
    for middle in (0.0, 2.0):
        zero = torch.full((1, 1), middle)
        domain = dict(zero_point_domain="float")
        codes = quantize_affine(x, [1, -1], scale, zero, torch.uint4, **domain)
        assert codes.tolist() == [[8, 8 - middle, 15, 0]]
    codes = quantize_affine(x, [1, -1], scale, None, torch.float8_e4m3fn).float()
    assert codes[0, 0].isnan() and codes[0, 1:].tolist() == [0, 448, -448]


def test_no_clipping_in_unsigned_codes():
    """The middle code is zero, so either side has half the codes; torchao counts all of them."""
    x = sample()
    check_error(x, (1, -1, -1), torch.uint4, NO_CLIPPING_INT)
    theirs = Torchao(torch.uint4, NO_CLIPPING_INT, (1, -1, -1))
    scale, zero = theirs.qparams(x)
    error = (theirs.dequantize(theirs.quantize(x, scale, zero), scale, zero) - x).abs()
    assert (error.amax((1, 2)) > 2 * scale.flatten()).all()


def test_a_range_without_zero():
    """preserve_zero=False: torchao clamps the zero point into the codes and loses the range."""
    x = torch.linspace(5, 6, 16)[None]
    check_error(x, [1, -1], torch.uint8, SHIFTED, steps=1)
    theirs = Torchao(torch.uint8, SHIFTED, [1, -1])
    scale, zero = theirs.qparams(x)
    assert (theirs.dequantize(theirs.quantize(x, scale, zero), scale, zero) - x).abs().min() > 1


def test_signed_codes_in_the_float_domain():
    """The lowest code stands for the minimum; torchao puts the middle code there."""
    x = sample()
    check_error(x, (1, 1, 8), torch.int4, TINYGEMM)
    theirs = Torchao(torch.int4, TINYGEMM, (1, 1, 8))
    scale, zero = theirs.qparams(x)
    assert (theirs.dequantize(theirs.quantize(x, scale, zero), scale, zero) - x).abs().max() > 1


def test_blocks_of_one_value():
    x = sample((2, 3))
    scale, _, codes, values = round_trip(x, [1, 1], torch.int8, NO_CLIPPING)
    assert scale.shape == x.shape and set(codes.flatten().tolist()) <= {-128, 0, 127}
    torch.testing.assert_close(values.float(), x, rtol=1e-6, atol=0)
    with pytest.raises(RuntimeError):  # one scale for the whole tensor
        Torchao(torch.int8, NO_CLIPPING, [1, 1]).qparams(x)


def test_bfloat16_inputs_are_quantized_in_float32():
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    check_error(x, [1, -1], torch.int8, SYMMETRIC)
    theirs = Torchao(torch.int8, SYMMETRIC, [1, -1])
    scale, _ = theirs.qparams(x)
    error = theirs.quantize(x, scale, None).double() * scale.double() - x.double()
    assert (error.abs() > 0.75 * scale).any()
