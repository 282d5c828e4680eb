"""Training of the language model, once: a budget of minutes decides the steps, a file keeps the weights."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accuracy_data import Text, draw, stream
from accuracy_model import LanguageModel, Size, initialize
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from fxquant.measure import synchronize

RECIPE = {"betas": (0.9, 0.95), "weight_decay": 0.1, "warmup": 0.05, "last_rate": 0.05, "clip": 1.0}
"""AdamW; rates as parts of the largest one: up in a line, then down along a cosine."""

WARM, TIMED = 3, 20
"""Steps that compile, and steps that are timed to see how many the budget holds."""


def cache_folder() -> Path:
    """The user's cache directory, by the XDG convention."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fxquant"


def rate_at(step: int, steps: int) -> float:
    """The learning rate of ``step`` as a part of the largest one."""
    warmup, last = max(int(RECIPE["warmup"] * steps), 1), RECIPE["last_rate"]
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(steps - warmup, 1)
    return last + (1 - last) * (1 + math.cos(math.pi * progress)) / 2


def trained(
    name: str, size: Size, text: Text, seed: int, device: torch.device, folder: Path
) -> tuple[LanguageModel, dict[str, Any]]:
    """The model in float32 on ``device`` and how it was trained: from ``folder``, or made and kept there.

    The file's name says what the weights depend on: the text, the size (not what it is measured on),
    the recipe, the seed and the kind of device. The file has the number of steps; with the same number
    training is repeatable on the same machine.
    """
    wanted = {
        name: getattr(size, name) for name in ("length", "batch", "rate", "minutes", "epochs")
    }
    wanted |= {"shape": dataclasses.asdict(size.shape), "recipe": RECIPE, "text": text.digest}
    wanted |= {"seed": seed, "device": device.type}
    key = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:16]
    path = folder / f"accuracy-{name}-{seed}-{key}.safetensors"
    model = LanguageModel(size.shape, size.length).to(device)
    if path.exists():
        with safe_open(path, framework="pt", device=str(device)) as file:
            about = json.loads(file.metadata()["about"])
            model.load_state_dict({k: file.get_tensor(k) for k in file.keys()})  # noqa: SIM118
    else:
        about = train(model, size, text, seed)
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")
        save_file(model.state_dict(), unfinished, {"about": json.dumps(about)})
        unfinished.replace(path)
    return model.eval().requires_grad_(False), about | {"file": path.name}


def train(model: LanguageModel, size: Size, text: Text, seed: int) -> dict[str, Any]:
    """Train in place from the seed's weights on, within ``size.minutes``; steps, seconds, losses."""
    started = time.perf_counter()
    tokens = stream(text.training)
    synchronize()
    for _ in losses(model, size, tokens, seed, WARM):
        pass
    timed = time.perf_counter()
    for _ in losses(model, size, tokens, seed, TIMED):
        pass
    synchronize()
    step = (time.perf_counter() - timed) / TIMED
    left = 60 * size.minutes - (time.perf_counter() - started)
    most = int(size.epochs * len(tokens) / (size.batch * size.length))
    steps = max(min(int(left / step), most), 1)
    found = list(losses(model, size, tokens, seed, steps, progress=True))
    last = torch.stack(found[-max(steps // 20, 1) :]).mean()
    return {
        "seed": seed,
        "steps": steps,
        "epochs": steps * size.batch * size.length / len(tokens),
        "seconds": time.perf_counter() - started,
        "training_loss": float(last),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def losses(
    model: LanguageModel,
    size: Size,
    tokens: torch.Tensor,
    seed: int,
    steps: int,
    progress: bool = False,
) -> Iterator[torch.Tensor]:
    """The loss of each step of a training that starts anew."""
    initialize(model, seed)
    random = torch.Generator().manual_seed(seed)
    optimizer = _optimizer(model, size)
    device = model.lm_head.weight.device
    compiled = torch.compile(model, dynamic=False)
    for step in tqdm(range(steps), desc=f"train, seed {seed}", disable=not progress):
        for group in optimizer.param_groups:
            group["lr"] = size.rate * rate_at(step, steps)
        batch = draw(tokens, size.batch, size.length + 1, random).to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = compiled(batch[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), RECIPE["clip"])
        optimizer.step()
        optimizer.zero_grad()
        yield loss.detach()


def _optimizer(model: LanguageModel, size: Size) -> torch.optim.AdamW:
    """Norms' gains do not decay."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        groups,
        lr=size.rate,
        betas=RECIPE["betas"],
        weight_decay=RECIPE["weight_decay"],
        fused=True,
    )
