"""How strongly to smooth linears, by the error of their outputs, activations included.

Xiao et al. 2023 (arXiv 2211.10438) leave the strength of smoothing to be found by a search. Here the
outputs on a sample of inputs decide: with scales s the linear computes ``Q(x / s) Q(W s)^T``, as its
scheme quantizes both. The least square alone would follow the luck of one rounding, so:

What tokens err in common counts twice, in each of them and in their mean: ``sum_t |d_t|^2 + T |mean d|^2``.
Layers behind average over tokens (attention, pooling): there the common part stays, the rest cancels.

Strengths that err no more than one standard error above the least are taken for equal (the 1 SE rule of
Breiman et al., Classification and Regression Trees, 1984; differences are paired by token). Of them the
one with the least error along the path is taken, logarithms averaged with the neighbours': an error far
below those beside it is an accident of how a few weights of a large channel were rounded, which a model
whose other layers err too does not repeat. (In MiniLM's first block alpha 1 errs as little as 0.6 and
a third of 0.95; taken there, it costs the whole model accuracy.)

Not to smooth has no neighbours. Where it is as good by that rule, most tokens decide: if the sum does
not know, it hangs on a few of them with huge values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..errors import ShapeMismatch
from ..scheme import Scheme

NEIGHBOURS = (1, 2, 3, 2, 1)
"""The weights of a candidate and those beside it: a triangle, the first and last candidate repeated."""


class LeastError(NamedTuple):
    """best: the index of the best candidate, the first of equals; None where the inputs are better left
    alone. errors: of each, and alone: without any, as the module's text counts them."""

    best: int | None
    errors: list[float]
    alone: float


@torch.no_grad()
def least_error(
    rows: torch.Tensor,
    weights: Sequence[torch.Tensor],
    schemes: Sequence[Scheme],
    candidates: Sequence[torch.Tensor],
) -> LeastError:
    """The best of ``candidates`` [k], scales of growing strength, for linears that share their inputs.

    rows: [t, k], a sample of the inputs before any scaling. weights: [n_i, k] each, of any floating
    dtype; schemes: of each. Errors are sums over tokens, outputs and linears, computed in float32 (float64
    for float64 weights). A candidate that overflows errs infinitely. Raises ShapeMismatch.
    """
    k = weights[0].shape[1]
    if rows.dim() != 2 or rows.shape[1] != k:
        raise ShapeMismatch(what="rows", found=tuple(rows.shape), expected=f"(tokens, {k})")
    wide = [w if w.dtype == torch.float64 else w.float() for w in weights]
    x = rows.to(wide[0])
    by_token = _by_token(x, wide, schemes, [torch.ones_like(x[0]), *candidates])
    errors = by_token.sum(1)
    equal = _no_worse(by_token, int(errors.argmin()))
    best = int(_beside(errors[1:]).where(equal[1:], torch.inf).argmin())
    most_alone = (by_token[0] <= by_token[1 + best]).double().mean() > 0.5
    better_alone = equal[0] and (most_alone or not equal[1:].any())
    alone, *tried = errors.tolist()
    return LeastError(None if better_alone else best, tried, alone)


def _by_token(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    schemes: Sequence[Scheme],
    scales: Sequence[torch.Tensor],
) -> torch.Tensor:
    """What each token adds to the error with each scale, float64 [c, t]: ``d_t (d_t + mean d)``."""
    outputs, found = [x @ w.T for w in weights], []
    for scale in scales:
        s, total = scale.to(x), x.new_zeros(len(x))
        for w, y, scheme in zip(weights, outputs, schemes, strict=True):
            inputs, scaled = x / s, w * s
            if scheme.input is not None:
                inputs = scheme.input.dequantize(scheme.input.quantize(inputs), x.dtype)
            codes = scheme.weight.quantize_weight(scaled)
            wrong = inputs @ scheme.weight.dequantize(codes, x.dtype).T - y
            total += (wrong * (wrong + wrong.mean(0))).sum(1)
        found.append(total)
    errors = torch.stack(found).double()
    return errors.where(errors.isfinite(), torch.inf)


def _no_worse(by_token: torch.Tensor, least: int) -> torch.Tensor:
    """Whose error [c] is within a standard error of the least one's."""
    more = by_token - by_token[least]
    more[least] = 0.0  # also where it is infinite
    return more.sum(1) <= more.std(1, correction=0) * more.shape[1] ** 0.5


def _beside(errors: torch.Tensor) -> torch.Tensor:
    """The logarithms of errors [c], averaged with their neighbours'."""
    reach = len(NEIGHBOURS) // 2
    finite = torch.finfo(errors.dtype)
    logs = errors.clamp(finite.tiny, finite.max).log()
    padded = F.pad(logs[None], (reach, reach), mode="replicate")[0]
    return padded.unfold(0, len(NEIGHBOURS), 1) @ logs.new_tensor(NEIGHBOURS)
