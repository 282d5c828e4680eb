"""The C++ kernels: the three oracles on the fast path and on the portable one, and their build."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fxquant.lowering import native
from fxquant.lowering.kernel import KERNELS, Device, M, Problem
from fxquant.lowering.native_linear import LAYOUT, native_linear, pack, unpack
from fxquant.lowering.select import select
from fxquant.ops import ACTIVATIONS
from fxquant.scheme import SCHEMES, Quantized, get_scheme
from tests import oracles

CASES = [
    (kernel.name, scheme.name)
    for kernel in KERNELS.values()
    if kernel.layout is LAYOUT
    for scheme in SCHEMES.values()
    if scheme.product.family in kernel.families and not scheme.static
]
ONE_OF_EACH = [
    ("native_w8a8", "int8dq"),
    ("native_w4a8", "8da4w-32"),
    ("native_w8a16", "int8wo"),
    ("native_w8a16", "fp8wo"),
    ("native_w4a16", "int4wo-64"),
    ("native_w4a16", "int4wo-32-sym"),
    ("native_w4a16", "int3wo-64"),
    ("native_w4a16", "int2wo-32"),
    ("native_wf8af8", "fp8dq"),
]
ROWS = (0, 1, 2, 7, 16, 17, 64, 129)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CPU = Device(
    name="Zen 4",
    type="cpu",
    bandwidth=6e10,
    peak={"float32": 2e11, "bfloat16": 4e11, "vector_bfloat16": 4e11, "vector_int8": 9e11},
    launch=1e-5,
    features=frozenset({"avx2", "avx512_vnni", "avx512_bf16"}),
)


@pytest.fixture(params=["fast", "portable"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run with everything this processor has, then in plain C++."""
    if request.param == "portable":
        library = native.library(portable=True)
        monkeypatch.setattr(native, "library", lambda: library)
    return request.param


@pytest.fixture(autouse=True)
def two_threads():
    """More threads than the tests need only wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, 2))
    yield
    torch.set_num_threads(before)


def shapes(scheme: str) -> list[tuple[int, int]]:
    """(N, K): one channel, odd and prime numbers, a whole panel and its neighbours, several spans."""
    group = get_scheme(scheme).weight.group_size
    if group:
        return [(37, group), (64, 3 * group), (131, 2 * group), (1, 5 * group), (65, 4 * group)]
    return [(37, 101), (64, 512), (131, 67), (1, 1), (63, 1031), (65, 2), (128, 1536)]


def linear(sample: oracles.Sample, epilogue: str = "", dtype: torch.dtype | None = None):
    """The op itself, on an unquantized sample's x."""
    packed = pack(sample.scheme, sample.weight)
    dtype = dtype or sample.x.dtype
    return native_linear(
        sample.x, None, None, packed, sample.bias, sample.scheme.name, epilogue, dtype
    )


@pytest.mark.parametrize("kernel, scheme", CASES)
def test_oracles(kernel: str, scheme: str, path: str) -> None:
    places = shapes(scheme)
    for i, m in enumerate(ROWS):
        for j, dtype in enumerate(DTYPES):
            for step in range(3):
                n, k = places[(i + 3 * j + step) % len(places)]
                bias = (i + j + step) % 2 == 0
                oracles.exact_probe(kernel, scheme, m, n, k, dtype, bias)
                oracles.elementwise_bound(kernel, scheme, m, n, k, dtype, not bias)
    oracles.recipe_sqnr(kernel, scheme)


@pytest.mark.parametrize("kernel, scheme", ONE_OF_EACH)
def test_more_rows_than_one_thread_takes_at_once(kernel: str, scheme: str, path: str) -> None:
    oracles.exact_probe(kernel, scheme, 1203, 70, shapes(scheme)[2][1], torch.bfloat16, True)


@pytest.mark.parametrize("epilogue", [name for name in ACTIVATIONS if name])
@pytest.mark.parametrize("kernel, scheme", ONE_OF_EACH)
def test_epilogues(kernel: str, scheme: str, epilogue: str, path: str) -> None:
    assert epilogue in KERNELS[kernel].epilogues
    k = shapes(scheme)[0][1]
    for dtype in DTYPES:
        oracles.elementwise_bound(kernel, scheme, 9, 70, k, dtype, True, epilogue=epilogue)


