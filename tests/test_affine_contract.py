"""What affine.py promises beside its numbers: shapes, tracing, packing, schemes, errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fxquant.affine import (
    bits_of,
    choose_qparams_affine,
    code_range,
    dequantize_affine,
    pack_codes,
    quantize_affine,
    storage_dtype,
    unpack_codes,
)
from fxquant.errors import InvalidBlockSize, InvalidOption, ShapeMismatch, UnsupportedDtype
from fxquant.scheme import SCHEMES

from .affine_cases import (
    ASYMMETRIC,
    EVERY,
    FLOAT8,
    NO_CLIPPING,
    NO_CLIPPING_INT,
    REAL,
    SHIFTED,
    SIGNED,
    SYMMETRIC,
    SYMMETRIC_INT,
    TINYGEMM,
    UNSIGNED,
    name,
    round_trip,
    same,
    sample,
)

# ----------------------------------------------------------------------------------- shapes


def test_empty_tensors():
    for shape, block, counts in [
        ((0, 16), (1, -1), (0, 1)), ((0, 16), (1, 8), (0, 2)), ((0, 16), (-1, -1), (1, 1)),
        ((4, 0), (1, -1), (4, 1)), ((4, 0), (1, 8), (4, 0)), ((0,), (-1,), (1,)),
    ]:  # fmt: skip
        for dtype, form in EVERY:
            scale, zero, codes, values = round_trip(torch.empty(shape), block, dtype, form)
            assert scale.shape == counts and (scale == 1).all()
            assert codes.shape == values.shape == shape and codes.dtype == storage_dtype(dtype)
            assert zero is None or zero.shape == counts


def test_a_scalar_and_a_vector():
    scale, _, codes, values = round_trip(torch.tensor(-2.0), [], torch.int8, NO_CLIPPING)
    assert scale.shape == () and codes == -128 and values == -2
    x = torch.tensor([1.0, -2.0, 4.0, -8.0])
    scale, _, codes, values = round_trip(x, [2], torch.int8, NO_CLIPPING)
    assert scale.tolist() == [2 / 128, 8 / 128] and codes.tolist() == [64, -128, 64, -128]
    assert values.tolist() == x.tolist()


@pytest.mark.parametrize("dtype, form", EVERY, ids=name)
def test_strides_do_not_matter(dtype, form):
    x = sample((4, 6, 16))
    for strided in (x.transpose(0, 2), x[:, ::2], x[..., 1::2].flip(0), x[:1].expand(3, 6, 16)):
        expected = round_trip(strided.contiguous(), (1, 1, -1), dtype, form)
        for ours, theirs in zip(
            round_trip(strided, (1, 1, -1), dtype, form), expected, strict=True
        ):
            assert ours is theirs is None or same(ours, theirs) is None
        assert round_trip(strided, (1, 1, -1), dtype, form)[2].is_contiguous()


@pytest.mark.parametrize(
    "block, dtype, form",
    [
        ((-1, -1), torch.uint4, SYMMETRIC_INT),
        ((1, -1), torch.int8, ASYMMETRIC),
        ((-1, 1), torch.float8_e4m3fn, SYMMETRIC),
        ((1, 8), torch.uint4, TINYGEMM),
        ((2, 8), torch.int8, NO_CLIPPING),
    ],
    ids=name,
)
def test_symbolic_shapes(block, dtype, form):
    """A traced graph serves other sizes; fake tensors have the shapes and dtypes of real ones."""

    def run(x):
        scale, zero, codes, values = round_trip(x, block, dtype, form)
        packed = pack_codes(codes, dtype)
        results = [scale, codes, values, packed, unpack_codes(packed, dtype)]
        return results if zero is None else [*results, zero]

    graph = make_fx(run, tracing_mode="symbolic")(sample((4, 16)))
    (x,) = (node for node in graph.graph.nodes if node.op == "placeholder")
    assert not any(isinstance(size, int) for size in x.meta["val"].shape)
    other = sample((6, 40), seed=2)
    expected = run(other)
    for ours, theirs in zip(graph(other), expected, strict=True):
        same(ours, theirs)
    with FakeTensorMode() as mode:
        fakes = run(mode.from_tensor(other))
    for fake, real in zip(fakes, expected, strict=True):
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


class RoundTrip(torch.nn.Module):
    def __init__(self, spec):
        super().__init__()
        self.spec = spec

    def forward(self, x):
        return self.spec.dequantize(self.spec.quantize(x), torch.float32)


@pytest.mark.parametrize("scheme, part", [("8da4w-32", "input"), ("int4wo-32", "weight")])
def test_export_and_compile(scheme, part):
    """One graph for all rows, in torch.export and in Dynamo."""
    module = RoundTrip(getattr(SCHEMES[scheme], part))
    rows = {"x": {0: torch.export.Dim("rows")}}
    exported = torch.export.export(module, (sample((4, 64)),), dynamic_shapes=rows).module()
    compiled = torch.compile(module, backend="aot_eager", dynamic=True, fullgraph=True)
    for count in (4, 7, 33):
        x = sample((count, 64))
        same(exported(x), module(x))
        same(compiled(x), module(x))


# --------------------------------------------------------------------------------- packing


@pytest.mark.parametrize(
    "dtype, codes, packed",
    [
        (torch.uint4, [1, 2, 3, 15], [0x21, 0xF3]),
        (torch.int4, [-8, 7, 0, -1], [0xF0, 0x78]),
        (torch.uint3, [*range(8)], [0b10_001_000, 0b1_100_011_0, 0b111_110_10]),
        (torch.int3, [*range(-4, 4)], [0b10_001_000, 0b1_100_011_0, 0b111_110_10]),
        (torch.uint2, [0, 1, 2, 3], [0b11_10_01_00]),
        (torch.int2, [-2, -1, 0, 1], [0b11_10_01_00]),
        (torch.uint1, [1, 0, 0, 1, 0, 0, 0, 1], [0b1000_1001]),
        (torch.int1, [0, -1, -1, 0, -1, -1, -1, 0], [0b1000_1001]),
    ],
    ids=name,
)
def test_packed_bytes(dtype, codes, packed):
    codes = torch.tensor(codes, dtype=storage_dtype(dtype))
    same(pack_codes(codes, dtype), torch.tensor(packed, dtype=torch.uint8))
    every = torch.arange(256, dtype=torch.uint8).repeat(3).view(2, 4, 96)
    same(pack_codes(unpack_codes(every, dtype), dtype), every)


@settings(max_examples=100, derandomize=True, deadline=None)
@given(
    shape=st.lists(st.integers(0, 3), max_size=2).map(tuple),
    last=st.integers(0, 4),
    dtype=st.sampled_from(SIGNED + UNSIGNED),
    seed=st.integers(0, 99),
)
def test_unpack_inverts_pack(shape, last, dtype, seed):
    lowest, highest = code_range(dtype)
    codes = torch.randint(
        lowest, highest + 1, (*shape, 8 * last), generator=torch.Generator().manual_seed(seed)
    ).to(storage_dtype(dtype))
    packed = pack_codes(codes, dtype)
    bits = bits_of(dtype) if bits_of(dtype) <= 4 else 8
    assert packed.shape == (*shape, last * bits)
    same(unpack_codes(packed, dtype), codes)


def test_whole_bytes_pass_through():
    for dtype in (torch.int5, torch.uint6, torch.int8, torch.uint8, *FLOAT8):
        codes = torch.zeros(3, dtype=storage_dtype(dtype))
        assert pack_codes(codes, dtype) is codes and unpack_codes(codes, dtype) is codes


# --------------------------------------------------------------------------------- schemes


@pytest.mark.parametrize("real", [*REAL, torch.float64], ids=name)
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_schemes(scheme, real):
    x = sample((6, 512), seed=3).to(real)
    for spec in filter(None, (scheme.weight, scheme.input)):
        quantized = spec.quantize(x)
        extent = spec.group_size or 512
        step = quantized.scale.double().repeat_interleave(extent, 1)
        assert quantized.scale.shape == (1 if spec.granularity == "tensor" else 6, 512 // extent)
        assert quantized.scale.dtype == spec.scale_dtype
        assert quantized.codes.shape == (6, 512 * min(spec.bits, 8) // 8)
        # bfloat16 qparams cost up to a tenth of a step, an integer zero point half a step.
        steps = 16 if spec.dtype in FLOAT8 else 1 if spec.zero_point_domain == "int" else 0.6
        error = spec.dequantize(quantized, torch.float64) - x.double()
        assert (error.abs() <= steps * step).all()
        assert spec.dequantize(quantized, real).dtype == real


# ---------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("block", [(1,), (1, 1, 1), (1, 0), (1, -2), (1, 5), (3, -1), (1, 32)])
def test_block_that_does_not_divide(block):
    with pytest.raises(InvalidBlockSize, match="does not divide a tensor of shape") as caught:
        choose_qparams_affine(torch.zeros(4, 16), block, torch.int8)
    assert caught.value.block_size == block and caught.value.shape == (4, 16)
    with pytest.raises(InvalidBlockSize):
        quantize_affine(torch.zeros(4, 16), block, torch.ones(4, 1), None, torch.int8)
    with pytest.raises(InvalidBlockSize):
        dequantize_affine(torch.zeros(4, 16).char(), block, torch.ones(4, 1), None, torch.int8)


@pytest.mark.parametrize(
    "dtype, options, option",
    [
        (torch.int16, {}, "dtype"),
        (torch.float16, {}, "dtype"),
        (torch.int8, dict(mapping="affine"), "mapping"),
        (torch.float8_e5m2, ASYMMETRIC, "mapping"),
        (torch.int1, NO_CLIPPING, "mapping"),
        (torch.uint1, NO_CLIPPING_INT, "mapping"),
        (torch.int8, dict(mapping="symmetric", zero_point_domain="float"), "zero_point_domain"),
        (torch.int8, dict(mapping="asymmetric"), "zero_point_domain"),
        (torch.uint8, SYMMETRIC, "zero_point_domain"),
        (torch.float8_e4m3fn, SYMMETRIC_INT, "zero_point_domain"),
        (torch.int4, dict(quant_min=-9), "quant_min, quant_max"),
        (torch.int4, dict(quant_max=8), "quant_min, quant_max"),
        (torch.int4, dict(quant_min=3, quant_max=3), "quant_min, quant_max"),
        (torch.int8, dict(scale_dtype=torch.int32), "scale_dtype"),
        (torch.uint4, dict(**TINYGEMM, zero_point_dtype=torch.int32), "zero_point_dtype"),
        (torch.uint8, dict(**ASYMMETRIC, zero_point_dtype=torch.int8), "zero_point_dtype"),
        (torch.uint8, dict(**ASYMMETRIC, zero_point_dtype=torch.bfloat16), "zero_point_dtype"),
        (torch.int8, dict(**SHIFTED, zero_point_dtype=torch.int16), "zero_point_dtype"),
    ],
)
def test_options_that_cannot_be(dtype, options, option):
    with pytest.raises(InvalidOption) as caught:
        choose_qparams_affine(torch.zeros(2, 8), [1, -1], dtype, **options)
    assert caught.value.name == option


def test_tensors_that_cannot_be():
    with pytest.raises(UnsupportedDtype, match="int64"):
        choose_qparams_affine(torch.zeros(2, 8, dtype=torch.int64), [1, -1], torch.int8)
    x, one = torch.zeros(2, 8), torch.ones(2, 1)
    for scale in (torch.ones(2, 2), torch.ones(1, 1), torch.ones(2), torch.tensor(1.0)):
        with pytest.raises(ShapeMismatch, match="scale has shape"):
            quantize_affine(x, [1, -1], scale, None, torch.int8)
        with pytest.raises(ShapeMismatch, match="zero_point has shape"):
            dequantize_affine(x.char(), [1, -1], one, scale, torch.int8, zero_point_domain="int")
    with pytest.raises(InvalidOption, match="expected a tensor in domain 'int'"):
        quantize_affine(x, [1, -1], one, None, torch.int8, zero_point_domain="int")
    with pytest.raises(InvalidOption, match="expected None in domain 'none'"):
        dequantize_affine(x.char(), [1, -1], one, one, torch.int8)
    with pytest.raises(InvalidOption, match="dtype of codes"):
        dequantize_affine(x, [1, -1], one, None, torch.int8)
    with pytest.raises(InvalidOption, match="dtype of codes"):
        pack_codes(x.char(), torch.uint4)
    with pytest.raises(InvalidOption, match="dtype of packed codes"):
        unpack_codes(x.char(), torch.int4)
    with pytest.raises(ShapeMismatch, match="multiple of 4"):
        pack_codes(torch.zeros(2, 6, dtype=torch.uint8), torch.uint2)
