"""How far the worst cosine of MiniLM's embeddings depends on which texts it is the worst of.

    PYTHONPATH=.:benchmarks python benchmarks/minilm_spread.py [--out benchmarks/results]

accuracy.py reports the worst of 16 texts, with bounds in the fourth digit. Here the same rows embed 200
docstrings of the standard library, none of them among those that statistics are taken from: the range in
which the worst of 16 of them lies, and how often it meets the bound. And the scale of int8 by three
conventions for the end of the range (the largest value over 127.5, as PyTorch and torchao have it; the
smallest scale at which neither end clips; over 127), of weights and of activations. Writes
minilm_spread.md.
"""

from __future__ import annotations

import argparse
import ast
import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accuracy_contenders import MINILM, Calibration, convert
from accuracy_data import standard_library
from accuracy_expectations import WORST_COSINES
from accuracy_subjects import tokenized
from tabulate import tabulate
from torch import nn

from fxquant.affine import choose_qparams_affine, dequantize_affine, quantize_affine
from fxquant.demo import BATCH, minilm, texts

MEASURED, DRAWS = 200, 4000


def docstrings() -> list[str]:
    """Those of the standard library that are as long as the demo's, shuffled."""
    text, found = standard_library(), set()
    for source in (text.training | text.held_out).values():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                found.add(ast.get_docstring(node) or "")
    known = set(texts(10 * BATCH))
    chosen = sorted(doc for doc in found - known if len(doc) > 400)
    return [chosen[i] for i in np.random.default_rng(0).permutation(len(chosen))]


def over_127(x: torch.Tensor) -> torch.Tensor:
    scale = x.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny) / 127
    return torch.round(x / scale) * scale


def mapped(mapping: str) -> Callable[[torch.Tensor], torch.Tensor]:
    def fake_quantized(x: torch.Tensor) -> torch.Tensor:
        blocks = [1] * (x.dim() - 1) + [x.shape[-1]]
        scale, _ = choose_qparams_affine(x, blocks, torch.int8, mapping=mapping)  # type: ignore[arg-type]
        codes = quantize_affine(x, blocks, scale, None, torch.int8)
        return dequantize_affine(codes, blocks, scale, None, torch.int8, output_dtype=x.dtype)

    return fake_quantized


ENDS = {
    "largest / 127.5": mapped("symmetric"),
    "no clipping": mapped("symmetric_no_clipping_err"),
    "largest / 127": over_127,
}


def simulated(model: nn.Module, weights: str, activations: str | None) -> nn.Module:
    """A copy whose linears have rounded weights and, if asked, round what they read."""
    model = copy.deepcopy(model)
    for linear in [m for m in model.modules() if isinstance(m, nn.Linear)]:
        linear.weight.copy_(ENDS[weights](linear.weight))
        if activations is not None:
            linear.register_forward_pre_hook(lambda _, x, end=ENDS[activations]: (end(x[0]),))
    return model


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    subject = minilm()
    model = subject.model.eval()
    others = docstrings()
    seen, unseen = others[: 2 * BATCH], others[2 * BATCH :][:MEASURED]
    measured = [subject.inputs, *tokenized(unseen, model)]
    wanted = [subject.embed(model(**batch), batch).double() for batch in measured]

    def cosines(candidate: nn.Module) -> np.ndarray:
        """Of the demo's 16 texts, then of the others."""
        found = [subject.embed(candidate(**batch), batch).double() for batch in measured]
        pairs = zip(found, wanted, strict=True)
        return torch.cat([F.cosine_similarity(a, b) for a, b in pairs]).numpy()

    drawn = np.random.default_rng(0).integers(len(unseen), size=(DRAWS, BATCH))
    calibration = Calibration(model, tokenized(seen, model), lambda scheme: scheme)
    lines = []
    for row in [r for r in MINILM if r.name in WORST_COSINES]:
        found = cosines(convert(row, calibration))
        worst = found[BATCH:][drawn].min(1)
        low, middle, high = np.quantile(worst, (0.05, 0.5, 0.95))
        met = f"{100 * (worst >= WORST_COSINES[row.name]).mean():.0f} %"
        cells = (found[:BATCH].min(), found[BATCH:].mean(), low, middle, high)
        lines.append([row.name, *(f"{c:.5f}" for c in cells), WORST_COSINES[row.name], met])
        print(lines[-1], flush=True)
    headers = [
        "",
        "worst of the demo's 16",
        f"mean of {MEASURED} others",
        "worst of 16 of them: 5 %",
    ]
    headers += ["median", "95 %", "bound", "met"]
    by_texts = tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True)
    lines = []
    for weights in ENDS:
        for activations in (None, *ENDS):
            found = cosines(simulated(model, weights, activations))
            cells = (found[:BATCH].min(), found[BATCH:].mean(), found[BATCH:].min())
            lines.append([weights, activations or "float", *(f"{c:.5f}" for c in cells)])
            print(lines[-1], flush=True)
    headers = [
        "weights",
        "activations",
        "worst of the demo's 16",
        "mean of the others",
        "their worst",
    ]
    by_ends = tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True)
    about = " ".join(__doc__.split("\n\n")[2].split())
    page = f"# The worst of 16 texts\n\ntorch {torch.__version__}\n\n{about}\n\n{by_texts}\n\n{by_ends}\n"
    (args.out / "minilm_spread.md").write_text(page)


if __name__ == "__main__":
    main()
