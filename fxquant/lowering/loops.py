"""Inductor: rows of activations quantized in the loops that it generates, behind the norm that made them.

The arithmetic of ``affine`` once more, in the ops of a loop. As ATen ops it was 17 to 37 nodes at every
linear, and Inductor took some 4 ms for each: its passes looked at it, lowered it, counted what it reads.
Here a result costs one loop, of the fewest ops that give the same bits: each is traced several times over.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch

from ..affine import code_range
from ..inductor import Pointwise, lower_to_loops, lowerings
from ..inductor import loop_ops as loop
from ..ops import spec_of
from ..scheme import QuantSpec
from .triton_quantize import SMALLEST, are_known

aten = torch.ops.aten
ops = torch.ops.fxquant
FLOAT = torch.float32
TAKEN = (torch.float16, torch.bfloat16, torch.float32)

Index = Sequence[Any]
Values = Callable[[Index], Any]
"""What a loop computes at an index."""


def are_rows(k: Any, dtype: torch.dtype, spec: QuantSpec) -> bool:
    """Whether the loops of ``fxquant.quantize`` are those of rows of ``k`` values for ``spec``; ``k`` may be
    symbolic."""
    empty = isinstance(k, int | sympy.Integer) and k == 0
    return spec.granularity == "token" and are_known(spec) and dtype in TAKEN and not empty


def is_static(
    shape: Sequence[Any],
    dtype: torch.dtype,
    qparams: Sequence[tuple[Any, torch.dtype]],
    spec: QuantSpec,
) -> bool:
    """Whether there is a loop of ``fxquant.quantize_static`` for rows of ``shape`` and ``qparams``, each a
    number of values and a dtype: the scale and, exactly where ``spec`` has one, a zero point."""
    if spec.granularity != "tensor" or not are_known(spec) or dtype not in TAKEN or not shape:
        return False
    right = len(qparams) == (1 if spec.zero_point_domain == "none" else 2)
    return right and qparams[0][1] != torch.float64 and all(count == 1 for count, _ in qparams)


def _number(value: float) -> Any:
    return loop.constant(float(value), FLOAT)


def _floats(box: Any) -> Values:
    """The values of ``box`` in float32."""
    load, dtype = box.make_loader(), box.get_dtype()
    if dtype == FLOAT:
        return load
    return lambda index: loop.to_dtype(load(index), FLOAT, src_dtype=dtype)


def _new(like: Any, size: Sequence[Any], dtype: torch.dtype, values: Values) -> Any:
    return Pointwise.create(
        device=like.get_device(), dtype=dtype, inner_fn=values, ranges=list(size)
    )


def _kept(like: Any, dtype: torch.dtype, values: Values) -> Any:
    """One value of each row, in a buffer: else the codes' loop, and all others, would compute it again."""
    found = _new(like, [*like.get_size()[:-1], 1], dtype, values)
    found.realize()
    return found


def _scale(x: Any, radius: Values, half: float) -> Any:
    """Of rows whose values lie within ``radius``, for codes within ``half``."""
    # a GPU divides by a constant through its reciprocal, in torch as in Inductor
    on_cpu = x.get_device().type == "cpu"

    def values(row: Index) -> Any:
        r = radius(row)
        step = loop.truediv(r, _number(half)) if on_cpu else loop.mul(r, _number(1 / half))
        step = loop.where(loop.eq(r, _number(0)), _number(1), step)
        step = loop.maximum(step, _number(SMALLEST))  # none is too large: half is above 1
        return loop.where(loop.lt(r, _number(math.inf)), step, _number(math.nan))

    return _kept(x, FLOAT, values)


def _half_of_range(low: Values, high: Values) -> Values:
    """Of the range of a row, 0 included, without its overflow."""

    def values(row: Index) -> Any:
        nothing, half = _number(0), _number(0.5)
        first, last = loop.minimum(low(row), nothing), loop.maximum(high(row), nothing)
        return loop.sub(loop.mul(last, half), loop.mul(first, half))

    return values


def _zero(x: Any, low: Values, scale: Values, dtype: torch.dtype) -> Any:
    """``low``: the smallest value, clamped to 0 by what clamps the zero point."""
    qmin, qmax = code_range(dtype)

    def values(row: Index) -> Any:
        first = _number(qmin)
        found = loop.sub(first, loop.round(loop.truediv(low(row), scale(row))))
        found = loop.minimum(loop.maximum(found, first), _number(qmax))
        found = loop.where(loop.isnan(found), _number(0), found)
        return loop.to_dtype(found, torch.int32, src_dtype=FLOAT)

    return _kept(x, torch.int32, values)


def _codes(x: Any, scale: Values, zero: Values | None, dtype: torch.dtype) -> Any:
    """``scale`` and ``zero``: at any index of ``x``."""
    qmin, qmax = code_range(dtype)
    real = _floats(x)

    def values(index: Index) -> Any:
        if dtype.is_floating_point:
            found = loop.truediv(real(index), scale(index))
        else:
            found = loop.round(loop.mul(real(index), loop.reciprocal(scale(index))))
            center = _number(0)
            if zero is not None:
                center = zero(index)
                found = loop.add(found, center)
            found = loop.where(loop.isnan(found), center, found)
        found = loop.minimum(loop.maximum(found, _number(qmin)), _number(qmax))
        return loop.to_dtype(found, dtype, src_dtype=FLOAT)

    return _new(x, x.get_size(), dtype, values)


def _quantized(x: Any, spec: QuantSpec) -> list[Any]:
    qmin, qmax = code_range(spec.dtype)
    half = (qmax - qmin) / 2
    if spec.mapping == "asymmetric":
        x.mark_reuse(3)  # one user reads it that many times
        low, high = (_floats(lowerings[end](x, [-1], True)) for end in (aten.amin, aten.amax))
        scale = _scale(x, _half_of_range(low, high), half)
        zero = _zero(x, low, _floats(scale), spec.dtype)
        return [_codes(x, _by_row(scale), _by_row(zero), spec.dtype), scale, zero]
    x.mark_reuse(2)
    load = x.make_loader()
    signless = _new(x, x.get_size(), x.get_dtype(), lambda index: loop.abs(load(index)))
    scale = _scale(x, _floats(lowerings[aten.amax](signless, [-1], True)), half)
    return [_codes(x, _by_row(scale), None, spec.dtype), scale]


def _by_row(qparam: Any) -> Values:
    values = _floats(qparam)
    return lambda index: values([*index[:-1], 0])


def _everywhere(qparam: Any) -> Values:
    values, rank = _floats(qparam), len(qparam.get_size())
    return lambda index: values([0] * rank)


def _quantize(x: Any, scheme: str, role: str, gate: str = "") -> list[Any] | None:
    spec, shape = spec_of(scheme, role), x.get_size()
    if role != "input" or gate or not shape or not are_rows(shape[-1], x.get_dtype(), spec):
        return None
    return _quantized(x, spec)


def _quantize_static(x: Any, scale: Any, zero: Any, scheme: str) -> Any | None:
    spec = spec_of(scheme, "input")
    qparams = [(q.get_numel(), q.get_dtype()) for q in (scale, zero) if q is not None]
    if not is_static(x.get_size(), x.get_dtype(), qparams, spec):
        return None
    center = None if zero is None else _everywhere(zero)
    return _codes(x, _everywhere(scale), center, spec.dtype)


lower_to_loops(ops.quantize.default, _quantize)
lower_to_loops(ops.quantize_static.default, _quantize_static)