@pytest.mark.parametrize("kernel, scheme", ONE_OF_EACH)
def test_row_depends_on_nothing_but_itself(kernel: str, scheme: str, path: str) -> None:
    """Not on the rows around it, the tile that it falls in, the threads, or the run."""
    k = 1024 if get_scheme(scheme).weight.group_size else 1100
    sample = oracles.random_sample(scheme, 130, 150, k, torch.bfloat16, True)
    whole = oracles.run(kernel, sample)
    for rows in (slice(0, 1), slice(3, 5), slice(7, 20), slice(100, 130), slice(0, 130, 3)):
        part = oracles.run(kernel, replace(sample, x=sample.x[rows]))
        oracles.assert_equal(part, whole[rows], f"{kernel}, rows {rows}")
    torch.set_num_threads(1)
    oracles.assert_equal(oracles.run(kernel, sample), whole, f"{kernel}, one thread")


@pytest.mark.parametrize("kernel, scheme", ONE_OF_EACH)
def test_views(kernel: str, scheme: str, path: str) -> None:
    """Strides and storage offsets of x and bias change nothing."""
    k = shapes(scheme)[1][1]
    sample = oracles.random_sample(scheme, 8, 70, k, torch.float32, True)
    expected = oracles.run(kernel, sample)
    wide = torch.zeros(9, k + 3)
    wide[1:, 3:] = sample.x
    bias = torch.zeros(140)
    bias[::2] = sample.bias
    for x in (sample.x.t().contiguous().t(), wide[1:, 3:]):
        found = oracles.run(kernel, replace(sample, x=x, bias=bias[::2]))
        oracles.assert_equal(found, expected, f"{kernel}, strides {x.stride()}")


