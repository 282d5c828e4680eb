"""Decoding and prefill of Llama-shaped decoders: bfloat16, fxquant's schemes and torchao, side by side.

    PYTHONPATH=. python3 benchmarks/llama.py --shape llama3-8b --batch 1,16 --out DIR --minutes 8

Every contender runs in a process of its own, with cold compilation caches, on the same seeded
random weights: converted part by part, then for each batch size decoded greedily (one compiled
function a token, static cache), then prefilled. DIR/llama.json gains or replaces a reading as soon
as there is one; llama.md is its table and llama.svg its plot, which ``--plot`` draws anew, with
``--kernels FILE`` the speed-up of kernels against rows too (speedup.svg). Plots need matplotlib.

tokens/s is the median wall clock of RUNS greedy runs. GB/s is what a step reads of the
weights (codes, qparams, norms; no cache, no embedding table) per second. "model GB" is the same
bytes, as torchao counts them. Peak memory is what the allocator reserved, conversion included.
"compile s" is the first call. Prefill is one sequence, its last row's logits alone; kernel by kernel as
the host issues them (mode "default"), and as a CUDA graph (mode "reduce-overhead").
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import gc
import json
import signal
import statistics
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llama_model import KNOWN, SHAPES, TORCHAO, Decoder, Generator, build, conversion, model_bytes
from llama_process import COMPILING, TIMING, Watched, gate, stop
from llama_report import (
    GROUP,
    compare,
    draw_kernels,
    draw_readings,
    machine,
    merge,
    page,
    rounded,
    save,
)

import fxquant.backend
from fxquant.measure import synchronize

FXQUANT = ("int4wo-64", "int8wo", "8da4w-32", "int8dq", "fp8dq", "fp8wo", "8da4w-128")
DEFAULT = ("bf16", *FXQUANT, *(f"torchao-{s}" for s in TORCHAO[:5]))
"""In order of priority: what comes last is missing first when time is short."""

RUNS = 5
"""Of the same decoding: the median is reported, and whether all chose the same tokens. (On an H200 one alone
may be 10 % off.)"""

Step = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def gigabytes(read: Callable[[], int]) -> float | None:
    """What an allocator's counter says; None without a GPU."""
    return read() / 1e9 if torch.cuda.is_available() else None


def compiled(generator: Generator, contender: str, mode: str) -> Step:
    """The generator under the contender's compiler; mode "eager" compiles nothing."""
    if mode == "eager":
        return generator
    settings: dict[str, Any] = {"mode": mode, "fullgraph": True, "dynamic": False}
    if contender == "bf16" or contender.startswith("torchao-"):
        return torch.compile(generator, **settings)
    return fxquant.compile(generator, **settings)


@contextmanager
def decisions() -> Iterator[dict[str, Any]]:
    """By name, what fxquant decides for each layer while something compiles: explain, for free."""
    found: dict[str, Any] = {}
    rewrite = fxquant.backend.rewrite
    fxquant.backend.rewrite = partial(rewrite, on_layers=found.update)
    try:
        yield found
    finally:
        fxquant.backend.rewrite = rewrite


def first_call(run: Step, *inputs: torch.Tensor) -> dict[str, Any]:
    """Its seconds, and the kernels of each kind of layer."""
    torch._dynamo.utils.counters.clear()
    with decisions() as found:
        synchronize()
        started = time.perf_counter()
        run(*inputs)
        synchronize()
        seconds = time.perf_counter() - started
    kernels: dict[str, Counter[str]] = {}
    for name, layer in found.items():
        kind = kernels.setdefault(name.rpartition(".")[2], Counter())
        kind[f"{layer.kernel} ({layer.scheme})" if layer.kernel else f"float: {layer.reason}"] += 1
    return {"compile_s": seconds, "kernels": kernels}


def counts() -> dict[str, int]:
    """Since the first call: graphs compiled, and those that CUDA graphs refused."""
    found = torch._dynamo.utils.counters
    skips = found["inductor"]["cudagraph_skips"]
    return {"graphs": found["stats"]["unique_graphs"], "cudagraph_skips": skips}


