"""A process that measures: its readings while it runs, whose turn it is, and nothing of it left behind."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

RUNNING: list[subprocess.Popen] = []
COMPILING, TIMING = fcntl.LOCK_SH, fcntl.LOCK_EX


@contextmanager
def gate(folder: Path, kind: int) -> Iterator[None]:
    """Of the processes that share a folder several compile at once, but none while another is timed: who
    waits goes first."""
    with (folder / "gate").open("w") as file:  # closing it unlocks it
        with (folder / "queue").open("w") as queue:
            fcntl.flock(queue, fcntl.LOCK_EX)
            fcntl.flock(file, kind)
        yield


class Watched:
    """The readings of a process, each as soon as its line is in ``<path>.lines``; its output goes to
    ``<path>.log``. Afterwards ``ended`` says why there are no more. Caches of compilers are cold."""

    def __init__(self, command: Sequence[str], path: Path, limit: float):
        self.command = command
        self.lines, self.log = (
            path.with_name(f"{path.name}.lines"),
            path.with_name(f"{path.name}.log"),
        )
        self.limit = limit
        self.ended = ""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.lines.unlink(missing_ok=True)
        deadline, count = time.time() + self.limit, 0
        with (
            tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cold,
            self.log.open("w") as log,
        ):
            caches = {n: f"{cold}/{n}" for n in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
            settings: dict[str, Any] = {"env": os.environ | caches, "start_new_session": True}
            process = subprocess.Popen(
                self.command, stdout=log, stderr=subprocess.STDOUT, **settings
            )
            RUNNING.append(process)
            while not self.ended:
                self.ended = self._end(process, deadline)
                found = self._readings()
                yield from found[count:]
                count = len(found)

    def _end(self, process: subprocess.Popen, deadline: float) -> str:
        """Why there will be no more readings, "" while there may be. Waits for a second."""
        try:
            return f"its process ended with {process.wait(timeout=1)}: {self._tail()}"
        except subprocess.TimeoutExpired:
            if time.time() < deadline:
                return ""
        kill(process)
        return f"no result within {self.limit:.0f} s"

    def _readings(self) -> list[dict[str, Any]]:
        text = self.lines.read_text() if self.lines.exists() else ""
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def _tail(self) -> str:
        found = self.log.read_text(errors="replace").strip().splitlines()[-3:]
        return " | ".join(found)[-400:]


def kill(process: subprocess.Popen) -> None:
    """With the processes that compile for it."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def stop(*_: object) -> None:
    """Leave nothing running on the GPU when this process is told to end: a signal's handler."""
    for process in RUNNING:
        if process.poll() is None:
            kill(process)
    os._exit(1)
