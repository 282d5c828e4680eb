"""The CUDA and Triton kernels under compute-sanitizer: memory (memcheck) and races (racecheck).

    PYTHONPATH=. python3 benchmarks/sanitize.py --out DIR [--only cuda_w4a16] [--seconds 240]
    PYTHONPATH=. python3 benchmarks/sanitize.py --case "NAME[;NAME]"     the cases alone, unchecked

A plain run compiles everything and checks the results; then both tools run the same cases
(sanitize_cases.py) side by side, each in one process. memcheck gets every tensor as an allocation
of its own.

racecheck gets a ``cuda_pipeline`` in which every lane arrives at its barriers (sanitize_cases.py says why).
What it says about Triton's own handshake of specialized warps (handshake.py) is counted apart.
Writes DIR/sanitize.json and DIR/sanitize.md; exits with 1 if a tool reports anything, is missing, or
a case did not run.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import handshake
import torch
from llama_report import machine
from sanitize_cases import EVERY_LANE, build, cases, let_every_lane_arrive, names_of, run
from tabulate import tabulate

OPTIONS = (
    # (tool or "" for both, option, value): those that this release of the sanitizer knows
    ("", "--print-limit", "300"),
    ("", "--target-processes", "application-only"),
    ("", "--destroy-on-device-error", "kernel"),  # the cases after it still run
    ("", "--show-backtrace", "no"),
    ("", "--launch-timeout", "0"),  # importing torch may take longer than the 10 seconds it waits
    ("memcheck", "--report-api-errors", "no"),  # torch asks for symbols that older drivers lack
    ("memcheck", "--padding", "512"),  # what lies past an allocation is nobody's
)
PAUSE = 0.15
"""Seconds after a case: the sanitizer prints what it found from another process."""

REPORTED = 9
"""The exit code of a tool that reported something."""

QUIET = "After millions of hazards racecheck reports no more: mend the first case, then run the others.\n"

PREFIX = "========="
BOILERPLATE = ("COMPUTE-SANITIZER", "ERROR SUMMARY", "RACECHECK SUMMARY", "LEAK SUMMARY")
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)")


def child(names: str) -> int:
    """Run the named cases, each between two printed marks."""
    known = {case.name: case for case in cases()}
    todo = list(known.values()) if names == "all" else [known[n] for n in names.split(";")]
    print(f"=== device {torch.cuda.get_device_name(0)}", flush=True)
    if os.environ.get(EVERY_LANE):
        let_every_lane_arrive()
    build(todo)
    code = 0
    for case in todo:
        print(f"=== case {case.name}", flush=True)
        try:
            with torch.no_grad():
                error, places = run(case)
            torch.cuda.synchronize()
            if places:
                print("=== handshake", *places, flush=True)
            verdict = "done" if error <= 1 else f"failed error {error:.3g}"
        except Exception as failure:
            what = " ".join(str(failure).split())[:300]
            verdict = f"failed {type(failure).__name__}: {what}"
        code |= verdict != "done"
        time.sleep(PAUSE)
        print(f"=== {verdict}", flush=True)
    print("=== end", flush=True)
    return code


def parse(text: str) -> dict[str, Any]:
    """What a run printed: {"device", "cases", "outside", "handshakes", "summary"}.

    cases: {name: {"state", "reports", "handshake"}}; state: "done", "failed ..." or "not finished".
    A report is the text of one finding; those of no case are in "outside", those of a handshake
    only counted. summary: the tool's own count, None where it printed none.
    """
    found: dict[str, Any] = {"device": "", "cases": {}, "outside": []}
    reports = found["outside"]
    name = ""
    for line in text.splitlines():
        if line.startswith("=== "):
            word, _, rest = line[4:].partition(" ")
            if word == "device":
                found["device"] = rest
            elif word == "case":
                name, reports = rest, []
                empty = {"state": "not finished", "reports": reports, "handshake": []}
                found["cases"][name] = empty
            elif word == "handshake":
                found["cases"][name]["handshake"] = rest.split()
            elif word in ("done", "failed"):  # what is printed until the next case is still its own
                found["cases"][name]["state"] = line[4:]
            elif word == "end":
                reports = found["outside"]
        elif line.startswith(PREFIX):
            body = line[len(PREFIX) :]
            if not body.strip() or body.strip().startswith(BOILERPLATE):
                continue
            if body.startswith("  ") and reports:
                reports[-1] += "\n" + body.strip()
            else:
                reports.append(body.strip())
    found["handshakes"] = 0
    for case in found["cases"].values():
        races = [r for r in case["reports"] if not handshake.explains(case["handshake"], r)]
        found["handshakes"] += len(case["reports"]) - len(races)
        case["reports"] = races
    counts = SUMMARY.findall(text)
    found["summary"] = sum(map(int, counts)) if counts else None
    return found


def clean(found: dict[str, Any], names: Sequence[str]) -> bool:
    """Whether a checked run did all cases, and nothing was found."""
    ran, known = found["cases"], found["handshakes"]
    code = REPORTED if known else 0
    quiet = found["code"] == code and found["summary"] == known and not found["outside"]
    return quiet and all(n in ran and state(ran[n]) == "clean" for n in names)


def state(case: dict[str, Any] | None) -> str:
    """One word, or a few, about a case."""
    if case is None:
        return "not run"
    if case["reports"]:
        return f"{len(case['reports'])} reported"
    return "clean" if case["state"] == "done" else case["state"]


def page(report: dict[str, Any]) -> str:
    """The findings as Markdown."""
    tools = report["runs"]
    versions = ", ".join(f"{k} {v}" for k, v in report["versions"].items())
    known = sum(found["handshakes"] for found in tools.values())
    verdict = "Nothing was reported" if report["clean"] else "**NOT clean**"
    verdict += f", but for {known} handshakes of Triton's warps (handshake.py)." if known else "."
    head = f"{report['gpu']}, {versions}, {report['sanitizer']}, {report['date']}"
    lines = [
        (name, *(state(found["cases"].get(name)) for found in tools.values()))
        for name in report["cases"]
    ]
    table = tabulate(lines, ("case", *tools), tablefmt="github", disable_numparse=True)
    parts = [f"# Kernels under compute-sanitizer\n\n{head}\n\n{verdict}\n", f"{table}\n"]
    parts += [f"{report['note']}\n"] if "note" in report else []
    for tool, found in tools.items():
        texts = [(name, t) for name, case in found["cases"].items() for t in case["reports"]]
        texts += [("outside of the cases", t) for t in found["outside"]]
        shown = [f"{name}:\n```\n{text[:1500]}\n```\n" for name, text in texts[:20]]
        if not clean(found, report["cases"]):
            count = f"exit code {found['code']}, the tool counts {found['summary']}"
            if tool == "racecheck" and texts:
                shown.append(QUIET)
            shown.append(f"{count}; the output ends with\n```\n{found['tail']}\n```\n")
        if shown:
            parts.append(f"## {tool}\n\n" + "\n".join(shown))
    return "\n".join(parts)


def executable() -> str | None:
    """compute-sanitizer, of the path or of the CUDA toolkit."""
    name, home = "compute-sanitizer", os.environ.get("CUDA_HOME", "/usr/local/cuda")
    places = (name, f"{home}/bin/{name}", f"{home}/{name}/{name}")
    return next((found for place in places if (found := shutil.which(place))), None)


def command(tool: str, path: str, known: str, port: int) -> list[str]:
    """compute-sanitizer with the options that ``known``, its help, names."""
    words = [path, "--tool", tool, "--error-exitcode", str(REPORTED)]
    for only, option, value in (*OPTIONS, ("", "--port", str(port))):
        if only in ("", tool) and option in known:
            words += [option, value]
    return words


def ran(
    prefix: Sequence[str], names: Sequence[str], deadline: float, **more: str
) -> dict[str, Any]:
    """The cases in a process of their own: what it printed, parsed; its exit code; the last lines.

    more: its environment. At the deadline it is ended, with all it started.
    """
    words = [*prefix, sys.executable, str(Path(__file__).resolve()), "--case", ";".join(names)]
    env = {**os.environ, **more, "PYTHONUNBUFFERED": "1"}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            words, stdout=log, stderr=subprocess.STDOUT, env=env, start_new_session=True
        )
        try:
            process.wait(max(deadline - time.time(), 1))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.seek(0)
        text = log.read()
    return {**parse(text), "code": process.returncode, "tail": text[-2500:]}


def check(path: str, names: Sequence[str], deadline: float) -> dict[str, Any]:
    """The report: a plain run, which fills the caches of compiled kernels, then both tools."""
    begin = time.time()
    ask = {"capture_output": True, "text": True}
    asked = [subprocess.run([path, f"--{what}"], **ask) for what in ("help", "version")]  # type: ignore
    known, version = (found.stdout + found.stderr for found in asked)
    runs = {"plain": ran([], names, deadline)}
    runs["plain"]["summary"] = 0  # no tool counts
    built = time.time()
    if runs["plain"]["cases"]:
        own = {
            "memcheck": {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            "racecheck": {EVERY_LANE: "1"},
        }
        with ThreadPoolExecutor(len(own)) as pool:
            futures = {
                tool: pool.submit(
                    ran, command(tool, path, known, 49152 + 100 * i), names, deadline, **more
                )
                for i, (tool, more) in enumerate(own.items())
            }
            runs |= {tool: future.result() for tool, future in futures.items()}
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "gpu": runs["plain"]["device"],
        "versions": machine(),
        "sanitizer": " ".join(["compute-sanitizer", *re.findall(r"Version (\S+)", version)]),
        "seconds": {"plain": round(built - begin), "checked": round(time.time() - built)},
        "cases": list(names),
        "clean": len(runs) == 3 and all(clean(found, names) for found in runs.values()),
        "runs": runs,
    }


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, default=Path(__file__).parent / "results")
    add("--only", default="", help="part of a case's name")
    add("--seconds", type=float, default=240, help="then what still runs is ended")
    add("--case", default="", help="run these cases unchecked (all, or names with ; between)")
    args = parser.parse_args(argv)
    if args.case:
        return child(args.case)
    path, names = executable(), names_of(args.only)
    if path is None or not names:
        print("compute-sanitizer is not installed" if path is None else f"no case has {args.only}")
        return 1
    report = check(path, names, time.time() + args.seconds)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "sanitize.json").write_text(json.dumps(report, indent=1))
    (args.out / "sanitize.md").write_text(page(report))
    print(page(report))
    print(f"{report['seconds']} s, {'clean' if report['clean'] else 'NOT clean'}")
    return 0 if report["clean"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
