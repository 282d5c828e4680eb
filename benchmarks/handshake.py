"""How Triton tells specialized warps what to do, which racecheck takes for a race.

The warps beyond the first group wait at barrier 1 of the whole block, read a byte each that names
their part (or the end), and meet the first group at that barrier again before and after the part;
only then are the bytes written anew:

    first group:  write, barrier, barrier, ..., barrier, write, barrier, exit
    the others:          barrier, read, barrier, ..., barrier,  barrier, read, exit

So a barrier lies between each read and each write. racecheck (2025.3) reports them none the less: it
may be that the two sides wait at different instructions. Here are the places of these reads and
writes in the machine code; a race at any other stays one.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

FIRST = 4
"""Warps in the first group of our kernels: the byte of warp w lies at w - FIRST."""

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")
BARRIER = re.compile(r"BAR\.SYNC(\.\w+)? 0x1")
READ = re.compile(r"LDS\.U8 R\d+, \[R\d+\+UR\d+\+0x([0-9a-f]+)\]")
WRITE = re.compile(r"STS(?:\.\w+)? \[UR\d+\+0x([0-9a-f]+)\], \w+")
ACCESS = re.compile(r"access at (.+?\+0x[0-9a-f]+)")


def offsets(sass: str) -> list[int]:
    """Where a kernel, as cuobjdump prints it, reads or writes the bytes; none if it has no such."""
    code = [(int(at, 16), text) for at, text in INSTRUCTION.findall(sass)]
    pairs = list(pairwise(code))
    met = BARRIER.fullmatch
    reads = [(at, r) for (_, a), (at, b) in pairs if met(a) and (r := READ.fullmatch(b))]
    if len(reads) != 1:
        return []
    start = int(reads[0][1][1], 16) + FIRST
    writes = [(at, WRITE.fullmatch(a)) for (at, a), (_, b) in pairs if met(b)]
    return [reads[0][0], *(at for at, w in writes if w and int(w[1], 16) == start)]


def explains(places: Iterable[str], report: str) -> bool:
    """Whether all accesses of the race that racecheck reports are at these places."""
    found = ACCESS.findall(report)
    return len(found) > 1 and "Race reported" in report and set(found) <= set(places)


class Kept:
    """A Triton kernel that keeps what its last launch was compiled to."""

    def __init__(self, kernel: Any):
        self.kernel, self.compiled = kernel, None

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **options: Any) -> Any:
            self.compiled = self.kernel[grid](*args, **options)
            return self.compiled

        return launch

    def __getattr__(self, name: str) -> Any:
        return getattr(self.kernel, name)

    def places(self) -> list[str]:
        """Of the last launch, if there was one: "kernel+0x1a0". Raises CalledProcessError if its code
        cannot be read."""
        if self.compiled is None:
            return []
        from triton import knobs

        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.compiled.asm["cubin"])
            file.flush()
            words = [knobs.nvidia.cuobjdump.path, "-sass", file.name]
            sass = subprocess.run(words, capture_output=True, text=True, check=True).stdout
        return [f"{self.kernel.__name__}+0x{at:x}" for at in offsets(sass)]