@pytest.mark.parametrize("scheme", sorted({scheme for _, scheme in CASES}))
def test_layout(scheme: str) -> None:
    """Exact inverses, contiguous, traceable under fake tensors, and no byte more than the codes."""
    row = get_scheme(scheme)
    for n, k in shapes(scheme):
        packed = oracles.layout_round_trip("native_w8a8", scheme, n, k)
        served = row.product
        assert packed[0].numel() == n * -(-k * served.weight.bits // 32) * 4
        back = unpack(served, packed, n, k)
        assert all(t is None or t.is_contiguous() for t in (*packed, *back))
        with FakeTensorMode():
            q = row.weight.recoded(row.weight.quantize(torch.randn(n, k)), served.weight)
            fake = pack(served, q)
            served.weight.recoded(unpack(served, fake, n, k), row.weight)
        assert [(t.shape, t.dtype) for t in fake] == [(t.shape, t.dtype) for t in packed]


@pytest.mark.parametrize("kernel, scheme", ONE_OF_EACH)
def test_opcheck_and_trace(kernel: str, scheme: str) -> None:
    sample = oracles.random_sample(scheme, 3, 70, shapes(scheme)[1][1], torch.bfloat16, True).served
    compute, packed = KERNELS[kernel].compute, pack(sample.scheme, sample.weight)
    trace = make_fx(
        lambda x, p, b: compute(sample.scheme, x, p, b, "gelu"), tracing_mode="symbolic"
    )
    graph = trace(sample.x, packed, sample.bias)
    nodes = [n for n in graph.graph.nodes if n.target is torch.ops.fxquant.native_linear.default]
    assert len(nodes) == 1
    expected = compute(sample.scheme, sample.x, packed, sample.bias, "gelu")
    oracles.assert_equal(graph(sample.x, packed, sample.bias), expected, "the traced graph")
    recorded = []

    class Recorder(torch.fx.Interpreter):
        def call_function(self, target, args, kwargs):
            if target is nodes[0].target:
                recorded.append((args, kwargs))
            return super().call_function(target, args, kwargs)

    Recorder(graph).run(sample.x, packed, sample.bias)
    for args, kwargs in recorded:
        torch.library.opcheck(nodes[0].target, args, kwargs)


@pytest.mark.parametrize("scheme", ["int8dq", "8da4w-32"])
def test_compiled_equals_eager(scheme: str) -> None:
    """On exact inputs, since Inductor may round the activations' scale differently."""
    sample = oracles.exact_sample(scheme, 5, 70, 96, torch.float32, True)
    (kernel,) = [k for k, s in ONE_OF_EACH if s == scheme]
    compute, packed = KERNELS[kernel].compute, pack(sample.scheme, sample.weight)
    compiled = torch.compile(lambda x, p, b: compute(sample.scheme, x, p, b, ""), fullgraph=True)
    found = compiled(sample.x, packed, sample.bias)
    oracles.assert_equal(found, oracles.reference(sample).float(), "compiled")


@pytest.mark.parametrize("k", [1024, 2**17 - 1])
def test_largest_int8_sum(k: int, path: str) -> None:
    """Codes of -128 throughout: the sum comes close to 2**31, and is still the exact one."""
    scheme = get_scheme("int8dq")
    codes = torch.full((2, k), -128, dtype=torch.int8)
    packed = pack(scheme, Quantized(codes, torch.ones(2, 1), None))
    one = torch.ones(2, 1)
    y = native_linear(codes, one, None, packed, None, "int8dq", "", torch.float32)
    oracles.assert_equal(y, torch.full((2, 2), 128.0 * 128.0 * k), "the largest sum")


def test_not_a_number(path: str) -> None:
    """NaN and infinity stay in their row or channel, and show there."""
    for scheme in ("int8wo", "fp8wo", "int4wo-32"):
        for dtype in DTYPES:
            for m in (3, 40):
                sample = oracles.random_sample(scheme, m, 70, 96, dtype, True)
                clean = linear(sample)
                sample.x[1, 5] = torch.nan
                sample.weight.scale[2] = torch.nan
                y = linear(sample)
                assert y[1].isnan().all() and y[:, 2].isnan().all()
                y[1], y[:, 2] = clean[1], clean[:, 2]
                oracles.assert_equal(y, clean, f"{scheme}, {dtype}: the other rows and channels")
    weight = torch.tensor([[0x7F], [0xFF], [0x01], [0x7E]], dtype=torch.uint8)
    weight = weight.view(torch.float8_e4m3fn)
    sample = oracles.Sample(
        get_scheme("fp8wo"), torch.ones(30, 1), Quantized(weight, torch.ones(4, 1), None), None
    )
    for x in (sample.x, sample.x[:2], sample.x.bfloat16(), sample.x[:1].bfloat16()):
        y = linear(replace(sample, x=x))
        assert y[:, :2].isnan().all()
        assert torch.equal(y[:, 2:], torch.tensor([[2.0**-9, 448.0]]).to(y.dtype).expand(len(x), 2))


def test_every_float8_code(path: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).unsqueeze(1)
    weight = Quantized(codes, torch.ones(256, 1), None)
    for m in (1, 30):
        for dtype in DTYPES:
            sample = oracles.Sample(
                get_scheme("fp8wo"), torch.ones(m, 1, dtype=dtype), weight, None
            )
            expected = codes[:, 0].to(dtype).expand(m, 256)
            assert torch.equal(linear(sample).nan_to_num(7), expected.nan_to_num(7))


def test_rounding(path: str) -> None:
    """float16 and bfloat16 in and out, bit for bit as torch converts: ties, subnormals, overflow."""
    one = Quantized(torch.ones(1, 1, dtype=torch.int8), torch.ones(1, 1), None)
    row = get_scheme("int8wo")
    half = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16)[:, None]
    y = linear(oracles.Sample(row, half, one, None))
    assert torch.equal(y.nan_to_num(7, 8, 9), half.nan_to_num(7, 8, 9))
    g = torch.Generator().manual_seed(0)
    wide = torch.randn(20000, 1, generator=g) * 2.0 ** torch.randint(
        -26, 20, (20000, 1), generator=g
    )
    ties = half.float() * (1 + 2.0**-11)
    halves = torch.tensor([[65519.99], [65520.0], [2.0**-25], [1.5 * 2.0**-25], [-(2.0**-26)]])
    bf16_ties = torch.tensor([[1 + 2.0**-8], [1 + 3 * 2.0**-8], [3.4e38], [-(2.0**-120)]])
    for x in (wide, ties[ties.isfinite()][:, None], halves, bf16_ties):
        for dtype in (torch.float16, torch.bfloat16):
            y = linear(oracles.Sample(row, x, one, None), dtype=dtype)
            normal = (x.abs() >= torch.finfo(dtype).tiny) | (dtype == torch.float16)
            assert torch.equal(y[normal], x.to(dtype)[normal])


