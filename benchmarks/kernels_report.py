"""What becomes of the readings of kernels.py: the targets and their verdicts, tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from tabulate import tabulate

Reading = dict[str, Any]
"""{scheme, n, k, m, kernel} with {us, bf16_us, gb_s, of_copy, repeats} or {failure}; up to 64 rows
the error; where activations are quantized, quantize_us."""

TARGETS = (
    (("int4wo-64", "int4wo-128"), {1: 3.0, 16: 2.8, 64: 1.8, 256: 0.95, 2048: 0.95, 4096: 0.95}),
    (("int8wo",), {1: 1.8, 16: 1.75, 64: 1.5}),
    (("fp8wo",), {1: 1.8, 16: 1.7}),
    (("int8dq",), {1: 1.7, 16: 1.6, 2048: 1.6, 4096: 1.65}),
    (("fp8dq",), {16: 1.5, 2048: 1.6}),
    (("8da4w-32", "8da4w-128"), {1: 2.8, 16: 2.6, 64: 2.0, 2048: 1.4}),
)
"""(schemes, {rows: least speed-up over bfloat16}), for every layer that is ``aimed_at``."""

BANDWIDTH_TARGETS = {("int4wo-64", 1): 0.75, ("int4wo-128", 1): 0.75}
"""(scheme, rows) -> least fraction of the bandwidth of a device copy, for the same layers."""


def aimed_at(n: int, k: int) -> bool:
    """Whether TARGETS are meant for this layer; others must only not be slower than bfloat16."""
    return n >= 14336 and k == 4096


def ratios(records: Iterable[Reading]) -> dict[tuple[str, int, int, int], float]:
    """(scheme, n, k, rows) -> speed-up over bfloat16."""
    return {
        (r["scheme"], r["n"], r["k"], r["m"]): r["bf16_us"] / r["us"] for r in records if "us" in r
    }


def verdicts(records: Sequence[Reading]) -> list[Reading]:
    """For every target: what was found by shape, and by how much the worst missed it (or None)."""
    speed = ratios(records)
    share = {(r["scheme"], r["n"], r["k"], r["m"]): r["of_copy"] for r in records if "us" in r}
    aims = [
        (s, m, "x bf16", t, speed) for names, at in TARGETS for s in names for m, t in at.items()
    ]
    aims += [(s, m, "of copy", t, share) for (s, m), t in BANDWIDTH_TARGETS.items()]
    lines = []
    for scheme, m, what, target, values in aims:
        found = {
            f"{n}x{k}": value
            for (name, n, k, rows), value in values.items()
            if (name, rows) == (scheme, m) and aimed_at(n, k)
        }
        worst = min(found.values(), default=None)
        missed = target - worst if worst is not None and worst < target else None
        lines.append(
            {"scheme": scheme, "rows": m, "what": what, "target": target, "found": found,
             "missed": missed}
        )  # fmt: skip
    return lines


def slower(records: Iterable[Reading]) -> list[tuple[float, str, str, int]]:
    """(speed-up, scheme, shape, rows) of what is slower than bfloat16, or than a lower target."""
    least = {(s, m): min(t, 1.0) for names, at in TARGETS for s in names for m, t in at.items()}
    return sorted(
        (ratio, scheme, f"{n}x{k}", m)
        for (scheme, n, k, m), ratio in ratios(records).items()
        if ratio < (least.get((scheme, m), 1.0) if aimed_at(n, k) else 1.0)
    )


def defects(records: Iterable[Reading]) -> list[str]:
    """What failed, erred by more than is allowed (or is not a number), or did not repeat itself."""
    lines = []
    for r in records:
        at = f"{r['scheme']} {r['n']}x{r['k']}, {r['m']} rows, {r['kernel']}: "
        if "failure" in r:
            lines.append(at + " ".join(r["failure"].split())[:240])
            continue
        if not r.get("error", 0) <= 1:
            lines.append(at + f"error {r['error']:.3g}")
        if not r["repeats"]:
            lines.append(at + "two runs differ")
    return lines


def spans(mine: Sequence[Reading]) -> str:
    """The kernels by rows: ``cuda_w4a16 to 129, cuda_dequantize to 4096``."""
    parts: list[tuple[str, int]] = []
    for r in sorted(mine, key=lambda r: r["m"]):
        if parts and parts[-1][0] == r["kernel"]:
            parts.pop()
        parts.append((r["kernel"], r["m"]))
    return ", ".join(f"{kernel} to {m}" for kernel, m in parts)


def table(records: Sequence[Reading], scheme: str, kernel: str = "") -> str:
    """Speed-up over bfloat16 by shape and rows, and what else was read there."""
    mine = [r for r in records if r["scheme"] == scheme and kernel in ("", r["kernel"])]
    rows = sorted({r["m"] for r in mine})
    lines = []
    for n, k in dict.fromkeys((r["n"], r["k"]) for r in mine):
        here = {r["m"]: r for r in mine if (r["n"], r["k"]) == (n, k)}
        cells = [_cell(here.get(m)) for m in rows]
        first = here.get(1, {})
        rate = f"{first['gb_s']:.0f} ({first['of_copy']:.0%})" if "us" in first else "-"
        errors = [r["error"] for r in here.values() if "error" in r]
        worst = max(errors, key=lambda e: (math.isnan(e), e)) if errors else None
        error_ = "-" if worst is None else f"{worst:.2f}"
        lines.append((f"{n}x{k}", *cells, rate, error_, spans(list(here.values()))))
    headers = ("shape", *map(str, rows), "GB/s, 1 row", "error", "kernels")
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True)


def _cell(r: Reading | None) -> str:
    if r is None:
        return "-"
    return "failed" if "failure" in r else f"{r['bf16_us'] / r['us']:.2f}"


def times(records: Sequence[Reading], n: int, k: int) -> str:
    """Microseconds at one shape, of the quantization alone in brackets."""
    mine = [r for r in records if (r["n"], r["k"]) == (n, k) and "us" in r]
    rows = sorted({r["m"] for r in mine})
    base = {r["m"]: r["bf16_us"] for r in mine}
    lines = [("bf16", *(f"{base[m]:.1f}" for m in rows))]
    for scheme in dict.fromkeys(r["scheme"] for r in mine):
        here = {r["m"]: r for r in mine if r["scheme"] == scheme}
        cells = []
        for r in (here.get(m, {}) for m in rows):
            own = f" ({r['quantize_us']:.1f})" if "quantize_us" in r else ""
            cells.append(f"{r['us']:.1f}{own}" if r else "-")
        lines.append((scheme, *cells))
    return tabulate(lines, ("us", *map(str, rows)), tablefmt="github", disable_numparse=True)


def judged(records: Sequence[Reading]) -> str:
    """The targets with what was found."""
    lines = []
    for v in verdicts(records):
        worst = min(v["found"].values(), default=None)
        verdict = "reached"
        if worst is None:
            verdict = "not measured"
        elif v["missed"] is not None:
            verdict = f"missed by {v['missed']:.2f} ({v['missed'] / v['target']:.0%})"
        found = ", ".join(f"{value:.2f} at {shape}" for shape, value in v["found"].items())
        lines.append((v["scheme"], v["rows"], f"{v['target']} {v['what']}", found or "-", verdict))
    headers = ("scheme", "rows", "target", "found", "verdict")
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True)


ABOUT = (
    "Times as a user gets them over bfloat16 `F.linear`'s in the same run: the kernel that fxquant\n"
    "chooses, quantization of activations included: of one row mostly by that kernel itself, of more by\n"
    "``triton_quantize`` before it (in a model rows are quantized with the norm before them, where\n"
    "there is one). Medians of CUDA-graph replays, weights rotated past the L2 cache. GB/s: bytes of the\n"
    "packed weight over the time of the whole linear,\n"
    "and its share of a device copy's bandwidth. Error: the largest, in units of what rounding\n"
    "allows, up to 64 rows.\n"
)


def page(report: dict[str, Any]) -> str:
    """The readings as Markdown."""
    records, versions = report["records"], report["versions"]
    head = f"{report['gpu']}, " + ", ".join(f"{k} {v}" for k, v in versions.items())
    parts = [
        f"# Linears by scheme, shape and rows\n\n{head}, {report['date']}\n",
        f"Device copy: {report['copy_gb_s']:.0f} GB/s, read and written.\n",
        ABOUT,
        "" if report["complete"] else "**Not everything was measured: the time was over.**\n",
    ]
    for scheme in dict.fromkeys(r["scheme"] for r in records):
        parts.append(f"## {scheme}\n\n{table(records, scheme)}\n")
    parts.append(f"## Targets\n\n{judged(records)}\n")
    lost = [f"- {s} {shape}, {m} rows: {ratio:.2f}" for ratio, s, shape, m in slower(records)]
    parts.append("## Slower than bf16\n\n" + ("\n".join(lost) or "Nothing.") + "\n")
    found = [f"- {line}" for line in defects(records)]
    parts.append("## Defects\n\n" + ("\n".join(found) or "None.") + "\n")
    for n, k in list(dict.fromkeys((r["n"], r["k"]) for r in records))[:1]:
        parts.append(f"## Microseconds at {n}x{k} (quantization alone)\n\n{times(records, n, k)}\n")
    for name, scheme in dict.fromkeys((r["kernel"], r["scheme"]) for r in report["peers"]):
        parts.append(f"## torch's {name}, {scheme}\n\n{table(report['peers'], scheme, name)}\n")
    parts += [f"- {note}" for note in report.get("notes", [])]
    return "\n".join(part for part in parts if part)


def short(report: dict[str, Any]) -> str:
    """Geometric means over the shapes, missed targets, and how much is slower or wrong."""
    found: dict[tuple[str, int], list[float]] = {}
    for (scheme, _, _, m), ratio in ratios(report["records"]).items():
        found.setdefault((scheme, m), []).append(math.log(ratio))
    rows = sorted({m for _, m in found})
    lines = [
        (
            s,
            *(
                f"{math.exp(sum(v) / len(v)):.2f}" if (v := found.get((s, m))) else "-"
                for m in rows
            ),
        )
        for s in dict.fromkeys(s for s, _ in found)
    ]
    text = [tabulate(lines, ("x bf16, mean", *map(str, rows)), disable_numparse=True)]
    all_ = verdicts(report["records"])
    reached = sum(bool(v["found"]) and v["missed"] is None for v in all_)
    text.append(f"targets: {reached} of {len(all_)} reached")
    for v in all_:
        if v["missed"] is not None:
            at = ", ".join(f"{value:.2f} {shape}" for shape, value in v["found"].items())
            text.append(f"  {v['scheme']}, {v['rows']} rows: {v['target']} {v['what']}, found {at}")
    lost = slower(report["records"])
    text.append(f"slower than bf16: {len(lost)}" + "".join(f"\n  {line}" for line in lost[:12]))
    wrong = defects(report["records"])
    text.append(f"defects: {len(wrong)}" + "".join(f"\n  {line}" for line in wrong[:12]))
    return "\n".join(text)
