"""The CUDA kernels on a real GPU: their tests, their errors at large shapes, their speed.

    PYTHONPATH=. python3 benchmarks/gpu_check.py --out DIR [--minutes 8] [--no-tests] [--only NAME]

Writes DIR/gpu_check.json (versions, GPU, date, every reading), DIR/gpu_check.md and
DIR/gpu_check_tests.txt, and prints a short table last. Needs torch with CUDA, Triton and pytest;
nothing is installed.

Times are medians of CUDA-graph replays over copies of the weight that together exceed the L2 cache,
beside bfloat16 ``F.linear`` in the same process. Activations are quantized before the clock
starts: compiled, that step is fused into whatever produces them. An error is the largest over
all elements, in units of the allowance of ``tests/oracles.py``: above 1 is a defect.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F

import fxquant.lowering  # noqa: F401
from fxquant.lowering.devices import device_row
from fxquant.lowering.dispatch import prequantized
from fxquant.lowering.kernel import KERNELS, Kernel, Problem
from fxquant.measure import copies, replayed
from fxquant.scheme import Scheme, get_scheme

CASES = [
    ("triton_w8a8", "int8dq"),
    ("triton_w8a8_persistent", "int8dq"),
    ("int_mm", "int8dq"),
    ("triton_w8a16", "int8wo"),
    ("triton_w4a16", "int4wo-64"),
    ("triton_w4a16", "int4wo-128-sym"),
    ("tinygemm", "int4wo-64"),
    ("triton_w4a8", "8da4w-128"),
    ("triton_w4a8", "8da4w-32"),
    ("triton_fp8", "fp8dq"),
    ("triton_fp8_persistent", "fp8dq"),
    ("scaled_mm", "fp8dq"),
    ("triton_wf8a16", "fp8wo"),
    ("triton_w4a16", "int2wo-64"),
]
SHAPES = [(28672, 4096), (4096, 14336), (6144, 4096), (896, 4864), (10240, 2560)]
ROWS = (1, 4, 16, 17, 64, 129, 256, 2048)
TEST_SHARDS = (
    "w8a8",
    "w8a16",
    "wf8a16 or fp8",
    "int4wo-32",
    "int4wo-64",
    "int4wo-128 or int4wo-256",
    "int2wo",
    "8da4w-32",
    "8da4w-64 or 8da4w-256",
)


def error(scheme: Scheme, x: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> float:
    """The largest |y - x @ w.T| over its allowance; NaN where y has one. ``w`` in float64."""
    from tests.oracles import UNIT_ROUNDOFF

    u = UNIT_ROUNDOFF[y.dtype]
    wide = x.double()
    if scheme.input is not None:
        wide = scheme.input.dequantize(scheme.input.quantize(x), torch.float64)
    exact = wide @ w.T
    spread = (wide.float().square() @ w.float().square().T).sqrt().double()
    allowed = 6 * u / 3**0.5 * spread + u * exact.abs() + torch.finfo(y.dtype).tiny
    return ((y.double() - exact).abs() / allowed).max().item()


BASELINE: dict[tuple[int, int, int], float] = {}


def baseline(m: int, n: int, k: int) -> float:
    """Seconds of the bfloat16 linear, once for each shape in a process."""
    if (m, n, k) not in BASELINE:
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        weights = copies([torch.randn(n, k, device="cuda", dtype=torch.bfloat16)])
        BASELINE[m, n, k] = replayed([partial(F.linear, x, w[0]) for w in weights])
    return BASELINE[m, n, k]


def measure(kernel: Kernel, scheme: Scheme, n: int, k: int, emit) -> None:
    """Check and time one kernel at one shape for every number of rows."""
    torch.manual_seed(n + k)
    q = scheme.weight.quantize(torch.randn(n, k, device="cuda") * k**-0.5)
    wide = scheme.weight.dequantize(q, torch.float64)
    packs = copies(kernel.layout.pack(scheme, q))
    for m in ROWS:
        record = {"kernel": kernel.name, "scheme": scheme.name, "n": n, "k": k, "m": m}
        problem = Problem(
            scheme=scheme, n=n, k=k, m=m, dtype=torch.bfloat16, bias=False,
            device=device_row(torch.device("cuda", 0)),
        )  # fmt: skip
        if reason := kernel.refusal(problem):
            emit({**record, "refused": reason})
            continue
        try:
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
            y = kernel.compute(scheme, x, packs[0], None, "")
            record["error"] = error(scheme, x, wide, y)
            codes = [] if scheme.input is None else scheme.input.quantize(x)
            prepared = prequantized(scheme, codes)
            calls = [partial(compiled(kernel.name), prepared, x, p, None, "") for p in packs]
            record["us"] = replayed(calls) * 1e6
            record["bf16_us"] = baseline(m, n, k) * 1e6
        except Exception as failure:
            record["failure"] = f"{type(failure).__name__}: {failure}"[:500]
            traceback.print_exc()
            emit(record)
            torch.cuda.synchronize()  # raises if the context is lost: a fresh process goes on
            continue
        emit(record)


@cache
def compiled(name: str) -> Callable[..., torch.Tensor]:
    """ATen's kernels leave loops to Inductor; Triton's are single launches already."""
    compute = KERNELS[name].compute
    if name != "int_mm":
        return compute

    @torch.compile(dynamic=True)
    def product(codes, scale, weight, weight_scale):
        prepared = prequantized(get_scheme("int8dq"), (codes, scale))
        like = torch.empty(0, dtype=torch.bfloat16, device=codes.device)
        return compute(prepared, like, [weight, weight_scale], None, "")

    return lambda s, x, p, bias, epilogue: product(*s.input.codes[:2], *p)


def worker(cases: list[int], path: Path, deadline: float) -> None:
    """Measure the numbered cases, a JSON line each; begins every case with its number."""
    with path.open("a") as file:

        def emit(record: dict) -> None:
            file.write(json.dumps(record) + "\n")
            file.flush()

        for index in cases:
            name, scheme = CASES[index]
            emit({"begin": index})
            for n, k in SHAPES:
                if time.time() > deadline:
                    emit({"late": index})
                    return
                try:
                    measure(KERNELS[name], get_scheme(scheme), n, k, emit)
                except Exception as failure:
                    what = f"{type(failure).__name__}: {failure}"[:500]
                    emit({"kernel": name, "scheme": scheme, "n": n, "k": k, "failure": what})
                    torch.cuda.synchronize()


def benchmark(out: Path, cases: list[int], deadline: float) -> list[dict]:
    """Run ``worker`` on all cases; one that kills its process is recorded and left behind."""
    path = out / "gpu_check.lines"
    path.unlink(missing_ok=True)
    extra: list[dict] = []
    while cases and time.time() < deadline:
        arguments = ["--worker", ",".join(map(str, cases)), "--deadline", str(deadline)]
        try:
            command = [sys.executable, __file__, "--out", str(out), *arguments]
            code = subprocess.run(command, timeout=deadline - time.time() + 15).returncode
        except subprocess.TimeoutExpired:
            code = -1
        records = (
            [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        )
        begun = [r["begin"] for r in records if "begin" in r]
        if code == 0 or not begun:
            break
        name, scheme = CASES[begun[-1]]
        extra.append(
            {"kernel": name, "scheme": scheme, "failure": f"its process ended with {code}"}
        )
        cases = cases[cases.index(begun[-1]) + 1 :]
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return [r for r in map(json.loads, lines) if "kernel" in r] + extra


def run_tests(out: Path, limit: float) -> dict[str, str]:
    """The test file in shards, side by side: most of the time is compiling, on the CPU."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONUNBUFFERED": "1"}
    file = "tests/lowering/test_triton_kernels.py"
    rest = "not (" + " or ".join(f"({shard})" for shard in TEST_SHARDS) + ")"
    options = ["-o", "addopts=", "-q", "--tb=short", "-p", "no:cacheprovider"]
    base = [sys.executable, "-m", "pytest", *options, file, "-k"]
    running = {}
    for i, shard in enumerate([*TEST_SHARDS, rest]):
        log = (out / f"shard{i}.txt").open("w+")
        running[shard] = (
            subprocess.Popen([*base, shard], env=environment, stdout=log, stderr=subprocess.STDOUT),
            log,
        )
    end, summary, texts = time.time() + limit, {}, []
    for shard, (process, log) in running.items():
        try:
            process.wait(max(end - time.time(), 0.1))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        log.seek(0)
        text = log.read()
        log.close()
        Path(log.name).unlink()
        texts.append(f"==== {shard}: rc {process.returncode}\n{text}")
        last = text.strip().splitlines()[-1:] or ["no output"]
        summary[shard[:40]] = f"rc {process.returncode}: {last[0]}"
    (out / "gpu_check_tests.txt").write_text("\n".join(texts))
    failed = [ln for t in texts for ln in t.splitlines() if ln.startswith(("FAILED", "ERROR"))]
    print("\n".join(ln[:220] for ln in failed[:25]))
    return summary


