"""What becomes of the readings of accuracy.py: rows, tables, a page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accuracy_expectations import Losses, interval
from tabulate import tabulate

ABOUT = """\
Perplexity is of bytes: of tokens of four bytes it grows by about four times as many per cent. loss:
mean cross-entropy on the held-out sequences less that of the base row, in thousandths of a nat a byte,
mean of the seeds; the interval is a bootstrap (95 %) over held-out sequences of the paired difference;
seeds: the smallest and largest of the seeds' own means. KL: the mean divergence of the base's
predictions from the row's. Rounding may by luck help the loss, whose first derivative is not 0 on
held-out text; it never helps the divergence, which therefore tells small losses apart. lm_head and the
embedding stay float, as in the literature. Where no norm or linear can take up the inverse of
a smoothing scale (o_proj, whose query heads share values; in MiniLM, whose norms feed the residual sum
too, all layers but the attention's output) layers divide their inputs; AWQ leaves such layers alone.
"compiled" rows run the kernels, all others eagerly the reference arithmetic of their library.
Outliers: 2 % of each norm's channels times 64, the columns that
read them divided by 64; this enlarges activations and makes weights small, so that weight-only schemes
suffer too, and SmoothQuant's scale (equation 4) is exactly what undoes it, for every alpha. MiniLM:
cosine of the embeddings to float32's, calibrated on texts other than those measured; worst of texts and
seeds. torchao int4-*, int3-* and int2-* are its IntxWeightOnlyConfig (asymmetric; hqq: symmetric,
scales alone), int4wo-* its tile_packed_to_4d for CUDA."""


def rows_of(measured: Sequence[Losses]) -> list[dict[str, Any]]:
    """A row for each contender that ran, in their order. measured: loss and divergence, or 1 - cosine."""
    losses, *divergences = measured
    found = []
    for name, values in losses.values.items():
        if not divergences:
            row = {"cosine_mean": float(1 - values.mean()), "cosine_worst": float(1 - values.max())}
            found.append(
                {"name": name, **row, "cosine_worst_by_seed": (1 - values.max(1)).tolist()}
            )
            continue
        delta, divergence = losses.delta(name), divergences[0].delta(name)
        change = (values - losses.of(losses.base)[: len(values)]).mean(1)
        found.append(
            {
                "name": name,
                "loss": float(values.mean()),
                "perplexity": float(np.exp(values.mean(1)).mean()),
                "growth_percent": float(100 * np.expm1(delta[0])),
                "delta": float(delta[0]),
                "interval": list(interval(delta)),
                "delta_by_seed": change.tolist(),
                "divergence": float(divergence[0]),
                "divergence_interval": list(interval(divergence)),
            }
        )
    return found


def table(
    rows: Sequence[Mapping[str, Any]], failed: Mapping[str, str], fewer: Mapping[str, int]
) -> str:
    """Rows that ran; below them what failed, and what was measured with ``fewer`` seeds than the rest."""
    if "cosine_mean" in rows[0]:
        headers = ["", "cosine", "worst", "worst by seed"]
        lines = [
            [
                r["name"],
                f"{r['cosine_mean']:.5f}",
                f"{r['cosine_worst']:.5f}",
                " ".join(f"{c:.4f}" for c in r["cosine_worst_by_seed"]),
            ]
            for r in rows
        ]
    else:
        headers = ["", "perplexity", "%", "loss, mnat", "95 %", "seeds", "KL, mnat", "95 %"]
        lines = [
            [
                r["name"],
                f"{r['perplexity']:.4f}",
                f"{r['growth_percent']:+.3f}",
                f"{1e3 * r['delta']:+.2f}",
                _range(r["interval"], 1e3),
                _range((min(r["delta_by_seed"]), max(r["delta_by_seed"])), 1e3),
                f"{1e3 * r['divergence']:.3f}",
                _range(r["divergence_interval"], 1e3, ".3f"),
            ]
            for r in rows
        ]
    text = tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True)
    text += "".join(f"\n\n{name} failed: {why}" for name, why in failed.items())
    return text + "".join(f"\n\n{name}: the first {n} of the seeds" for name, n in fewer.items())


def _range(pair: Sequence[float], scale: float = 1.0, form: str = "+.2f") -> str:
    return f"{scale * pair[0]:{form}} .. {scale * pair[1]:{form}}"


def expectations_table(checked: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for c in checked:
        measured = "value" in c
        form = ".4f" if not c["unit"] else ".3f"
        value = f"{c['value']:{form}} {c['unit']}" if measured else f"needs {c['missing']}"
        spread = _range(c["interval"], form=form) if measured and c["unit"] else ""
        lines.append([c["verdict"], c["name"], c["subject"], c["bound"], value, spread])
    headers = ["", "expectation", "subject", "bound", "measured", "95 %"]
    return tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True)


def pairs_table(pairs: Sequence[Mapping[str, Any]], measure: str) -> str:
    lines = [
        [p["fxquant"], p["torchao"], f"{1e3 * p['difference']:+.3f}", _range(p["interval"], 1e3)]
        for p in pairs
    ]
    headers = ["fxquant", "torchao", f"fxquant less torchao: {measure}, thousandths", "95 %"]
    return tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True)


def page(report: Mapping[str, Any]) -> str:
    """Everything as Markdown."""
    machine = ", ".join(f"{k} {v}" for k, v in report["machine"].items())
    parts = [f"# Accuracy on a trained model\n\n{machine}\n\n{report['seeds']}\n\n{ABOUT}\n"]
    parts.append(f"## Expectations\n\n{expectations_table(report['expectations'])}\n")
    for name, subject in report["subjects"].items():
        parts.append(f"## {name}\n\nbase: {subject['base']}; {_about(subject['about'])}\n")
        parts.append(table(subject["rows"], subject["failed"], subject["fewer_seeds"]) + "\n")
        for measure, pairs in subject["side_by_side"].items():
            if pairs:
                parts.append(pairs_table(pairs, measure) + "\n")
    return "\n".join(parts)


def _about(about: Sequence[Mapping[str, Any]]) -> str:
    return "; ".join(
        ", ".join(f"{k} {v:.6g}" if isinstance(v, float) else f"{k} {v}" for k, v in one.items())
        for one in about
    )


def save(report: Mapping[str, Any], folder: Path, name: str) -> None:
    """Write NAME.json and its page, NAME.md."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / f"{name}.md").write_text(page(report))
