"""CPU: MiniLM, and a Llama-3.2-1B-shaped block at several numbers of rows, in one run.

    python benchmarks/cpu.py [--out benchmarks/results] [--rows 1 4 16 64 512]

Everything is compiled first, then timed in interleaved rounds; medians. Beside fxquant's schemes:
float32 and bfloat16 compiled by Inductor, and torchao 0.18 where it is installed and runs. Writes
cpu.json and cpu.md with versions and hardware.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import os
import platform
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")  # first calls compile

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import nn

import fxquant
from fxquant.demo import minilm
from fxquant.lowering.devices import cpu_features
from fxquant.measure import interleaved

BASES = ("float32", "bfloat16")
SCHEMES = ("int8dq", "int8wo", "int4wo-64", "8da4w-32")
TORCHAO = ("torchao int8dq",)


class LlamaBlock(nn.Module):
    """One decoder block with Llama-3.2-1B's sizes, without positions: 2048 wide, 32 and 8 heads."""

    def __init__(self, width: int = 2048, hidden: int = 8192, heads: int = 32, kv_heads: int = 8):
        super().__init__()
        self.heads, self.kv_heads, self.size = heads, kv_heads, width // heads
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, kv_heads * self.size, bias=False)
        self.v = nn.Linear(width, kv_heads * self.size, bias=False)
        self.o = nn.Linear(width, width, bias=False)
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)
        self.norm_1, self.norm_2 = nn.RMSNorm(width), nn.RMSNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm_1(x)
        split = (*x.shape[:-1], -1, self.size)
        q, k, v = (p(h).view(split).transpose(1, 2) for p in (self.q, self.k, self.v))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(a.transpose(1, 2).reshape(x.shape))
        h = self.norm_2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def _torchao(model: nn.Module, name: str) -> Callable[..., Any]:
    """torchao's compiled model; its process-wide Inductor settings are put back."""
    from torch._inductor import config
    from torchao.quantization import (
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        quantize_,
    )

    configs = {"int8dq": Int8DynamicActivationInt8WeightConfig, "int8wo": Int8WeightOnlyConfig}
    kept = config.get_config_copy()
    quantize_(model, configs[name.split()[1]](set_inductor_config=False))
    config.load_config(kept)
    return torch.compile(model)


def contestants(model: nn.Module, names: list[str]) -> dict[str, Callable[..., Any]]:
    """Each name as a compiled model of its own, from ``model`` in float32."""
    found: dict[str, Callable[..., Any]] = {}
    half = copy.deepcopy(model).to(torch.bfloat16)
    for name in names:
        if name == "float32":
            found[name] = torch.compile(copy.deepcopy(model))
        elif name == "bfloat16":
            found[name] = torch.compile(copy.deepcopy(half))
        elif name.startswith("torchao"):
            found[name] = _torchao(copy.deepcopy(half), name)
        else:
            found[name] = fxquant.compile(copy.deepcopy(half), name)
    return found


def first_calls(
    runs: dict[str, Callable[[], Any]],
) -> tuple[dict[str, float], dict[str, Any], dict[str, str]]:
    """Seconds and output of each first call; what fails is left out, with its message."""
    seconds, outputs, failed = {}, {}, {}
    for name, run in list(runs.items()):
        started = time.perf_counter()
        try:
            outputs[name] = run()
            seconds[name] = time.perf_counter() - started
            print(f"  {name}: first call {seconds[name]:.1f} s", flush=True)
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {str(error)[:200]}"
            print(f"  {name}: {failed[name]}", flush=True)
            del runs[name]
    return seconds, outputs, failed


SLOW = 2.0
"""Seconds a call: what takes longer is read once, not in every round."""


def medians(runs: dict[str, Callable[[], Any]], rounds: int, repeat: int = 1) -> dict[str, float]:
    """Interleaved medians; a single reading for what is slow."""
    slow = {}
    for name, run in runs.items():
        started = time.perf_counter()
        run()
        took = time.perf_counter() - started
        if took > SLOW:
            slow[name] = took
    fast = {name: run for name, run in runs.items() if name not in slow}
    return interleaved(fast, rounds=rounds, repeat=repeat) | slow


