"""Dumps: the graph after each pass, the diffs between them, the manifest."""

from __future__ import annotations

import json

import pytest
import torch

import fxquant
from fxquant.passes import PIPELINE

from .conftest import MLP

STAGES = ["captured", *(name for name, _ in PIPELINE)]


@pytest.mark.parametrize("by", ["option", "environment"])
@torch.no_grad()
def test_every_pass_is_dumped(by, graphs, tmp_path, monkeypatch):
    options = {"scheme": "int4wo-32"}
    if by == "option":
        options["dump_dir"] = str(tmp_path)
    else:
        monkeypatch.setenv("FXQUANT_DUMP_DIR", str(tmp_path))
    model = MLP()
    torch.compile(model, backend="fxquant", options=options)(torch.randn(3, 64))
    torch._dynamo.reset()
    torch.compile(model, backend="fxquant", options=options)(torch.randn(3, 64))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["graph_0", "graph_1"]
    folder = tmp_path / "graph_0"
    names = [f"{i:02d}_{name}" for i, name in enumerate(STAGES)]
    assert sorted(p.stem for p in folder.glob("*.py")) == names
    assert sorted(p.stem for p in folder.glob("*.diff")) == names[1:]
    text = {name: (folder / f"{name}.py").read_text() for name in names}
    assert "aten.linear" in text["00_captured"] and "fxquant" not in text["00_captured"]
    quantized = (folder / "02_quantized.diff").read_text()
    assert any(ln.startswith("+") and "fxquant.dequantize" in ln for ln in quantized.splitlines())
    assert "fxquant.linear" in text["04_fused"]
    assert "fxquant.linear" not in text["06_lowered"] and "fxquant.pack" in text["06_lowered"]
    manifest = json.loads((folder / "manifest.json").read_text())
    layers = {layer["name"]: layer for layer in manifest["layers"]}
    assert manifest["stages"] == names and set(layers) == {"up", "down"}
    assert layers["up"]["scheme"] == "int4wo-32" and layers["up"]["kernel"]
    assert layers["up"]["refused"] and layers["down"]["in_features"] == 128


@torch.no_grad()
def test_nothing_is_written_unless_asked(graphs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FXQUANT_DUMP_DIR", raising=False)
    fxquant.compile(MLP(), "int8wo")(torch.randn(3, 64))
    assert list(tmp_path.iterdir()) == []
