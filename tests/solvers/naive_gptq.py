"""The algorithm of arXiv 2210.17323 as published: float64, one column at a time, explicit inverse.

Nothing of fxquant is used but the fields of QuantSpec; ranges are min-max, written out again.
"""

from __future__ import annotations

import torch

from fxquant.scheme import QuantSpec


def qparams(block: torch.Tensor, spec: QuantSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """scale and zero [n] of the rows of ``block`` [n, size]; a zero of 0 where there is none."""
    bottom, top = ends(spec)
    low, high = block.min(1).values, block.max(1).values
    if spec.mapping == "asymmetric":
        if spec.zero_point_domain == "int":
            low, high = low.clamp(max=0), high.clamp(min=0)
        scale = (high - low) / (top - bottom)
    elif spec.mapping == "symmetric_no_clipping_err":
        scale = torch.maximum(low / bottom, high / top)
    else:
        scale = torch.maximum(-low, high) / ((top - bottom) / 2)
    scale = torch.where(scale == 0, 1.0, scale).to(spec.scale_dtype).double()
    zero = torch.zeros_like(scale)
    if spec.zero_point_domain == "int":
        zero = (bottom - torch.round(low / scale)).clamp(bottom, top)
    elif spec.zero_point_domain == "float":
        zero = (low + scale * (middle_of(spec) - bottom)).to(spec.scale_dtype).double()
    return scale, zero


def ends(spec: QuantSpec) -> tuple[int, int]:
    if spec.dtype.is_floating_point:
        return -448, 448
    if str(spec.dtype).startswith("torch.u"):
        return 0, 2**spec.bits - 1
    return -(2 ** (spec.bits - 1)), 2 ** (spec.bits - 1) - 1


def middle_of(spec: QuantSpec) -> int:
    return (ends(spec)[0] + ends(spec)[1] + 1) // 2


def nearest(
    column: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, spec: QuantSpec
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of a column [n] and their values."""
    bottom, top = ends(spec)
    if spec.dtype.is_floating_point:
        codes = (column / scale).clamp(bottom, top).float().to(spec.dtype).double()
        return codes, codes * scale
    if spec.zero_point_domain == "float":
        middle = middle_of(spec)
        codes = torch.round((column - zero) / scale + middle).clamp(bottom, top)
        return codes, (codes - middle) * scale + zero
    codes = (torch.round(column / scale) + zero).clamp(bottom, top)
    return codes, (codes - zero) * scale


def gptq(
    weight: torch.Tensor,
    spec: QuantSpec,
    hessian: torch.Tensor,
    damping: float,
    act_order: bool,
    static_groups: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """codes [n, k], scale and zero [n, groups], all float64."""
    w, hessian = weight.double().clone(), hessian.double().clone()
    n, k = w.shape
    size = spec.group_size or k
    diagonal = hessian.diagonal().clone()
    dead = diagonal == 0
    w[:, dead] = 0
    hessian += damping * diagonal[~dead].mean() * torch.eye(k)
    order = torch.argsort(diagonal, descending=True, stable=True) if act_order else torch.arange(k)
    scale = torch.zeros(n, k // size, dtype=torch.float64)
    zero = torch.zeros(n, k // size, dtype=torch.float64)
    if static_groups or size == k:
        for group in range(k // size):
            scale[:, group], zero[:, group] = qparams(w[:, group * size : (group + 1) * size], spec)
    w = w[:, order]
    inverse = torch.linalg.inv(hessian[order][:, order])
    codes = torch.zeros(n, k, dtype=torch.float64)
    for i in range(k):
        group = int(order[i]) // size
        if i % size == 0 and not (static_groups or size == k):
            scale[:, group], zero[:, group] = qparams(w[:, i : i + size], spec)
        codes[:, order[i]], value = nearest(w[:, i], scale[:, group], zero[:, group], spec)
        error = (w[:, i] - value) / inverse[i, i]
        w[:, i + 1 :] -= error[:, None] * inverse[i, i + 1 :]
        inverse = inverse - inverse[:, i : i + 1] * inverse[i : i + 1] / inverse[i, i]
    return codes, scale, zero
