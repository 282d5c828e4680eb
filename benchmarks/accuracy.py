"""Accuracy of every scheme and solver on a trained model: perplexity, and MiniLM's cosines.

    PYTHONPATH=. python benchmarks/accuracy.py [--size small|large] [--subjects plain outliers minilm]
        [--schemes 'int4*' ...] [--seeds 0 1 2] [--out benchmarks/results] [--cache DIR]

Trains a language model of Llama's architecture on the sources of the standard library, once (it is kept
in the user's cache directory), and quantizes it in every way that accuracy_contenders.py lists, torchao
0.18's beside fxquant's, on the same data. A second subject is the same function with outliers in its
activations, the third MiniLM with its real weights. Prints tables and which expectations were met, and
writes accuracy_cpu.json and .md, or accuracy_cuda. A row that raises is reported and the next one runs.

small: 2 M parameters, 2.5 minutes of training on two quiet cores for each of three models. large:
100 M, 5.5 minutes on an H200, one model; its seeds draw calibration data.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import fnmatch
import logging
import math
import platform
import signal
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accuracy_contenders import CONTENDERS, Contender, convert
from accuracy_expectations import EXPECTATIONS, Losses, side_by_side
from accuracy_model import SIZES
from accuracy_report import page, rows_of, save
from accuracy_subjects import SUBJECTS, Subject, about_text, device
from accuracy_train import cache_folder
from tqdm import tqdm

import fxquant


def rows_for(subject: str, patterns: Sequence[str]) -> list[Contender]:
    """The contenders of a subject that this machine has a device for; the float ones always."""
    cuda = torch.cuda.is_available()
    return [
        row
        for row in CONTENDERS[subject]
        if (cuda or not row.cuda)
        and (row.library == "float" or any(fnmatch.fnmatch(row.name, p) for p in patterns))
    ]


class Ended(Exception):
    """By SIGTERM."""


def let_be_ended(args: argparse.Namespace) -> Any:
    """SIGTERM ends the row that is being measured, or the subject that is being made, and lets no other
    begin: what there is will be saved. A second one ends the process. Returns what answered to it
    before."""

    def ended(*_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        args.deadline = -math.inf
        raise Ended("ended from outside")

    return signal.signal(signal.SIGTERM, ended)


LATE = "no time was left for it"


def readings(
    subject: Subject, rows: Sequence[Contender], label: str, args: argparse.Namespace
) -> tuple[dict[str, np.ndarray], dict[str, str], dict[str, float]]:
    """Losses [measures, items] by row, what failed with its message (LATE where it did not begin, or was
    ended), and seconds. None but the float ones begins after ``args.deadline`` (of
    ``time.perf_counter``)."""
    found, failed, seconds = {}, {}, {}
    progress = tqdm(rows, desc=label)
    for row in progress:
        progress.set_postfix_str(row.name)
        if (started := time.perf_counter()) > args.deadline and row.library != "float":
            failed[row.name] = LATE
            continue
        try:
            values = subject.measure(convert(row, subject.calibration))
            if not np.isfinite(values).all():
                raise ArithmeticError("the losses are not finite")
            found[row.name] = values
        except Ended:
            failed[row.name] = LATE
        except Exception as error:
            failed[row.name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if row.compiled:
            torch._dynamo.reset()  # its limit of recompilations counts for all models of a class
        seconds[row.name] = time.perf_counter() - started
    return found, failed, seconds


def run(args: argparse.Namespace, name: str) -> tuple[dict[str, Losses], dict[str, Any]]:
    """A subject over all seeds: by measure the losses [seeds, items] of the rows that never failed. Of rows
    for which time was over, those of the seeds before. Raises Ended, and RuntimeError for a base that
    fails, in the first seed; a later one that has no base does not count."""
    values: dict[str, list[np.ndarray]] = {}
    failed: dict[str, str] = {}
    seconds: dict[str, float] = {}
    about, models = [], []
    rows = rows_for(name, args.schemes)
    for done, seed in enumerate(args.seeds):
        try:
            subject = SUBJECTS[name](args, seed)
        except Ended:
            if not done:
                raise
            break
        todo = [row for row in rows if len(values.get(row.name, ())) == done]
        known = {}
        if subject.model in models:
            first = models.index(subject.model)
            known = {row.name: values[row.name][first] for row in todo if not row.calibrated}
        todo = [row for row in todo if row.name not in known]
        mine, wrong, took = readings(subject, todo, f"{name}, seed {seed}", args)
        mine |= known
        if subject.base not in mine:
            if not done:
                raise RuntimeError(f"{subject.base}, the base of {name}: {wrong[subject.base]}")
            break
        for row, losses in mine.items():
            values.setdefault(row, []).append(losses)
        broken = {row: f"{why} (seed {seed})" for row, why in wrong.items() if why != LATE}
        failed |= broken | {row: LATE for row in wrong.keys() - values.keys() - broken.keys()}
        values = {row: v for row, v in values.items() if row not in broken}
        seconds |= {row: seconds.get(row, 0.0) + s for row, s in took.items()}
        about.append(subject.about)
        models.append(subject.model)
    whole = {row.name: np.stack(values[row.name]) for row in rows if row.name in values}
    measured = {
        f"{name} {measure}".strip(): Losses({r: v[:, i] for r, v in whole.items()}, subject.base)
        for i, measure in enumerate(subject.measures)
    }
    return measured, {
        "base": subject.base,
        "about": about,
        "rows": rows_of(list(measured.values())),
        "failed": failed,
        "fewer_seeds": {r: len(v) for r, v in whole.items() if len(v) < len(args.seeds)},
        "seconds": {row: round(s, 2) for row, s in seconds.items()},
        "side_by_side": {key: side_by_side(losses) for key, losses in measured.items()},
    }


def machine() -> dict[str, Any]:
    """Versions and hardware."""
    found: dict[str, Any] = {"date": datetime.date.today().isoformat()}
    found["hardware"] = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    found |= {"threads": torch.get_num_threads(), "python": platform.python_version()}
    found |= {"torch": torch.__version__, "fxquant": fxquant.__version__}
    for package in ("torchao", "transformers"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((ln.partition(":")[2].strip() for ln in lines if ln.startswith("model name")), "")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = "large" if torch.cuda.is_available() else "small"
    parser.add_argument("--size", choices=SIZES, default=default)
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--schemes", nargs="+", default=["*"], help="patterns of rows' names")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, help="of training, for each model")
    parser.add_argument(
        "--limit", type=float, default=math.inf, help="minutes for all rows to begin"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--cache", type=Path, default=cache_folder())
    args = parser.parse_args(argv)
    args.deadline = time.perf_counter() + 60 * args.limit
    args.settings = SIZES[args.size]
    if args.minutes is not None:
        args.settings = dataclasses.replace(args.settings, minutes=args.minutes)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    before = let_be_ended(args)
    logging.getLogger("fxquant").setLevel(logging.ERROR)  # every row would say what is not smoothed
    started = time.perf_counter()
    models = min(args.settings.models, len({s % args.settings.models for s in args.seeds}))
    report: dict[str, Any] = {
        "machine": machine(),
        "settings": {"size": args.size, **dataclasses.asdict(args.settings)},
        "seeds": f"seeds {args.seeds}: {models} trained models; each seed draws its own calibration data",
        "text": about_text(args.settings),
    }
    measured: dict[str, Losses] = {}
    subjects = {}
    for name in args.subjects:
        try:
            found, subjects[name] = run(args, name)
            measured |= found
        except (ImportError, metadata.PackageNotFoundError, Ended) as error:
            print(f"{name} left out: {error}")
        report["subjects"] = subjects
        report["expectations"] = [
            e.check(measured) for e in EXPECTATIONS if e.subject.split()[0] in args.subjects
        ]
        report["seconds"] = round(time.perf_counter() - started, 1)
        save(report, args.out, f"accuracy_{device().type}")  # what is measured is not lost
    signal.signal(signal.SIGTERM, before)
    print(page(report))
    print(f"took {report['seconds']:.0f} s")


if __name__ == "__main__":
    main()
