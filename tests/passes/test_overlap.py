"""Programmatic dependent launch: what Inductor generates where kernels overlap."""

from __future__ import annotations

import contextlib
import re

import pytest
import torch
from torch._inductor import config
from torch._inductor.codegen.triton import TritonKernel, TritonScheduling
from torch._inductor.utils import fresh_cache

import fxquant
from fxquant.lowering.triton_launch import HAS_TRITON

WAIT, LAUNCH = "tl.extra.cuda.gdc_wait()", "tl.extra.cuda.gdc_launch_dependents()"


class Block(torch.nn.Module):
    """A row that a loop reads twice, one that fits a block, a pointwise kernel, kernels that read a seed or
    nothing, and a linear."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.RMSNorm(16384)
        self.linear = torch.nn.Linear(256, 64, bias=False)

    def forward(self, x, table, at):
        wide = self.norm(x + 1)
        nothing = torch.rand_like(x), torch.arange(77) * 2
        return wide, self.linear(wide[:, :256]).softmax(-1), table[at] * 2, *nothing


class Nowhere:
    """A driver of a Hopper GPU that is not there."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self):
        return torch.device("cpu")


def sources(
    monkeypatch: pytest.MonkeyPatch,
    model: torch.nn.Module | None = None,
    inputs: tuple[torch.Tensor, ...] = (),
    scheme: str | None = "int8wo",
    **options,
) -> list[str]:
    """The Triton kernels of a model, a Block or another, as generated for a Hopper GPU. What comes after that
    fails here."""
    import triton

    found, generate = [], TritonKernel.codegen_kernel

    def spied(self, *args, **kwargs):
        found.append(generate(self, *args, **kwargs))
        return found[-1]

    enabled = staticmethod(lambda: config.triton.enable_pdl)
    monkeypatch.setattr(TritonKernel, "codegen_kernel", spied)
    monkeypatch.setattr(TritonKernel, "_enable_pdl_codegen", enabled)
    monkeypatch.setattr(triton.runtime.driver, "_active", Nowhere(), raising=False)
    torch.compiler.reset()
    inputs = inputs or (torch.randn(4, 16384), torch.randn(10, 3), torch.tensor([1, 2]))
    settings = {"cpu_backend": "triton"} | options
    model = fxquant.compile(model or Block(), scheme, inductor=settings)
    patches = config.patch(compile_threads=1)
    with torch.no_grad(), fresh_cache(), patches, contextlib.suppress(Exception):
        model(*inputs)
    return found


needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton to generate its kernels")


@needs_triton
def test_a_kernel_lets_the_next_one_begin_and_waits_before_anything_else(monkeypatch):
    kernels = sources(monkeypatch)
    assert any(re.search(r"for r0_offset in", k) for k in kernels), "one of them has a loop"
    assert any("load_seed_offset" in k for k in kernels) and len(kernels) >= 5
    for source in kernels:
        lines = [line.strip() for line in source.splitlines()]
        assert (lines.count(WAIT), lines.count(LAUNCH)) == (1, 1)
        at = lines.index(LAUNCH)
        assert lines[at + 1] == WAIT
        body = next(i for i, line in enumerate(lines) if line.startswith("def ")) + 1
        assert all(re.fullmatch(r"\w+(: tl.constexpr)? = \w+", line) for line in lines[body:at])
    assert TritonScheduling.kernel_type is TritonKernel, "in that graph alone"


@needs_triton
def test_who_turns_it_off_gets_kernels_as_ever(monkeypatch):
    kernels = sources(monkeypatch, **{"triton.enable_pdl": False})
    assert kernels and not any(WAIT in k or LAUNCH in k for k in kernels)


LOOP = "for r0_offset in"


@needs_triton
@pytest.mark.parametrize(
    "width, options, held",
    [(4096, {}, True), (16384, {}, False), (4096, {"triton.enable_pdl": False}, False)],
    ids=["held", "too wide", "as ever"],
)
@pytest.mark.parametrize("scheme", ["int8dq", "8da4w-128"])
def test_rows_of_which_it_makes_codes_are_read_once(monkeypatch, scheme, width, options, held):
    model = torch.nn.Sequential(
        torch.nn.RMSNorm(width), torch.nn.Linear(width, 64, bias=False)
    ).bfloat16()
    kernels = sources(monkeypatch, model, (torch.randn(300, width).bfloat16(),), scheme, **options)
    (norm,) = [k for k in kernels if "rsqrt" in k]
    assert "*i8" in norm, "fused with the quantization"
    assert ("persistent_reduction" in norm, LOOP in norm) == (held, not held)


class Pooled(torch.nn.Module):
    """A column's mean, of which codes are made."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(512, 64, bias=False)

    def forward(self, x):
        return self.linear(x.mean(1))


@needs_triton
def test_codes_of_what_a_kernel_sums_up_are_none_of_its_rows(monkeypatch):
    model, x = Pooled().bfloat16(), torch.randn(4, 4096, 512).bfloat16()
    stats = fxquant.calibrate(model, [x])
    fxquant.quantize(model, "int8static", stats=stats, smooth=None)
    kernels = sources(monkeypatch, model, (x,), None)
    (mean,) = [k for k in kernels if "4096.0" in k]
    assert "*i8" in mean and LOOP in mean


@needs_triton
def test_who_wants_no_persistent_reductions_gets_none(monkeypatch):
    model = torch.nn.Sequential(torch.nn.RMSNorm(512), torch.nn.Linear(512, 64, bias=False))
    options = {"triton.persistent_reductions": False}
    kernels = sources(monkeypatch, model, (torch.randn(300, 512),), "int8dq", **options)
    assert kernels and not any("persistent_reduction" in k for k in kernels)


class Residuals(torch.nn.Module):
    """Linears behind norms, each added to what came before."""

    def __init__(self, depth: int = 4):
        super().__init__()
        self.norms = torch.nn.ModuleList(torch.nn.RMSNorm(128) for _ in range(depth))
        self.linears = torch.nn.ModuleList(
            torch.nn.Linear(128, 128, bias=False) for _ in range(depth)
        )

    def forward(self, x):
        for norm, linear in zip(self.norms, self.linears, strict=True):
            x = x + linear(norm(x))
        return x


@needs_triton
def test_a_norm_reads_one_sum_and_not_all_that_was_added(monkeypatch):
    kernels = sources(monkeypatch, Residuals().bfloat16(), (torch.randn(5, 128).bfloat16(),))
    norms = [k for k in kernels if "rsqrt" in k]
    assert len(norms) == 4
    for norm in norms:  # the sum so far, what a linear made, the weight
        assert len(set(re.findall(r"\b(?:in|in_out)_ptr\d+", norm))) <= 3
