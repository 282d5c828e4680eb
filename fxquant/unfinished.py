"""What a long run has solved so far, in a folder: a run that was interrupted goes on from there."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from .errors import ResumeMismatch
from .inductor import tree_leaves
from .scheme import Quantized
from .solvers import Record, Solution

FORMAT = "fxquant-solved-1"

SAMPLE = 4096
"""Values of a tensor that its fingerprint holds: hashing all of a large model would take a minute."""


class Unfinished:
    """Solutions by segment, one file each. ``folder``: None keeps nothing.

    fingerprint: of everything that the solutions depend on; asked for only with a folder. Raises
    ResumeMismatch where the folder holds those of another run.
    """

    def __init__(self, folder: Path | None, fingerprint: Callable[[], str]):
        self.folder = folder
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self.fingerprint = fingerprint()

    def read(self, segment: int) -> dict[str, Solution] | None:
        """The solutions of a segment's layers; None if they are not there."""
        if self.folder is None or not (path := self._path(segment)).exists():
            return None
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            if (about.get("format"), about.get("fingerprint")) != (FORMAT, self.fingerprint):
                raise ResumeMismatch(path=str(path))
            found = {}
            for name, figures in json.loads(about["records"]).items():
                fields = [f"{name}|{field}" for field in Quantized._fields]
                tensors = [file.get_tensor(f) if f in file.keys() else None for f in fields]  # noqa: SIM118
                found[name] = Solution(Quantized(*tensors), Record(**figures))  # type: ignore[arg-type]
        return found

    def write(self, segment: int, solutions: Mapping[str, Solution]) -> None:
        """Keep the solutions of a segment's layers; a file is there whole or not at all."""
        if self.folder is None:
            return
        tensors = {
            f"{name}|{field}": tensor.detach().cpu().contiguous().clone()
            for name, solution in solutions.items()
            for field, tensor in zip(Quantized._fields, solution.quantized, strict=True)
            if tensor is not None
        }
        records = {name: asdict(solution.record) for name, solution in solutions.items()}
        about = {"format": FORMAT, "fingerprint": self.fingerprint, "records": json.dumps(records)}
        path = self._path(segment)
        temporary = path.with_suffix(".partial")
        save_file(tensors, temporary, about)
        os.replace(temporary, path)

    def _path(self, segment: int) -> Path:
        assert self.folder is not None
        return self.folder / f"segment_{segment:04}.safetensors"


def fingerprint(parts: Iterable[Any]) -> str:
    """A hash of ``parts``: text, and tensors by shape, dtype, up to SAMPLE of their values, and the sum
    of all their bytes."""
    digest = hashlib.sha256()
    for part in parts:
        for leaf in tree_leaves(part):
            digest.update(_read(leaf) if isinstance(leaf, torch.Tensor) else repr(leaf).encode())
    return digest.hexdigest()


def _read(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().flatten()
    total = int(flat.view(torch.uint8).sum(dtype=torch.int64))
    values = flat[:: max(len(flat) // SAMPLE, 1)].contiguous().cpu()
    about = f"{tensor.dtype} {tuple(tensor.shape)} {total}".encode()
    return about + values.view(torch.uint8).numpy().tobytes()
