"""Which of some scales for the inputs of linears lets their outputs err least, activations included.

Xiao et al. 2023 (arXiv 2211.10438) leave the strength of smoothing to be found by a search. Here the
outputs on a sample of inputs decide: with scales s the linear computes ``Q(x / s) Q(W s)^T``, as its
scheme quantizes both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..errors import ShapeMismatch
from ..scheme import Scheme


class LeastError(NamedTuple):
    """best: the index of the best candidate, the first of equals. errors: of each, squared."""

    best: int
    errors: list[float]


@torch.no_grad()
def least_error(
    rows: torch.Tensor,
    weights: Sequence[torch.Tensor],
    schemes: Sequence[Scheme],
    candidates: Sequence[torch.Tensor],
) -> LeastError:
    """The best of ``candidates`` [k] for linears that share their inputs.

    rows: [t, k], a sample of the inputs before any scaling. weights: [n_i, k] each, of any floating
    dtype; schemes: of each. Errors are sums over tokens, outputs and linears, computed in float32 (float64
    for float64 weights). A candidate that overflows errs infinitely. Raises ShapeMismatch.
    """
    k = weights[0].shape[1]
    if rows.dim() != 2 or rows.shape[1] != k:
        raise ShapeMismatch(what="rows", found=tuple(rows.shape), expected=f"(tokens, {k})")
    wide = [w if w.dtype == torch.float64 else w.float() for w in weights]
    x = rows.to(wide[0])
    outputs = [x @ w.T for w in wide]
    errors = []
    for scale in candidates:
        s, total = scale.to(x), x.new_zeros(())
        for w, y, scheme in zip(wide, outputs, schemes, strict=True):
            inputs, scaled = x / s, w * s
            if scheme.input is not None:
                inputs = scheme.input.dequantize(scheme.input.quantize(inputs), x.dtype)
            codes = scheme.weight.quantize_weight(scaled)
            found = inputs @ scheme.weight.dequantize(codes, x.dtype).T
            total += (found - y).square_().sum()
        errors.append(total)
    figures = torch.stack(errors).double().nan_to_num(nan=torch.inf)
    return LeastError(int(figures.argmin()), figures.tolist())
