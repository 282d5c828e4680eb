"""The whole pipeline on a GPU: every scheme compiled by Inductor, CUDA graphs, changing rows."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

import fxquant
from fxquant.backend import fxquant_backend
from fxquant.scheme import SCHEMES

from .conftest import Block, sqnr

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

STATIC = [s for s in SCHEMES if SCHEMES[s].static]
DISTINCT = [
    s
    for s in SCHEMES
    if s not in STATIC and not s.endswith(("64", "128", "256", "128-sym", "256-sym"))
]


@pytest.mark.parametrize("scheme", [*DISTINCT, "int4wo-64", "int4wo-128", "int4wo-64-sym"])
@torch.no_grad()
def test_scheme_compiles_and_is_right(scheme):
    model = Block(256).cuda().bfloat16().requires_grad_(False).eval()
    x = torch.randn(2, 24, 256, device="cuda", dtype=torch.bfloat16)
    reference = fxquant.quantize(_copy(model), scheme)(x)
    run = torch.compile(model, backend=fxquant_backend, options={"scheme": scheme}, fullgraph=True)
    y = run(x)
    assert sqnr(y, reference) > 36, "the kernels differ from the reference by more than rounding"
    assert sqnr(y, model(x)) > min(SCHEMES[scheme].sqnr, 30) - 4
    assert torch.equal(run(x), y), "bit-identical from run to run"


@pytest.mark.parametrize("scheme", [*DISTINCT, "int4wo-64", *STATIC])
@torch.no_grad()
def test_cuda_graphs_and_weight_updates(scheme):
    """One row and many, by CUDA graphs of their own that no kernel refuses."""
    model = Block(256).cuda().bfloat16().requires_grad_(False).eval()
    inputs = [torch.randn(1, n, 256, device="cuda", dtype=torch.bfloat16) for n in (1, 70)]
    ranges = {}
    if scheme in STATIC:
        ranges["stats"] = fxquant.calibrate(model, inputs, compiled=False, progress=False)
    torch._dynamo.utils.counters.clear()
    run = fxquant.compile(model, scheme, mode="reduce-overhead", fullgraph=True, **ranges)
    floor = min(SCHEMES[scheme].sqnr, 30) - (6 if ranges else 4)
    for sign in (1, -1):
        model.down.weight.mul_(sign)
        for x in inputs:
            for _ in range(4):
                y = run(x).clone()
            assert sqnr(y, model(x)) > floor
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("smooth", [False, 0.5])
@pytest.mark.parametrize("scheme", STATIC)
@torch.no_grad()
def test_static_schemes_compile_and_are_right(scheme, smooth, dtype):
    model = Block(256).cuda().to(dtype).requires_grad_(False).eval()
    run, reference = None, None
    for rows in (1, 24, 300):
        x = torch.randn(2, rows, 256, device="cuda", dtype=dtype)
        if run is None:
            stats = fxquant.calibrate(model, [4 * x, x], compiled=False, progress=False)
            run = fxquant.compile(model, scheme, stats=stats, smooth=smooth, dynamic=True)
        reference = fxquant.trace(model, (x,))
        steps = fxquant.passes.pipeline(scheme, stats=stats, smooth=smooth)
        for _, one in itertools.takewhile(lambda step: step[0] != "fused", steps):
            one(reference)
        y = run(x)
        assert sqnr(y, reference(x)) > 36
        assert sqnr(y, model(x)) > min(SCHEMES[scheme].sqnr, 30) - 6


@pytest.mark.parametrize("scheme", [*DISTINCT, "int4wo-64"])
@torch.no_grad()
def test_changing_rows_make_at_most_two_graphs(scheme):
    model = Block(256).cuda().bfloat16().requires_grad_(False).eval()
    run = torch.compile(model, backend=fxquant_backend, options={"scheme": scheme}, fullgraph=True)
    torch._dynamo.utils.counters.clear()
    for rows in (1, 3, 17, 64, 300):
        x = torch.randn(1, rows, 256, device="cuda", dtype=torch.bfloat16)
        assert sqnr(run(x), model(x)) > min(SCHEMES[scheme].sqnr, 30) - 4
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


def _copy(model: Block) -> Block:
    other = Block(256).cuda().bfloat16().requires_grad_(False).eval()
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize("keep", ["cpu", "device", "disk"])
@torch.no_grad()
def test_a_model_on_the_cpu_is_solved_on_the_gpu(keep):
    model = torch.nn.Sequential(Block(256), Block(256)).eval().requires_grad_(False)
    data = [torch.randn(2, 24, 256) for _ in range(4)]
    settings = {"solver": "gptq", "batches": data, "progress": False}
    wanted = fxquant.quantize(copy.deepcopy(model), "int4wo-64", **settings)
    found = fxquant.quantize(model, "int4wo-64", device="cuda", keep=keep, **settings)
    for name, module in found.named_modules():
        if isinstance(module, fxquant.QuantLinear):
            other = wanted.get_submodule(name)
            assert module.codes.device.type == "cpu"
            assert abs(module.record.relative / other.record.relative - 1) < 0.05
    x = data[0]
    assert sqnr(found(x), wanted(x)) > 20
