"""``python -m fxquant demo | schemes | tune``."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from . import demo, tuner
from .errors import FxQuantError, InvalidOption
from .scheme import ALIASES, SCHEMES


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; a named error ends it with its message and status 2."""
    parser = argparse.ArgumentParser(prog="fxquant", description="Quantize PyTorch models.")
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("demo", help="quantize a real model and compare it with itself")
    show.add_argument("--schemes", nargs="+", default=list(demo.SCHEMES), metavar="SCHEME")
    show.add_argument("--dump-dir", help="where graphs go (default: a new temporary folder)")
    show.add_argument("--rounds", type=int, default=15, help="timed rounds (default: 15)")
    commands.add_parser("schemes", help="list the number formats")
    tune = commands.add_parser("tune", help="measure kernels on a model's shapes on this GPU")
    tune.add_argument("--scheme", nargs="+", required=True, metavar="SCHEME")
    subject = tune.add_mutually_exclusive_group(required=True)
    subject.add_argument("--model", help="module:callable that returns the model")
    subject.add_argument("--shapes", nargs="+", metavar="NxK", help="out_features x in_features")
    tune.add_argument("--rows", nargs="+", type=int, default=list(tuner.ROWS))
    tune.add_argument("--table", type=Path, help="the file to update (default: the user's own)")
    args = parser.parse_args(argv)
    try:
        if args.command == "demo":
            print(demo.run(tuple(args.schemes), args.dump_dir, args.rounds))
        elif args.command == "tune":
            print(tuned(args))
        else:
            print(schemes_table())
    except FxQuantError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def tuned(args: argparse.Namespace) -> str:
    """Tune as the command line asks; a line for each scheme, shape and number of rows."""
    subject = _model(args.model) if args.model else [_pair(shape) for shape in args.shapes]
    readings = []
    for scheme in args.scheme:
        readings += tuner.tune(subject, scheme, rows=args.rows, path=args.table)
    return tuner.summary(readings)


def _model(name: str) -> Any:
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError, ValueError) as error:
        raise InvalidOption(
            name="--model", value=name, expected=f"module:callable that can be imported ({error})"
        ) from error


def _pair(shape: str) -> tuple[int, int]:
    n, _, k = shape.partition("x")
    if not (n.isdecimal() and k.isdecimal()):
        raise InvalidOption(name="--shapes", value=shape, expected="NxK, as in 4096x14336")
    return int(n), int(k)


def schemes_table() -> str:
    """Every scheme with its aliases, its floor and what it does."""
    aliases = {name: [a for a, target in ALIASES.items() if target == name] for name in SCHEMES}
    rows = [
        (s.name, ", ".join(aliases[s.name]), s.family, f"{s.sqnr:.1f}", s.summary)
        for s in SCHEMES.values()
    ]
    return tabulate(rows, headers=("scheme", "aliases", "family", "SQNR floor dB", "what it does"))
