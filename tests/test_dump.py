"""Dumps: graphs after every pass, their diffs, the manifest, and torch's structured trace."""

from __future__ import annotations

import json
import logging
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

import fxquant
from fxquant import passes
from fxquant.dump import Dump, readable

from .conftest import MLP, Block

X = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
STAGES = [
    "00_captured",
    *(f"{i:02d}_{name}" for i, (name, _) in enumerate(passes.pipeline("int8wo"), 1)),
]


def run(model: nn.Module, *args: torch.Tensor, **options) -> None:
    torch._dynamo.reset()
    model.requires_grad_(False)
    torch.compile(model, backend="fxquant", options=options)(*(args or (X,)))


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"graph.svg"}  # where Graphviz is installed


def test_a_file_after_every_pass_and_a_diff_between_two(graphs, tmp_path):
    run(MLP(), scheme="int8wo", dump_dir=str(tmp_path))
    folder = tmp_path / "graph_0"
    assert [path.name for path in tmp_path.iterdir()] == ["graph_0"]
    wanted = {f"{s}.py" for s in STAGES} | {f"{s}.diff" for s in STAGES[1:]} | {"manifest.json"}
    assert files(folder) == wanted
    texts = {stage: (folder / f"{stage}.py").read_text() for stage in STAGES}
    for text in texts.values():
        compile(text.replace("class <lambda>(", "class Graph("), "dump", "exec")  # valid Python
    assert "aten.linear" in texts["00_captured"] and "fxquant" not in texts["00_captured"]
    assert "fxquant.quantize" not in texts["01_normalized"]
    assert "fxquant.quantize.default" in texts["02_quantized"]
    assert "self.folded_0" in texts["03_folded"]
    assert "'gelu'" in texts["04_fused"] and "aten.gelu" not in texts["04_fused"]
    assert "fxquant.linear" not in texts["08_lowered"]
    assert texts["09_verified"] == texts["08_lowered"]


def test_a_graph_is_readable(graphs, tmp_path):
    """Shapes, strides, the user's lines, and what each fold computes for which layer."""
    run(MLP(), scheme="int4wo-32", dump_dir=str(tmp_path))
    text = (tmp_path / "graph_0" / "08_lowered.py").read_text()
    assert "f32[5, 64][64, 1]cpu" in text
    assert "return self.down(nn.functional.gelu(self.up(x)))" in text
    for layer in ("up", "down"):
        assert f": {layer}\n" in text
    assert text.count("fxquant.quantize.default(p0, 'int4wo-32', 'weight')") == 2
    assert text.count("fxquant.pack.default") == 2


def test_diffs_lead_from_one_graph_to_the_next(graphs, tmp_path):
    run(Block(), X[None], scheme="int8dq", dump_dir=str(tmp_path))
    folder = tmp_path / "graph_0"
    for before, after in pairwise(STAGES):
        old, new = ((folder / f"{stage}.py").read_text() for stage in (before, after))
        diff = (folder / f"{after}.diff").read_text()
        assert bool(diff) == (old != new)
        if diff:
            lines = diff.splitlines()
            assert lines[0].split() == ["---", before] and lines[1].split() == ["+++", after]
            removed = [line[1:] for line in lines[2:] if line.startswith("-")]
            added = [line[1:] for line in lines[2:] if line.startswith("+")]
            assert set(removed) <= set(old.splitlines()) and set(added) <= set(new.splitlines())
            unchanged = len(old.splitlines()) - len(removed)
            assert unchanged == len(new.splitlines()) - len(added)
    merged = (folder / "06_merged.diff").read_text().splitlines()
    for sign, linears in (("-", 5), ("+", 2)):
        assert sum(line.startswith(sign) and "fxquant.linear" in line for line in merged) == linears


def test_the_manifest_says_what_was_decided_and_why(graphs, tmp_path):
    recipe = {"k": None, "down": "int4wo-32", "*": "int8wo"}
    run(Block(), X[None], recipe=recipe, dump_dir=tmp_path)
    manifest = json.loads((tmp_path / "graph_0" / "manifest.json").read_text())
    assert set(manifest) == {"torch", "stages", "settings", "layers"}
    assert manifest["torch"] == torch.__version__ and manifest["stages"] == STAGES
    settings = manifest["settings"]
    assert settings["strict"] is False
    assert fxquant.Recipe.from_json(settings["recipe"]) == fxquant.Recipe.of(recipe)
    layers = {layer["name"]: layer for layer in manifest["layers"]}
    assert list(layers) == ["q", "k", "v", "gate", "up", "down"]
    assert layers["k"]["scheme"] is None and layers["k"]["reason"] == "kept float by the rule 'k'"
    assert layers["down"]["scheme"] == "int4wo-32"
    assert (layers["down"]["in_features"], layers["down"]["out_features"]) == (128, 64)
    assert layers["q"]["merged"] == ["q", "v"] and layers["q"]["rows"] == "5"
    for name in ("q", "v", "gate", "up", "down"):
        assert layers[name]["kernel"] and all(layers[name]["refused"].values())


