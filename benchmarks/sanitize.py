"""The CUDA and Triton kernels under compute-sanitizer: memory (memcheck) and races (racecheck).

    PYTHONPATH=. python3 benchmarks/sanitize.py --out DIR [--only cuda_w4a16] [--seconds 240]
    PYTHONPATH=. python3 benchmarks/sanitize.py --case "NAME[;NAME]"     the cases alone, unchecked

A plain run compiles everything and checks the results; then both tools run the same cases side by
side, each in one process. A case is the smallest problem that meets every edge: rows and columns
that fill no tile, and k long enough that each pipeline goes round. Every way to multiply of the
streaming kernels has its own (mma or wgmma, k split over a cluster or not). Inputs are made on the
CPU, so that no other kernels run; memcheck gets every tensor as an allocation of its own.

Writes DIR/sanitize.json and DIR/sanitize.md; exits with 1 if a tool reports anything, is missing, or
a case did not run.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from llama_report import machine
from tabulate import tabulate

from fxquant import tuner
from fxquant.lowering import cuda_layout, cuda_prefill, cuda_stream, triton_prefill
from fxquant.lowering.cuda_stream import Shape
from fxquant.lowering.dispatch import prequantized
from fxquant.lowering.kernel import KERNELS
from fxquant.scheme import Quantized, Scheme, get_scheme

STREAM = {
    "cuda_w4a16": ("int4wo-64", "int4wo-128-sym", "int2wo-32"),
    "cuda_w8a16": ("int8wo", "fp8wo"),
    "cuda_w4a8": ("8da4w-32", "8da4w-128"),
    "cuda_w8a8": ("int8dq", "fp8dq"),
}
STREAM_ROWS, STREAM_N, STREAM_K = (1, 13, 130), 280, 4096
DEQUANTIZED = ("int4wo-64", "int2wo-32", "int8wo", "fp8wo", "8da4w-32")
TRITON = (
    *(("triton_w8a8", "int8dq"), ("triton_fp8", "fp8dq"), ("triton_w8a8_persistent", "int8dq")),
    *(
        ("triton_fp8_persistent", "fp8dq"),
        ("triton_w4a16", "int4wo-64"),
        ("triton_w4a8", "8da4w-32"),
    ),
    *(("triton_w8a16", "int8wo"), ("triton_wf8a16", "fp8wo")),
)
OPTIONS = (
    # (tool or "" for both, option, value): those that this release of the sanitizer knows
    ("", "--print-limit", "300"),
    ("", "--target-processes", "application-only"),
    ("", "--destroy-on-device-error", "kernel"),  # the cases after it still run
    ("", "--show-backtrace", "no"),
    ("memcheck", "--report-api-errors", "no"),  # torch asks for symbols that older drivers lack
    ("memcheck", "--padding", "512"),  # what lies past an allocation is nobody's
)
PAUSE = 0.15
"""Seconds after a case: the sanitizer prints what it found from another process."""

PREFIX = "========="
BOILERPLATE = ("COMPUTE-SANITIZER", "ERROR SUMMARY", "RACECHECK SUMMARY", "LEAK SUMMARY")
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)")


@dataclass(frozen=True)
class Case:
    """One launch. ``shape``: how a streaming kernel is cut."""

    kernel: str
    scheme: str
    rows: int
    n: int
    k: int
    shape: Shape | None = None

    @property
    def name(self) -> str:
        cut = "" if self.shape is None else " cut " + "-".join(map(str, self.shape))
        return f"{self.kernel} {self.scheme} {self.rows}x{self.n}x{self.k}{cut}"


def cases() -> list[Case]:
    found = [
        Case(kernel, scheme, rows, STREAM_N, STREAM_K, shape)
        for kernel, schemes in STREAM.items()
        for scheme in schemes
        for rows in STREAM_ROWS
        for shape in kinds(get_scheme(scheme), rows)
    ]
    found += [Case("cuda_dequantize", scheme, 0, STREAM_N, 256) for scheme in DEQUANTIZED]
    for kernel, scheme in TRITON:
        n = 600 if kernel.endswith("persistent") else STREAM_N
        found += [Case(kernel, scheme, 13, n, 1088), Case(kernel, scheme, 130, n, 1024)]
    return found


def names_of(part: str) -> list[str]:
    """The names of all cases that have ``part`` in them."""
    return [case.name for case in cases() if part in case.name]


def kinds(scheme: Scheme, rows: int) -> list[Shape]:
    """Cuts for this many rows, with and without wgmma: one that splits k neither over warps nor over
    a cluster, one that does both; of each kind that with the shortest pipeline."""
    cuts = tuner.cuts(scheme, STREAM_N, STREAM_K, rows)
    cuts = [c for c in cuts if (c.warps_k > 1) == (c.splits > 1)]
    cuts.sort(key=lambda c: (c.stages * c.step * c.warps_k * c.splits, c.tokens), reverse=True)
    return list({(c.warpgroup, c.splits > 1): c for c in cuts}.values())


def build(todo: Sequence[Case]) -> None:
    """Compile the streaming kernels at once; the cache keeps them for the runs that are checked."""

    def one(case: Case) -> None:
        scheme = get_scheme(case.scheme)
        dtype = torch.bfloat16 if scheme.input is None else scheme.input.codes_dtype
        form = cuda_layout.format_of(scheme)
        cuda_stream.compiled(form, case.shape, dtype, torch.bfloat16, None, "", 0)  # type: ignore

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(one, (case for case in todo if case.shape is not None)))


def on_gpu(tensors: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    return [None if t is None else t.cuda() for t in tensors]


def run(case: Case) -> float:
    """The largest error of the case in units of its allowance."""
    from tests import oracles

    scheme, n, k = get_scheme(case.scheme), case.n, case.k
    sample = oracles.random_sample(scheme, case.rows, n, k, torch.bfloat16)
    kernel = KERNELS[case.kernel]
    packed: Any = on_gpu(kernel.layout.pack(scheme, sample.weight))
    if case.kernel == "cuda_dequantize":
        return dequantized(scheme, sample.weight, packed, n, k)
    x, codes = sample.x.cuda(), []
    if scheme.input is not None:
        q = scheme.input.quantize(sample.x)
        codes = on_gpu((q.codes, q.scale.float(), None if q.zero is None else q.zero.float()))
    if case.shape is None:
        row = prequantized(scheme, codes)
        few = mock.patch.object(triton_prefill, "multiprocessors", lambda device: 2)
        with few:  # so that a program walks over several tiles
            y = kernel.compute(row, x, packed, None, "")
    else:
        x, scale, zero = codes or (x, None, None)
        y = cuda_stream.run(
            scheme, case.shape, x, scale, zero, packed, None, n, "", torch.bfloat16
        )  # fmt: skip
    return oracles.bound_ratio(sample, y.cpu()).max().item()


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


def child(names: str) -> int:
    """Run the named cases, each between two printed marks."""
    known = {case.name: case for case in cases()}
    todo = list(known.values()) if names == "all" else [known[n] for n in names.split(";")]
    print(f"=== device {torch.cuda.get_device_name(0)}", flush=True)
    build(todo)
    code = 0
    for case in todo:
        print(f"=== case {case.name}", flush=True)
        try:
            with torch.no_grad():
                error = run(case)
            torch.cuda.synchronize()
            verdict = "done" if error <= 1 else f"failed error {error:.3g}"
        except Exception as failure:
            what = " ".join(str(failure).split())[:300]
            verdict = f"failed {type(failure).__name__}: {what}"
        code |= verdict != "done"
        time.sleep(PAUSE)
        print(f"=== {verdict}", flush=True)
    print("=== end", flush=True)
    return code


def parse(text: str) -> dict[str, Any]:
    """What a run printed: {"device", "cases": {name: {"state", "reports"}}, "outside", "summary"}.

    state: "done", "failed ..." or "not finished". A report is the text of one finding; those that
    belong to no case are in "outside". summary: the tool's own count, None where it printed none.
    """
    found: dict[str, Any] = {"device": "", "cases": {}, "outside": []}
    reports = found["outside"]
    name = ""
    for line in text.splitlines():
        if line.startswith("=== "):
            word, _, rest = line[4:].partition(" ")
            if word == "device":
                found["device"] = rest
            elif word == "case":
                name, reports = rest, []
                found["cases"][name] = {"state": "not finished", "reports": reports}
            elif word in ("done", "failed"):  # what is printed until the next case is still its own
                found["cases"][name]["state"] = line[4:]
            elif word == "end":
                reports = found["outside"]
        elif line.startswith(PREFIX):
            body = line[len(PREFIX) :]
            if not body.strip() or body.strip().startswith(BOILERPLATE):
                continue
            if body.startswith("  ") and reports:
                reports[-1] += "\n" + body.strip()
            else:
                reports.append(body.strip())
    counts = SUMMARY.findall(text)
    found["summary"] = sum(map(int, counts)) if counts else None
    return found


def clean(found: dict[str, Any], names: Sequence[str]) -> bool:
    """Whether a checked run did all cases, and nothing was found."""
    ran = found["cases"]
    quiet = found["code"] == 0 and found["summary"] == 0 and not found["outside"]
    return quiet and all(n in ran and state(ran[n]) == "clean" for n in names)


def state(case: dict[str, Any] | None) -> str:
    """One word, or a few, about a case."""
    if case is None:
        return "not run"
    if case["reports"]:
        return f"{len(case['reports'])} reported"
    return "clean" if case["state"] == "done" else case["state"]


def page(report: dict[str, Any]) -> str:
    """The findings as Markdown."""
    tools = report["runs"]
    versions = ", ".join(f"{k} {v}" for k, v in report["versions"].items())
    verdict = "Nothing was reported." if report["clean"] else "**NOT clean.**"
    head = f"{report['gpu']}, {versions}, {report['sanitizer']}, {report['date']}"
    lines = [
        (name, *(state(found["cases"].get(name)) for found in tools.values()))
        for name in report["cases"]
    ]
    table = tabulate(lines, ("case", *tools), tablefmt="github", disable_numparse=True)
    parts = [f"# Kernels under compute-sanitizer\n\n{head}\n\n{verdict}\n", f"{table}\n"]
    for tool, found in tools.items():
        texts = [(name, t) for name, case in found["cases"].items() for t in case["reports"]]
        texts += [("outside of the cases", t) for t in found["outside"]]
        shown = [f"{name}:\n```\n{text[:1500]}\n```\n" for name, text in texts[:20]]
        if not clean(found, report["cases"]):
            count = f"exit code {found['code']}, the tool counts {found['summary']}"
            shown.append(f"{count}; the output ends with\n```\n{found['tail']}\n```\n")
        if shown:
            parts.append(f"## {tool}\n\n" + "\n".join(shown))
    return "\n".join(parts)


def executable() -> str | None:
    """compute-sanitizer, of the path or of the CUDA toolkit."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("compute-sanitizer") or shutil.which(f"{home}/bin/compute-sanitizer")


