"""The subjects: the trained model, its twin with outliers, MiniLM; each with its data and its measure."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accuracy_contenders import BASES, Calibration
from accuracy_data import Text, draw, standard_library, stream, unigram_perplexity, windows
from accuracy_model import LanguageModel, Size, add_outliers, log_probabilities, sequence_losses
from accuracy_train import trained
from torch import nn

from fxquant.demo import BATCH, TOKENS, minilm, texts

FACTOR, SHARE = 64.0, 0.02
"""Outliers: what 2 % of each norm's channels are multiplied by."""

AT_ONCE = 16
"""Sequences that run together, in calibration and in measuring."""


@dataclass(frozen=True)
class Subject:
    """A float model of one seed. base: its row among the contenders, what losses are compared with.

    model: which float model it is: with an earlier seed's, what looks at no data loses the same again.
    measure: what a model loses on each held-out item, float64 [measures, items], the base itself 0 in
    all but the first. measures: their names; expectations call the first by the subject's alone.
    """

    base: str
    calibration: Calibration
    measure: Callable[[nn.Module], np.ndarray]
    measures: tuple[str, ...] = ("",)
    model: int = 0
    about: dict[str, Any] = field(default_factory=dict)


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def language_base() -> str:
    """What the language model computes in: bfloat16 where that is what people run."""
    return "bf16" if device().type == "cuda" else "float32"


def but_the_head(scheme: str) -> Any:
    """All linears but the projection to the vocabulary, as the literature has it."""
    return {"*lm_head*": None, "*": scheme}


@cache
def _text() -> Text:
    return standard_library()


def about_text(size: Size) -> dict[str, Any]:
    text = _text()
    return {
        "training_modules": len(text.training),
        "training_bytes": sum(map(len, text.training.values())),
        "held_out_modules": len(text.held_out),
        "held_out_bytes": sum(map(len, text.held_out.values())),
        "held_out_sequences": len(windows(text.held_out, size.held_out, size.length + 1)),
        "unigram_perplexity": unigram_perplexity(text),
        "digest": text.digest,
    }


@cache
def _trained(name: str, size: Size, seed: int, folder: Path) -> tuple[LanguageModel, dict]:
    return trained(name, size, _text(), seed, device(), folder)


def _language(args: argparse.Namespace, seed: int, outliers: bool) -> Subject:
    """Seeds beyond the number of trained models draw other calibration data for the same models."""
    size, where = args.settings, device()
    model, about = _trained(args.size, size, seed % size.models, args.cache)
    random = torch.Generator().manual_seed(1000 + seed)
    tokens = draw(stream(_text().training), size.calibration, size.length, random)
    held_out = windows(_text().held_out, size.held_out, size.length + 1).to(where)
    base = language_base()
    model = _copy(model, size).to(BASES[base])
    if outliers:
        wanted = _logits(model, held_out)
        add_outliers(model, FACTOR, SHARE, seed)
        difference = float((_logits(model, held_out) - wanted).abs().max())
        about = {"seed": seed, "largest_change_of_float_logits": difference}
    reference = log_probabilities(model, held_out, AT_ONCE)
    return Subject(
        base=base,
        calibration=Calibration(model, tokens.to(where).split(AT_ONCE), but_the_head),
        measure=lambda m: sequence_losses(m, held_out, AT_ONCE, reference).numpy(),
        measures=("", "divergence"),
        model=seed if outliers else seed % size.models,
        about=about,
    )


def _copy(model: LanguageModel, size: Size) -> LanguageModel:
    """Its own parameters: outliers and dtypes do not reach the trained one."""
    new = LanguageModel(size.shape, size.length).to(device())
    new.load_state_dict(model.state_dict())
    return new.eval().requires_grad_(False)


@torch.no_grad()
def _logits(model: nn.Module, held_out: torch.Tensor) -> torch.Tensor:
    return model(held_out[:AT_ONCE, :-1]).float()


def plain(args: argparse.Namespace, seed: int) -> Subject:
    """The language model as it was trained."""
    return _language(args, seed, outliers=False)


def with_outliers(args: argparse.Namespace, seed: int) -> Subject:
    """The same function of the tokens, with some activations enlarged and their weights made small."""
    return _language(args, seed, outliers=True)


def tokenized(chosen: Sequence[str], model: Any) -> list[dict[str, torch.Tensor]]:
    """Texts as batches of the demo's size, as the model's own tokenizer has them."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(model.config._name_or_path)
    options = {"padding": "max_length", "truncation": True, "max_length": TOKENS}
    parts = [chosen[i : i + BATCH] for i in range(0, len(chosen), BATCH)]
    return [dict(tokenizer(part, return_tensors="pt", **options)) for part in parts]


@torch.no_grad()
def sentences(args: argparse.Namespace, seed: int) -> Subject:
    """MiniLM's embeddings of the demo's texts; calibrated on other ones. Raises ImportError and
    PackageNotFoundError without it."""
    subject = minilm()
    model, where = subject.model.to(device()), device()
    inputs = {k: v.to(where) for k, v in subject.inputs.items()}
    others = [t for t in texts(CANDIDATES) if t not in set(texts(BATCH))]
    chosen = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))
    seen = tokenized([others[i] for i in chosen[: 2 * BATCH]], model)
    batches = [{k: v.to(where) for k, v in batch.items()} for batch in seen]
    wanted = subject.embed(model(**inputs), inputs)

    @torch.no_grad()
    def measure(candidate: nn.Module) -> np.ndarray:
        embedded = subject.embed(candidate(**inputs), inputs)
        cosine = F.cosine_similarity(embedded.double(), wanted.double())
        return (1 - cosine).cpu().numpy()[None]

    about = {"seed": seed, "texts": BATCH, "calibration_texts": 2 * BATCH}
    calibration = Calibration(model, batches, lambda scheme: scheme)
    return Subject("float32", calibration, measure, about=about)


CANDIDATES = 200
"""Docstrings among which the texts to calibrate MiniLM on are drawn."""

SUBJECTS: dict[str, Callable[[argparse.Namespace, int], Subject]] = {
    "plain": plain,
    "outliers": with_outliers,
    "minilm": sentences,
}
