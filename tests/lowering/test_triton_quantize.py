"""Activations quantized by a kernel of its own: the reference's codes, whatever the rows hold."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")

from torch._inductor.utils import fresh_cache, run_and_get_code  # noqa: E402
from torch._subclasses import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

import fxquant  # noqa: E402
from fxquant.inductor import trace_decomposed  # noqa: E402
from fxquant.lowering import triton_quantize  # noqa: E402
from fxquant.lowering.triton_launch import HAS_TRITON  # noqa: E402
from fxquant.ops import bundle, finish  # noqa: E402
from fxquant.passes import expansion  # noqa: E402
from fxquant.passes.expansion import expand  # noqa: E402
from fxquant.scheme import get_scheme  # noqa: E402
from tests.conftest import DISASSEMBLER, sqnr  # noqa: E402

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
SCHEMES = ["int8dq", "8da4w-32", "fp8dq"]
NAN, INF = float("nan"), float("inf")


def same(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    """Scales within a last bit (a GPU divides by a constant through its reciprocal); codes and zero
    points equal where scales are, which is nearly everywhere, and next to each other elsewhere."""
    assert [t.dtype for t in found] == [t.dtype for t in wanted]
    assert [t.shape for t in found] == [t.shape for t in wanted]
    (codes, scale), (codes_, scale_) = found[:2], wanted[:2]
    assert torch.equal(scale.isnan(), scale_.isnan())
    bits = (scale.view(torch.int32) - scale_.view(torch.int32)).abs()
    assert bool(((bits <= 1) | scale.isnan()).all())
    equal = (scale == scale_) | scale.isnan()
    if codes.dtype.is_floating_point:
        codes, codes_ = (t.view(torch.uint8).int() for t in (codes, codes_))
    for a, b in ((codes, codes_), *zip(found[2:], wanted[2:], strict=True)):
        far = (a.int() - b.int()).abs()
        assert int(far[equal.expand_as(far)].sum()) == 0
        assert int(far.max()) <= 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", [(5, 64), (3, 100), (1, 1), (2, 1025), (0, 64)])
def test_equals_the_reference(scheme, shape, dtype):
    x = (torch.randn(shape) * 3).to(DEVICE, dtype)
    found = torch.ops.fxquant.quantize_rows(x, scheme)
    if shape[0]:
        same(found, torch.ops.fxquant.quantize(x, scheme, "input"))
    else:
        assert found[0].shape == shape
        assert found[0].dtype == get_scheme(scheme).input.codes_dtype


@pytest.mark.parametrize("gated", [1, 2])
@pytest.mark.parametrize("few", [True, False])
def test_a_program_has_as_many_warps_as_triton_takes(few, gated):
    """A power of two, for every row: those of 2560, 5120, 11008 and 12288 values are held in two parts."""
    for k in range(8, triton_quantize.WIDEST + 1, 8):
        values = gated * sum(triton_quantize.parts_of(k))
        warps = triton_quantize.warps_for(values, few)
        assert 4 <= warps <= 32 and warps & (warps - 1) == 0, (k, warps)


@pytest.mark.parametrize("gate", ["silu_mul", "gelu_mul", "gelu_tanh_mul", "relu_mul"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("k", [200, 80])
def test_what_a_gate_makes(scheme, gate, dtype, k):
    """Rounded once, to the type of its halves (a GPU's exponential may differ in the last bits)."""
    x = torch.randn(5, 2 * k, device=DEVICE).to(dtype)
    found = torch.ops.fxquant.quantize_rows(x, scheme, gate)
    spec = get_scheme(scheme).input
    wanted = finish(x.float(), gate).to(dtype)
    expected = spec.quantize(wanted)
    assert [(t.shape, t.dtype) for t in found] == [
        (t.shape, t.dtype) for t in expected if t is not None
    ]
    step = expected.scale.float()
    near = spec.dequantize(bundle(found), torch.float32) - wanted.float()
    # half a code (of float8, of its 3 bits), and one rounding of what is quantized and of its largest
    allowed = step * 0.5 + (2.0**-4 * wanted.float().abs() if scheme == "fp8dq" else 0)
    allowed = allowed + 2 * torch.finfo(dtype).eps * wanted.float().abs().amax(1, keepdim=True)
    assert bool((near.abs() <= 1.01 * allowed).all())


ROWS = {
    "zeros": [0.0, 0.0, 0.0, 0.0],
    "one sign": [1.0, 2.0, 3.0, 4.0],
    "negative": [-1.0, -2.5, -3.0, -0.5],
    "halves": [127.5, -127.5, 0.5, 1.5],
    "tiny": [1e-38, -2e-39, 0.0, 1e-40],
    "large": [3e38, -3e38, 1e38, 0.0],
    "nan": [1.0, NAN, 2.0, -3.0],
    "negative nan": [1.0, -NAN, 2.0, -3.0],
    "infinite": [1.0, INF, 2.0, -3.0],
    "both": [INF, -INF, NAN, 0.0],
}


@pytest.mark.parametrize("before", [0, 1100])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ROWS)
def test_rows_that_are_odd(name, scheme, before):
    """At their beginning, and where a program holds the rest of a row apart."""
    x = torch.tensor([ROWS[name], [1.0, 2.0, -3.0, 0.25]], device=DEVICE)
    x = torch.cat([torch.zeros(2, before, device=DEVICE), x], 1)
    found = torch.ops.fxquant.quantize_rows(x, scheme)
    same(found, torch.ops.fxquant.quantize(x, scheme, "input"))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rows_of_a_larger_tensor(scheme):
    x = torch.randn(64, 7, device=DEVICE).t()
    same(
        torch.ops.fxquant.quantize_rows(x, scheme),
        torch.ops.fxquant.quantize(x.contiguous(), scheme, "input"),
    )