def greedy(run: Step, token: torch.Tensor, places: list[torch.Tensor]) -> dict[str, Any]:
    """Decode from ``token`` [batch, 1], one step for each position: tokens [batch, T] and times."""
    chosen, marks = [], []
    synchronize()
    started = time.perf_counter()
    for place in places:
        torch.compiler.cudagraph_mark_step_begin()
        token, logits = run(token, place)
        token = token.clone()  # the graph's own memory is written to by the next step
        chosen.append(token)
        if torch.cuda.is_available():
            marks.append(torch.cuda.Event(enable_timing=True))
            marks[-1].record()
        else:
            marks.append(time.perf_counter())
    issued = time.perf_counter() - started
    synchronize()
    wall = time.perf_counter() - started
    pairs = list(pairwise(marks))
    if torch.cuda.is_available():
        steps = [a.elapsed_time(b) for a, b in pairs]
    else:
        steps = [(b - a) * 1e3 for a, b in pairs]
    return {
        "chosen": torch.cat(chosen, dim=1),
        "logits": logits.clone(),
        "wall_s": wall,
        "step_ms": statistics.median(steps) if steps else wall * 1e3,
        "host_ms": issued / len(places) * 1e3,
    }


def decode(model: Decoder, args: argparse.Namespace, contender: str, batch: int) -> dict[str, Any]:
    """Greedy decoding of ``batch`` sequences after a prompt; the prompt's steps are the warm-up."""
    random = torch.Generator().manual_seed(batch)
    prompt = torch.randint(model.shape.vocab, (args.prompt, batch, 1), generator=random)
    tokens = [t.clone() for t in prompt.to(device())]
    places = [torch.tensor([i], device=device()) for i in range(args.prompt + args.tokens)]
    with gate(args.scratch, COMPILING):
        run = compiled(Generator(model, batch, args.length), contender, args.mode)
        reading = first_call(run, tokens[0], places[0])
        resident = gigabytes(torch.cuda.memory_allocated)
        for token, place in zip(tokens, places, strict=False):
            torch.compiler.cudagraph_mark_step_begin()
            token, logits = run(token, place)
        token, logits = token.clone(), logits.float().cpu()
    np.save(_logits_path(args, batch, contender), logits.numpy())
    with gate(args.scratch, TIMING):
        runs = [greedy(run, token, places[args.prompt :]) for _ in range(RUNS)]
        if args.profile:
            reading["profile"] = profile(lambda: greedy(run, token, places[args.prompt :][:4]), 4)
    wall, step, host = (
        statistics.median(r[key] for r in runs) for key in ("wall_s", "step_ms", "host_ms")
    )
    rate = args.tokens / wall
    return (
        reading
        | counts()
        | {
            "tokens_per_s": batch * rate,
            "gb_per_s": model_bytes(model) * rate / 1e9,
            "step_ms": step,
            "host_ms": host,
            "tokens": args.tokens,
            "resident_gb": resident,
            "deterministic": all(torch.equal(runs[0]["chosen"], r["chosen"]) for r in runs[1:]),
            "finite": bool(torch.isfinite(runs[-1]["logits"]).all()),
        }
    )


def prefill(
    model: Decoder, args: argparse.Namespace, contender: str, batch: int, mode: str
) -> dict[str, Any]:
    """One prompt of ``args.prefill`` tokens through the model into the cache; host_ms: until it is issued."""
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.shape.vocab, (batch, args.prefill), generator=random)
    inputs = tokens.to(device()), torch.arange(args.prefill, device=device())
    with gate(args.scratch, COMPILING):
        run = compiled(Generator(model, batch, args.prefill), contender, mode)
        reading = first_call(run, *inputs)
        run(*inputs)
    with gate(args.scratch, TIMING):
        issued, times = list[float](), list[float]()
        while len(times) < 3 or (len(times) < 9 and sum(times) < 1.0):
            torch.compiler.cudagraph_mark_step_begin()
            synchronize()
            started = time.perf_counter()
            _, logits = run(*inputs)
            issued.append(time.perf_counter() - started)
            synchronize()
            times.append(time.perf_counter() - started)
        if args.profile:
            reading["profile"] = profile(lambda: run(*inputs), 1)
    prefill_ms, host_ms = (statistics.median(seconds) * 1e3 for seconds in (times, issued))
    found = {"prefill_ms": prefill_ms, "host_ms": host_ms}
    return reading | counts() | found | {"finite": bool(torch.isfinite(logits).all())}


