"""oneDNN's prepacked int8 product: right on every machine, chosen where there are AMX tiles."""

from __future__ import annotations

import pytest
import torch

from fxquant.lowering.kernel import KERNELS, Device, Problem
from fxquant.lowering.select import select
from fxquant.scheme import get_scheme
from tests import oracles

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN"
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m", [0, 1, 2, 7, 16, 17])
def test_oracles(m, dtype):
    for n, k, bias in [(1, 1, False), (37, 101, True), (64, 48, True)]:
        oracles.exact_probe("onednn_int8", "int8dq", m, n, k, dtype, bias)
        oracles.elementwise_bound("onednn_int8", "int8dq", m, n, k, dtype, bias)


def test_floor():
    oracles.recipe_sqnr("onednn_int8", "int8dq", m=8, n=32)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (37, 101), (64, 128)])
def test_layout_round_trip(n, k):
    oracles.layout_round_trip("onednn_int8", "int8dq", n, k)


def row(*features: str, int8: float) -> Device:
    peak = {"float32": 2e11, "bfloat16": 2e12, "int8": int8, "vector_int8": 6e11}
    return Device(
        name="a CPU",
        type="cpu",
        bandwidth=3e10,
        peak=peak,
        launch=1e-5,
        features=frozenset(features),
        units=2,
    )


def test_chosen_on_amx_and_refused_with_a_reason_elsewhere():
    problem = Problem(
        scheme=get_scheme("int8dq"),
        n=8192,
        k=2048,
        m=None,
        dtype=torch.bfloat16,
        bias=False,
        device=row("avx512_vnni", "amx_int8", int8=5.4e12),
    )
    assert select(problem).at(512).name == "onednn_int8"
    vnni = Problem(**{**problem.__dict__, "device": row("avx512_vnni", int8=6e11)})
    choice = select(vnni)
    assert choice.refused["onednn_int8"] == "needs amx_int8, a CPU has none"
    assert choice.at(512).name != "onednn_int8"
    assert "int32 sum" in KERNELS["onednn_int8"].refusal(
        Problem(**{**problem.__dict__, "k": 2**17})
    )
