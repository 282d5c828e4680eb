"""The CUDA C++ kernels: layouts and compilation everywhere, the three oracles on a Hopper GPU."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

import fxquant
from fxquant import tuner
from fxquant.affine import unpack_codes
from fxquant.lowering import (
    candidates,
    cuda_cuts,
    cuda_layout,
    cuda_pipeline,
    cuda_prefill,
    cuda_stream,
    nvrtc,
    tuning,
)
from fxquant.lowering.cuda_shapes import Shape
from fxquant.lowering.kernel import KERNELS, Device, Problem
from fxquant.lowering.select import select
from fxquant.lowering.tuning import tuned_shapes
from fxquant.scheme import Quantized, get_scheme
from tests import oracles

HOPPER = Device(
    name="some Hopper",
    type="cuda",
    bandwidth=4e12,
    peak={"float32": 5e13, "bfloat16": 7e14, "int8": 1.15e15, "float8": 1.2e15},
    launch=3e-6,
    features=frozenset({"sm80", "sm89", "sm90", "hopper"}),
    units=132,
)
STREAM = {
    "cuda_w4a16": [
        "int4wo-32",
        "int4wo-64",
        "int4wo-64-sym",
        "int4wo-128",
        "int4wo-256",
        "int3wo-32",
        "int3wo-128",
        "int2wo-32",
    ],
    "cuda_w8a16": ["int8wo", "fp8wo"],
    "cuda_w4a8": ["8da4w-32", "8da4w-64", "8da4w-128", "8da4w-256"],
    "cuda_w8a8": ["int8dq", "fp8dq"],
    "cuda_pipeline": [
        "int4wo-32",
        "int4wo-64-sym",
        "int4wo-128",
        "int4wo-256",
        "int3wo-64",
        "int2wo-64",
        "int8wo",
        "fp8wo",
    ],
    "cuda_pipeline_w4a8": ["8da4w-32", "8da4w-128", "8da4w-256"],
    "cuda_pipeline_w4a8_widened": ["8da4w-32", "8da4w-256"],
    "cuda_pipeline_w8a8": ["int8dq", "fp8dq"],
    "cuda_dequantize": [
        "int4wo-32",
        "int4wo-256-sym",
        "int3wo-64",
        "int2wo-64",
        "int8wo",
        "fp8wo",
    ],
    "cuda_dequantize_w4a8": ["8da4w-32", "8da4w-128"],
}
CASES = [(kernel, scheme) for kernel, schemes in STREAM.items() for scheme in schemes]
ROWS = (0, 1, 2, 9, 40, 65, 300)
needs_compiler = pytest.mark.skipif(nvrtc.refusal() is not None, reason="needs NVRTC")
needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a Hopper GPU",
)


def problem(scheme: str, n: int = 4096, k: int = 4096, **changes) -> Problem:
    dtype = changes.pop("dtype", torch.bfloat16)
    row = get_scheme(scheme).product
    at = Problem(scheme=row, n=n, k=k, m=None, dtype=dtype, bias=False, device=HOPPER)
    return replace(at, **changes)


@pytest.mark.parametrize("scheme", sorted({s for _, s in CASES} - {"int8dq", "fp8dq"}))
@pytest.mark.parametrize("n, k", [(16, 256), (37, 512), (1, 768)])
def test_the_stream_gives_back_what_it_was_packed_from(scheme, n, k):
    oracles.layout_round_trip(_with_layout(scheme), scheme, n, k)


def _with_layout(scheme: str):
    return next(KERNELS[kernel] for kernel, name in CASES if name == scheme)


@pytest.mark.parametrize("scheme", ["int4wo-64", "8da4w-32", "int8wo"])
def test_large_weights_are_packed_in_slabs(scheme, monkeypatch):
    whole = oracles.random_sample(scheme, 0, 80, 512, torch.float32).weight
    expected = cuda_layout.pack(get_scheme(scheme), whole)
    monkeypatch.setattr(cuda_layout, "SLAB", 512 * 32)
    for a, b in zip(expected, cuda_layout.pack(get_scheme(scheme), whole), strict=True):
        assert torch.equal(a, b)


SOME = ("int3wo-64", "int4wo-64", "int4wo-64-sym", "8da4w-32", "int8wo", "int8dq", "fp8wo")
PACKS = sorted(
    {
        (scheme, kernel.layout.name)
        for kernel, scheme in itertools.product(KERNELS.values(), SOME)
        if kernel.device != "cpu" and get_scheme(scheme).product.family in kernel.families
    }
)


@pytest.mark.parametrize("scheme, layout", PACKS)
def test_packed_weights_share_no_memory_with_what_they_were_packed_from(scheme, layout):
    """Canonical codes are freed once packed: a view of them left in the pack would dangle."""
    q = oracles.random_sample(scheme, 0, 64, 256, torch.float32).weight
    packed = torch.ops.fxquant.pack(*q, scheme, layout)
    before = [t.clone() for t in packed]
    for tensor in q:
        if tensor is not None:
            tensor.view(torch.uint8).bitwise_not_()
    for tensor, expected in zip(packed, before, strict=True):
        assert torch.equal(tensor.view(torch.uint8), expected.view(torch.uint8))


def test_widened_activations_meet_their_weights():
    """What the kernel does to a word, in Python: each lane's pairs of weights, as the operands of two 16-bit
    products, times the activations that lie at the same k."""
    scheme, n, k = get_scheme("8da4w-32"), 16, 64
    q = oracles.random_sample(scheme, 0, n, k, torch.float32).weight
    codes = torch.randint(-128, 128, (3, k), dtype=torch.int8)
    inputs = Quantized(codes, torch.ones(3, 1), torch.tensor([[5], [-7], [0]]))
    x = torch.ops.fxquant.widen(inputs.codes, inputs.zero).float()
    stream = cuda_layout.pack(scheme, q)[0].view(k // 32, -1)[:, : 16 * 32 // 2]
    words = stream.contiguous().view(torch.int32).view(k // 32, 32, 2)
    weights = torch.zeros(n, k)
    for block, lane, half, p in itertools.product(range(k // 32), range(32), range(2), range(4)):
        pair = ((int(words[block, lane, half]) >> (4 * p)) & 0x000F000F) ^ 0x00080008
        register = 2 * (1 - p % 2) + half  # of mma's left operand: rows, then the second half of k
        at = block * 32 + p // 2 * 16 + register // 2 * 8 + lane % 4 * 2
        row = lane // 4 + 8 * (register % 2)
        weights[row, at], weights[row, at + 1] = (pair & 0xFFFF) - 8, (pair >> 16) - 8
    integers = codes.float() - torch.tensor([[5.0], [-7.0], [0.0]])
    assert torch.equal(x @ weights.T, integers @ unpack_codes(q.codes, torch.int4).float().T)


def test_extreme_scales_survive_the_stream():
    """Rows with scales from 2**-60 to 2**60, and a group 2**40 smaller than its row's largest."""
    scheme = get_scheme("int4wo-32")
    q = oracles.random_sample(scheme, 0, 24, 128, torch.float32).weight
    powers = torch.linspace(-60, 60, 24).round().exp2()[:, None]
    scale = (q.scale.float() * powers).bfloat16()
    scale[:, 1] *= 2.0**-40
    zero = (q.zero.float() * powers).bfloat16()
    extreme = q._replace(scale=scale, zero=zero)
    back = cuda_layout.unpack(scheme, cuda_layout.pack(scheme, extreme), 24, 128)
    assert torch.equal(back.scale, scale) and torch.equal(back.zero, zero)


