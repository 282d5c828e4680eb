"""What all tests share: small seeded models, SQNR, what code calls, compilation without Inductor."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch
from torch import nn

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import fxquant.backend
from fxquant.scheme import Quantized, get_scheme

_TRITON = importlib.util.find_spec("triton")
_ROOT = Path(_TRITON.origin).parent if _TRITON and _TRITON.origin else Path("nowhere")
DISASSEMBLER = _ROOT / "backends" / "nvidia" / "bin" / "nvdisasm"
"""Comes with Triton."""


class MLP(nn.Module):
    """Two linears around a GELU: in -> 2 * in -> out."""

    def __init__(self, width: int = 64, out: int = 32, bias: bool = True):
        super().__init__()
        self.up = nn.Linear(width, 2 * width, bias=bias)
        self.down = nn.Linear(2 * width, out, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.gelu(self.up(x)))


class Block(nn.Module):
    """A transformer block in miniature: q/k/v share an input, gate/up too."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, width, bias=b) for b in (True, False, True))
        self.gate, self.up = nn.Linear(width, 2 * width), nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        q, k, v = (
            p(h).view(*h.shape[:-1], 4, -1).transpose(-2, -3) for p in (self.q, self.k, self.v)
        )
        a = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + a.transpose(-2, -3).reshape(h.shape)
        h = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


def sqnr(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Signal-to-quantization-noise ratio in dB."""
    found, wanted = found.double(), wanted.double()
    return float(10 * torch.log10(wanted.square().sum() / (found - wanted).square().sum()))


def called(name: str, code: list[str]) -> bool:
    """Whether the generated code calls ``fxquant.<name>``: its comments name it anyhow."""
    lines = (line for text in code for line in text.splitlines())
    return any(f"ops.fxquant.{name}" in n for n in lines if not n.lstrip().startswith(("#", "//")))


def linear_on(
    x: torch.Tensor, q: Quantized, bias: torch.Tensor | None, scheme: str, epilogue: str = ""
) -> torch.Tensor:
    """``fxquant::linear`` of ``x``; a static scheme's input has the range that ``x`` itself has."""
    ops, static = torch.ops.fxquant, ()
    if get_scheme(scheme).static:
        ends = torch.stack(torch.aminmax(x.float())).unsqueeze(1)
        scale, *rest = ops.static_qparams(ends, None, scheme)
        zero = rest[0] if rest else None
        static = (scale, zero, x.dtype)
        x = ops.quantize_static(x, scale, zero, scheme)
    return ops.linear(x, *q, bias, scheme, epilogue, *static)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """Compile without Inductor: the lowered graph runs as it is, and is kept in this list."""
    kept: list[torch.fx.GraphModule] = []

    def run_as_is(gm, origin, inputs, extras, patches, tag):
        kept.append(gm)
        return gm.forward

    monkeypatch.setattr(fxquant.backend, "compile_graph", run_as_is)
    return kept
