"""tune(): measure the kernels on a model's own shapes, and keep the result for this machine.

For each (scheme, n, k) and each range of rows the kernels of the layer's layout are timed, and
those of ``CUTTERS`` under each way to cut their blocks. The fastest go to the user's table
(``lowering/tuning.py``), which every later compile reads.
"""

from __future__ import annotations

import datetime
import itertools
import json
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

from .backend import linears_of
from .errors import InvalidOption
from .lowering import cuda_cuts, cuda_layout, cuda_pipeline, cuda_shapes, cuda_stream
from .lowering.candidates import pipeline_cuts, stream_cuts
from .lowering.cuda_layout import Format
from .lowering.devices import device_row
from .lowering.dispatch import prequantized, run_kernel
from .lowering.kernel import KERNELS, Problem
from .lowering.select import FALLBACK, select
from .lowering.tuning import SECTIONS, forget, key, user_table
from .measure import alternating, copies
from .scheme import Scheme, get_scheme

ROWS = (1, 8, 16, 32, 64, 128, 256, 512, 2048, 4096)
"""A reading at one of these stands for the rows above the one before it."""


@dataclass(frozen=True)
class Cutter:
    """A kernel family whose blocks can be cut: where its tuned cuts lie, which are worth a reading for
    (scheme, n, k, rows), which is picked on a device, what compiles and what runs one, the form that takes
    activations of a type; up to how many rows it quantizes itself, and whether their codes come widened."""

    section: str
    cuts: Callable[[Scheme, int, int, int], Sequence[Any]]
    pick: Callable[[Scheme, int, int, int, str], Any]
    compiled: Callable[..., Any]
    run: Callable[..., torch.Tensor]
    taking: Callable[[Format, torch.dtype], Format]
    own_rows: int = 0
    widened: bool = False

    def quantizes(self, scheme: Scheme, rows: int) -> bool:
        """Whether the kernel quantizes so many rows itself."""
        return scheme.input is not None and rows <= self.own_rows

    def types(self, scheme: Scheme, cut: Any = None) -> tuple[torch.dtype, Format]:
        """What activations come as, at a cut for few rows maybe, and the format that takes them."""
        form, spec = cuda_layout.format_of(scheme), scheme.input
        own = cut is not None and self.quantizes(scheme, cut.tokens)
        x = torch.bfloat16 if spec is None or own or self.widened else spec.codes_dtype
        return x, self.taking(form, x)

    def operands(self, scheme: Scheme, x: torch.Tensor) -> tuple[torch.Tensor, Any, Any]:
        """Activations as ``run`` takes them, with their scale and zero point."""
        if scheme.input is None or self.quantizes(scheme, x.shape[0]):
            return x, None, None
        q = scheme.input.quantize(x)
        scale, zero = (cuda_stream.of_rows(t, x.shape[0]) for t in (q.scale, q.zero))
        if self.widened:
            return torch.ops.fxquant.widen(q.codes, q.zero), scale, None
        return q.codes, scale, zero


_STREAM = Cutter(
    section="shapes",
    cuts=stream_cuts,
    pick=cuda_shapes.shape_for,
    compiled=cuda_stream.compiled,
    run=cuda_stream.run,
    taking=cuda_stream.quantizing,
    own_rows=1,
)
_PIPELINE = Cutter(
    section="pipelines",
    cuts=pipeline_cuts,
    pick=cuda_cuts.cut_for,
    compiled=cuda_pipeline.compiled,
    run=cuda_pipeline.run,
    taking=Format.taking,
)
_WIDENED = replace(
    _PIPELINE,
    section="widened",
    cuts=partial(pipeline_cuts, widened=True),
    pick=cuda_cuts.widened_cut_for,
    widened=True,
)
CUTTERS = {
    **dict.fromkeys(("cuda_w4a16", "cuda_w8a16", "cuda_w4a8", "cuda_w8a8"), _STREAM),
    **dict.fromkeys(("cuda_pipeline", "cuda_pipeline_w4a8", "cuda_pipeline_w8a8"), _PIPELINE),
    "cuda_pipeline_w4a8_widened": _WIDENED,
}


def build(cutter: Cutter, scheme: Scheme, shapes: Iterable[Any], device: torch.device) -> None:
    """Compile all these cuts at once: the compiler leaves Python's lock to others. Raises BuildFailed."""

    def compile(shape: Any) -> None:
        x, form = cutter.types(scheme, shape)
        cutter.compiled(form, shape, x, torch.bfloat16, None, "", device.index)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile, shapes))