@needs_compiler
@pytest.mark.parametrize(
    "scheme", ["int4wo-64", "int2wo-32", "int8wo", "fp8wo", "8da4w-32", "int8dq", "fp8dq"]
)
@pytest.mark.parametrize("gated", [0, 1])
def test_every_form_compiles_for_hopper(scheme, gated):
    form = cuda_layout.format_of(get_scheme(scheme))
    more = {"x_half": 0, "y_type": 1, "bias_type": 0, "activation": 4, "gated": gated}
    shapes = [Shape(1, 4, 2, 1, 128, 4), Shape(4, 1, 2, 64, 128, 3, 1)]
    for shape in (s for s in shapes if s.fits(form, 4096)):
        constants = cuda_stream.defines(form, shape, **more)
        text = cuda_stream.source(form, shape, False)
        assert nvrtc.compile_source(text, dict(constants), "sm_90a")[:4] == b"\x7fELF"
    if get_scheme(scheme).input is not None:
        for dtype in cuda_stream.CODE:  # of one row, which the kernel quantizes
            constants = dict(
                cuda_stream.defines(cuda_stream.quantizing(form, dtype), shapes[0], **more)
            )
            assert constants["X_TYPE"] > 0
            text = cuda_stream.source(form, shapes[0], False)
            assert nvrtc.compile_source(text, constants, "sm_90a")[:4] == b"\x7fELF"
    cut = cuda_cuts.cut_for(get_scheme(scheme), 4096, 4096, 64, "none")
    shape = cut.shape
    constants = cuda_stream.defines(form, shape, **more)
    text = cuda_pipeline.source(form, cut, False)
    assert nvrtc.compile_source(text, dict(constants), "sm_90a")[:4] == b"\x7fELF"
    if not form.row_major:
        if form.x_bits == 8:
            wide = form.taking(torch.bfloat16)
            cut = cuda_cuts.widened_cut_for(get_scheme(scheme), 4096, 4096, 300, "none")
            constants = dict(cuda_stream.defines(wide, cut.shape, **more))
            text = cuda_pipeline.source(wide, cut, False)
            assert nvrtc.compile_source(text, constants, "sm_90a")[:4] == b"\x7fELF"
            constants = cuda_stream.defines(form, shape, **more)
        text = cuda_stream.text_of(*cuda_prefill.SOURCES)
        assert nvrtc.compile_source(text, dict(constants), "sm_90a")[:4] == b"\x7fELF"


