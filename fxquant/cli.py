"""``python -m fxquant demo | schemes``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from tabulate import tabulate

from . import demo
from .errors import FxQuantError
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
    args = parser.parse_args(argv)
    try:
        if args.command == "demo":
            print(demo.run(tuple(args.schemes), args.dump_dir, args.rounds))
        else:
            print(schemes_table())
    except FxQuantError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def schemes_table() -> str:
    """Every scheme with its aliases, its floor and what it does."""
    aliases = {name: [a for a, target in ALIASES.items() if target == name] for name in SCHEMES}
    rows = [
        (s.name, ", ".join(aliases[s.name]), s.family, f"{s.sqnr:.1f}", s.summary)
        for s in SCHEMES.values()
    ]
    return tabulate(rows, headers=("scheme", "aliases", "family", "SQNR floor dB", "what it does"))
