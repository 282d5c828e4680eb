"""A model that starts on the CPU: how long its conversion takes, and the GPU's peak memory meanwhile.

    PYTHONPATH=. python3 benchmarks/conversion.py --out DIR [--shape llama3-8b] [--schemes int8wo,int4wo-64]

The decoder of ``llama_model.py`` with all its float weights on the CPU; ``fxquant.quantize`` with the GPU as
its ``device``, which takes one weight after another there; then the model moves to the GPU. Writes
DIR/conversion.json and conversion.md.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from llama_model import SHAPES, Shape, build
from llama_report import machine, rounded
from tabulate import tabulate

import fxquant
from fxquant.measure import synchronize

ALLOWED = 2.0
"""GB beyond the converted model that its conversion may take."""


def read(shape: Shape, scheme: str, device: torch.device) -> dict[str, Any]:
    """Seconds and GB (1e9 bytes) of one conversion."""
    model, _ = build(shape, lambda part: part, device)  # random numbers are faster there
    model.cpu()
    gc.collect()
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    fxquant.quantize(model, scheme, device=device)
    synchronize()
    quantized = time.perf_counter()
    model.to(device)
    synchronize()
    tensors = [*model.parameters(), *model.buffers()]
    size = sum(t.untyped_storage().nbytes() for t in tensors) / 1e9
    reserved = torch.cuda.max_memory_reserved() / 1e9 if cuda else None
    return {
        "scheme": scheme,
        "quantize_s": quantized - started,
        "move_s": time.perf_counter() - quantized,
        "model_gb": size,
        "allocated_gb": torch.cuda.max_memory_allocated() / 1e9 if cuda else None,
        "reserved_gb": reserved,
        "beyond_gb": None if reserved is None else reserved - size,
    }


HEADERS = (
    *("scheme", "quantize s", "move s", "model GB"),
    *("peak allocated GB", "peak reserved GB", "beyond the model GB"),
)


def page(report: dict[str, Any]) -> str:
    """The readings as Markdown."""
    rows = [list(r.values()) for r in report["readings"]]
    table = tabulate(rows, HEADERS, tablefmt="github", missingval="-", floatfmt=".2f")
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    about = (
        f"{report['gpu']}, {versions}, {report['date']}; {report['shape']}'s shape. Model: codes,"
        f" qparams, norms and embeddings; {ALLOWED:.0f} GB beyond that are allowed."
    )
    return f"# Conversion of a model that starts on the CPU\n\n{about}\n\n{table}\n"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--shape", choices=SHAPES, default="llama3-8b")
    parser.add_argument("--schemes", default="int8wo,int4wo-64")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name() if device.type == "cuda" else "no GPU",
        "versions": machine(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "shape": args.shape,
        "readings": [],
    }
    args.out.mkdir(parents=True, exist_ok=True)
    for scheme in args.schemes.split(","):
        with torch.no_grad():
            report["readings"].append(rounded(read(SHAPES[args.shape], scheme, device)))
        (args.out / "conversion.json").write_text(json.dumps(report, indent=1))
        (args.out / "conversion.md").write_text(page(report))
    print(page(report))


if __name__ == "__main__":
    main(sys.argv[1:])
