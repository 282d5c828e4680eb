"""What becomes of the readings of llama.py: merged, compared with each other, a table, plots."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llama_model import UNTUNED
from tabulate import tabulate

import fxquant

Reading = dict[str, Any]

GROUP = ("device", "shape", "layers", "merged", "attention", "mode")
"""What readings must share to be compared."""
KEY = (*GROUP, "contender", "phase", "batch", "length", "prefill_mode")
"""A reading with the same values of these replaces the older one."""
ABOUT = (
    "tokens/s: wall clock of greedy decoding, the median of five runs; GB/s: codes, qparams and norms\n"
    "that a step reads, per second; model GB: the same bytes, without the table of embeddings; peak GB:\n"
    "reserved by the allocator, conversion included; compile: the first call, caches cold when a process\n"
    "begins (its first batch size); prefill: one sequence, issued kernel by kernel (mode default), and as\n"
    "one CUDA graph (reduce-overhead); cosine: the first decoded logits to bfloat16's, mean over the batch;\n"
    "repeats: all runs decode the same tokens. Weights are random: cosines say\n"
    "that the arithmetic is right, not how good a real model is. lm_head is quantized like all linears.\n"
    "*: not in one run with the bf16 row. **: over torchao without its settings for Inductor (-untuned),\n"
    "where with them there is no reading."
)


def merge(old: Iterable[Reading], new: Iterable[Reading]) -> list[Reading]:
    """All readings, of those with the same key the newest."""
    return list({tuple(r.get(k) for k in KEY): r for r in [*old, *new]}.values())


def compare(readings: Iterable[Reading], run: Reading, path: Callable[[int, str], Path]) -> None:
    """Note the cosine of the first decoded logits to bfloat16's, where both were computed.

    run: the values of GROUP and the date of the run that is meant. path: the file of the logits
    [batch, V] of a batch size and a contender.
    """
    for reading in readings:
        mine = all_equal(run, (*GROUP, "date"), reading)
        if not mine or reading["phase"] != "decode" or "failure" in reading:
            continue
        base, mine = (path(reading["batch"], name) for name in ("bf16", reading["contender"]))
        if base.exists() and mine.exists():
            a, b = np.load(base).astype(np.float64), np.load(mine).astype(np.float64)
            cosine = (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))
            reading["cosine"] = round(float(cosine.mean()), 6)
            reading["cosine_worst"] = round(float(cosine.min()), 6)


def machine() -> dict[str, Any]:
    """Versions of what was measured."""
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda}
    versions |= {"python": platform.python_version(), "fxquant": fxquant.__version__}
    for name in ("triton", "torchao"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def rounded(found: Any) -> Any:
    """``found`` with six digits of each float: more would be noise."""
    if isinstance(found, float):
        return float(f"{found:.6g}")
    if isinstance(found, dict):
        return {k: rounded(v) for k, v in found.items()}
    return [rounded(v) for v in found] if isinstance(found, list | tuple) else found


def all_equal(one: Reading, keys: Iterable[str], other: Reading) -> bool:
    return all(one[k] == other[k] for k in keys)


def groups(readings: Iterable[Reading]) -> dict[tuple[Any, ...], list[Reading]]:
    """Decoding readings, failed ones too, by GROUP and (batch, length)."""
    found: dict[tuple[Any, ...], list[Reading]] = {}
    for r in readings:
        if r["phase"] == "decode":
            key = tuple(r[k] for k in (*GROUP, "batch", "length"))
            found.setdefault(key, []).append(r)
    return found


def title(key: Sequence[Any]) -> str:
    device, shape, layers, merged, attention, mode, batch, length = key
    linears = ", merged linears" if merged else ""
    return (
        f"{shape}, {layers} layers, batch {batch}, cache {length}, {mode}, {attention}{linears}, "
        f"{device}"
    )


def page(report: dict[str, Any]) -> str:
    """The readings as Markdown, a table for each group with the date of its newest, the newest first."""
    parts = ["# Llama-shaped decoders, random weights\n"]
    for device, versions in report["machines"].items():
        parts.append(f"{device}: " + ", ".join(f"{k} {v}" for k, v in versions.items()) + "\n")
    parts.append(ABOUT + "\n")
    found = groups(report["readings"])
    newest = {key: max(r["date"] for r in mine) for key, mine in found.items()}
    for key, mine in sorted(found.items(), key=lambda item: newest[item[0]], reverse=True):
        prefills = [
            r
            for r in report["readings"]
            if r["phase"] == "prefill" and all_equal(mine[0], GROUP, r)
        ]
        parts.append(f"## {title(key)}, {newest[key][:10]}\n\n{table(mine, prefills)}\n")
    parts += [f"- {note}" for note in report.get("notes", [])]
    return "\n".join(parts)


PREFILLS = ("default", "reduce-overhead")
"""How a prompt is compiled: kernel by kernel, and as one CUDA graph. Readings of other modes are listed."""

HEADERS = (
    "",
    "tokens/s",
    "x bf16",
    "x torchao",
    "GB/s",
    "peak GB",
    "model GB",
    "compile s",
    "x bf16",
    "prefill ms",
    "x bf16",
    "as a graph ms",
    "x bf16",
    "quantize s",
    "cosine",
    "repeats",
)


def table(readings: Sequence[Reading], prefills: Sequence[Reading]) -> str:
    """One group's table, a row for each contender, and below it what failed."""
    decoded = {r["contender"]: r for r in readings}
    filled = {(r["contender"], r["prefill_mode"]): r for r in prefills}
    rows = []
    for name, r in decoded.items():
        theirs = (decoded.get(f"torchao-{name}{end}", {}) for end in ("", UNTUNED))
        twin = next((found for found in theirs if "tokens_per_s" in found), {})
        untuned = "tokens_per_s" in r and twin.get("contender", "").endswith(UNTUNED)
        bf16 = decoded.get("bf16", {})
        prompts = [[filled.get((which, mode), {}) for which in (name, "bf16")] for mode in PREFILLS]
        alone = bf16 and r["date"] != bf16["date"]
        rows.append(
            (
                f"{name} *" if alone else name,
                _text(r.get("tokens_per_s"), ".1f"),
                _ratio(r, bf16, "tokens_per_s"),
                _ratio(r, twin, "tokens_per_s") + " **" * untuned,
                _text(r.get("gb_per_s"), ".0f"),
                _text(r.get("peak_gb"), ".2f"),
                _text(r.get("model_gb"), ".3f"),
                _text(r.get("compile_s"), ".1f"),
                _ratio(r, bf16, "compile_s"),
                *(
                    text
                    for mine, base in prompts
                    for text in (
                        _text(mine.get("prefill_ms"), ".1f"),
                        _ratio(base, mine, "prefill_ms")
                        + " *" * (base.get("date") != mine.get("date") and bool(base and mine)),
                    )
                ),
                _text(r.get("quantize_s"), ".1f"),
                _text(r.get("cosine"), ".4f"),
                {True: "yes", False: "NO"}.get(r.get("deterministic"), "-"),
            )
        )
    text = tabulate(rows, headers=HEADERS, tablefmt="github", disable_numparse=True)
    for r in (*readings, *prefills):
        mode = r.get("prefill_mode", "default")
        prompt = f" {r['length']} ({mode})" if r["phase"] == "prefill" else ""
        where = f"\n\n{r['contender']}, {r['phase']}{prompt}"
        if "failure" in r:
            text += f"{where} failed: {' '.join(r['failure'].split())[:240]}"
        elif not r["finite"]:
            text += f"{where}: the logits are NOT finite"
        elif mode not in PREFILLS:
            text += f"{where}: {r['prefill_ms']:.1f} ms"
    return text


