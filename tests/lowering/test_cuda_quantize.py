"""One row of activations that the kernel quantizes itself (``cuda/quantize.cuh``)."""

from __future__ import annotations

import itertools

import pytest
import torch

from fxquant.affine import pack_codes, storage_dtype
from fxquant.lowering import cuda_layout, cuda_stream, tuning
from fxquant.lowering.cuda_shapes import BESIDE_CODES, Shape, plain_shape, shape_for
from fxquant.lowering.cuda_stream import LONGEST, quantizes
from fxquant.lowering.hopper import room
from fxquant.lowering.kernel import KERNELS
from fxquant.ops import bundle
from fxquant.scheme import Quantized, Scheme, get_scheme
from tests.lowering.test_cuda_kernels import needs_hopper, problem

SCHEMES = ["int8dq", "fp8dq", "8da4w-32", "8da4w-128"]
CUTS = [
    Shape(1, 4, 2, 1, 128, 3),
    Shape(7, 1, 1, 1, 256, 3),
    Shape(2, 4, 1, 1, 128, 4, splits=2),
    Shape(1, 16, 1, 1, 128, 3),
]


def identity(scheme: Scheme, k: int) -> Quantized:
    """A weight [k, k] that gives back what it is multiplied by."""
    spec = scheme.weight
    codes = pack_codes(torch.eye(k).to(storage_dtype(spec.dtype)), spec.dtype)
    groups = k // spec.group_size if spec.group_size else 1
    return Quantized(codes, torch.ones(k, groups, dtype=spec.scale_dtype), None)


def rows(k: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Normal numbers, large and small ones, codes that are halves, one sign alone, zeros, an outlier."""
    x = torch.randn(1, k, generator=torch.Generator().manual_seed(k))
    halves = torch.arange(k).remainder(511)[None] - 255.0
    outlier = torch.where(torch.arange(k)[None] == k - 1, 300.0, x)
    scaled = [
        x * 2.0**power for power in ((-20, 13) if dtype == torch.float16 else (-130, -60, 90))
    ]
    found = [x, *scaled, halves / 2, x.abs(), -x.abs(), 0 * x, 0 * x + 3, outlier, -outlier]
    return [row.to(dtype) for row in found]


@needs_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scheme", SCHEMES)
@torch.no_grad()
def test_the_codes_are_those_of_quantize(scheme, dtype):
    """Times the identity they are what they stand for, which float32 holds exactly."""
    row, k = get_scheme(scheme), 1280
    kernel = next(
        KERNELS[name] for name in ("cuda_w4a8", "cuda_w8a8") if row.family in KERNELS[name].families
    )
    packed = [t.cuda() for t in kernel.layout.pack(row, identity(row, k))]
    for x, cut in itertools.product(rows(k, dtype), CUTS):
        codes = torch.ops.fxquant.quantize_rows(x.cuda(), scheme)
        q = bundle(codes)
        wanted = (q.codes.float() - (0 if q.zero is None else q.zero)) * q.scale
        rest = (None, None, packed, None, k, "", torch.float32)
        found = cuda_stream.run(row, cut, x.cuda(), *rest)
        assert torch.equal(found, wanted), (x, cut)
        assert torch.equal(found, cuda_stream.run(row, cut, x.cuda(), *rest)), "from run to run"
    for bad in (torch.inf, -torch.inf, torch.nan):
        x = rows(k, dtype)[0].cuda()
        x[0, 77] = bad
        assert cuda_stream.run(row, CUTS[0], x, *rest).isnan().all(), (
            "nothing that is not finite is lost"
        )


@needs_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scheme", SCHEMES)
@torch.no_grad()
def test_codes_made_before_give_the_same(scheme, dtype):
    """Bit for bit, at the cuts that are chosen, with a gate and a bias and without."""
    row, n, k = get_scheme(scheme), 288, 1024
    kernel = next(
        KERNELS[name] for name in ("cuda_w4a8", "cuda_w8a8") if row.family in KERNELS[name].families
    )
    weight = row.weight.quantize(torch.randn(n, k, generator=torch.Generator().manual_seed(0)))
    packed = [t.cuda() for t in kernel.layout.pack(row, weight)]
    x = torch.randn(1, k, generator=torch.Generator().manual_seed(1)).to("cuda", dtype)
    codes, scale, *zero = torch.ops.fxquant.quantize_rows(x, scheme)
    op = torch.ops.fxquant.stream_linear
    biases = (None, torch.randn(n, device="cuda", dtype=dtype))
    for epilogue, bias in itertools.product(("", "silu", "silu_mul"), biases):
        rest = (packed, bias, scheme, epilogue, n, dtype)
        before = op(codes, scale, *(zero or [None]), *rest)
        assert torch.equal(op(x, None, None, *rest), before), epilogue


def test_one_row_alone_is_quantized_by_the_kernel():
    for scheme in SCHEMES:
        assert quantizes(problem(scheme, m=1))
        for other in (problem(scheme, m=2), problem(scheme), problem(scheme, m=1, k=2 * LONGEST)):
            assert not quantizes(other)
    assert not quantizes(problem("int4wo-64", m=1))
    names = {name for name, kernel in KERNELS.items() if kernel.quantizes(problem("int8dq", m=1))}
    assert {"cuda_w8a8", "cuda_w4a8"} == names


def test_a_cut_for_more_tokens_is_not_taken_for_one_row(monkeypatch):
    """Of activations that come as floats it may be; codes of one row are made where one row is cut alone."""
    table = {section: {} for section in tuning.SECTIONS}
    cut = [4, 2, 1, 8, 128, 4]
    table["shapes"] = {"int8dq 4096x4096": [[0, cut]], "int8wo 4096x4096": [[0, cut]]}
    monkeypatch.setattr(tuning, "tuned_table", lambda device: table)
    for scheme, tokens in (("int8dq", 1), ("int8wo", 8)):
        row = get_scheme(scheme)
        assert shape_for(row, 4096, 4096, 1, "some").tokens == tokens
        assert shape_for(row, 4096, 4096, 2, "some").tokens == 8
    tuning.forget()


def test_its_codes_have_room_in_every_cut_for_one_row():
    """Where a measured cut has none, another is taken; a plain one always has."""
    for scheme, k in itertools.product(SCHEMES, (256, 4096, 14336, LONGEST)):
        row = get_scheme(scheme)
        form = cuda_layout.format_of(row)
        shape = shape_for(row, 28672, k, 1, "NVIDIA H200")
        own = cuda_stream.quantizing(form, torch.bfloat16)
        assert (
            shape.fits(form, k) and shape.fits(own, k) and not shape._replace(tokens=8).fits(own, k)
        )
        beside = shape.activations(own, k)
        assert beside >= BESIDE_CODES + k // shape.splits and shape.activations(form, k) == 0
        plain = plain_shape(form, k, 1)
        assert room(plain.shared(own) + plain.activations(own, k), 1)