@dataclass(frozen=True)
class Reading:
    """One measurement: seconds for a linear, bfloat16's beside it."""

    scheme: str
    n: int
    k: int
    rows: int
    kernel: str
    shape: tuple[int, ...] | None
    seconds: float
    bfloat16: float


Run = Callable[[Sequence[torch.Tensor]], torch.Tensor]
"""A linear on a packed weight."""


class _Subject:
    """One weight, packed and repeated past the cache, and its activations."""

    def __init__(self, scheme: Scheme, n: int, k: int, device: torch.device):
        self.scheme, self.n, self.k, self.device = scheme, n, k, device
        problem = Problem(
            scheme=scheme, n=n, k=k, m=None, dtype=torch.bfloat16, bias=False,
            device=device_row(device),
        )  # fmt: skip
        self.problem, self.layout = problem, select(problem).layout
        generator = torch.Generator(device).manual_seed(0)
        weight = torch.randn(n, k, device=device, generator=generator) * k**-0.5
        self.packs = copies(self.layout.pack(scheme, scheme.weight.quantize_weight(weight)))
        self.float = copies([weight.bfloat16()])

    def kernels(self, rows: int) -> list[str]:
        """Those of the layout which can serve; the fallback only where nothing else can."""
        at = replace(self.problem, m=rows)
        names = [
            k.name
            for k in KERNELS.values()
            if k.layout.name == self.layout.name and k.refusal(at) is None
        ]
        return [n for n in names if n != FALLBACK] or names

    def read(self, rows: int, emit: Callable[[Reading], None]) -> None:
        """All that can serve this many rows, and bfloat16, in turns. Activations are quantized beforehand; if
        one kernel does that itself, the others' times have it too."""
        x = torch.randn(rows, self.k, device=self.device, dtype=torch.bfloat16)
        with torch.no_grad():
            names = self.kernels(rows)
            cutters = {name: CUTTERS[name] for name in names if name in CUTTERS}
            own = [name for name, c in cutters.items() if c.quantizes(self.scheme, rows)]
            runs = [run for name in names for run in self.runs(name, rows, x)]
            runs = [
                (
                    name,
                    cut,
                    partial(self.after_quantization, x, run) if own and name not in own else run,
                )
                for name, cut, run in runs
            ]
            calls = [[partial(run, packed) for packed in self.packs] for _, _, run in runs]
            floats = [partial(F.linear, x, w) for (w,) in self.float]
            *times, base = alternating([*calls, floats], span=1e-3, rounds=7)
        for (name, shape, _), took in zip(runs, times, strict=True):
            emit(Reading(self.scheme.name, self.n, self.k, rows, name, shape, took, base))

    def runs(self, name: str, rows: int, x: torch.Tensor) -> list[tuple[str, Any, Run]]:
        """(kernel, its cut or None, what runs it on a packed weight), built."""
        cutter = CUTTERS.get(name)
        if cutter is None:
            return [(name, None, self.other(name, x))]
        operands = cutter.operands(self.scheme, x)
        shapes = cutter.cuts(self.scheme, self.n, self.k, rows)
        build(cutter, self.scheme, shapes, self.device)
        return [(name, shape, partial(self.cut, cutter, shape, *operands)) for shape in shapes]

    def after_quantization(self, x: torch.Tensor, run: Run, packed: Sequence[torch.Tensor]):
        """A run on codes that were made before, and what making them takes."""
        torch.ops.fxquant.quantize_rows(x, self.scheme.name)
        return run(packed)

    def cut(self, cutter, shape, x, scale, zero, packed) -> torch.Tensor:
        return cutter.run(
            self.scheme, shape, x, scale, zero, packed, None, self.n, "", torch.bfloat16
        )

    def other(self, name: str, x: torch.Tensor) -> Callable[[Sequence[torch.Tensor]], Any]:
        codes = [] if self.scheme.input is None else self.scheme.input.quantize(x)
        row, layout, n = self.scheme, self.layout.name, self.n

        def product(codes: Sequence[torch.Tensor], packed: Sequence[torch.Tensor]) -> torch.Tensor:
            return run_kernel(name, prequantized(row, codes), layout, x, packed, None, "", n)

        if name in COMPOSED:
            product = torch.compile(product)
        return lambda packed: product([t for t in codes if t is not None], packed)


COMPOSED = frozenset({"dequantize", "int_mm", "cuda_dequantize_w4a8"})
"""Kernels that are several torch ops: in a graph Inductor fuses what is around the product."""


