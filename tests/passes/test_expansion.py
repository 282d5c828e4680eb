"""expand: quantized activations are one node for AOTAutograd, and plain ops for Inductor."""

import pytest
import torch
from torch._inductor.utils import run_and_get_code

import fxquant


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("scheme", ["int8dq", "8da4w-32", "fp8dq"])
def test_inductor_gets_the_ops(scheme, dynamic):
    model = torch.nn.Sequential(torch.nn.LayerNorm(64), torch.nn.Linear(64, 64))
    torch.compiler.reset()
    with torch.no_grad():
        run = fxquant.compile(model, scheme, dynamic=dynamic)
        y, code = run_and_get_code(run, torch.randn(3, 64))
    assert y.shape == (3, 64)
    assert code and not any("fxquant.quantize" in text for text in code)


def test_the_users_own_pass_runs_after_it():
    seen = []

    def look(graph):
        seen.extend(str(node.target) for node in graph.nodes)

    model = torch.nn.Sequential(torch.nn.LayerNorm(64), torch.nn.Linear(64, 64))
    torch.compiler.reset()
    options = {"inductor": {"post_grad_custom_pre_pass": look}}
    with torch.no_grad():
        fxquant.compile(model, "int8dq", **options)(torch.randn(3, 64))
    assert seen and not any("fxquant.quantize" in target for target in seen)


def test_kernels_overlap_unless_one_would_read_nothing():
    """The switch is on for Inductor's code generation, as the user sets it, and off again afterwards."""
    from torch._inductor import config

    class Model(torch.nn.Module):
        def __init__(self, fill):
            super().__init__()
            self.linear = torch.nn.Linear(64, 64)
            self.fill = fill

        def forward(self, x):
            y = self.linear(x) + torch.arange(64, device=x.device)
            return (y, torch.full((3,), 2.0)) if self.fill else y

    seen = []
    hook = {"post_grad_custom_post_pass": lambda graph: seen.append(config.triton.enable_pdl)}
    for fill, given in [(False, {}), (True, {}), (False, {"triton.enable_pdl": False})]:
        torch.compiler.reset()
        with torch.no_grad():
            fxquant.compile(Model(fill), "int8wo", inductor=hook | given)(torch.randn(3, 64))
    assert seen == [True, False, False]
    assert not config.triton.enable_pdl
