"""Text that every machine has: the sources of Python's standard library, as bytes, split by module.

A token is a byte; byte 0, which no source holds, parts the modules. Whole modules are held out, by a
hash of their names, and files with the same content count once: nothing that is evaluated was trained
on. Tests are left out, and the tables of ``encodings``, which are near copies of each other.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

VOCABULARY = 256
SEPARATOR = b"\0"
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings"}
HELD_OUT_ONE_IN = 16


@dataclass(frozen=True)
class Text:
    """Sources by module: those to train on and those held out, each in the order of their names."""

    training: Mapping[str, bytes]
    held_out: Mapping[str, bytes]

    @property
    def digest(self) -> str:
        """Of names, contents and the split."""
        found = hashlib.sha256()
        for part in (self.training, self.held_out):
            for name, source in part.items():
                found.update(b"%d %s %d " % (part is self.held_out, name.encode(), len(source)))
                found.update(source)
        return found.hexdigest()[:16]


def is_held_out(name: str) -> bool:
    """Whether the module called ``name`` is for evaluation: a hash decides, whatever else there is."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) % HELD_OUT_ONE_IN == 0


def split(sources: Mapping[str, bytes]) -> Text:
    """Each source is one part's, whole; of copies the first by name counts."""
    seen: set[bytes] = set()
    parts: tuple[dict[str, bytes], dict[str, bytes]] = {}, {}
    for name, source in sorted(sources.items()):
        source = source.replace(SEPARATOR, b"")
        if source.strip() and source not in seen:
            seen.add(source)
            parts[is_held_out(name)][name] = source
    return Text(*parts)


def standard_library() -> Text:
    """The sources of the running Python's standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    sources = {}
    for path in root.rglob("*.py"):
        place = path.relative_to(root)
        if not LEFT_OUT & set(place.parts):
            sources[".".join(place.with_suffix("").parts)] = path.read_bytes()
    return split(sources)


def stream(sources: Mapping[str, bytes]) -> torch.Tensor:
    """All modules one after another, each with a separator before it: uint8 [bytes]."""
    joined = b"".join(SEPARATOR + source for source in sources.values())
    return torch.from_numpy(np.frombuffer(joined, dtype=np.uint8).copy())


def draw(tokens: torch.Tensor, count: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """``count`` windows of ``length`` tokens from anywhere in the stream: int64 [count, length]."""
    starts = torch.randint(len(tokens) - length + 1, (count, 1), generator=generator)
    return tokens[starts + torch.arange(length)].long()


def windows(sources: Mapping[str, bytes], count: int, length: int) -> torch.Tensor:
    """Windows that do not overlap and lie within one module each, int64 [at most count, length].

    Where there are more than ``count``, every module keeps its share: they are taken at equal steps.
    """
    found = [
        source[start : start + length]
        for source in sources.values()
        for start in range(0, len(source) - length + 1, length)
    ]
    chosen = [found[i * len(found) // count] for i in range(count)] if len(found) > count else found
    array = np.frombuffer(b"".join(chosen), dtype=np.uint8).reshape(-1, length)
    return torch.from_numpy(array.astype(np.int64))


def unigram_perplexity(text: Text) -> float:
    """Of the held-out bytes, knowing nothing but how often each occurs in training (add one)."""
    counts = [
        np.bincount(stream(part).numpy(), minlength=VOCABULARY)
        for part in (text.training, text.held_out)
    ]
    probability = (counts[0] + 1) / (counts[0] + 1).sum()
    return float(np.exp(-(counts[1] * np.log(probability)).sum() / counts[1].sum()))