@pytest.mark.parametrize("epilogue", [name for name in ACTIVATIONS if name])
def test_activation_accuracy(epilogue: str, path: str) -> None:
    """Within 2**-21 of |x| of the float64 activation, over all magnitudes; NaN stays NaN."""
    x = torch.cat([torch.linspace(-20, 20, 40001), torch.tensor([0.0, 1e-30, 1e4, -1e4, 3e38])])
    row = get_scheme("int8wo")
    one = Quantized(torch.ones(1, 1, dtype=torch.int8), torch.ones(1, 1), None)
    y = linear(oracles.Sample(row, x[:, None], one, None), epilogue)[:, 0]
    error = (y.double() - ACTIVATIONS[epilogue](x.double())).abs()
    assert (error <= 2.0**-21 * x.abs().double() + 1e-37).all()
    nan = linear(oracles.Sample(row, torch.full((1, 1), torch.nan), one, None), epilogue)
    assert nan.isnan().all()


# What is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel, scheme", CASES)
def test_faults_are_refused(kernel: str, scheme: str) -> None:
    row = get_scheme(scheme).product
    sound = Problem(scheme=row, n=64, k=512, m=None, dtype=torch.bfloat16, bias=True, device=CPU)
    assert KERNELS[kernel].refusal(sound) is None
    for fault in KERNELS[kernel].faults:
        assert KERNELS[kernel].refusal(replace(sound, **fault)), fault
    assert KERNELS[kernel].refusal(replace(sound, device=replace(CPU, type="cuda")))


@pytest.mark.parametrize("scheme", ["int8wo", "fp8wo", "int4wo-64", "int3wo-64", "int2wo-32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_writing_the_weight_out_pays_at_thousands_of_rows(scheme: str, dtype: torch.dtype) -> None:
    """On one core 147 ms instead of 61 for int4wo-64 at 128 x 8192 x 2048."""
    row = get_scheme(scheme).product
    at = Problem(scheme=row, n=8192, k=2048, m=None, dtype=dtype, bias=False, device=CPU)
    chosen = select(at)
    assert {chosen.at(rows).layout.name for rows in (1, 16, 128, 512)} == {LAYOUT.name}


@pytest.mark.parametrize("kernel, scheme", ONE_OF_EACH)
def test_cost(kernel: str, scheme: str) -> None:
    """One row costs the weight's bytes, many rows the operations, at the rate of the fast path."""
    problem = Problem(
        scheme=get_scheme(scheme).product,
        n=2048,
        k=2048,
        m=None,
        dtype=torch.bfloat16,
        bias=True,
        device=CPU,
    )
    cost = KERNELS[kernel].cost(problem)
    one, many = (float(cost.subs(M, m)) for m in (1, 2**16))
    codes = 2048 * 2048 * problem.scheme.weight.bits / 8 / CPU.bandwidth
    assert (
        codes < one - CPU.launch < 2.1 * codes
    )  # int2wo-32: as many bits for qparams as for codes
    rate = 9e11 if kernel in ("native_w8a8", "native_w4a8") else 4e11
    assert many == pytest.approx(2 * 2**16 * 2048**2 / rate, rel=0.15)
    slow = replace(problem, device=replace(CPU, features=frozenset()))
    assert float(KERNELS[kernel].cost(slow).subs(M, 2**16)) > 1.5 * many
