"""The op of the C++ kernels refuses what it must not read; their build, its cache and its failures."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import torch

from fxquant.errors import BuildFailed, InvalidOption, ShapeMismatch, UnsupportedDtype
from fxquant.lowering import native
from fxquant.lowering.devices import device_row
from fxquant.lowering.kernel import KERNELS, Problem
from fxquant.lowering.native_linear import native_linear, pack
from fxquant.scheme import get_scheme
from tests import oracles


def test_op_refuses() -> None:
    """Named errors, before any memory is read."""
    sample = oracles.random_sample("8da4w-32", 4, 70, 64, torch.float32, True)
    codes, scale, zero = sample.scheme.input.quantize(sample.x)
    packed = pack(sample.scheme, sample.weight)
    good = dict(
        x=codes, x_scale=scale, x_zero=zero, packed=packed, bias=sample.bias, scheme="8da4w-32",
        epilogue="", dtype=torch.float32,
    )  # fmt: skip
    assert native_linear(**good).shape == (4, 70)
    weight, weight_scale, weight_sum = packed
    for error, change in [
        (ShapeMismatch, {"x": codes[0]}),
        (ShapeMismatch, {"x": codes[:, :63]}),
        (ShapeMismatch, {"x": codes[:, :32]}),
        (ShapeMismatch, {"x_scale": scale[:3]}),
        (ShapeMismatch, {"x_zero": zero.flatten()}),
        (ShapeMismatch, {"bias": sample.bias[:69]}),
        (ShapeMismatch, {"packed": packed[:2]}),
        (ShapeMismatch, {"packed": [weight[:, :-1], weight_scale, weight_sum]}),
        (ShapeMismatch, {"packed": [weight, weight_scale[:-1], weight_sum]}),
        (ShapeMismatch, {"packed": [weight, weight_scale, weight_sum[:-1]]}),
        (ShapeMismatch, {"scheme": "8da4w-64"}),
        (UnsupportedDtype, {"x": sample.x}),
        (UnsupportedDtype, {"x_scale": scale.double()}),
        (UnsupportedDtype, {"x_zero": zero.long()}),
        (UnsupportedDtype, {"bias": sample.bias.double()}),
        (UnsupportedDtype, {"dtype": torch.float64}),
        (UnsupportedDtype, {"packed": [weight, weight_scale.float(), weight_sum]}),
        (UnsupportedDtype, {"packed": [weight.to("meta"), weight_scale, weight_sum]}),
        (InvalidOption, {"x_scale": None}),
        (InvalidOption, {"x_zero": None}),
        (InvalidOption, {"epilogue": "tanh"}),
    ]:
        with pytest.raises(error):
            native_linear(**(good | change))


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """As in a new process with an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "_failures", {})
    for cached in (native.compiler, native._load):
        cached.cache_clear()
    yield tmp_path
    for cached in (native.compiler, native._load):
        cached.cache_clear()


def test_no_compiler(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    kernel = KERNELS["native_w8a8"]
    problem = Problem(
        scheme=get_scheme("int8dq"),
        n=64,
        k=64,
        m=None,
        dtype=torch.float32,
        bias=False,
        device=device_row(torch.device("cpu")),
    )
    assert "needs a C++ compiler" in (kernel.refusal(problem) or "")
    with pytest.raises(BuildFailed, match="there is no C"):
        native.library()


def test_compiler_that_fails(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = fresh / "c++"
    fake.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "out of luck" >&2\nexit 1\n')
    fake.chmod(0o755)
    monkeypatch.setenv("CXX", str(fake))
    with pytest.raises(BuildFailed, match="out of luck"):
        native.library()
    assert "that works" in (native.refusal() or "")
    assert not list((fresh / "fxquant").iterdir())  # no half-written library stays behind


def test_cache(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Private, named by content, built once."""
    calls = []

    def compile_nothing(arguments: list[str], command: tuple[str, ...]) -> str:
        calls.append(arguments)
        return "version 1"

    monkeypatch.setattr(native, "_run", compile_nothing)
    first = native.build()
    builds = [c for c in calls if "-o" in c]
    assert first.parent == fresh / "fxquant" and len(builds) == 1
    assert stat.S_IMODE(first.parent.stat().st_mode) == 0o700
    assert native.build() == first and len([c for c in calls if "-o" in c]) == 1
    assert native.build(portable=True) != first
    monkeypatch.setattr(native, "_run", lambda a, c: "version 2")
    assert native.build() != first
    assert len(list(first.parent.iterdir())) == 3


def test_cache_of_another_user_is_not_used(fresh: Path) -> None:
    elsewhere = fresh / "elsewhere"
    elsewhere.mkdir()
    (fresh / "fxquant").symlink_to(elsewhere)
    with pytest.raises(BuildFailed, match="not a directory of this user"):
        native.library()
    (fresh / "fxquant").unlink()
    (fresh / "fxquant").mkdir(mode=0o777)
    os.chmod(fresh / "fxquant", 0o777)
    assert stat.S_IMODE(native.cache_dir().stat().st_mode) == 0o700
