"""The CUDA kernels: on a GPU where there is one, else Triton's under its interpreter on the CPU.

On the CPU the shapes are small and each (kernel, scheme, rows) meets one shape, type and bias in
turn; on a GPU it meets them all, and larger ones in turn.
"""

from __future__ import annotations

import itertools
import os
from dataclasses import replace

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest  # noqa: E402
from torch.fx.experimental.proxy_tensor import make_fx  # noqa: E402

import fxquant.lowering  # noqa: E402, F401
from fxquant.lowering import cuda_aten, triton_launch, triton_prefill, triton_w8a8  # noqa: E402
from fxquant.lowering.kernel import KERNELS, Device, Kernel, Problem  # noqa: E402
from fxquant.lowering.select import select  # noqa: E402
from fxquant.lowering.triton_launch import Tile  # noqa: E402
from fxquant.ops import ACTIVATIONS  # noqa: E402
from fxquant.scheme import Quantized, get_scheme  # noqa: E402
from tests import oracles  # noqa: E402

assert DEVICE == "cuda" or triton_launch.INTERPRET, (
    "fxquant was imported before this file could set TRITON_INTERPRET=1: set it earlier"
)

HOPPER = Device(
    name="a Hopper without a table",
    type="cuda",
    bandwidth=4.8e12,
    peak={"float32": 67e12, "bfloat16": 989e12, "int8": 1979e12, "float8": 1979e12},
    launch=3e-6,
    features=frozenset({"sm80", "sm89", "sm90"}),
    units=132,
)
TRITON = [
    ("triton_w8a8", "int8dq"),
    ("triton_w8a16", "int8wo"),
    ("triton_wf8a16", "fp8wo"),
    ("triton_fp8", "fp8dq"),
    ("triton_w4a16", "int4wo-32"),
    ("triton_w4a16", "int4wo-64-sym"),
    ("triton_w4a16", "int4wo-128"),
    ("triton_w4a16", "int4wo-256-sym"),
    ("triton_w4a16", "int2wo-32"),
    ("triton_w4a16", "int2wo-64"),
    ("triton_w4a8", "8da4w-32"),
    ("triton_w4a8", "8da4w-64"),
    ("triton_w4a8", "8da4w-256"),
    ("triton_w4a16", "int3wo-32"),
    ("triton_w4a16", "int3wo-128"),
    ("triton_w8a8_persistent", "int8dq"),
    ("triton_fp8_persistent", "fp8dq"),
]
ATEN = [("int_mm", "int8dq")]
if DEVICE == "cuda":  # torch has these for CUDA alone
    ATEN += [("tinygemm", s) for s in ("int4wo-32", "int4wo-128-sym", "int3wo-64")]
    ATEN += [("scaled_mm", "fp8dq")]
CASES = TRITON + ATEN
ROWS = (0, 1, 2, 7, 16, 17, 64, 129, 300)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def problem(scheme: str, m: int | None, n: int, k: int, dtype: torch.dtype) -> Problem:
    row = get_scheme(scheme).product
    return Problem(scheme=row, n=n, k=k, m=m, dtype=dtype, bias=False, device=HOPPER)


def shapes(scheme: str) -> list[tuple[int, int]]:
    """(N, K): odd, prime, single, divisible by every tile, one step and many."""
    group = get_scheme(scheme).weight.group_size
    if group:
        return [(37, group), (64, 2 * group), (19, 3 * group), (1, group)]
    return [(37, 101), (64, 512), (19, 331), (1, 48), (136, 80)]


def large(scheme: str) -> list[tuple[int, int]]:
    if get_scheme(scheme).weight.group_size:
        return [(1000, 1024), (131, 3840), (2560, 2560)]
    return [(1000, 1024), (131, 3841), (2560, 4864)]


def problems(kernel: Kernel, scheme: str, m: int) -> list[tuple[int, int, torch.dtype, bool]]:
    """The (n, k, dtype, bias) that the kernel takes for ``m`` rows: all, or on the CPU a few."""
    every = [
        (n, k, dtype, bias)
        for (n, k), dtype, bias in itertools.product(shapes(scheme), DTYPES, (True, False))
        if kernel.refusal(problem(scheme, m, n, k, dtype)) is None
    ]
    if DEVICE == "cpu":
        return every[m % 7 :: 13]
    return every + [
        (n, k, torch.bfloat16, m % 2 == 0)
        for n, k in large(scheme)[m % 3 :: 3]
        if kernel.refusal(problem(scheme, m, n, k, torch.bfloat16)) is None
    ]


