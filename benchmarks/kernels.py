"""Every scheme's linear on a GPU as a user gets it, beside bfloat16: the table of kernels.

    PYTHONPATH=. python3 benchmarks/kernels.py --out DIR [--minutes 6] [--schemes int8dq,fp8dq]
        [--shapes 28672x4096,4096x4096] [--rows 1,16] [--sanitize]

For each scheme, shape (n x k) and number of rows: the kernel that fxquant chooses (measured tables
included), its activations quantized by that kernel (one row) or by one of its own before the product (in a
model rows are quantized with the norm before them, where there is one). bfloat16 ``F.linear``
and torch's own quantized products run in the same process.
Times are medians of CUDA-graph replays over copies of the weight that together exceed the L2 cache,
a scheme's and bfloat16's in turns.
An error is the largest in units of the allowance of ``tests/oracles.py`` (above 1 is a defect), up
to 64 rows and over up to 2048 output columns.

Writes DIR/kernels.json after every number of rows, DIR/kernels.md, and prints a short table last.
``--sanitize`` runs sanitize.py after it. Exits with 1 where a kernel failed, erred or did not repeat.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import signal
import subprocess
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gpu_check import error
from kernels_report import Reading, defects, page, short
from llama_report import machine, rounded

from fxquant import tuner
from fxquant.lowering.devices import device_row
from fxquant.lowering.dispatch import prequantized, run_kernel
from fxquant.lowering.kernel import KERNELS, Kernel, Layout, Problem
from fxquant.lowering.select import select
from fxquant.lowering.triton_quantize import is_served
from fxquant.lowering.triton_widen import widen
from fxquant.measure import alternating, copies, replayed
from fxquant.scheme import SCHEMES, Quantized, QuantSpec, Scheme, get_scheme

NAMES = ("int4wo-64", "int4wo-128", "int8wo", "fp8wo", "int8dq", "fp8dq", "8da4w-32", "8da4w-128")
SHAPES = (
    *((28672, 4096), (14336, 4096), (4096, 14336), (6144, 4096), (4096, 4096), (11008, 4096)),
    *((128256, 4096), (896, 4864), (2560, 2560)),
)
ROWS = (1, 16, 17, 64, 129, 256, 2048, 4096)

PEERS = {
    # torch's own kernel: (the schemes it serves, the most rows that are worth a measurement)
    "tinygemm": (("int4wo-64", "int4wo-128"), 64),
    "int_mm": (("int8dq",), 4096),
    "scaled_mm": (("fp8dq",), 4096),
}
PEER_SHAPES = SHAPES[:4]

CHECKED_ROWS, CHECKED_COLUMNS = 64, 2048
BACKEND = "inductor"


def quantization(
    scheme: Scheme, widened: bool = False
) -> Callable[[torch.Tensor], list[torch.Tensor]]:
    """x -> (codes, scale[, zero]), or widened (codes less the zero point, scale), as a graph has it whose
    input is ``x``: by a kernel of its own, where there is one."""
    spec = scheme.input
    assert spec is not None

    def quantize(x: torch.Tensor) -> list[torch.Tensor]:
        if is_served(x, spec):
            found = torch.ops.fxquant.quantize_rows(x, scheme.name, "", widened)
        else:
            q = spec.quantize(x)
            found = [widen(q.codes, q.zero), q.scale] if widened else q
        return [any_number(t) for t in found if t is not None]

    return quantize


def activations(rows: int, k: int, device: torch.device) -> torch.Tensor:
    """x[rows, k]."""
    return any_number(torch.randn(rows, k, device=device, dtype=torch.bfloat16))


def any_number(x: torch.Tensor) -> torch.Tensor:
    """What is compiled for these rows is for any number above one."""
    if x.shape[0] > 1:
        torch._dynamo.mark_dynamic(x, 0)
    return x


def ends(t: torch.Tensor | None) -> torch.Tensor | None:
    """The first and last of many rows, CHECKED_COLUMNS together."""
    if t is None or t.shape[0] <= CHECKED_COLUMNS:
        return t
    return torch.cat([t[: CHECKED_COLUMNS // 2], t[-CHECKED_COLUMNS // 2 :]])


class Subject:
    """One layer in one scheme: the kernels chosen for it, its packed weight often enough to rotate."""

    def __init__(self, scheme: Scheme, weight: torch.Tensor):
        self.scheme, (self.n, self.k) = scheme, weight.shape
        self.problem = problem_of(scheme, self.n, self.k, weight.device)
        self.choice = select(self.problem)
        self.q = scheme.weight.quantize(weight)
        self.packs: dict[str, list[list[torch.Tensor]]] = {}
        self.wide = scheme.weight.dequantize(Quantized(*map(ends, self.q)), torch.float64)  # type: ignore
        self.packed(self.choice.layout)

    def packed(self, layout: Layout) -> list[list[torch.Tensor]]:
        if layout.name not in self.packs:
            self.packs[layout.name] = copies(layout.pack(self.scheme, self.q))
        return self.packs[layout.name]

    def call(self, kernel: Kernel, layout: str) -> Callable[..., torch.Tensor]:
        """(x, *packed) -> y, quantization included."""
        scheme, name, n = self.scheme, kernel.name, self.n
        cutter = tuner.CUTTERS.get(name)
        widened = cutter is not None and cutter.widened

        def whole(x: torch.Tensor, *packed: torch.Tensor) -> torch.Tensor:
            if kernel.quantizes(replace(self.problem, m=x.shape[0])):
                return run_kernel(name, scheme, layout, x, packed, None, "", n)
            return product(x, quantize(x), *packed)

        def product(x: torch.Tensor, codes: Sequence[torch.Tensor], *packed: torch.Tensor):
            if widened:
                run = torch.ops.fxquant.widened_linear
                return run(*codes, None, packed, None, scheme.name, "", n, x.dtype)
            row = prequantized(scheme, codes)
            return run_kernel(name, row, layout, x, packed, None, "", n)

        if name in tuner.COMPOSED:
            product = torch.compile(product, dynamic=False, fullgraph=True, backend=BACKEND)
        quantize = (lambda x: []) if scheme.input is None else quantization(scheme, widened)
        return whole

    def read(
        self,
        kernel: Kernel,
        layout: Layout,
        x: torch.Tensor,
        floats: Sequence[Sequence[torch.Tensor]],
        copy: float,
    ) -> Reading:
        """One kernel at one number of rows, and bfloat16 in turns with it. floats: copies of the bfloat16
        weight. copy: bytes/s of a device copy, read and written."""
        call, packs = self.call(kernel, layout.name), self.packed(layout)
        y = call(x, *packs[0])
        found: Reading = {"repeats": torch.equal(y, call(x, *packs[0]))}
        if x.shape[0] <= CHECKED_ROWS:
            some = ends(y.t()).t()  # type: ignore[union-attr]
            found["error"] = error(self.scheme, x, self.wide, some)
        del y
        own = [partial(call, x, *packed) for packed in packs]
        seconds, base = alternating([own, [partial(F.linear, x, w) for (w,) in floats]])
        speed = sum(t.numel() * t.element_size() for t in packs[0]) / seconds
        times = {"us": seconds * 1e6, "bf16_us": base * 1e6}
        return found | times | {"gb_s": speed / 1e9, "of_copy": speed / copy}

    def peers(self, rows: int) -> list[Kernel]:
        """torch's own kernels that take this layer at this number of rows."""
        names = [
            name
            for name, (schemes, most) in PEERS.items()
            if self.scheme.name in schemes and rows <= most and (self.n, self.k) in PEER_SHAPES
        ]
        at = replace(self.problem, m=rows)
        return [KERNELS[name] for name in names if KERNELS[name].refusal(at) is None]