@needs_compiler
def test_a_source_that_does_not_compile_says_why():
    with pytest.raises(fxquant.FxQuantError, match="undefined_name"):
        nvrtc.compile_source("int f() { return undefined_name; }", {}, "sm_90a")


@pytest.mark.parametrize("scheme", sorted(fxquant.SCHEMES))
def test_hopper_gets_these_kernels_for_every_scheme(scheme, monkeypatch):
    monkeypatch.setattr(nvrtc, "refusal", lambda: None)
    choice = select(problem(scheme))
    assert choice.at(1).name in {"cuda_w4a16", "cuda_w8a16", "cuda_w4a8", "cuda_pipeline_w8a8"}
    assert choice.at(16).name.startswith("cuda_")


@pytest.mark.parametrize("kernel", STREAM)
def test_refusals_come_with_a_reason(kernel, monkeypatch):
    monkeypatch.setattr(nvrtc, "refusal", lambda: None)
    served = KERNELS[kernel]
    scheme = STREAM[kernel][0]
    assert served.refusal(problem(scheme)) is None
    for fault in served.faults:
        assert served.refusal(problem(scheme, **fault)), fault
    older = replace(HOPPER, features=HOPPER.features - {"hopper"})
    assert "hopper" in served.refusal(problem(scheme, device=older))
    monkeypatch.setattr(nvrtc, "refusal", lambda: "needs NVRTC")
    assert served.refusal(problem(scheme)) == "needs NVRTC"


def test_cuts_fit_and_cover_all_rows():
    for scheme, k, rows in itertools.product(
        ["int4wo-64", "int8dq", "fp8dq", "8da4w-128"], (896, 4096), tuner.ROWS
    ):
        form = cuda_layout.format_of(get_scheme(scheme))
        found = candidates.stream_cuts(get_scheme(scheme), 4096, k, rows)
        assert bool(found) == (rows <= 256) and all(s.fits(form, k) for s in found)
        found = candidates.pipeline_cuts(get_scheme(scheme), 4096, k, rows)
        assert found and all(s.fits(form, k) for s in found)


def test_tiles_share_the_rows_evenly():
    cut = cuda_cuts.Cut(2, 1, 256, 64, 5)
    tokens = {rows: cuda_cuts.evened(cut, rows).tokens for rows in (9, 33, 129, 256, 257, 700)}
    assert tokens == {9: 16, 33: 48, 129: 144, 256: 256, 257: 144, 700: 240}
    assert cuda_cuts.evened(cut._replace(tokens=64), 4096).tokens == 64


