"""How long a weight solver takes for a whole decoder of Llama's shape, and how much memory.

    PYTHONPATH=. python benchmarks/solving.py [--shape llama3-8b] [--layers 0] [--scheme int4wo-128]
        [--solver gptq] [--sequences 128] [--length 2048] [--batch 4] [--keep cpu] [--host] [--out DIR]

Random bfloat16 weights and tokens: neither changes what is computed. ``--host`` keeps the model on the
CPU, so that only a segment of it is on the GPU. The target: Llama-3-8B's shape on 128 x 2048 tokens in ten
minutes on one H200. Writes solving.json and solving.md; without a GPU the tiny shape is run.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accuracy_model import LanguageModel
from llama_model import SHAPES, Shape
from llama_report import machine
from tabulate import tabulate

import fxquant
from fxquant.measure import synchronize
from fxquant.modules import QuantLinear

HEADERS = (
    "shape",
    "layers",
    "scheme",
    "solver",
    "tokens",
    "model on",
    "s",
    "peak GPU GB",
    "worst dB",
    "less than rtn",
)


def build(shape: Shape, length: int, device: torch.device) -> LanguageModel:
    """A decoder with seeded random weights in bfloat16."""
    torch.manual_seed(0)
    with torch.device(device):
        model = LanguageModel(shape, length)
    model = model.to(torch.bfloat16).requires_grad_(False).eval()
    for name, parameter in model.named_parameters():
        parameter.fill_(1.0) if "norm" in name else parameter.normal_(0.0, 0.02)
    return model


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One run: seconds, peak memory of the GPU, and how far off the layers are."""
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    shape = SHAPES[args.shape]
    shape = dataclasses.replace(shape, layers=args.layers or shape.layers)
    model = build(shape, args.length, torch.device("cpu") if args.host else device)
    vocabulary, home = model.shape.vocab, model.cos.device
    counts = [args.batch] * (args.sequences // args.batch)
    batches = [torch.randint(vocabulary, (n, args.length), device=home) for n in counts]
    recipe = {"*lm_head*": None, "*": args.scheme}
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    synchronize()
    started = time.perf_counter()
    fxquant.quantize(
        model, recipe, solver=args.solver, batches=batches, device=device, keep=args.keep
    )
    synchronize()
    seconds = time.perf_counter() - started
    records = [m.record for m in model.modules() if isinstance(m, QuantLinear)]
    return {
        "shape": args.shape,
        "blocks": shape.layers,
        "scheme": args.scheme,
        "solver": args.solver,
        "tokens": sum(counts) * args.length,
        "model_on": str(home),
        "keep": args.keep,
        "seconds": round(seconds, 1),
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if gpu else None,
        "worst_relative_error": max(r.relative for r in records),
        "gain": 1 - sum(r.error for r in records) / sum(r.baseline for r in records),
        "layers": len(records),
        "gpu": torch.cuda.get_device_name() if gpu else None,
    }


def row(found: dict[str, Any]) -> tuple[Any, ...]:
    decibel = -10 * torch.tensor(found["worst_relative_error"]).log10()
    tail = (found["seconds"], found["peak_gb"], f"{decibel:.1f}", f"{100 * found['gain']:.0f} %")
    return *(found[k] for k in ("shape", "blocks", "scheme", "solver", "tokens", "model_on")), *tail


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    gpu = torch.cuda.is_available()
    parser.add_argument("--shape", choices=SHAPES, default="llama3-8b" if gpu else "tiny")
    parser.add_argument("--layers", type=int, default=0, help="cut the depth; 0: all")
    parser.add_argument("--scheme", default="int4wo-128")
    parser.add_argument("--solver", default="gptq")
    parser.add_argument("--sequences", type=int, default=128 if gpu else 8)
    parser.add_argument("--length", type=int, default=2048 if gpu else 64)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--keep", choices=("cpu", "disk", "device"), default="cpu")
    parser.add_argument("--host", action="store_true", help="the model stays on the CPU")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(argv)
    found = measure(args)
    table = tabulate([row(found)], headers=HEADERS, tablefmt="github")
    today = datetime.date.today().isoformat()
    report = {"date": today, "machine": machine(), "reading": found}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "solving.json").write_text(json.dumps(report, indent=2) + "\n")
    (args.out / "solving.md").write_text(f"{today}, {report['machine']}\n\n{table}\n")
    print(table)


if __name__ == "__main__":
    main()
