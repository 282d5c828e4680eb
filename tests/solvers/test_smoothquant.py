"""The strength of smoothing: what counts as error, and that luck does not decide."""

from __future__ import annotations

import pytest
import torch

from fxquant.errors import ShapeMismatch
from fxquant.scheme import get_scheme
from fxquant.solvers import least_error

INT8 = get_scheme("int8dq")


def outlier(tokens: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs with a channel 60 times the others, and weights that read them, made small there."""
    x, w = torch.randn(tokens, 64), torch.randn(32, 64)
    x[:, 7] *= 60
    w[:, 7] /= 60
    return x, w


def dividing(factor: float, channel: int = 7) -> torch.Tensor:
    return torch.ones(64).index_fill(0, torch.tensor(channel), factor)


@torch.no_grad()
def test_the_error_is_the_scheme_s_own_and_what_tokens_share_counts_twice():
    x, w = torch.randn(40, 64).double() + 3, torch.randn(8, 64).double()
    other = torch.randn(5, 64).double()
    s = torch.rand(64).double() + 0.5
    scheme = get_scheme("8da4w-32")
    expected, xq = 0.0, scheme.input.dequantize(scheme.input.quantize(x / s), torch.float64)
    for one in (w, other):
        q = scheme.weight.quantize(one * s)
        wrong = xq @ scheme.weight.dequantize(q, torch.float64).T - x @ one.T
        common = 40 * wrong.mean(0).square().sum()
        assert common > 0.1 * wrong.square().sum(), "not to be overlooked"
        expected += float(wrong.square().sum() + common)
    found = least_error(x, [w, other], [scheme] * 2, [s, torch.ones(64)])
    assert found.errors[0] == pytest.approx(expected, rel=1e-9)
    assert found.errors[1] == pytest.approx(found.alone, rel=1e-12)


@torch.no_grad()
def test_a_group_that_smoothing_would_harm_is_left_alone():
    """Weights with the same channels large as the inputs: moving difficulty makes both worse."""
    x, w = torch.randn(256, 64), torch.randn(32, 64)
    found = least_error(x, [w], [INT8], [torch.rand(64) * 50 + 0.02])
    assert found.best is None and found.alone < found.errors[0]
    exact = least_error(x, [torch.zeros(32, 64)], [INT8], [torch.rand(64) + 1])
    assert exact.best is None and exact.alone == exact.errors[0] == 0, "nothing to gain"


@torch.no_grad()
def test_a_lucky_strength_among_bad_ones_does_not_win():
    x, w = outlier()
    path = [dividing(f) for f in (40, 65, 80, 65, 40, 1, 1, 62, 1, 1)]
    found = least_error(x, [w], [INT8], path)
    assert min(found.errors) == found.errors[7], "by a hair"
    assert found.best == 2
    path[2] = dividing(20)
    assert least_error(x, [w], [INT8], path).best in (1, 3), "what is certainly worse stays out"


@pytest.mark.parametrize("helps", [True, False])
@torch.no_grad()
def test_one_token_does_not_speak_for_all(helps):
    """Whether to smooth, where a token dwarfs the others and the sum says what its rounding happens to."""
    misled = 0
    for _ in range(16):
        x, w = outlier() if helps else (torch.randn(256, 64), torch.randn(32, 64))
        smooth = dividing(12 if helps else 1) * (torch.rand(64) + 0.5)
        x[0, 3] = 3e4 if helps else 1e3
        found = least_error(x, [w], [INT8], [smooth])
        misled += (found.errors[0] < found.alone) != helps
        assert found.best == (0 if helps else None)
    assert misled > 2


@torch.no_grad()
def test_what_overflows_is_not_chosen():
    x, w = outlier()
    path = [torch.zeros(64), dividing(4), dividing(6), dividing(8)]
    found = least_error(x, [w], [INT8], path)
    assert found.errors[0] == torch.inf
    assert found.best == 3, "nor what is beside it"
    assert least_error(x, [w], [INT8], path[:1]).best is None


def test_inputs_of_another_width_are_refused():
    with pytest.raises(ShapeMismatch, match=r"rows has shape \(4, 63\), expected \(tokens, 64\)"):
        least_error(torch.randn(4, 63), [torch.randn(8, 64)], [INT8], [torch.ones(64)])
