"""Programmatic dependent launch: what Inductor generates where kernels overlap."""

from __future__ import annotations

import contextlib
import re

import pytest
import torch
from torch._inductor import config
from torch._inductor.codegen.triton import TritonKernel
from torch._inductor.utils import fresh_cache

import fxquant
from fxquant.lowering.triton_launch import HAS_TRITON

WAIT, LAUNCH = "tl.extra.cuda.gdc_wait()", "tl.extra.cuda.gdc_launch_dependents()"


class Block(torch.nn.Module):
    """A row that a loop reads twice, one that fits a block, a pointwise kernel, and a linear."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.RMSNorm(16384)
        self.linear = torch.nn.Linear(256, 64, bias=False)

    def forward(self, x, table, at):
        wide = self.norm(x + 1)
        return wide, self.linear(wide[:, :256]).softmax(-1), table[at] * 2


class Nowhere:
    """A driver of a Hopper GPU that is not there."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self):
        return torch.device("cpu")


def sources(monkeypatch: pytest.MonkeyPatch, **options) -> list[str]:
    """The Triton kernels of a model, as generated for a Hopper GPU. What comes after that fails here."""
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
    model = fxquant.compile(Block(), "int8wo", inductor={"cpu_backend": "triton"} | options)
    inputs = torch.randn(4, 16384), torch.randn(10, 3), torch.tensor([1, 2])
    patches = config.patch(compile_threads=1)
    with torch.no_grad(), fresh_cache(), patches, contextlib.suppress(Exception):
        model(*inputs)
    return found


needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton to generate its kernels")


@needs_triton
def test_a_kernel_waits_before_it_touches_memory_and_then_lets_the_next_one_begin(monkeypatch):
    kernels = sources(monkeypatch)
    assert any(re.search(r"for r0_offset in", k) for k in kernels), "one of them has a loop"
    assert len(kernels) >= 3
    for source in kernels:
        lines = [line.strip() for line in source.splitlines()]
        assert (lines.count(WAIT), lines.count(LAUNCH)) == (1, 1)
        at = lines.index(WAIT)
        assert lines[at + 1] == LAUNCH
        touched = [i for i, line in enumerate(lines) if "tl.load(" in line or "tl.store(" in line]
        loops = [i for i, line in enumerate(lines) if line.startswith("for ")]
        assert at < min(touched + loops)
    assert TritonKernel._filter_pdl.__qualname__ == "TritonKernel._filter_pdl", (
        "of that graph alone"
    )


@needs_triton
def test_who_turns_it_off_gets_kernels_as_ever(monkeypatch):
    kernels = sources(monkeypatch, **{"triton.enable_pdl": False})
    assert kernels and not any(WAIT in k or LAUNCH in k for k in kernels)