def test_a_cut_is_adapted_to_a_layer_that_was_not_measured():
    """Half of the multiprocessors would have nothing to do with the cut of the likest layer."""
    for scheme, rows in itertools.product(("int4wo-64", "8da4w-32", "int8wo"), (16, 64, 129, 2048)):
        row = get_scheme(scheme)
        cut = cuda_cuts.cut_for(row, 896, 5120, rows, "NVIDIA H200")
        assert cut.fits(cuda_layout.format_of(row), 5120)
        blocks = -(-896 // cut.rows) * -(-rows // cut.tokens) * cut.splits
        assert blocks >= 56, (scheme, rows, cut)
        measured = cuda_cuts.cut_for(row, 4096, 4096, rows, "NVIDIA H200")
        table = tuned_shapes("NVIDIA H200", "pipelines", scheme, row.family, 4096, 4096, rows)
        if rows != 129:
            assert measured == cuda_cuts.Cut(*table[0])


def test_a_measured_tile_that_the_rows_do_not_fill_is_not_kept():
    """256 tokens were measured with steps of 64: for 129 rows there is room for larger ones."""
    row = get_scheme("int4wo-64")
    whole = cuda_cuts.cut_for(row, 28672, 4096, 256, "NVIDIA H200")
    assert (whole.tokens, whole.step) == (256, 64)
    part = cuda_cuts.cut_for(row, 28672, 4096, 129, "NVIDIA H200")
    assert part.tokens == 144 and part.step == 128


def test_a_tile_of_few_tokens_is_not_kept_for_many_rows(monkeypatch):
    """Though nothing larger was measured: whoever tunes a layer for decoding prefills it too."""
    few = {**{section: {} for section in tuning.SECTIONS}, "pipelines": {}}
    few["pipelines"]["int4wo-64 4096x4096"] = [[0, [1, 1, 16, 256, 4, 2, 2]]]
    monkeypatch.setattr(tuning, "tuned_table", lambda device: few)
    row = get_scheme("int4wo-64")
    tokens = {m: cuda_cuts.cut_for(row, 4096, 4096, m, "some").tokens for m in (1, 16, 64, 2048)}
    assert tokens[1] == tokens[16] == 16 and tokens[64] >= 32 and tokens[2048] >= 128


def test_float8_sums_leave_the_tensor_core_in_time():
    """Sums of 128 products and of all of them have a register each, so that fewer tokens fit."""
    form = cuda_layout.format_of(get_scheme("fp8dq"))
    integers = cuda_layout.format_of(get_scheme("int8dq"))
    cut = cuda_cuts.Cut(2, 1, 256, 128, 4)
    assert cut.fits(integers, 4096) and not cut.fits(form, 4096)
    assert cut._replace(tokens=128).fits(form, 4096)
    assert not cut.shape._replace(tokens=64).fits(form, 4096), "where threads copy: by mma alone"


def taken(kernel: str) -> list[torch.dtype]:
    """Types of activations."""
    if kernel.endswith("widened"):
        return [torch.bfloat16]
    return [torch.bfloat16, torch.float16, torch.float32][: 3 if kernel in FLOAT32 else 2]


FLOAT32 = ("cuda_w8a8", "cuda_w4a8")


@needs_hopper
@pytest.mark.parametrize("kernel, scheme", CASES)
@torch.no_grad()
def test_exact_and_within_bounds(kernel, scheme):
    """Small integers bit for bit, and random numbers within their allowance, at all numbers of rows."""
    group = get_scheme(scheme).weight.group_size or 32
    narrow = [] if kernel.startswith("cuda_dequantize") else [(37, 1024), (1, 256)]
    row = 128 if kernel in ("cuda_pipeline_w4a8", "cuda_pipeline_w8a8") else 64
    wide = [(144, 4 * group), (200, 3 * max(group, row)), (272, 1280)]
    sizes = itertools.cycle(narrow + wide)
    dtypes = itertools.cycle(taken(kernel))
    for rows, bias in itertools.product(ROWS, (False, True)):
        (n, k), dtype = next(sizes), next(dtypes)
        if (kernel, scheme) == ("cuda_pipeline_w8a8", "fp8dq"):
            oracles.narrow_float8_probe(kernel, rows, n, k, dtype, "cuda")
        elif not (bias and kernel == "cuda_dequantize_w4a8"):  # the product is rounded before it
            oracles.exact_probe(kernel, scheme, rows, n, k, dtype, bias, "cuda")
        epilogue = "silu" if bias and KERNELS[kernel].epilogues else ""
        oracles.elementwise_bound(kernel, scheme, rows, n, k, dtype, bias, "cuda", epilogue)
    oracles.recipe_sqnr(kernel, scheme, torch.bfloat16, "cuda")


GATED = [(kernel, scheme) for kernel, scheme in CASES if "silu_mul" in KERNELS[kernel].epilogues]


@needs_hopper
@pytest.mark.parametrize("kernel, scheme", GATED)
@torch.no_grad()
def test_gates_are_within_bounds(kernel, scheme):
    """Both halves of the channels in whole tiles, as few as one, and more than a block has."""
    row = max(get_scheme(scheme).weight.group_size or 0, 128)
    sizes = itertools.cycle([(32, 4 * row), (96, 2 * row), (544, 1024), (1312, 3 * row)])
    dtypes = itertools.cycle(taken(kernel)[:2])
    gates = itertools.cycle(["silu_mul", "gelu_tanh_mul", "gelu_mul", "relu_mul"])
    for rows, bias in itertools.product(ROWS, (False, True)):
        (n, k), dtype, gate = next(sizes), next(dtypes), next(gates)
        oracles.elementwise_bound(kernel, scheme, rows, n, k, dtype, bias, "cuda", gate)


@needs_hopper
@torch.no_grad()
def test_rows_beside_the_activations_do_not_matter():
    """The activations are three rows of a larger tensor full of NaN."""
    scheme = get_scheme("int4wo-64")
    sample = oracles.random_sample(scheme, 3, 40, 256, torch.bfloat16).to("cuda")
    x = torch.full((5, 256), torch.nan, device="cuda", dtype=torch.bfloat16)
    x[1:4] = sample.x
    packed = cuda_layout.pack(scheme, sample.weight)
    op = torch.ops.fxquant.stream_linear
    y = op(x[1:4], None, None, packed, None, "int4wo-64", "", 40, x.dtype)
    expected = oracles.run("cuda_w4a16", sample)
    oracles.assert_equal(y.cpu(), expected.cpu(), "rows beside others, of NaN")