def best(readings: Iterable[Reading]) -> dict[str, dict[str, list[Any]]]:
    """The table of the fastest: kernels and cuts by scheme and shape, in order of rows."""
    table: dict[str, dict[str, list[Any]]] = {section: {} for section in SECTIONS}
    ordered = sorted(readings, key=lambda r: (r.scheme, r.n, r.k, r.rows, r.seconds))
    for (scheme, n, k), group in itertools.groupby(ordered, lambda r: (r.scheme, r.n, r.k)):
        kernels: list[Any] = []
        first, speeds = 0, table["speeds"].setdefault(key(scheme, n, k), [])
        for rows, found in itertools.groupby(group, lambda r: r.rows):
            fastest = list(found)
            if get_scheme(scheme).input is None:  # else its quantization may not be in the reading
                speeds.append([rows, round(fastest[0].bfloat16 / fastest[0].seconds, 2)])
            if not kernels or kernels[-1][0] != fastest[0].kernel:
                kernels.append([fastest[0].kernel, first])
            for section in sorted({c.section for c in CUTTERS.values()}):
                cuts = table[section].setdefault(key(scheme, n, k), [])
                cut = next((list(r.shape or ()) for r in fastest if _section(r) == section), None)
                if cut and (not cuts or cuts[-1][1] != cut):
                    cuts.append([first, cut])
            first = rows + 1
        table["kernels"][key(scheme, n, k)] = kernels
    return {name: {k: v for k, v in section.items() if v} for name, section in table.items()}


def _section(reading: Reading) -> str | None:
    return None if reading.shape is None else CUTTERS[reading.kernel].section


def measure(
    problems: Iterable[tuple[str, int, int]],
    device: torch.device,
    rows: Sequence[int] = ROWS,
    progress: bool = True,
) -> list[Reading]:
    """Readings for every (scheme, n, k)."""
    readings: list[Reading] = []
    for scheme, n, k in tqdm(list(problems), desc="tune", disable=not progress):
        subject = _Subject(get_scheme(scheme), n, k, device)
        for count in rows:
            subject.read(count, readings.append)
        del subject
        torch.cuda.empty_cache()
    return readings


def tune(
    model: nn.Module | Iterable[tuple[int, int]],
    scheme: str,
    *,
    rows: Sequence[int] = ROWS,
    device: torch.device | str = "cuda",
    path: Path | None = None,
    progress: bool = True,
) -> list[Reading]:
    """Measure ``scheme`` on every linear shape of ``model``; later compiles use what was fastest.

    model: a module, or (out_features, in_features) pairs. rows: at which numbers of rows to measure.
    path: the table to update; by default the user's own for this device. Returns all readings.
    Raises InvalidOption where there is no GPU to measure.
    """
    device = torch.device(device)
    if device.type != "cuda" or not torch.cuda.is_available():
        raise InvalidOption(
            name="device", value=str(device), expected="a CUDA device of this machine"
        )
    if device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    shapes = (
        sorted({(layer.out_features, layer.in_features) for layer in linears_of([model])})
        if isinstance(model, nn.Module)
        else list(model)
    )
    name = get_scheme(scheme).product.name
    readings = measure([(name, n, k) for n, k in shapes], device, rows, progress)
    save(best(readings), path or user_table(device_row(device).name))
    forget()
    return readings


def summary(readings: Iterable[Reading]) -> str:
    """The fastest for each scheme, shape and number of rows, beside bfloat16."""
    fastest: dict[tuple[str, int, int, int], Reading] = {}
    for r in readings:
        at = (r.scheme, r.n, r.k, r.rows)
        if at not in fastest or r.seconds < fastest[at].seconds:
            fastest[at] = r
    lines = [
        (r.scheme, f"{r.n}x{r.k}", r.rows, r.kernel, r.shape and " ".join(map(str, r.shape)),
         f"{r.seconds * 1e6:.1f}", f"{r.bfloat16 / r.seconds:.2f}")
        for r in fastest.values()
    ]  # fmt: skip
    headers = ("scheme", "shape", "rows", "kernel", "cut", "us", "x bf16")
    return tabulate(lines, headers=headers)


def save(table: dict[str, dict[str, list[Any]]], path: Path) -> None:
    """Add ``table`` to the file at ``path``."""
    content: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    for section in SECTIONS:
        content[section] = dict(sorted((content.get(section, {}) | table[section]).items()))
    content["versions"] = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "date": datetime.date.today().isoformat(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_compact(content))


def _compact(content: dict[str, Any]) -> str:
    """JSON with one line for each entry."""
    parts = []
    for name, section in content.items():
        lines = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in section.items())
        parts.append(f" {json.dumps(name)}: {{\n{lines}\n }}")
    return "{\n" + ",\n".join(parts) + "\n}\n"