SERVED = [(*case, m) for case in CASES for m in ROWS if problems(KERNELS[case[0]], case[1], m)]
"""Without the rows that a kernel refuses (int_mm takes 17 and more)."""


@pytest.mark.parametrize(("name", "scheme", "m"), SERVED)
def test_exact(name: str, scheme: str, m: int) -> None:
    for n, k, dtype, bias in problems(KERNELS[name], scheme, m):
        if DEVICE == "cuda" and scheme == "fp8dq":
            oracles.narrow_float8_probe(name, m, n, k, dtype, DEVICE)
        elif name == "tinygemm":  # it rounds to bfloat16 before the bias: exact without one
            oracles.exact_probe(name, scheme, m, n, k, dtype, False, DEVICE)
        else:
            oracles.exact_probe(name, scheme, m, n, k, dtype, bias, DEVICE)


@pytest.mark.parametrize(("name", "scheme", "m"), SERVED)
def test_bound(name: str, scheme: str, m: int) -> None:
    for n, k, dtype, bias in problems(KERNELS[name], scheme, m):
        oracles.elementwise_bound(name, scheme, m, n, k, dtype, bias, DEVICE)


@pytest.mark.parametrize("epilogue", [e for e in ACTIVATIONS if e])
@pytest.mark.parametrize(("name", "scheme"), [TRITON[i] for i in (0, 1, 5, 10, -2, -1)])
def test_epilogue(name: str, scheme: str, epilogue: str) -> None:
    assert epilogue in KERNELS[name].epilogues
    _, k = shapes(scheme)[1]
    for dtype, n in ((torch.bfloat16, 37), (torch.float16, 37), (torch.bfloat16, 40)):
        oracles.elementwise_bound(name, scheme, 18, n, k, dtype, True, DEVICE, epilogue)


@pytest.mark.parametrize("epilogue", [e for e in ACTIVATIONS if e])
def test_epilogue_keeps_nan_and_limits(epilogue: str) -> None:
    scheme = get_scheme("int8wo")
    weight = Quantized(torch.ones(3, 1, dtype=torch.int8), torch.ones(3, 1), None)
    x = torch.tensor([[torch.nan], [-60000.0], [60000.0], [0.0]], dtype=torch.bfloat16)
    sample = oracles.Sample(scheme, x, weight, None).to(DEVICE)
    y = oracles.run("triton_w8a16", sample, epilogue).cpu().float()
    expected = ACTIVATIONS[epilogue](x.float()).expand(4, 3).to(torch.bfloat16).float()
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("name", "scheme"), [*TRITON, ("int_mm", "int8dq"), ("scaled_mm", "fp8dq")]
    + [("tinygemm", f"int4wo-{size}") for size in (32, 64, 128, "128-sym", "32-sym")]
    + [("tinygemm", "int3wo-64")],
)  # fmt: skip
def test_layout(name: str, scheme: str) -> None:
    group = get_scheme(scheme).weight.group_size
    for n, k in ((8, 3 * (group or 32)), (24, 2 * (group or 32)), (64, 1024)):
        oracles.layout_round_trip(name, scheme, n, k, DEVICE)
    if name != "tinygemm":
        oracles.layout_round_trip(name, scheme, 37, group or 101, DEVICE)