def problem_of(scheme: Scheme, n: int, k: int, device: torch.device) -> Problem:
    return Problem(
        scheme=scheme, n=n, k=k, m=None, dtype=torch.bfloat16, bias=False, device=device_row(device)
    )  # fmt: skip


def copy_bandwidth(device: torch.device, size: int = 1 << 30) -> float:
    """Bytes/s, read and written, of a copy by a kernel; the best of five, as clocks rise. (In a CUDA graph
    ``copy_`` is left to the copy engine, which is slower.)"""
    source = torch.randint(1 << 30, (size // 4,), dtype=torch.int32, device=device)
    copy = partial(torch.bitwise_not, source, out=torch.empty_like(source))
    return 2 * size / min(replayed([copy]) for _ in range(5))


def build(schemes: Sequence[Scheme], shapes, rows: Sequence[int], device: torch.device) -> None:
    """Compile what will be launched, all cuts at once."""

    def one(scheme: Scheme) -> None:
        name, found = device_row(device).name, defaultdict(set)
        for (n, k), m in itertools.product(shapes, rows):
            cutter = tuner.CUTTERS.get(select(problem_of(scheme, n, k, device)).at(m).name)
            if cutter is not None:
                found[cutter].add(cutter.pick(scheme, n, k, m, name))
        for cutter, cuts in found.items():
            tuner.build(cutter, scheme, cuts, device)

    with ThreadPoolExecutor(len(schemes)) as pool:
        list(pool.map(one, schemes))


class Late(Exception):
    """The deadline has passed."""


@torch.no_grad()
def measure(
    schemes: Sequence[Scheme],
    shape: tuple[int, int],
    rows: Sequence[int],
    device: torch.device,
    copy: float,
    report: dict[str, Any],
    written: Callable[[], None],
    deadline: float,
) -> None:
    """All readings of one shape, into ``report["records"]`` and ``["peers"]``. Raises Late."""
    n, k = shape
    torch.manual_seed(n + k)
    weight = torch.randn(n, k, device=device) * k**-0.5
    floats = copies([weight.bfloat16()])
    subjects = [Subject(scheme, weight) for scheme in schemes]
    del weight
    for m in rows:
        x = activations(m, k, device)
        steps: dict[QuantSpec, float] = {}
        for subject in subjects:
            if time.time() > deadline:
                raise Late
            scheme, chosen = subject.scheme, subject.choice.at(m)
            todo = [("records", chosen, subject.choice.layout)]
            todo += [("peers", kernel, kernel.layout) for kernel in subject.peers(m)]
            for place, kernel, layout in todo:
                record: Reading = {"scheme": scheme.name, "n": n, "k": k, "m": m}
                record["kernel"] = kernel.name
                try:
                    record |= subject.read(kernel, layout, x, floats, copy)
                    spec, own = scheme.input, kernel.quantizes(replace(subject.problem, m=m))
                    if spec is not None and not own:
                        if spec not in steps:
                            steps[spec] = replayed([partial(quantization(scheme), x)]) * 1e6
                        record["quantize_us"] = steps[spec]
                except Exception as failure:
                    record["failure"] = f"{type(failure).__name__}: {failure}"[:500]
                    traceback.print_exc()
                report[place].append(rounded(record))
                if "failure" in record and device.type == "cuda":
                    written()
                    torch.cuda.synchronize()  # raises where the failure has cost the context
        written()


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, default=Path(__file__).parent / "results")
    add("--minutes", type=float, default=6, help="then it writes what there is")
    add("--schemes", default=",".join(NAMES))
    add("--shapes", default=",".join(f"{n}x{k}" for n, k in SHAPES), help="n x k of the weight")
    add("--rows", default=",".join(map(str, ROWS)))
    add("--table", type=Path, help="a tuned table, in which to note the speeds that were found")
    add("--sanitize", action="store_true", help="run sanitize.py afterwards")
    args = parser.parse_args(argv)
    args.schemes = args.schemes.split(",")
    if unknown := sorted(set(args.schemes) - set(SCHEMES)):
        parser.error(f"unknown schemes {unknown}; known are {', '.join(SCHEMES)}")
    try:
        args.shapes = [tuple(map(int, shape.split("x"))) for shape in args.shapes.split(",")]
        args.rows = [int(m) for m in args.rows.split(",")]
    except ValueError as failure:
        parser.error(f"--shapes are like 4096x14336, --rows like 1,16: {failure}")
    if any(len(shape) != 2 or min(shape) < 1 for shape in args.shapes) or min(args.rows) < 1:
        parser.error("--shapes are pairs like 4096x14336; sizes and --rows at least 1")
    return args


def speeds(records: Sequence[Reading]) -> dict[str, list[list[float]]]:
    """Of each layer in each scheme, over bfloat16, as a tuned table has them."""
    found: dict[str, list[list[float]]] = defaultdict(list)
    for r in (r for r in records if "us" in r):
        speed = [r["m"], round(r["bf16_us"] / r["us"], 2)]
        found[tuner.key(r["scheme"], r["n"], r["k"])].append(speed)
    return dict(found)


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    begin, device = time.time(), torch.device("cuda", 0)
    deadline = begin + 60 * args.minutes
    signal.alarm(int(60 * args.minutes) + 120)  # should a kernel hang
    torch._dynamo.config.recompile_limit = 1000  # one function serves all shapes
    args.out.mkdir(parents=True, exist_ok=True)
    report = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "gpu": torch.cuda.get_device_name(device),
        "versions": machine(),
        "copy_gb_s": rounded(copy_bandwidth(device) / 1e9),
        "complete": False,
        "seconds": {},
        "records": [],
        "peers": [],
    }

    def written() -> None:
        (args.out / "kernels.json").write_text(json.dumps(report, indent=1))
        (args.out / "kernels.md").write_text(page(report))

    schemes = [get_scheme(name) for name in args.schemes]
    build(schemes, args.shapes, args.rows, device)
    report["seconds"]["build"] = round(time.time() - begin)
    try:
        for shape in args.shapes:
            copy = report["copy_gb_s"] * 1e9
            measure(schemes, shape, args.rows, device, copy, report, written, deadline)
            torch.cuda.empty_cache()
            print(f"{shape}: {time.time() - begin:.0f} s", flush=True)
        report["complete"] = True
    except Late:
        print("the time is over")
    report["seconds"]["all"] = round(time.time() - begin)
    written()
    print(f"{report['gpu']}, torch {torch.__version__}, {report['seconds']}")
    print(short(report))
    if args.table:
        empty = {section: {} for section in tuner.SECTIONS}
        tuner.save(empty | {"speeds": speeds(report["records"])}, args.table)
    signal.alarm(0)
    code = int(bool(defects(report["records"])))
    if args.sanitize:
        script = Path(__file__).with_name("sanitize.py")
        command = [sys.executable, str(script), "--out", str(args.out)]
        code |= subprocess.run(command).returncode
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