@torch.no_grad()
def bench_minilm(names: list[str], rounds: int) -> dict[str, Any]:
    """16 x 128 tokens through all-MiniLM-L6-v2: ms, and cosine to the float32 embeddings."""
    print("MiniLM, 16 x 128 tokens", flush=True)
    subject = minilm()
    wanted = subject.embed(subject.model(**subject.inputs), subject.inputs)
    models = contestants(subject.model, names)
    runs = {n: (lambda m=m: m(**subject.inputs)) for n, m in models.items()}
    first, outputs, failed = first_calls(runs)
    seconds = medians(runs, rounds)
    cosine = {
        n: F.cosine_similarity(subject.embed(y, subject.inputs), wanted) for n, y in outputs.items()
    }
    return {
        "ms": {n: t * 1e3 for n, t in seconds.items()},
        "first_call_s": first,
        "cosine_mean": {n: float(c.mean()) for n, c in cosine.items()},
        "cosine_worst": {n: float(c.min()) for n, c in cosine.items()},
        "failed": failed,
    }


@torch.no_grad()
def bench_block(rows: int, names: list[str], rounds: int) -> dict[str, Any]:
    """The block at ``rows`` tokens."""
    print(f"Llama-3.2-1B block, {rows} rows", flush=True)
    torch.manual_seed(0)
    torch._dynamo.reset()
    models = contestants(LlamaBlock().eval(), names)
    x = torch.randn(1, rows, 2048)
    inputs = {n: x if n == "float32" else x.bfloat16() for n in names}
    runs = {n: (lambda m=m, n=n: m(inputs[n])) for n, m in models.items()}
    first, outputs, failed = first_calls(runs)
    wanted = outputs["float32"].double()
    noise = {
        n: 20 * float(torch.log10(wanted.norm() / (wanted - y.double()).norm().clamp_min(1e-30)))
        for n, y in outputs.items()
    }
    seconds = medians(runs, rounds, repeat=5 if rows <= 16 else 1)
    ms = {n: t * 1e3 for n, t in seconds.items()}
    return {"ms": ms, "first_call_s": first, "sqnr_db": noise, "failed": failed}


def table(title: str, result: dict[str, Any]) -> str:
    """Markdown: ms, speed-ups over the bases, first call, accuracy."""
    ms = result["ms"]
    rows = []
    for name, t in ms.items():
        row = [name, f"{t:.2f}", f"{ms['float32'] / t:.2f}", f"{ms['bfloat16'] / t:.2f}"]
        row.append(f"{result['first_call_s'][name]:.1f}")
        if "cosine_mean" in result:
            row += [f"{result['cosine_mean'][name]:.4f}", f"{result['cosine_worst'][name]:.4f}"]
        else:
            row.append(f"{result['sqnr_db'][name]:.1f}")
        rows.append(row)
    headers = ["", "ms", "x float32", "x bfloat16", "first call s"]
    headers += ["cosine", "worst"] if "cosine_mean" in result else ["SQNR dB"]
    text = tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)
    failed = "".join(f"\n\n{n} did not run: {why}" for n, why in result["failed"].items())
    return f"## {title}\n\n{text}{failed}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default=str(Path(__file__).parent / "results"))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 64, 512])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES))
    parser.add_argument("--no-torchao", action="store_true")
    parser.add_argument("--no-minilm", action="store_true")
    args = parser.parse_args()
    names = [*BASES, *args.schemes, *([] if args.no_torchao else TORCHAO)]
    results: dict[str, Any] = {}
    if not args.no_minilm:
        results["MiniLM, 16 x 128 tokens"] = bench_minilm(names, args.rounds)
    for rows in args.rows:
        results[f"Llama-3.2-1B block, {rows} rows"] = bench_block(rows, names, args.rounds)
    interesting = ("amx_int8", "amx_bf16", "avx512_vnni", "avx512_bf16", "avx2")
    machine = {
        "date": datetime.date.today().isoformat(),
        "processor": _processor(),
        "features": [f for f in interesting if f in cpu_features()],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "torchao": None if args.no_torchao else metadata.version("torchao"),
        "python": platform.python_version(),
        "fxquant": fxquant.__version__,
    }
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "cpu.json").write_text(json.dumps({"machine": machine, "results": results}, indent=1))
    about = ", ".join(f"{k} {v}" for k, v in machine.items())
    text = f"# CPU\n\n{about}\n\nMedians of {args.rounds} interleaved rounds.\n\n"
    text += "\n".join(table(title, result) for title, result in results.items())
    (out / "cpu.md").write_text(text)
    print(text)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((ln.partition(":")[2].strip() for ln in lines if ln.startswith("model name")), "")


if __name__ == "__main__":
    main()