def command(tool: str, path: str, known: str, port: int) -> list[str]:
    """compute-sanitizer with the options that ``known``, its help, names."""
    words = [path, "--tool", tool, "--error-exitcode", "9"]
    for only, option, value in (*OPTIONS, ("", "--port", str(port))):
        if only in ("", tool) and option in known:
            words += [option, value]
    return words


def ran(
    prefix: Sequence[str], names: Sequence[str], deadline: float, **more: str
) -> dict[str, Any]:
    """The cases in a process of their own: what it printed, parsed; its exit code; the last lines.

    more: its environment. At the deadline it is ended, with all it started.
    """
    words = [*prefix, sys.executable, str(Path(__file__).resolve()), "--case", ";".join(names)]
    env = {**os.environ, **more, "PYTHONUNBUFFERED": "1"}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            words, stdout=log, stderr=subprocess.STDOUT, env=env, start_new_session=True
        )
        try:
            process.wait(max(deadline - time.time(), 1))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.seek(0)
        text = log.read()
    return {**parse(text), "code": process.returncode, "tail": text[-2500:]}


def check(path: str, names: Sequence[str], deadline: float) -> dict[str, Any]:
    """The report: a plain run, which fills the caches of compiled kernels, then both tools."""
    begin = time.time()
    ask = {"capture_output": True, "text": True}
    asked = [subprocess.run([path, f"--{what}"], **ask) for what in ("help", "version")]  # type: ignore
    known, version = (found.stdout + found.stderr for found in asked)
    runs = {"plain": ran([], names, deadline)}
    runs["plain"]["summary"] = 0  # no tool counts
    built = time.time()
    if runs["plain"]["cases"]:
        own = {"memcheck": {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, "racecheck": {}}
        with ThreadPoolExecutor(len(own)) as pool:
            futures = {
                tool: pool.submit(
                    ran, command(tool, path, known, 49152 + 100 * i), names, deadline, **more
                )
                for i, (tool, more) in enumerate(own.items())
            }
            runs |= {tool: future.result() for tool, future in futures.items()}
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "gpu": runs["plain"]["device"],
        "versions": machine(),
        "sanitizer": " ".join(version.split()[-2:]),
        "seconds": {"plain": round(built - begin), "checked": round(time.time() - built)},
        "cases": list(names),
        "clean": len(runs) == 3 and all(clean(found, names) for found in runs.values()),
        "runs": runs,
    }


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, default=Path(__file__).parent / "results")
    add("--only", default="", help="part of a case's name")
    add("--seconds", type=float, default=240, help="then what still runs is ended")
    add("--case", default="", help="run these cases unchecked (all, or names with ; between)")
    args = parser.parse_args(argv)
    if args.case:
        return child(args.case)
    path, names = executable(), names_of(args.only)
    if path is None or not names:
        print("compute-sanitizer is not installed" if path is None else f"no case has {args.only}")
        return 1
    report = check(path, names, time.time() + args.seconds)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "sanitize.json").write_text(json.dumps(report, indent=1))
    (args.out / "sanitize.md").write_text(page(report))
    print(page(report))
    print(f"{report['seconds']} s, {'clean' if report['clean'] else 'NOT clean'}")
    return 0 if report["clean"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
