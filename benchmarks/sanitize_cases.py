"""The cases of sanitize.py: each the smallest problem that meets every edge of a kernel.

Rows and columns fill no tile, k is long enough that each pipeline goes round, and a block that walks
over tiles has several. Every way to cut a kernel has its own: mma or wgmma, k split over a cluster or
not, groups that multiply alone or beside others. Inputs are made on the CPU, so that no other
kernels run.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import handshake
import torch

from fxquant import tuner
from fxquant.lowering import (
    candidates,
    cuda_cuts,
    cuda_layout,
    cuda_pipeline,
    cuda_prefill,
    triton_prefill,
    triton_quantize,
    triton_widen,
)
from fxquant.lowering.cuda_cuts import Cut
from fxquant.lowering.cuda_layout import Format
from fxquant.lowering.cuda_shapes import Shape
from fxquant.lowering.dispatch import prequantized
from fxquant.lowering.hopper import MULTIPROCESSORS
from fxquant.lowering.kernel import KERNELS
from fxquant.ops import bundle, finish
from fxquant.scheme import Quantized, Scheme, get_scheme

STREAM = {
    "cuda_w4a16": ("int4wo-64", "int4wo-128-sym", "int2wo-32"),
    "cuda_w8a16": ("int8wo", "fp8wo"),
    "cuda_w4a8": ("8da4w-32", "8da4w-128"),
    "cuda_w8a8": ("int8dq", "fp8dq"),
}
PIPELINE = {
    "cuda_pipeline": (*STREAM["cuda_w4a16"], *STREAM["cuda_w8a16"]),
    "cuda_pipeline_w4a8": STREAM["cuda_w4a8"],
    "cuda_pipeline_w4a8_widened": ("8da4w-32",),
    "cuda_pipeline_w8a8": STREAM["cuda_w8a8"],
}
STREAM_ROWS, STREAM_N, STREAM_K = (1, 13, 70), 152, 4096
PIPELINE_ROWS, PIPELINE_N = 130, 280
DEQUANTIZED = ("int4wo-64", "int2wo-32", "int8wo", "fp8wo", "8da4w-32")
TRITON = (
    ("triton_w8a8", "int8dq"),
    ("triton_fp8", "fp8dq"),
    ("triton_w8a8_persistent", "int8dq"),
    ("triton_fp8_persistent", "fp8dq"),
    ("triton_w4a16", "int4wo-64"),
    ("triton_w4a8", "8da4w-32"),
    ("triton_w8a16", "int8wo"),
    ("triton_wf8a16", "fp8wo"),
)
QUANTIZED = ("int8dq", "8da4w-32", "fp8dq")
WIDENERS = ("quantize_rows_widened", "widen")
FEW = 2
"""Multiprocessors that kernels think they have whose programs walk over tiles."""


@dataclass(frozen=True)
class Case:
    """One launch. ``cut``: how a kernel of ``tuner.CUTTERS`` is cut; ``units``: multiprocessors that it
    thinks it has; ``coded``: one row comes as codes to a kernel that would quantize it."""

    kernel: str
    scheme: str
    rows: int
    n: int
    k: int
    cut: Shape | Cut | None = None
    units: int = FEW
    coded: bool = False

    @property
    def name(self) -> str:
        cut = "" if self.cut is None else " cut " + "-".join(map(str, self.cut))
        codes = " codes" if self.coded else ""
        return f"{self.kernel} {self.scheme} {self.rows}x{self.n}x{self.k}{cut}{codes}"


def cases() -> list[Case]:
    found = [
        Case(kernel, scheme, rows, STREAM_N, STREAM_K, cut)
        for kernel, schemes in STREAM.items()
        for scheme in schemes
        for rows in STREAM_ROWS
        for cut in stream_kinds(scheme, rows)
    ]
    found += [
        replace(case, coded=True)
        for case in found
        if tuner.CUTTERS[case.kernel].quantizes(get_scheme(case.scheme), case.rows)
    ]
    for kernel, schemes in PIPELINE.items():
        for scheme, cut in ((s, cut) for s in schemes for cut in pipeline_kinds(kernel, s)):
            # rows of y that end on 16 bytes, and others; split, all tiles at once
            n = PIPELINE_N + 3 * (cut.tokens > 64)
            units = FEW if cut.splits == 1 else MULTIPROCESSORS
            found.append(Case(kernel, scheme, PIPELINE_ROWS, n, STREAM_K, cut, units))
            if cut.splits > 1:  # five tiles for a cluster of four blocks, the last is shared
                few = (cut.tokens - 5, 5 * cut.rows - 37)
                found.append(Case(kernel, scheme, *few, STREAM_K, cut))
    found += [Case("cuda_dequantize", scheme, 0, STREAM_N, 256) for scheme in DEQUANTIZED]
    for scheme in QUANTIZED:  # n: the width of what is read, two halves where a gate joins them
        found += [Case("quantize_rows", scheme, 13, width, 1000) for width in (1000, 2000)]
        found.append(Case("quantize_rows", scheme, 13, 1100, 1100))  # in two parts
    found += [Case(kernel, "8da4w-32", 13, 992, 992) for kernel in WIDENERS]
    for kernel, scheme in TRITON:
        n = 600 if kernel.endswith("persistent") else STREAM_N
        found += [Case(kernel, scheme, 13, n, 1088), Case(kernel, scheme, 130, n, 1024)]
    return found


def names_of(part: str) -> list[str]:
    """The names of all cases that have ``part`` in them."""
    return [case.name for case in cases() if part in case.name]


def stream_kinds(scheme: str, rows: int) -> list[Shape]:
    """Cuts for this many rows, with and without wgmma and fixed-point numbers: one that splits k neither over
    warps nor over a cluster, one that does both; of each kind that with the shortest pipeline."""
    cuts = candidates.stream_cuts(get_scheme(scheme), STREAM_N, STREAM_K, rows)
    cuts = [c for c in cuts if (c.warps_k > 1) == (c.splits > 1)]
    cuts.sort(key=lambda c: (c.stages * c.step * c.warps_k * c.splits, c.tokens), reverse=True)
    return list({(c.warpgroup, c.splits > 1, c.fixed): c for c in cuts}.values())


def pipeline_kinds(kernel: str, scheme: str) -> list[Cut]:
    """Cuts with k split over a cluster or not: one group that multiplies few tokens, several that
    multiply many; of each kind that with the shortest ring."""
    _, form = tuner.CUTTERS[kernel].types(get_scheme(scheme))
    cuts = cuda_cuts.cuts(form, PIPELINE_N, STREAM_K, PIPELINE_ROWS, (64, 128))
    cuts = [c for c in cuts if (c.warpgroups > 1) == (c.tokens > 64) and c.splits in (1, 4)]
    cuts.sort(key=lambda c: (c.stages * c.step, c.tokens), reverse=True)
    return list({(c.tokens > 64, c.splits > 1): c for c in cuts}.values())


EVERY_LANE = "FXQUANT_EVERY_LANE"
"""Set for racecheck, which follows an arrival at a barrier for the lane that makes it, and does not see that
``__syncwarp`` has brought the others there: it took every read of a stage of the ring for a race with the
copy engine's next write. Under it each lane arrives itself; nothing else of the kernel differs."""