def profile(run: Callable[[], object], steps: int) -> dict[str, Any]:
    """Microseconds a step in which kernels ran, how many there were, and the longest of them."""
    from torch.profiler import ProfilerActivity

    on_gpu = torch.cuda.is_available()
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as found:
        run()
        synchronize()
    name = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = [e for e in found.key_averages() if getattr(e, name) > 0]
    events.sort(key=lambda e: -getattr(e, name))
    return {
        "busy_us": sum(getattr(e, name) for e in events) / steps,
        "kernels": sum(e.count for e in events) / steps,
        "longest": [(e.key[:80], e.count / steps, getattr(e, name) / steps) for e in events[:16]],
    }


def _logits_path(args: argparse.Namespace, batch: int, contender: str) -> Path:
    merged = "-merged" if args.merged else ""
    name = f"{args.shape}-{args.layers}{merged}-{args.prompt}-b{batch}-{contender}.npy"
    return args.scratch / name


def phases(args: argparse.Namespace) -> list[dict[str, Any]]:
    """What every contender does, in order."""
    found = [{"phase": "decode", "batch": b, "length": args.length} for b in args.batch]
    if args.prefill:
        prompt = {"phase": "prefill", "batch": 1, "length": args.prefill}
        found += [prompt | {"prefill_mode": mode} for mode in args.prefill_mode.split(",")]
    return found


@torch.no_grad()
def work(args: argparse.Namespace, contender: str) -> None:
    """One contender from weights to readings; a JSON line each to ``<scratch>/<contender>.lines``."""
    shape = dataclasses.replace(SHAPES[args.shape], layers=args.layers)
    plain = args.attention == "matmul"
    with gate(args.scratch, COMPILING):
        convert = conversion(contender)
        model, seconds = build(shape, convert, device(), merged=args.merged, plain=plain)
    peak = gigabytes(torch.cuda.max_memory_reserved)
    common = {"quantize_s": seconds, "model_gb": model_bytes(model) / 1e9, "convert_peak_gb": peak}
    with (args.scratch / f"{contender}.lines").open("w") as file:
        for phase in phases(args):
            torch.compiler.reset()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            try:
                if phase["phase"] == "decode":
                    found = decode(model, args, contender, phase["batch"])
                else:
                    found = prefill(model, args, contender, phase["batch"], phase["prefill_mode"])
                reading = common | found
                peak = gigabytes(torch.cuda.max_memory_reserved)
                reading["peak_gb"] = peak and max(peak, common["convert_peak_gb"])
                reading["allocated_gb"] = gigabytes(torch.cuda.max_memory_allocated)
            except Exception as error:
                traceback.print_exc()
                reading = {"failure": f"{type(error).__name__}: {error}"[:500]}
            file.write(json.dumps(phase | rounded(reading)) + "\n")
            file.flush()