def _text(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _ratio(above: Reading, below: Reading, what: str) -> str:
    if above.get(what) is None or below.get(what) is None:
        return "-"
    return f"{above[what] / below[what]:.2f}"


def colour(contender: str) -> str:
    if contender == "bf16":
        return "#777777"
    return "#e69f00" if contender.startswith("torchao") else "#0072b2"


def bars(readings: Iterable[Reading]) -> dict[str, list[tuple[str, float]]]:
    """By the title of a group: contenders with their tokens/s, the fastest first."""
    found = {}
    for key, mine in groups(readings).items():
        values = [(r["contender"], r["tokens_per_s"]) for r in mine if "failure" not in r]
        if values:
            found[title(key)] = sorted(values, key=lambda pair: -pair[1])
    return found


def curves(records: Iterable[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """By scheme: (rows, speed-up over bf16), the geometric mean over the shapes measured there.

    Where several kernels were measured at one shape the fastest counts.
    """
    best: dict[tuple[str, int, int, int], float] = {}
    for r in records:
        if "us" in r and "bf16_us" in r:
            key = (r["scheme"], r["m"], r["n"], r["k"])
            best[key] = max(best.get(key, 0.0), r["bf16_us"] / r["us"])
    found: dict[tuple[str, int], list[float]] = {}
    for (scheme, m, _, _), ratio in best.items():
        found.setdefault((scheme, m), []).append(math.log(ratio))
    lines: dict[str, list[tuple[int, float]]] = {}
    for (scheme, m), logs in sorted(found.items()):
        lines.setdefault(scheme, []).append((m, math.exp(sum(logs) / len(logs))))
    return lines


def _pyplot() -> Any:
    """matplotlib without a display, whose files are the same for the same data."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "fxquant"
    from matplotlib import pyplot

    return pyplot


def draw_readings(readings: Iterable[Reading], path: Path) -> None:
    """tokens/s as bars, a panel for each group. Raises ImportError without matplotlib."""
    plt = _pyplot()
    panels = bars(readings)
    if not panels:
        return
    heights = [1.0 + 0.3 * len(values) for values in panels.values()]
    figure, axes = plt.subplots(
        len(panels),
        1,
        figsize=(8, sum(heights)),
        squeeze=False,
        gridspec_kw={"height_ratios": heights},
    )
    for axis, (name, values) in zip(axes[:, 0], panels.items(), strict=True):
        names, speeds = zip(*reversed(values), strict=True)
        drawn = axis.barh(names, speeds, color=[colour(n) for n in names])
        axis.bar_label(drawn, fmt="%.0f", padding=3, fontsize=8)
        axis.margins(x=0.1)
        axis.set_title(name, fontsize=9, loc="left")
        axis.set_xlabel("tokens/s", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, format="svg", metadata={"Date": None})
    plt.close(figure)


def draw_kernels(readings: Any, path: Path) -> None:
    """Speed-up of kernels over bf16 against rows, a line for each scheme.

    readings: records {scheme, n, k, m, us, bf16_us}, or a mapping that has them as "records".
    Raises ImportError without matplotlib.
    """
    plt = _pyplot()
    lines = curves(readings["records"] if isinstance(readings, dict) else readings)
    figure, axis = plt.subplots(figsize=(8, 4.5))
    axis.axhline(1.0, color="#777777", linewidth=1)
    for index, (scheme, points) in enumerate(lines.items()):
        rows, ratios = zip(*points, strict=True)
        marker = "osD^v<>P"[index % 8]
        axis.plot(rows, ratios, marker=marker, markersize=4, label=scheme)
    axis.set_xscale("log", base=2)
    ticks: list[int] = []
    for m in sorted({m for points in lines.values() for m, _ in points}):
        if not ticks or m > 1.2 * ticks[-1]:  # 17 would lie on 16
            ticks.append(m)
    axis.set_xticks(ticks, [str(m) for m in ticks], fontsize=8)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("rows")
    axis.set_ylabel("speed-up over bf16")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    figure.savefig(path, format="svg", metadata={"Date": None})
    plt.close(figure)


def save(report: dict[str, Any], folder: Path) -> None:
    """Write llama.json and its table, llama.md."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "llama.json").write_text(json.dumps(report, indent=1))
    (folder / "llama.md").write_text(page(report))
