"""A fresh process finds the backend by its name, passes the mode on, and changes nothing global."""

from __future__ import annotations

import json
import subprocess
import sys

PROGRAM = """
import json, sys, torch
from torch import nn
from torch._inductor import config
before = dict(config.get_config_copy())
flags = lambda: (torch.get_float32_matmul_precision(), torch.get_num_threads(),
                 torch.get_default_dtype(), torch.is_grad_enabled())
global_before = flags()
assert not any(m.startswith("fxquant") for m in sys.modules)
listed = "fxquant" in torch._dynamo.list_backends()
model = nn.Sequential(nn.Linear(64, 32), nn.ReLU()).requires_grad_(False)
x = torch.randn(5, 64)
run = torch.compile(model, backend="fxquant", mode="max-autotune-no-cudagraphs")
y = run(x)
noise = (y - model(x)).norm() / model(x).norm()
import fxquant.inductor
mode = fxquant.inductor.mode_options("max-autotune-no-cudagraphs")
print(json.dumps({
    "listed": listed,
    "noise": noise.item(),
    "mode": mode,
    "same_config": before == dict(config.get_config_copy()),
    "same_flags": global_before == flags(),
}))
"""


def test_fresh_process(tmp_path):
    out = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, cwd=tmp_path
    )
    assert out.returncode == 0, out.stderr[-2000:]
    found = json.loads(out.stdout.strip().splitlines()[-1])
    assert found["listed"]
    assert 0 < found["noise"] < 0.02, "not quantized, or wrong"
    assert found["mode"]["max_autotune"] is True
    assert found["same_config"] and found["same_flags"]
