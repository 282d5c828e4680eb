"""A fresh process finds the backend by its name, and nothing global is changed by using it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import json, logging, os, sys, warnings
import torch
import torch._dynamo, torch._functorch.config, torch._inductor.compile_fx
from torch import nn

def names(config):  # a copied set may have another order
    copy = config.get_config_copy()
    return {k: repr(sorted(v) if isinstance(v, set) else v) for k, v in copy.items()}

def snapshot():
    return {
        "inductor": names(torch._inductor.config),
        "dynamo": names(torch._dynamo.config),
        "functorch": names(torch._functorch.config),
        "precision": torch.get_float32_matmul_precision(),
        "fp32": [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32],
        "cudnn": [torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark],
        "mkldnn": [torch.backends.mkldnn.enabled, torch.backends.mkldnn.deterministic],
        "quantized": torch.backends.quantized.engine,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "dtype": str(torch.get_default_dtype()),
        "grad": torch.is_grad_enabled(),
        "denormal": (torch.tensor(1e-40) * 1.0).item(),
        "seed": torch.initial_seed(),
        "random": torch.get_rng_state().sum().item(),
        "logging": [logging.getLogger().level, len(logging.getLogger().handlers)],
        "warnings": len(warnings.filters),
        "environment": {k: v for k, v in os.environ.items() if not k.startswith("TORCHINDUCTOR")},
    }

found = {"loaded at start": any(m.startswith("fxquant") for m in sys.modules)}
found["backends"] = torch._dynamo.list_backends()
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 32)).requires_grad_(False)
x = torch.randn(5, 64)
wanted = model(x)

# Inductor's own first use of a process is not ours
warm = torch.compile(lambda x: x * 2 + 1, backend="inductor")
warm(x)

patches = []
compile_fx = torch._inductor.compile_fx.compile_fx
def recording(gm, inputs, *args, config_patches=None, **kwargs):
    patches.append(dict(config_patches or {}))
    return compile_fx(gm, inputs, *args, config_patches=config_patches, **kwargs)
torch._inductor.compile_fx.compile_fx = recording

found["before"] = snapshot()
run = torch.compile(model, backend="fxquant", mode="max-autotune-no-cudagraphs")
found["loaded by torch.compile"] = "fxquant.backend" in sys.modules
y = run(x)
found["again"] = torch.equal(run(x), y)
found["after"] = snapshot()
found["noise"] = ((y - wanted).norm() / wanted.norm()).item()
found["patches"] = {k: v for p in patches for k, v in p.items() if isinstance(v, bool)}
found["mode"] = torch._inductor.list_mode_options("max-autotune-no-cudagraphs")
print("FOUND " + json.dumps(found))
"""


LOGGED = """
import torch
from torch import nn
import fxquant
fxquant.explain(nn.Sequential(nn.Linear(64, 32)), torch.randn(5, 64))
"""


def process(program: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter, run where no source tree is importable by accident."""
    unset = ("PYTHONPATH", "TORCH_TRACE", "TORCH_LOGS", "FXQUANT_DUMP_DIR")
    environment = {k: v for k, v in os.environ.items() if k not in unset}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment | variables,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    done = process(PROGRAM, tmp_path_factory.mktemp("elsewhere"))
    line = next(ln for ln in done.stdout.splitlines() if ln.startswith("FOUND "))
    return json.loads(line.removeprefix("FOUND ")) | {"log": done.stderr}


def test_the_entry_point_is_found_without_an_import(found):
    assert not found["loaded at start"]
    assert "fxquant" in found["backends"] and "inductor" in found["backends"]


def test_the_model_is_quantized_and_repeats_itself(found):
    assert 1e-4 < found["noise"] < 0.03, "float, or wrong"
    assert found["again"]


def test_the_mode_reaches_inductor(found):
    assert found["mode"]["max_autotune"] is True
    assert found["patches"].items() >= found["mode"].items()


def test_nothing_global_is_changed(found):
    before, after = found["before"], found["after"]
    assert before.keys() == after.keys()
    for key in before:
        assert before[key] == after[key], key


def test_torchs_own_switch_turns_the_log_on(found, tmp_path):
    assert "<pass normalize" not in found["log"]
    assert "<pass normalize" in process(LOGGED, tmp_path, TORCH_LOGS="+fxquant").stderr


def test_all_ways_to_name_the_backend_are_one():
    import torch

    import fxquant.backend

    assert torch._dynamo.lookup_backend("fxquant") is fxquant.backend.fxquant_backend
    assert Path(fxquant.__file__).parent.name == "fxquant"