def test_a_row_is_held_in_no_more_than_it_needs():
    parts = {k: triton_quantize.parts_of(k) for k in (1, 80, 896, 2560, 4096, 4864, 11008, 14336)}
    assert parts == {
        1: (64,),
        80: (64, 32),
        896: (1024,),
        2560: (2048, 512),
        4096: (4096,),
        4864: (4096, 1024),
        11008: (8192, 4096),
        14336: (16384,),
    }
    assert all(sum(triton_quantize.parts_of(k)) >= k for k in range(1, 40000, 7))


@pytest.fixture
def anywhere(monkeypatch):
    monkeypatch.setattr(triton_quantize, "PLACES", ("cuda", "cpu"))


def test_what_is_worth_a_kernel_of_its_own(anywhere):
    spec = get_scheme("int8dq").input

    def x(rows, k):
        return torch.empty(rows, k, device=DEVICE)

    served, many = triton_quantize.is_served, triton_quantize.are_many
    assert many(x(256, 4096)) and not many(x(255, 4096)) and not many(x(16, 4096))
    assert served(x(1, 4096), spec)
    assert not served(x(64, (1 << 15) + 1), spec), "a row does not fit"
    assert not served(x(64, 64), get_scheme("int8static").input), "no scale for each row"
    assert not served(torch.empty(1024, 2048, device="meta"), spec)
    assert not served(x(64, 64).double(), spec), "float64 is computed in float64"
    assert not served(torch.empty(4, 512, 1024, device=DEVICE), spec)


def test_nothing_is_interpreted_on_the_cpu():
    assert not triton_quantize.is_served(torch.empty(1024, 2048), get_scheme("int8dq").input)


@pytest.mark.parametrize(
    "before, rows, least, own",
    [
        (torch.sin, 2, 1 << 20, False),
        (lambda y: y @ y.mT @ y, 2, 1 << 20, True),
        (lambda y: (y @ y.mT @ y).reshape(2, 1, 64).view(-1, 64), 2, 1 << 20, True),
        (lambda y: torch.bmm(y[None], (y.mT @ y)[None])[0].view(2, 64), 2, 1 << 20, False),
        (lambda y: (y @ y.mT @ y).sin(), 2, 1 << 20, False),
        (lambda y: torch.ops.fxquant.quantize(y, "fp8dq", "input")[1] * y, 2, 1 << 20, False),
        (torch.sin, 20, 1200, True),
        (torch.sin, 20, 1300, False),
        (lambda y: y, 2, 1 << 20, True),
        (lambda y: y.view(1, 2, 64).reshape(2, 64), 2, 1 << 20, True),
        (lambda y: (y @ y.mT @ y).sin().t().sin().t(), 20, 1200, True),
    ],
    ids=[
        *("fused", "product", "views", "a slice", "activation", "scaled", "many", "not so many"),
        *("from outside", "a view of that", "moved"),
    ],
)
def test_inductor_gets_the_kernel_where_it_is_better(
    before, rows, least, own, anywhere, monkeypatch
):
    check(before, rows, least, own, monkeypatch)


@pytest.mark.parametrize(
    "before, widest, own",
    [
        (torch.sin, 64, False),
        (torch.sin, 63, True),
        (lambda y: y @ y.mT @ y, 64, True),
        (lambda y: y.sin().t().sin().t(), 64, True),
        (lambda y: (y @ y.mT @ y).view(20, 4, 16).mT.contiguous().view(20, 64), 64, True),
    ],
    ids=["computed", "wider than is held", "product", "moved", "copied"],
)
def test_many_rows_that_inductor_holds_are_fused_too(before, widest, own, anywhere, monkeypatch):
    monkeypatch.setattr(expansion, "WIDEST_HELD", widest)
    check(before, 20, 1200, own, monkeypatch, held=True)


