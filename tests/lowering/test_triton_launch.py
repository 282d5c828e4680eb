"""Launches of Triton kernels that are found by what they were compiled for."""

from __future__ import annotations

import itertools

import pytest
import torch

from fxquant.lowering import triton_launch
from fxquant.lowering.triton_launch import _kind_of, start


def probe(value):
    """A kernel of one argument."""


class Compiled:
    """What Triton returns for a launch: it can be launched by itself, with all constants."""

    def __init__(self):
        self.launches: list[tuple] = []

    def __getitem__(self, grid):
        return lambda *args: self.launches.append((grid, args))


class Kernel:
    """A kernel of two arguments and two constants that counts how often Triton binds it."""

    def __init__(self):
        self.arg_names = ["x", "count", "BLOCK", "OVERLAP"]
        self.bound: list[tuple] = []
        self.compiled: list[Compiled] = []

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.bound.append((grid, args, options))
            self.compiled.append(Compiled())
            return self.compiled[-1]

        return launch


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(triton_launch, "INTERPRET", False)
    return Kernel()


X = torch.zeros(8, dtype=torch.bfloat16)
CONSTANTS = {"BLOCK": 32, "OVERLAP": False}


def test_triton_binds_a_launch_once(kernel):
    for programs in (3, 5):
        start(kernel, programs, (X, 32), CONSTANTS, num_warps=4)
    assert kernel.bound == [((3,), (X, 32), {**CONSTANTS, "num_warps": 4})]
    assert kernel.compiled[0].launches == [((5, 1, 1), (X, 32, 32, False))]


@pytest.mark.parametrize(
    "arguments, constants, options",
    [
        ((X.float(), 32), {}, {}),
        ((X[1:], 32), {}, {}),  # no longer on 16 bytes
        ((X, 33), {}, {}),
        ((X, 1), {}, {}),
        ((X, 1 << 36), {}, {}),
        ((X, 32), {"BLOCK": 64}, {}),
        ((X, 32), {}, {"num_warps": 8}),
    ],
)
def test_what_triton_compiles_for_is_told_apart(kernel, arguments, constants, options):
    start(kernel, 1, (X, 32), CONSTANTS, num_warps=4)
    start(kernel, 1, arguments, CONSTANTS | constants, **{"num_warps": 4, **options})
    assert len(kernel.bound) == 2
    start(kernel, 1, (X, 48), CONSTANTS, num_warps=4)
    assert len(kernel.bound) == 2, "another multiple of 16 is of the same kind"


def test_a_tensor_that_is_missing_is_told_apart(kernel):
    kernel.arg_names = ["x", "bias", "count", "BLOCK", "OVERLAP"]
    for bias in (X, None, X):
        start(kernel, 1, (X, bias, 32), CONSTANTS, num_warps=4)
    assert [args[1] is None for _, args, _ in kernel.bound] == [False, True]
    assert len(kernel.compiled[0].launches) == 1


def test_a_kernel_that_waits_by_itself_may_begin_early(kernel):
    start(kernel, 1, (X, 32), CONSTANTS | {"OVERLAP": True}, num_warps=4)
    assert kernel.bound[0][2]["launch_pdl"] is True


def test_constants_that_the_kernel_has_elsewhere_are_refused(kernel):
    with pytest.raises(AssertionError, match="in their order"):
        start(kernel, 1, (X, 32), {"OVERLAP": False, "BLOCK": 32}, num_warps=4)


def test_kinds_are_told_apart_as_triton_does():
    """Whatever Triton compiles anew for is another kind."""
    pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    jitted = JITFunction(probe)  # not interpreted
    backend = make_backend(GPUTarget("cuda", 90, 32))
    bind = create_function_from_signature(jitted.signature, jitted.params, backend)
    values = [X, X[1:], X.float(), X.to(torch.int8), None]
    values += [0, 1, 2, 15, 16, 32, 48, 2**31 - 1, 2**31, 2**33, 2**33 + 1]
    for a, b in itertools.combinations(values, 2):
        apart = str(bind(a)[1]) != str(bind(b)[1])
        assert not apart or _kind_of(a) != _kind_of(b), (a, b)