ARRIVALS = (
    ("if (lane == 0) barrier_arrive(empty", "barrier_arrive(empty"),
    ("barrier_init(empty + 8 * i, WARPS_N)", "barrier_init(empty + 8 * i, 32 * WARPS_N)"),
)


def let_every_lane_arrive() -> None:
    """For the rest of this process."""
    plain = cuda_pipeline.source

    def source(form: Format, cut: Cut, half: bool) -> str:
        text = plain(form, cut, half)
        for one, other in ARRIVALS:
            assert text.count(one) == 1, f"pipeline.cu has changed: {one}"
            text = text.replace(one, other)
        return text

    cuda_pipeline.source = source


def build(todo: Sequence[Case]) -> None:
    """Compile the kernels that are cut at once; the cache keeps them for the runs that are checked."""

    def one(case: Case) -> None:
        cutter = tuner.CUTTERS[case.kernel]
        x, form = cutter.types(get_scheme(case.scheme), None if case.coded else case.cut)
        cutter.compiled(form, case.cut, x, torch.bfloat16, None, "", 0)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(one, (case for case in todo if case.cut is not None)))


def on_gpu(tensors: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    return [None if t is None else t.cuda() for t in tensors]


def run(case: Case) -> tuple[float, list[str]]:
    """The largest error of the case in units of its allowance, and the places of a handshake."""
    from tests import oracles

    scheme, n, k = get_scheme(case.scheme), case.n, case.k
    if case.kernel == "quantize_rows":
        return quantized(scheme, case.rows, n, k), []
    if case.kernel in WIDENERS:
        return widened(scheme, case.rows, k, case.kernel == "widen"), []
    sample = oracles.random_sample(scheme, case.rows, n, k, torch.bfloat16)
    kernel = KERNELS[case.kernel]
    packed: Any = on_gpu(kernel.layout.pack(scheme, sample.weight))
    if case.kernel == "cuda_dequantize":
        return dequantized(scheme, sample.weight, packed, n, k), []
    x, codes = sample.x.cuda(), []
    if scheme.input is not None:
        q = scheme.input.quantize(sample.x)
        codes = on_gpu((q.codes, q.scale.float(), q.zero))
    kept = handshake.Kept(triton_prefill.persistent_linear_kernel)
    few = {"multiprocessors": lambda device: FEW, "persistent_linear_kernel": kept}
    row = {"device_row": lambda device: SimpleNamespace(units=case.units)}
    with mock.patch.multiple(triton_prefill, **few), mock.patch.multiple(cuda_pipeline, **row):
        if case.cut is None:
            y = kernel.compute(prequantized(scheme, codes), x, packed, None, "")
        else:
            cutter = tuner.CUTTERS[case.kernel]
            x, scale, zero = (
                codes if case.coded else cutter.operands(prequantized(scheme, codes), x)
            )
            y = cutter.run(scheme, case.cut, x, scale, zero, packed, None, n, "", torch.bfloat16)
    return oracles.bound_ratio(sample, y.cpu()).max().item(), kept.places()


def dequantized(scheme: Scheme, q: Quantized, packed: Any, n: int, k: int) -> float:
    """cuda_dequantize's own kernel in two slabs, the second with a broken tile."""
    form, first = cuda_layout.format_of(scheme), cuda_layout.TILE
    found = []
    for start, rows in ((0, first), (first, n - first)):
        out = torch.empty(rows, k, dtype=torch.bfloat16, device="cuda")
        cuda_prefill.dequantize_tiles(form, *packed, n, k, start // first, out)
        found.append(out.cpu().double())
    expected = scheme.weight.dequantize(q, torch.float64).abs()
    allowed = 1.01 * 2.0**-8 * expected + 2.0**-20 * expected.max()  # one rounding to bfloat16
    difference = torch.cat(found) - scheme.weight.dequantize(q, torch.float64)
    return (difference.abs() / allowed).max().item()


def quantized(scheme: Scheme, rows: int, width: int, k: int) -> float:
    """quantize_rows, of rows as they are or of what a gate makes of their halves."""
    spec, gate = scheme.input, "silu_mul" if width > k else ""
    assert spec is not None
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(k)).bfloat16()
    found = [t.cpu() for t in triton_quantize.quantize_rows(x.cuda(), scheme.name, gate)]
    exact = finish(x.double(), gate)
    step = found[1].double()  # of float8's numbers the largest are 32 apart, of 448
    allowed = step * (16 if spec.dtype.is_floating_point else 1) + 2.0**-7 * exact.abs()
    return ((spec.dequantize(bundle(found), torch.float64) - exact).abs() / allowed).max().item()


def widened(scheme: Scheme, rows: int, k: int, apart: bool) -> float:
    """Integers in the lanes' order, in steps of one: by a kernel of their own, or as rows are quantized."""
    spec = scheme.input
    assert spec is not None
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(k)).bfloat16()
    q = spec.quantize(x)
    expected = triton_widen.widen(q.codes, q.zero)
    if apart:
        found = torch.ops.fxquant.widen(q.codes.cuda(), q.zero.cuda())
    else:
        found, _ = triton_quantize.quantize_rows(x.cuda(), scheme.name, "", True)
    return (found.cpu() - expected).abs().max().item()