def test_tinygemm_pack_is_torchs() -> None:
    """A word holds nibble p + 4 e = code 8 p + 2 r + e of 32, for lane r of row n."""
    scheme = get_scheme("int4wo-32")
    q = oracles.random_sample(scheme, 0, 16, 192, torch.bfloat16).weight
    words, pairs = KERNELS["tinygemm"].layout.pack(scheme, Quantized(*(t.to(DEVICE) for t in q)))
    if DEVICE == "cuda":  # torch wants the even code in the high nibble
        swapped = ((q.codes << 4) | (q.codes >> 4)).to(DEVICE)
        expected = torch.ops.aten._convert_weight_to_int4pack(swapped, 4)
        assert torch.equal(words, expected)
    assert words.shape == (2, 3, 32, 2) and pairs.shape == (6, 16, 2)
    low, high = q.codes & 15, q.codes >> 4
    u = torch.stack([low, high], -1).flatten(-2).long()
    for n, outer, r, j in ((0, 0, 0, 0), (5, 1, 3, 1), (15, 2, 2, 0)):
        row = u[n, 64 * outer + 32 * j :]
        nibbles = [row[8 * p + 2 * r + e] << 4 * (p + 4 * e) for p in range(4) for e in range(2)]
        found = words[n // 8, outer, n % 8 * 4 + r, j].long().cpu() & 0xFFFFFFFF
        assert found == sum(nibbles)


@pytest.mark.parametrize(("name", "scheme"), CASES)
def test_strides(name: str, scheme: str) -> None:
    """Rows apart, columns apart, transposed, expanded and misaligned activations."""
    kernel, (n, k) = KERNELS[name], (16, 256)
    dtype = torch.bfloat16
    if kernel.refusal(problem(scheme, 18, n, k, dtype)):
        pytest.fail(f"{name} refuses the shape of this test")
    sample = oracles.random_sample(scheme, 18, n, k, dtype, True).served.to(DEVICE)
    packed = kernel.layout.pack(sample.scheme, sample.weight)
    wide = torch.randn(18, 2 * k + 1, dtype=dtype, device=DEVICE)
    views = [
        wide[:, :k],
        wide[:, 1 : k + 1],
        wide[:, : 2 * k : 2],
        torch.randn(k, 18, dtype=dtype, device=DEVICE).t(),
        torch.randn(1, k, dtype=dtype, device=DEVICE).expand(18, k),
        torch.randn(18 * k + 1, dtype=dtype, device=DEVICE)[1:].view(18, k),
    ]
    for x in views:
        found = kernel.compute(sample.scheme, x, packed, sample.bias, "")
        dense = x.new_empty(x.shape).copy_(x)
        assert torch.equal(found, kernel.compute(sample.scheme, dense, packed, sample.bias, ""))


@pytest.mark.parametrize(("name", "scheme"), CASES)
def test_deterministic(name: str, scheme: str) -> None:
    for m, times in ((17, 20), (300, 20)) if DEVICE == "cuda" else ((17, 1),):
        sample = oracles.random_sample(scheme, m, 64, 512, torch.bfloat16).to(DEVICE)
        first = oracles.run(name, sample)
        for _ in range(times):
            assert torch.equal(first, oracles.run(name, sample))


@pytest.mark.parametrize(("name", "scheme"), [TRITON[i] for i in (0, 1, 6, 11, -2)])
def test_opcheck(name: str, scheme: str) -> None:
    """The schema, the fake and the dynamic trace of the op (opcheck itself fails on float8)."""
    calls = []
    sample = oracles.random_sample(scheme, 5, 19, 128, torch.bfloat16, True).served.to(DEVICE)
    packed = KERNELS[name].layout.pack(sample.scheme, sample.weight)

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "fxquant":
                calls.append((func, args))
            return func(*args, **(kwargs or {}))

    with Record():
        KERNELS[name].compute(sample.scheme, sample.x, packed, sample.bias, "silu")
    ((op, args),) = calls
    torch.library.opcheck(op, args)


@pytest.mark.parametrize(("name", "scheme"), CASES)
def test_traces_with_symbolic_rows(name: str, scheme: str) -> None:
    """One graph for every number of rows, with the product as one node."""
    kernel = KERNELS[name]
    sample = oracles.random_sample(scheme, 33, 64, 256, torch.bfloat16, True).served.to(DEVICE)
    packed = kernel.layout.pack(sample.scheme, sample.weight)

    def compute(x, packed, bias):
        return kernel.compute(sample.scheme, x, packed, bias, "")

    graph = make_fx(compute, tracing_mode="symbolic")(sample.x, packed, sample.bias)
    products = [n for n in graph.graph.nodes if "linear" in str(n.target) or "_mm" in str(n.target)]
    assert len(products) == 1
    other = oracles.random_sample(scheme, 50, 64, 256, torch.bfloat16).to(DEVICE)
    for x in (sample.x, other.x):
        assert torch.equal(graph(x, packed, sample.bias), compute(x, packed, sample.bias))


@pytest.mark.parametrize("specialized", [True, False])
@pytest.mark.parametrize("tile", [tile for tile, _ in triton_prefill.INTEGER_TILES])
def test_persistent_tiles(tile: Tile, specialized: bool) -> None:
    """Several tiles a program, each edge clipped: bit for bit the plain kernel's."""
    shape = (300, 520, 144) if DEVICE == "cpu" else (1500, 4008, 1040)
    for m, n, k in (shape, (1, 37, 16)):
        g = torch.Generator().manual_seed(m)
        x, w = (torch.randint(-128, 128, (r, k), generator=g, dtype=torch.int8) for r in (m, n))
        scales = (torch.rand(r, 1, generator=g) for r in (m, n))
        x, w, x_scale, w_scale = (t.to(DEVICE) for t in (x, w, *scales))
        args = (x, x_scale, w, w_scale, None, "relu", torch.bfloat16)
        plain = triton_w8a8.launch(*args)
        for described in (True, False):
            y = triton_prefill.launch_tile(
                *args, tile, specialized=specialized, described=described
            )
            assert torch.equal(y, plain), (m, n, k, described)


def test_quickest_tile_fills_the_multiprocessors() -> None:
    wide, narrow = Tile(128, 256, 128, 8, 3), Tile(128, 128, 128, 8, 4)
    tiles = ((wide, 1.0), (narrow, 0.9))
    assert triton_prefill.quickest(tiles, 2048, 28672, 132) == wide
    assert triton_prefill.quickest(tiles, 256, 4096, 132) == narrow  # 32 or 64 of 132 at work


def test_prefill_takes_the_persistent_kernel() -> None:
    for n, k in ((28672, 4096), (4096, 14336), (4096, 4096)):
        choice = select(problem("int8dq", None, n, k, torch.bfloat16))
        assert "triton_w8a8_persistent" not in (choice.at(1).name, choice.at(128).name)
        assert choice.at(2048).name == choice.at(4096).name == "triton_w8a8_persistent"
    refused = problem("int8dq", 2048, 64, 256, torch.bfloat16)
    for features in ({"sm80", "sm89"}, {"sm80", "sm89", "sm90", "sm100"}):
        other = replace(refused, device=replace(HOPPER, features=frozenset(features)))
        assert KERNELS["triton_w8a8_persistent"].refusal(other)


@pytest.mark.parametrize("name", sorted({name for name, _ in CASES} | {"tinygemm", "scaled_mm"}))
def test_faults_are_refused(name: str) -> None:
    kernel = KERNELS[name]
    scheme = next(
        s for k, s in [*CASES, ("tinygemm", "int4wo-32"), ("scaled_mm", "fp8dq")] if k == name
    )
    good = dict(scheme=scheme, m=64, n=64, k=256, dtype=torch.bfloat16)
    assert kernel.refusal(problem(**good)) is None
    for fault in kernel.faults:
        assert kernel.refusal(problem(**{**good, **fault})), fault
    assert kernel.cost(problem(**good)).subs("M", 1) > 0


@pytest.mark.parametrize("worth", [0, 1 << 24])
@pytest.mark.parametrize("rows", [128, 129, 200, 255, 256])
def test_rows_beside_the_padded_ones_do_not_matter(rows: int, worth: int, monkeypatch) -> None:
    """``_scaled_mm`` runs on the CPU too: each row is that of a product of its own."""
    monkeypatch.setattr(cuda_aten, "WORTH_PADDING", worth)
    seen, product = [], torch._scaled_mm
    monkeypatch.setattr(
        torch, "_scaled_mm", lambda x, *a, **k: (seen.append(len(x)), product(x, *a, **k))[1]
    )
    scheme, kernel = get_scheme("fp8dq"), KERNELS["scaled_mm"]
    random = torch.Generator().manual_seed(rows)
    q = scheme.weight.quantize_weight(torch.randn(48, 64, generator=random).to(DEVICE))
    x = torch.randn(rows, 64, generator=random).to(DEVICE, torch.bfloat16)
    bias = torch.randn(48, generator=random).to(DEVICE)
    y = kernel.compute(scheme, x, [q.codes, q.scale], bias, "")
    wanted = scheme.input.quantize(x)
    exact = (wanted.codes.double() @ q.codes.double().t()) * wanted.scale * q.scale.t() + bias
    assert y.shape == (rows, 48) and seen == [256 if rows > 128 and not worth else rows]
    torch.testing.assert_close(y.double(), exact, rtol=2**-7, atol=2**-6)
