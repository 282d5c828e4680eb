"""GPTQ: columns are rounded one after another, the rest of the row making up for the error.

Frantar et al. 2022, arXiv 2210.17323. For rows w and the damped Hessian H, with U the upper
Cholesky factor of its inverse (``H^-1 = U^T U``): column i is rounded to q_i, and every later
column j moves by ``-(w_i - q_i) U[i, j] / U[i, i]`` (equations 2 and 3 in the form of section 3.3).
Rows do not know of each other, so linears that share their inputs may be stacked by rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..affine import pack_codes, storage_dtype
from ..errors import InvalidOption, UnsolvableHessian
from ..scheme import Quantized, QuantSpec
from .gram import Gram, hessian_for
from .grid import Grid, check, group_size, quantized
from .objective import Solution, solution
from .rtn import RANGES, Ranges, choose_ranges

MOST_DAMPING = 1.0
"""Relative; with it no positive semidefinite Hessian can fail, so that a larger one is no remedy."""

ROWS_AT_ONCE = 1 << 28
"""Weights that are solved together. Large: each piece walks all columns, one by one."""


@torch.no_grad()
def solve(
    weight: torch.Tensor,
    spec: QuantSpec,
    gram: Gram | None = None,
    *,
    block_size: int = 128,
    damping: float = 0.01,
    act_order: bool = True,
    static_groups: bool | None = None,
    ranges: Ranges = "mse-diag",
    fallback: bool = True,
    layer: str = "weight",
) -> Solution:
    """Codes of ``weight`` [n, k] that keep its outputs on the data of ``gram`` [k, k].

    block_size: columns after which the rest of the row is brought up to date, at once; fitted to
        groups that are not static. The result is the same for any, up to rounding.
    damping: added to the diagonal, relative to its mean. Where the Cholesky factorization fails, it
        is raised tenfold up to MOST_DAMPING; the record has what was used.
    act_order: columns in the order of falling mean square of their inputs, otherwise as they stand.
    static_groups: qparams of all groups from the weight as it is, otherwise each group's from what
        the columns before have made of it. Default: as act_order says, which needs it: canonical
        groups are consecutive columns. Channels always have one range, that of the weight.
    ranges: how qparams are chosen, see ``rtn``.
    fallback: a row takes the codes of round-to-nearest (``rtn``, or those of ``ranges``), if these
        err less on the data or no more; the record counts the rows. So never worse than ``rtn``.

    Channels that were 0 in all tokens (dead) count as weights of 0: they get the code next to that,
    and no influence on ranges and other columns. Arithmetic is float32; float64 for a float64
    weight, and the Cholesky factor's for a float64 Gram.

    Raises UnsupportedDtype, UnsupportedSpec, InvalidBlockSize, InvalidOption, NonFiniteWeight,
    NoCalibrationData, ShapeMismatch, UnsolvableHessian.
    """
    static = act_order if static_groups is None else static_groups
    _check_options(spec, block_size, damping, act_order, static, ranges)
    weight = check(weight, spec, solver="gptq", layer=layer)
    hessian = hessian_for(gram, weight, solver="gptq", layer=layer)
    assert gram is not None
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    live = weight.masked_fill(dead, 0.0)
    order = diagonal.argsort(descending=True, stable=True) if act_order else None
    unit, used = _unit_factor(hessian, order, dead, damping, layer, gram.tokens)

    size = group_size(spec, weight.shape[1])
    static = static or size == weight.shape[1]
    qparams = choose_ranges(live, spec, ranges, diagonal) if static else None
    columns = torch.arange(weight.shape[1], device=weight.device) if order is None else order
    group = columns // size
    block = block_size if static else _fit(block_size, size)
    unit = unit.to(weight.dtype)
    rows = max(ROWS_AT_ONCE // weight.shape[1], 1)
    parts = []
    for start in range(0, len(live), rows):
        piece = live[start : start + rows]
        groups: _StaticGroups | _DynamicGroups
        if qparams is not None:
            scale, zero = (None if t is None else t[start : start + rows] for t in qparams)
            assert scale is not None
            groups = _StaticGroups(spec, scale, zero, group, weight.dtype)
        else:
            groups = _DynamicGroups(spec, size, ranges, diagonal)
        parts.append(_walk(piece, groups, unit, order, block))
    own = _joined(parts, spec)

    candidates = {"gptq": own}
    if fallback:
        candidates = {"rtn": spec.quantize_weight(weight)}
        if ranges != "minmax":
            best = qparams or choose_ranges(live, spec, ranges, diagonal)
            candidates[ranges] = quantized(weight, spec, *best)
        candidates["gptq"] = own
    return solution(
        "gptq",
        weight,
        spec,
        hessian,
        gram.tokens,
        candidates,
        choose=fallback,
        damping=used,
        dead=dead,
    )


def _check_options(
    spec: QuantSpec, block_size: int, damping: float, act_order: bool, static: bool, ranges: str
) -> None:
    if ranges not in RANGES:
        raise InvalidOption(name="ranges", value=ranges, expected=f"one of {', '.join(RANGES)}")
    if block_size < 1:
        raise InvalidOption(name="block_size", value=block_size, expected="1 or more columns")
    if not 0 < damping <= MOST_DAMPING:
        raise InvalidOption(name="damping", value=damping, expected=f"in (0, {MOST_DAMPING:g}]")
    if act_order and not static and spec.granularity == "group":
        raise InvalidOption(
            name="static_groups",
            value=static,
            expected="True with act_order: columns of a group are not solved one after another",
        )


def _fit(block_size: int, group: int) -> int:
    """The block size at most ``block_size`` at which a group begins or ends with every block.

    A group that begins within a block would find columns behind it that are not up to date.
    """
    if group <= block_size:
        return block_size // group * group
    return max(size for size in range(1, block_size + 1) if group % size == 0)


def _unit_factor(
    hessian: torch.Tensor,
    order: torch.Tensor | None,
    dead: torch.Tensor,
    damping: float,
    layer: str,
    tokens: int,
) -> tuple[torch.Tensor, float]:
    """U with its rows divided by their diagonal [k, k], columns in ``order``, and the damping used.

    ``H = R R^T`` with R upper triangular is the Cholesky factorization of H with both dimensions
    reversed. Then U is R^-1, with no inverse of H, nor a second factorization of that.
    """
    diagonal = hessian.diagonal()
    mean = diagonal.sum() / (~dead).sum().clamp(min=1)
    mean = torch.where(mean > 0, mean, 1.0)
    # A dead channel is apart from all others; any pivot will do, and one like theirs is none too far.
    diagonal = torch.where(dead, mean, diagonal)
    if order is not None:
        hessian, diagonal = hessian[order][:, order], diagonal[order]
    reversed_ = hessian.flip(0, 1)
    identity = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    while True:
        reversed_.diagonal().copy_((diagonal + damping * mean).flip(0))
        lower, info = torch.linalg.cholesky_ex(reversed_)
        factor = lower.flip(0, 1)
        factor /= factor.diagonal().clone()
        unit = torch.linalg.solve_triangular(factor, identity, upper=True, unitriangular=True)
        finite = torch.isfinite(unit).all()
        failed, finite_ = torch.stack([info, finite.to(info)]).tolist()
        if not failed and finite_:
            return unit, damping
        if damping >= MOST_DAMPING:
            reason = f"leading minor {failed} is not positive" if failed else "it is not finite"
            raise UnsolvableHessian(layer=layer, tokens=tokens, damping=damping, reason=reason)
        damping = min(damping * 10, MOST_DAMPING)


class _StaticGroups:
    """Grids known beforehand. Columns may come in any order."""

    def __init__(
        self,
        spec: QuantSpec,
        scale: torch.Tensor,
        zero: torch.Tensor | None,
        group: torch.Tensor,
        dtype: torch.dtype,
    ):
        self.spec, self.group, self.qparams = spec, group, (scale, zero)
        zero = None if zero is None else zero.T.contiguous()
        self.grid = Grid(spec, scale.T.contiguous(), zero, dtype)

    def grids(self, start: int, stop: int, weight: torch.Tensor) -> Iterator[Grid]:
        """Those of the columns from ``start`` to ``stop``; ``weight`` [k, n] is being solved."""
        return iter(self.grid[self.group[start:stop]].unbind())


class _DynamicGroups:
    """Each group's grid from the weights that its first column finds. Columns come as they stand."""

    def __init__(self, spec: QuantSpec, size: int, ranges: Ranges, importance: torch.Tensor):
        self.spec, self.size, self.ranges, self.importance = spec, size, ranges, importance
        self.found: list[tuple[torch.Tensor, torch.Tensor | None]] = []

    def grids(self, start: int, stop: int, weight: torch.Tensor) -> Iterator[Grid]:
        """Those of the columns from ``start`` to ``stop``, each made when its group is reached."""
        for column in range(start, stop):
            if column % self.size == 0:
                part = slice(column, column + self.size)
                columns, importance = weight[part].T.contiguous(), self.importance[part]
                scale, zero = choose_ranges(columns, self.spec, self.ranges, importance)
                self.found.append((scale, zero))
                first = None if zero is None else zero[:, 0]
                self.grid = Grid(self.spec, scale[:, 0], first, weight.dtype)
            yield self.grid

    @property
    def qparams(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        zeros = [zero for _, zero in self.found if zero is not None]
        scale = torch.cat([scale for scale, _ in self.found], 1)
        return scale, torch.cat(zeros, 1) if zeros else None


def _walk(
    weight: torch.Tensor,
    groups: _StaticGroups | _DynamicGroups,
    unit: torch.Tensor,
    order: torch.Tensor | None,
    block: int,
) -> Quantized:
    """Unpacked codes and qparams of some rows of ``weight`` [n, k]; ``unit`` is in ``order``."""
    # Transposed: a column lies in one piece.
    w = weight.T.clone(memory_format=torch.contiguous_format) if order is None else weight.T[order]
    codes = torch.empty_like(w, dtype=storage_dtype(groups.spec.dtype))
    for start in range(0, len(w), block):
        stop = min(start + block, len(w))
        errors = torch.empty_like(w[start:stop])
        # Views are made in one go: a column takes some ten launches, and the host must keep up.
        lines = zip(
            groups.grids(start, stop, w),
            w[start:stop].unbind(),
            codes[start:stop].unbind(),
            errors.unbind(),
            unit[start:stop, start:stop].unbind(),
            strict=True,
        )
        for i, (grid, column, code, error, factor) in enumerate(lines, 1):
            found = grid.round(column)
            code.copy_(found)
            torch.sub(column, grid.values(found), out=error)
            w[start + i : stop].addr_(factor[i:], error, alpha=-1)
        w[stop:].addmm_(unit[start:stop, stop:].T, errors, alpha=-1)
    if order is not None:
        codes = codes[order.argsort()]
    return Quantized(codes.T.contiguous(), *groups.qparams)


def _joined(parts: list[Quantized], spec: QuantSpec) -> Quantized:
    zeros = [part.zero for part in parts if part.zero is not None]
    return Quantized(
        pack_codes(torch.cat([part.codes for part in parts]), spec.dtype),
        torch.cat([part.scale for part in parts]),
        torch.cat(zeros) if zeros else None,
    )
