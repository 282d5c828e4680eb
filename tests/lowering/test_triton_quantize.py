"""Activations quantized by a kernel of its own: the reference's codes, whatever the rows hold."""

from __future__ import annotations

import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")

import fxquant  # noqa: E402
from fxquant import passes  # noqa: E402
from fxquant.lowering import triton_quantize  # noqa: E402
from fxquant.lowering.triton_launch import HAS_TRITON  # noqa: E402
from fxquant.passes.expansion import expand  # noqa: E402
from fxquant.scheme import get_scheme  # noqa: E402

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


ROWS = {
    "zeros": [0.0, 0.0, 0.0, 0.0],
    "one sign": [1.0, 2.0, 3.0, 4.0],
    "negative": [-1.0, -2.5, -3.0, -0.5],
    "halves": [127.5, -127.5, 0.5, 1.5],
    "tiny": [1e-38, -2e-39, 0.0, 1e-40],
    "large": [3e38, -3e38, 1e38, 0.0],
    "nan": [1.0, NAN, 2.0, -3.0],
    "infinite": [1.0, INF, 2.0, -3.0],
    "both": [INF, -INF, NAN, 0.0],
}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ROWS)
def test_rows_that_are_odd(name, scheme):
    x = torch.tensor([ROWS[name], [1.0, 2.0, -3.0, 0.25]], device=DEVICE)
    found = torch.ops.fxquant.quantize_rows(x, scheme)
    same(found, torch.ops.fxquant.quantize(x, scheme, "input"))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rows_of_a_larger_tensor(scheme):
    x = torch.randn(64, 7, device=DEVICE).t()
    same(
        torch.ops.fxquant.quantize_rows(x, scheme),
        torch.ops.fxquant.quantize(x.contiguous(), scheme, "input"),
    )


@pytest.fixture
def anywhere(monkeypatch):
    monkeypatch.setattr(triton_quantize, "PLACES", ("cuda", "cpu"))


def test_what_is_worth_a_kernel_of_its_own(anywhere):
    spec = get_scheme("int8dq").input

    def worth(rows, k, spec=spec):
        return triton_quantize.worth_it(torch.empty(rows, k, device=DEVICE), spec)

    assert worth(256, 4096) and not worth(255, 4096) and not worth(16, 4096)
    assert not worth(64, (1 << 15) + 1), "a row does not fit"
    assert not worth(1 << 14, 64, get_scheme("int8static").input), "no scale for each row"
    assert not triton_quantize.worth_it(torch.empty(1024, 2048, device="meta"), spec)
    assert not triton_quantize.worth_it(torch.empty(4, 512, 1024, device=DEVICE), spec)


def test_nothing_is_interpreted_on_the_cpu():
    spec = get_scheme("int8dq").input
    assert not triton_quantize.worth_it(torch.empty(1024, 2048), spec)


@pytest.mark.parametrize("rows, own", [(2, False), (300, True)])
@torch.no_grad()
def test_inductor_gets_the_kernel_where_rows_are_many(rows, own, anywhere):
    model = torch.nn.Sequential(torch.nn.LayerNorm(4096), torch.nn.Linear(4096, 32)).to(DEVICE)
    gm = fxquant.trace(model.requires_grad_(False), (torch.randn(rows, 4096, device=DEVICE),))
    for _, one in passes.pipeline("int8dq"):
        one(gm)
    expand(gm.graph)
    targets = {str(node.target) for node in gm.graph.nodes}
    assert "fxquant.quantize.default" not in targets
    assert ("fxquant.quantize_rows.default" in targets) == own
    gm.recompile()
    x = torch.randn(rows, 4096, device=DEVICE)
    y, wanted = gm(x), model(x)
    assert (y - wanted).norm() / wanted.norm() < 0.02