def launch(
    args: argparse.Namespace,
    argv: list[str],
    contender: str,
    publish: Callable[[list[dict[str, Any]]], None],
) -> None:
    """Run one contender in its own process; publish each reading as it comes, a failure for others."""
    limit = min(args.limit, args.deadline - time.time())
    if limit < min(args.limit, 30):
        print(f"{contender}: not run, no time left", flush=True)
        return
    mine = {k: getattr(args, k) for k in (*GROUP, "jobs", "date")} | {"contender": contender}
    wanted, count, started = phases(args), 0, time.time()
    path = args.scratch / contender
    command = [sys.executable, __file__, *argv, "--worker", contender, "--limit", str(limit)]
    for reading in (watched := Watched(command, path, limit)):
        publish([mine | reading])
        count += 1
    print(f"{contender}: {time.time() - started:.0f} s", flush=True)
    if missing := [mine | phase | {"failure": watched.ended} for phase in wanted[count:]]:
        publish(missing)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="llama3-8b")
    add("--layers", type=int, default=0, help="cut the depth; 0: all")
    add("--batch", default="1,16", help="batch sizes to decode at, separated by commas; or none")
    add("--contenders", default=",".join(DEFAULT), help=f"of {', '.join(DEFAULT)} and others")
    add("--mode", default="reduce-overhead", help="torch.compile's, or eager")
    add("--prefill-mode", default="default,reduce-overhead", help="those for prefill, one by one")
    add("--prompt", type=int, default=128)
    add("--tokens", type=int, default=128, help="decoded tokens that are timed")
    add("--length", type=int, default=256, help="of the cache for decoding")
    add("--prefill", type=int, default=2048, help="tokens; 0: none")
    add("--attention", choices=("matmul", "sdpa"), default="matmul", help="for decoding")
    add("--merged", action="store_true", help="q/k/v and gate/up are one linear each, for all")
    add("--profile", action="store_true", help="also record the kernels of a step")
    add("--out", type=Path, default=Path(__file__).parent / "results")
    add("--limit", type=float, default=150, help="seconds for one contender")
    add("--minutes", type=float, default=60, help="for all")
    add("--jobs", type=int, default=1, help="contenders that may compile at once")
    add("--plot", action="store_true", help="only draw llama.json, and write its table")
    add("--kernels", type=Path, help="readings {scheme, n, k, m, us, bf16_us}: draw speedup.svg")
    add("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "fxquant_llama")
    add("--worker", default="", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.layers = args.layers or SHAPES[args.shape].layers
    args.batch = [int(b) for b in args.batch.split(",")] if args.batch != "none" else []
    args.names = args.contenders.split(",")
    if unknown := sorted(set(args.names) - KNOWN):
        parser.error(f"unknown contenders {unknown}; known are {sorted(KNOWN)}")
    if args.prompt < 1 or args.tokens < 1 or args.prompt + args.tokens > args.length:
        parser.error("--length must hold --prompt and --tokens, each at least 1")
    if args.prefill == 1:
        parser.error("--prefill is 0 or at least 2")
    return args


def draw(args: argparse.Namespace, report: dict[str, Any]) -> None:
    try:
        draw_readings(report["readings"], args.out / "llama.svg")
        if args.kernels:
            draw_kernels(json.loads(args.kernels.read_text()), args.out / "speedup.svg")
    except ImportError as error:
        print(f"no plot ({error}); where matplotlib is: {Path(__file__).name} --plot --out DIR")


def main(argv: list[str]) -> None:
    args = parse(argv)
    args.scratch.mkdir(parents=True, exist_ok=True)
    if args.worker:
        signal.alarm(int(args.limit) + 5)  # should the parent be gone
        work(args, args.worker)
        return
    path = args.out / "llama.json"
    report = json.loads(path.read_text()) if path.exists() else {"machines": {}, "readings": []}
    if not args.plot:
        args.deadline = time.time() + 60 * args.minutes
        args.date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        args.device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"
        report["machines"][args.device] = machine() | {"date": args.date}
        lock = threading.Lock()
        signal.signal(signal.SIGTERM, stop)

        def publish(readings: list[dict[str, Any]]) -> None:
            shown = ["contender", "phase", "batch", "tokens_per_s"]
            shown += ["prefill_mode", "prefill_ms", "host_ms", "compile_s", "failure"]
            for reading in readings:
                print("  ", {k: reading[k] for k in shown if k in reading}, flush=True)
            with lock:
                report["readings"] = merge(report["readings"], readings)
                compare(report["readings"], vars(args), partial(_logits_path, args))
                save(report, args.out)

        with ThreadPoolExecutor(args.jobs) as pool:
            for done in [pool.submit(launch, args, argv, n, publish) for n in args.names]:
                done.result()
    save(report, args.out)
    draw(args, report)
    print(page(report))


if __name__ == "__main__":
    main(sys.argv[1:])
