"""expand: quantized activations are one node for AOTAutograd, and loops for Inductor."""

import functools
from types import SimpleNamespace

import pytest
import torch
from torch._inductor import config
from torch._inductor.utils import fresh_cache, run_and_get_code
from torch._subclasses import FakeTensorMode

import fxquant
from fxquant import inductor
from fxquant.inductor import trace_decomposed
from fxquant.passes.expansion import expand
from tests.conftest import called, sqnr


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("scheme", ["int8dq", "8da4w-32", "fp8dq"])
def test_inductor_writes_them_out(scheme, dynamic):
    model = torch.nn.Sequential(torch.nn.LayerNorm(64), torch.nn.Linear(64, 64))
    torch.compiler.reset()
    with torch.no_grad(), fresh_cache():
        run = fxquant.compile(model, scheme, dynamic=dynamic)
        y, code = run_and_get_code(run, torch.randn(3, 64))
    assert y.shape == (3, 64)
    assert code and not called("quantize", code)


@pytest.mark.parametrize("scheme", ["int8dq", "8da4w-32", "fp8dq"])
def test_a_scale_is_computed_in_one_place(scheme):
    """Not again in the loops of the codes and of the zero point: its NaN is there once."""
    model = torch.nn.Sequential(torch.nn.RMSNorm(64), torch.nn.Linear(64, 64)).bfloat16()
    torch.compiler.reset()
    with torch.no_grad(), fresh_cache():
        run = fxquant.compile(model, scheme, dynamic=False)
        _, code = run_and_get_code(run, torch.randn(1, 64, dtype=torch.bfloat16))
    assert "\n".join(code).count("quiet_NaN") == 1


def test_the_users_own_pass_runs_after_it():
    seen = []

    def look(graph):
        seen.extend(str(node.target) for node in graph.nodes)

    model = torch.nn.Sequential(torch.nn.LayerNorm(64), torch.nn.Linear(64, 64)).double()
    torch.compiler.reset()
    options = {"inductor": {"post_grad_custom_pre_pass": look}}
    with torch.no_grad(), fresh_cache():
        fxquant.compile(model, "int8dq", **options)(torch.randn(3, 64).double())
    assert seen and not any("fxquant.quantize" in target for target in seen), "float64 has no loops"


MADE_OF_NOTHING = {
    "filled": lambda y: torch.full((3,), 2.0),
    "positions": lambda y: torch.arange(64) * 2,
    "triangle": lambda y: torch.ones(8, 8, dtype=torch.bool).tril(),
    "mask": lambda y: torch.bmm(
        y[None], (torch.arange(64)[None] <= torch.arange(64)[:, None]).float()[None]
    ),
    "chain": lambda y: functools.reduce(
        lambda i, _: (i * 1.5).sin() + 0.25, range(30), torch.arange(64.0)
    ),
    "region": lambda y: (
        torch.full((3,), 2.0),
        torch.cond(y.sum() > 0, torch.sin, torch.cos, (y,)),
    ),
}


class Model(torch.nn.Module):
    def __init__(self, extra):
        super().__init__()
        self.linear = torch.nn.Linear(64, 64)
        self.extra = extra

    def forward(self, x):
        y = self.linear(x) + torch.arange(64)
        return y, self.extra(y)


def overlap(monkeypatch, extra, **options):
    """The setting, after each graph's kernels are known and before they are generated."""
    seen, check = [], inductor._Overlap.__call__

    def spied(self, nodes):
        nodes = check(self, nodes)
        seen.append(config.triton.enable_pdl)
        return nodes

    monkeypatch.setattr(inductor._Overlap, "__call__", spied)
    torch.compiler.reset()
    with torch.no_grad(), fresh_cache():  # a graph from the cache has no kernels left to generate
        fxquant.compile(Model(extra), "int8wo", inductor=options)(torch.randn(3, 64))
    assert not config.triton.enable_pdl, "as it was"
    return seen


@pytest.mark.parametrize("extra", MADE_OF_NOTHING)
def test_kernels_overlap_though_one_reads_nothing(monkeypatch, extra):
    seen = overlap(monkeypatch, MADE_OF_NOTHING[extra])
    assert seen and all(seen), "the graph itself comes last, its regions before it"


@pytest.mark.parametrize("scans", [False, True])
def test_a_split_scan_does_not_wait_before_all_else(scans):
    parts = [SimpleNamespace(is_split_scan=lambda found=found: found) for found in (False, scans)]
    assert inductor._waits(SimpleNamespace(get_nodes=lambda: parts)) is not scans


def test_what_is_on_no_device_has_no_kernels(monkeypatch):
    assert overlap(monkeypatch, lambda y: torch.empty(3, device="meta") + 1) == [True]


def test_who_sets_the_overlap_decides(monkeypatch):
    assert overlap(monkeypatch, torch.relu, **{"triton.enable_pdl": False}) == []


def test_the_users_passes_may_be_a_list_and_see_the_scheduler(monkeypatch):
    seen = []
    options = {
        "post_grad_custom_pre_pass": [lambda graph: seen.append("graph")],
        "_post_fusion_custom_pass": lambda nodes: seen.append("nodes") or nodes,
    }
    assert overlap(monkeypatch, torch.relu, **options) == [], "its pass has no uuid for the cache"
    assert seen == ["graph", "nodes"]


def test_what_a_linear_is_added_to_is_stored_where_it_is_read_again():
    def residuals(x, w):
        first = x + x @ w  # a norm reads it, and the next sum
        second = first + torch.nn.functional.rms_norm(first, (64,)) @ w
        other = x.sin() + x.cos()  # no linear
        return second.exp(), other * other.tan()

    fake = FakeTensorMode()
    inputs = (fake.from_tensor(torch.randn(*shape)) for shape in ((5, 64), (64, 64)))
    gm = trace_decomposed(residuals, *inputs)
    expand(gm.graph)
    sums = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor)
    stored = [n.meta.get("inductor_realize_to_strides", False) for n in sums if len(n.args) == 2]
    assert stored.count(True) == 1 and stored[0], sums


@pytest.mark.parametrize("scheme, floor", [("int8dq", 43), ("8da4w-128", 43), ("fp8dq", 37.5)])
def test_many_rows_behind_a_norm_are_quantized_as_well(scheme, floor):
    """As many as would have a kernel of their own, on a GPU."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = torch.nn.Sequential(torch.nn.RMSNorm(4096), torch.nn.Linear(4096, 64, bias=False))
    model.to(device, torch.bfloat16)
    x = torch.randn(300, 4096, device=device, dtype=torch.bfloat16)
    x[7, 3] = float("nan")
    x[8] = 0
    reference = torch.nn.Sequential(model[0], torch.nn.Linear(4096, 64, bias=False))
    reference[1].weight = model[1].weight
    fxquant.quantize(reference, scheme)
    torch.compiler.reset()
    with torch.no_grad(), fresh_cache():
        y, code = run_and_get_code(fxquant.compile(model, scheme, dynamic=False), x)
        expected = reference(x)
    assert not called("quantize", code) and not called("quantize_rows", code)
    rows = torch.arange(300, device=device) != 7
    assert y[7].isnan().all() and bool((y[8] == 0).all())
    assert sqnr(y[rows], expected[rows]) > floor