def table(records: list[dict]) -> str:
    """By kernel and rows: speed over bfloat16 (geometric mean over shapes); the worst error."""
    lines = [f"{'x bf16 (mean of shapes)':28}" + "".join(f"{m:>7}" for m in ROWS) + "  worst error"]
    for name, scheme in CASES:
        mine = [r for r in records if (r["kernel"], r["scheme"]) == (name, scheme)]
        cells = ""
        for m in ROWS:
            ratios = [r["bf16_us"] / r["us"] for r in mine if r.get("m") == m and "bf16_us" in r]
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else None
            cells += f"{mean:7.2f}" if mean else f"{'-':>7}"
        errors = [r["error"] for r in mine if "error" in r]
        worst = max(errors, key=lambda e: (math.isnan(e), e)) if errors else math.nan
        failures = sum("failure" in r for r in mine)
        note = f", {failures} FAILED" if failures else ""
        lines.append(f"{name.removeprefix('triton_'):13}{scheme:15}{cells}  {worst:.3f}{note}")
    n, k = SHAPES[0]
    lines.append(f"us at {n}x{k}")
    for name, scheme in [("bf16", ""), *CASES]:
        cells = ""
        for m in ROWS:
            mine = [r for r in records if (r.get("n"), r.get("m")) == (n, m) and "us" in r]
            if name == "bf16":
                found = [r["bf16_us"] for r in mine if "bf16_us" in r]
            else:
                found = [r["us"] for r in mine if (r["kernel"], r["scheme"]) == (name, scheme)]
            cells += f"{statistics.median(found):7.0f}" if found else f"{'-':>7}"
        lines.append(f"{name.removeprefix('triton_'):13}{scheme:15}{cells}")
    return "\n".join(lines)