def check(before, rows, least, own, monkeypatch, **held):
    monkeypatch.setattr(triton_quantize, "LEAST", least)
    x = FakeTensorMode().from_tensor(torch.randn(rows, 64))
    gm = trace_decomposed(lambda x: torch.ops.fxquant.quantize(before(x), "int8dq", "input"), x)
    (node,) = [n for n in quantizations(gm) if n.args[1] == "int8dq"]
    before_it = list(node.users)
    expand(gm.graph, **held)
    gm.graph.lint()
    assert any(n is node for n in quantizations(gm)) is not own and before_it
    kernels = gm.graph.find_nodes(
        op="call_function", target=torch.ops.fxquant.quantize_rows.default
    )
    assert [n.args[1] for n in kernels if n.args[1] == "int8dq"] == ["int8dq"] * own


def quantizations(gm: torch.fx.GraphModule) -> list[torch.fx.Node]:
    return gm.graph.find_nodes(op="call_function", target=torch.ops.fxquant.quantize.default)


class Products(torch.nn.Module):
    """The second linear reads what a product has written."""

    def __init__(self):
        super().__init__()
        self.norm, self.a = torch.nn.LayerNorm(64), torch.nn.Linear(64, 64)
        self.b = torch.nn.Linear(64, 32)
        self.requires_grad_(False).to(DEVICE)

    def forward(self, x):
        y = self.a(self.norm(x))
        return self.b(y @ y.mT @ y)


@pytest.mark.parametrize("dynamic", [False, True])
@torch.no_grad()
def test_through_inductor(dynamic, anywhere):
    model = Products()
    torch.compiler.reset()
    with fresh_cache():
        run = fxquant.compile(model, "int8dq", dynamic=dynamic)
        for rows in (8, 16) if dynamic else (8,):
            x = torch.randn(rows, 64, device=DEVICE)
            y, code = run_and_get_code(run, x)
            assert sqnr(y, model(x)) > 30
            assert any("fxquant.quantize_rows" in text for text in code) or rows == 16


COMPILED = """
import sys
import torch
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fxquant.lowering import triton_quantize as quantize
from fxquant.scheme import get_scheme

scheme = get_scheme(sys.argv[1])
plan = quantize._plan(scheme, "silu_mul", False, False, 11008, torch.device("cpu"))
constants = plan.constants | {"OVERLAP": True, "NATIVE": True}
names = quantize.quantize_rows_kernel.arg_names
codes = {torch.int8: "*i8", torch.float8_e4m3fn: "*fp8e4nv"}[plan.codes]
types = {"x": "*bf16", "codes": codes, "scale": "*fp32", "zero": "*i32", "K": "i32"}
types |= dict.fromkeys(constants, "constexpr")
source = ASTSource(
    fn=quantize.quantize_rows_kernel,
    signature=types,
    constexprs={(names.index(name),): value for name, value in constants.items()},
    attrs={(names.index(name),): [["tt.divisibility", 16]] for name in ("x", "codes", "K")},
)
made = compile(source, target=GPUTarget("cuda", 90, 32), options=plan.options)
open(sys.argv[2], "wb").write(made.asm["cubin"])
"""


@pytest.mark.skipif(not DISASSEMBLER.is_file(), reason="needs nvdisasm")
@pytest.mark.parametrize("scheme", ["int8dq", "8da4w-128", "fp8dq"])
def test_nothing_is_converted_one_by_one(scheme, tmp_path):
    """What a gate makes is rounded two numbers at a time, codes become bytes by an addition, and a sigmoid
    takes four instructions: with F2F and F2I for each value and more of the others a gate took a fourth more
    time."""
    file = tmp_path / "kernel.cubin"
    environment = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILED, scheme, str(file)]
    subprocess.run(command, check=True, env=environment, cwd=Path(fxquant.__file__).parents[1])
    code = subprocess.run([DISASSEMBLER, "-c", file], check=True, capture_output=True, text=True)
    words = re.findall(r"[A-Z][A-Z0-9_]+", code.stdout)
    assert "LDG" in words and "MUFU" in words
    one_by_one = [word for word in words if word in ("F2F", "F2I")]
    assert len(one_by_one) <= (scheme == "8da4w-128"), "the zero point of a row"
    values = 12288 // (32 * 16 if scheme != "8da4w-128" else 32 * 8)
    # one a value looks for a NaN; a sigmoid that minds subnormal numbers has two more
    assert words.count("FSETP") <= 1.3 * values


@pytest.mark.parametrize("widened", [False, True])
def test_what_it_writes_is_allocated_and_nothing_else_runs(widened):
    """What no kernel has written yet was once converted to the type of the widened codes."""
    x, ran = torch.ones(3, 64).bfloat16(), []

    class Recorded(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            ran.append(func.overloadpacket)
            return func(*args, **(kwargs or {}))

    with Recorded():
        found = triton_quantize._fake(x, "8da4w-32", "", widened)
    assert found[0].dtype == (torch.bfloat16 if widened else torch.int8)
    assert ran and set(ran) <= {torch.ops.aten.new_empty, torch.ops.aten.empty_like}