def test_each_graph_has_a_folder_and_none_is_overwritten(graphs, tmp_path):
    class Breaks(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 32)

        def forward(self, x):
            x = self.first(x)
            torch._dynamo.graph_break()
            return self.second(x)

    model, base = Breaks(), tmp_path / "a" / "b"
    run(model, scheme="int8wo", dump_dir=base)
    run(model, scheme="int8wo", dump_dir=base)
    folders = sorted(path.name for path in base.iterdir())
    assert folders == ["graph_0", "graph_1", "graph_2", "graph_3"]
    manifests = [json.loads((base / folder / "manifest.json").read_text()) for folder in folders]
    names = [[layer["name"] for layer in m["layers"]] for m in manifests]
    assert names == [["first"], ["second"], ["first"], ["second"]]


def test_bodies_are_in_the_dump(graphs, tmp_path):
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x):
            return torch.cond(x.sum() > 0, self.a, self.b, (x,))

    run(Branch(), scheme="int8wo", dump_dir=tmp_path)
    text = (tmp_path / "graph_0" / "02_quantized.py").read_text()
    assert text.count("fxquant.quantize.default") == 2


def test_the_environment_names_the_folder(graphs, tmp_path, monkeypatch):
    monkeypatch.setenv("FXQUANT_DUMP_DIR", str(tmp_path / "environment"))
    run(MLP(), scheme="int8wo")
    assert "manifest.json" in files(tmp_path / "environment" / "graph_0")
    run(MLP(), scheme="int8wo", dump_dir=tmp_path / "option")
    assert files(tmp_path / "option" / "graph_0")
    assert len(list((tmp_path / "environment").iterdir())) == 1, "the option goes first"


def test_nothing_is_written_unasked(graphs, tmp_path, monkeypatch):
    monkeypatch.delenv("FXQUANT_DUMP_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    run(MLP(), scheme="int8wo")
    assert not list(tmp_path.iterdir())


def test_explain_dumps_too(tmp_path):
    fxquant.explain(MLP(), X, options={"scheme": "int8wo", "dump_dir": tmp_path})
    assert "08_lowered.py" in files(tmp_path / "graph_0")


def test_what_was_done_before_a_failure_is_there(tmp_path):
    with pytest.raises(Exception, match="fell back"):
        run(MLP().double(), X.double(), scheme="int4wo-32", strict=True, dump_dir=tmp_path)
    assert files(tmp_path / "graph_0") >= {"06_merged.py", "06_merged.diff"}
    assert "08_lowered.py" not in files(tmp_path / "graph_0")


def test_dumps_of_passes_run_by_hand(tmp_path):
    gm = fxquant.trace(MLP(), (X,))
    dump = Dump(str(tmp_path))
    dump.graph("before", gm)
    dump.graph("same", gm)
    dump.manifest(gm, {"why": Path("a")})
    folder = tmp_path / "graph_0"
    assert files(folder) == {"00_before.py", "01_same.py", "01_same.diff", "manifest.json"}
    assert (folder / "01_same.diff").read_text() == ""
    assert json.loads((folder / "manifest.json").read_text())["settings"] == {"why": "a"}
    assert "aten.linear" in readable(gm)


class Records(logging.Handler):
    """The texts of fxquant's artifacts by name."""

    def __init__(self):
        super().__init__()
        self.found: dict[str, str] = {}

    def emit(self, record: logging.LogRecord) -> None:
        name = record.metadata.get("artifact", {}).get("name", "")
        if name.startswith("fxquant"):
            self.found[name] = record.payload


@pytest.fixture
def structured_trace(monkeypatch) -> dict[str, str]:
    """What fxquant writes into torch's structured trace (TORCH_TRACE, read by tlparse)."""
    handler = Records()
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "handlers", [handler])
    return handler.found


def test_the_structured_trace_gets_the_same_texts(graphs, tmp_path, structured_trace):
    run(MLP(), scheme="int8wo", dump_dir=tmp_path)
    folder = tmp_path / "graph_0"
    assert set(structured_trace) == {"fxquant_manifest", *(f"fxquant_{s}" for s in STAGES)}
    for stage in STAGES:
        assert structured_trace[f"fxquant_{stage}"] == (folder / f"{stage}.py").read_text()
    assert structured_trace["fxquant_manifest"] == (folder / "manifest.json").read_text()


def test_the_structured_trace_needs_no_folder(graphs, structured_trace):
    run(MLP(), scheme="int8wo")
    assert len(structured_trace) == len(STAGES) + 1


def test_nothing_is_rendered_when_nobody_reads_it(graphs, monkeypatch):
    def fail(gm):
        raise AssertionError("a graph was rendered")

    monkeypatch.delenv("FXQUANT_DUMP_DIR", raising=False)
    monkeypatch.setattr("fxquant.dump.readable", fail)
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "handlers", [])
    run(MLP(), scheme="int8wo")