def page(report: dict) -> str:
    """The readings as Markdown."""
    tests = "\n".join(f"{shard}: {line}" for shard, line in report["tests"].items())
    versions = f"{report['gpu']}, torch {report['torch']}, Triton {report['triton']}"
    return (
        f"# CUDA kernels, first versions\n\n{versions}, {report['date']}\n\n"
        "Times are medians of CUDA-graph replays over weights rotated past the L2 cache; activation\n"
        "quantization is outside them. Errors are in units of the allowance of tests/oracles.py.\n\n"
        f"```\n{table(report['records'])}\n```\n\nTests on this GPU:\n\n```\n{tests}\n```\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--no-tests", action="store_true")
    parser.add_argument("--only", default="", help="part of a kernel's or scheme's name")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, default=0.0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.worker:
        worker(
            [int(i) for i in args.worker.split(",")], args.out / "gpu_check.lines", args.deadline
        )
        return
    begin = time.time()
    deadline = begin + 60 * args.minutes - 25
    tests = {} if args.no_tests else run_tests(args.out, limit=0.5 * (deadline - begin))
    tested = time.time()
    chosen = [i for i, case in enumerate(CASES) if any(args.only in part for part in case)]
    records = benchmark(args.out, chosen, deadline)
    import triton

    report = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "gpu": torch.cuda.get_device_name(0),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "seconds": {"tests": round(tested - begin), "benchmark": round(time.time() - tested)},
        "tests": tests,
        "records": records,
    }
    (args.out / "gpu_check.json").write_text(json.dumps(report, indent=1))
    (args.out / "gpu_check.md").write_text(page(report))
    for record in [r for r in records if "failure" in r][:12]:
        print({k: (v[:160] if isinstance(v, str) else v) for k, v in record.items()})
    print(
        f"{report['gpu']}, torch {report['torch']}, triton {report['triton']}, {report['seconds']}"
    )
    for shard, line in tests.items():
        print(f"tests [{shard}]: {line}")
    print(table(records))


if __name__ == "__main__":
    main()
