"""benchmarks/kernels*.py on the CPU: what they measure, their tables and verdicts."""

from __future__ import annotations

import importlib.util
import math
import sys
import time
from pathlib import Path

import pytest
import torch

from fxquant.lowering import nvrtc
from fxquant.lowering.kernel import CANONICAL, KERNELS, LAYOUTS
from fxquant.lowering.select import Choice
from fxquant.lowering.tuning import forget
from fxquant.scheme import SCHEMES, get_scheme
from tests.lowering.test_cuda_kernels import HOPPER

FOLDER = str(Path(__file__).parents[1] / "benchmarks")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(FOLDER)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch):
    """Under a name of its own: transformers looks for a package called ``kernels``."""
    spec = importlib.util.spec_from_file_location("benchmark_kernels", f"{FOLDER}/kernels.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tables():
    return importlib.import_module("kernels_report")


def reading(scheme, m, ratio, n=28672, k=4096, kernel="cuda_x", **more):
    us = 10.0
    found = {"scheme": scheme, "n": n, "k": k, "m": m, "kernel": kernel, "us": us}
    found |= {"bf16_us": us * ratio, "gb_s": 3000.0, "of_copy": 0.7, "repeats": True}
    return found | more


def of(verdicts, scheme, rows, what="x bf16"):
    (one,) = [v for v in verdicts if (v["scheme"], v["rows"], v["what"]) == (scheme, rows, what)]
    return one


def test_targets_are_those_that_were_set(tables, kernels):
    assert of(tables.verdicts([]), "int4wo-64", 16)["target"] == 2.8
    assert {v["scheme"] for v in tables.verdicts([])} == set(kernels.NAMES) <= set(SCHEMES)
    assert {v["rows"] for v in tables.verdicts([])} <= set(kernels.ROWS)
    assert len(tables.verdicts([])) == 33


def test_the_worst_layer_decides_whether_a_target_is_reached(tables):
    records = [
        reading("int8dq", 1, 1.9),
        reading("int8dq", 1, 1.6, n=14336),
        reading("int8dq", 1, 0.5, n=4096),  # none that the targets are meant for
        reading("int8dq", 16, 1.6, error=0.5),
        {"scheme": "int8dq", "n": 28672, "k": 4096, "m": 2048, "kernel": "a", "failure": "E: no"},
        reading("int4wo-64", 1, 3.4),
    ]
    found = tables.verdicts(records)
    one = of(found, "int8dq", 1)
    assert one["found"] == {"28672x4096": 1.9, "14336x4096": 1.6}
    assert one["missed"] == pytest.approx(0.1)
    assert of(found, "int8dq", 16)["missed"] is None
    assert of(found, "int8dq", 2048)["found"] == {}
    assert of(found, "int4wo-64", 1)["missed"] is None
    assert of(found, "int4wo-64", 1, "of copy")["missed"] == pytest.approx(0.05)
    text = tables.judged(records)
    lines = {
        line.split("|")[1].strip() + line.split("|")[2].strip(): line for line in text.split("\n")
    }
    assert "missed by 0.10 (6%)" in lines["int8dq1"] and "1.60 at 14336x4096" in lines["int8dq1"]
    assert "reached" in lines["int8dq16"]
    assert "not measured" in lines["int8dq2048"]


def test_nothing_may_be_slower_than_bfloat16(tables):
    records = [
        reading("int4wo-64", 256, 0.97),  # whose target is 0.95
        reading("int4wo-64", 256, 0.97, n=4096),
        reading("fp8wo", 64, 0.999),
        reading("fp8wo", 1, 1.0),
    ]
    assert [entry[1:] for entry in tables.slower(records)] == [
        ("int4wo-64", "4096x4096", 256),
        ("fp8wo", "28672x4096", 64),
    ]


def test_defects_are_found(tables):
    broken = [
        reading("int8wo", 1, 2.0, error=1.2),
        reading("int8wo", 16, 2.0, error=math.nan),
        reading("int8wo", 17, 2.0, repeats=False),
        {"scheme": "int8wo", "n": 1, "k": 2, "m": 64, "kernel": "a", "failure": "E: \n gone"},
    ]
    fine = reading("int8wo", 64, 2.0, error=0.6)
    found = tables.defects([*broken, fine])
    assert [line.split(", ")[1] for line in found] == ["1 rows", "16 rows", "17 rows", "64 rows"]
    assert "E: gone" in found[3]


def test_the_page_has_a_table_for_every_scheme_and_peer(tables):
    records = [
        reading("int4wo-64", 1, 3.2, kernel="cuda_w4a16", error=0.4),
        reading("int4wo-64", 16, 2.9, kernel="cuda_w4a16", error=math.nan),
        reading("int4wo-64", 256, 0.96, kernel="cuda_dequantize"),
        reading("int8dq", 1, 1.7, n=896, k=4864, quantize_us=2.0),
        {"scheme": "int8dq", "n": 896, "k": 4864, "m": 16, "kernel": "cuda_w8a8", "failure": "E"},
    ]
    report = {"gpu": "GPU", "versions": {"torch": "2"}, "date": "today", "copy_gb_s": 4000.0}
    report |= {"records": records, "peers": [reading("int4wo-64", 1, 1.6, kernel="tinygemm")]}
    text = tables.page({**report, "complete": True})
    row = next(line for line in text.split("\n") if line.startswith("| 28672x4096"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:4] == ["3.20", "2.90", "0.96"]
    assert cells[4:] == ["3000 (70%)", "nan", "cuda_w4a16 to 16, cuda_dequantize to 256"]
    assert "| 896x4864" in text and "failed" in text and "torch's tinygemm, int4wo-64" in text
    assert "Not everything" not in text
    assert "Not everything" in tables.page({**report, "complete": False})
    assert "3.20" in tables.short(report) and "defects: 2" in tables.short(report)
    assert "10.0 (2.0)" in tables.times(records, 896, 4864)


def test_the_plot_of_speed_ups_reads_the_records(kernels):
    curves = importlib.import_module("llama_report").curves
    assert curves([reading("int8dq", 1, 2.0), reading("int8dq", 1, 0.5, n=96)]) == {
        "int8dq": [(1, pytest.approx(1.0))]
    }


def test_arguments(kernels, capsys):
    args = kernels.parse([])
    assert args.schemes == list(kernels.NAMES) and tuple(args.shapes) == kernels.SHAPES
    args = kernels.parse(["--schemes", "int8dq", "--shapes", "96x64,32x64", "--rows", "1,5"])
    assert (args.shapes, args.rows) == ([(96, 64), (32, 64)], [1, 5])
    for wrong in (["--schemes", "int9"], ["--shapes", "4096"], ["--rows", "0"], ["--rows", "a"]):
        with pytest.raises(SystemExit):
            kernels.parse(wrong)
    assert "int9" in capsys.readouterr().err


@pytest.mark.parametrize("composed", [True, False])
def test_measuring_on_the_cpu(kernels, tables, monkeypatch, composed):
    """The whole path but for the clock: errors and repeats looked at."""
    fallback = KERNELS["dequantize"]
    graphs = []

    def backend(gm, _):
        graphs.append(gm)
        return gm

    def clock(runs, **_):
        for call in (call for calls in runs for call in calls[:2]):
            call()
        return [1e-5] * len(runs)

    monkeypatch.setattr(kernels, "BACKEND", backend)
    monkeypatch.setattr(kernels, "alternating", clock)
    monkeypatch.setattr(kernels, "replayed", lambda calls: clock([calls])[0])
    monkeypatch.setattr(kernels, "CHECKED_COLUMNS", 64)
    monkeypatch.setattr(
        kernels.tuner, "COMPOSED", kernels.tuner.COMPOSED if composed else frozenset()
    )
    one = Choice(LAYOUTS[CANONICAL], ((fallback, 0),), {})
    monkeypatch.setattr(kernels, "select", lambda problem: one)
    report = {"records": [], "peers": []}
    schemes = [get_scheme(name) for name in ("int8wo", "int8dq")]
    late = time.time() + 60
    kernels.measure(schemes, (96, 64), (1, 16, 65), CPU, 1e12, report, lambda: None, late)
    torch._dynamo.reset()
    records = report["records"]
    assert [(r["scheme"], r["m"]) for r in records[:2]] == [("int8wo", 1), ("int8dq", 1)]
    assert len(records) == 6 and not tables.defects(records)
    assert all(("error" in r) == (r["m"] <= 64) for r in records)
    assert all(("quantize_us" in r) == (r["scheme"] == "int8dq") for r in records)
    assert records[0]["gb_s"] == pytest.approx((96 * 64 + 96 * 4) / 1e-5 / 1e9, rel=1e-4)
    # one graph for a single row, one for all other numbers of rows, of each scheme
    assert len(graphs) == (2 * 2 if composed else 0)
    with pytest.raises(kernels.Late):
        kernels.measure(schemes, (96, 64), (1,), CPU, 1e12, report, lambda: None, 0.0)


def test_a_wrong_kernel_is_noticed(kernels, monkeypatch):
    """One column too large, among the last of those that are looked at."""
    monkeypatch.setattr(kernels, "CHECKED_COLUMNS", 64)
    monkeypatch.setattr(kernels, "alternating", lambda runs: [1e-5, 1e-5])
    layout = LAYOUTS[CANONICAL]
    monkeypatch.setattr(
        kernels, "select", lambda problem: Choice(layout, ((KERNELS["dequantize"], 0),), {})
    )
    monkeypatch.setattr(kernels.tuner, "COMPOSED", frozenset())
    subject = kernels.Subject(get_scheme("int8wo"), torch.randn(96, 64))
    x = kernels.activations(4, 64, CPU)

    def found():
        return subject.read(KERNELS["dequantize"], layout, x, [], 1e12)["error"]

    assert found() < 1
    subject.packs[CANONICAL][0][1][-1] *= 2
    assert found() > 1


def test_widened_activations_are_made_with_their_codes(kernels, monkeypatch):
    """As a graph has them: no kernel between quantization and product."""
    scheme, seen = get_scheme("8da4w-32"), []
    monkeypatch.setattr(kernels, "select", lambda problem: Choice(LAYOUTS[CANONICAL], (), {}))
    monkeypatch.setattr(torch.ops.fxquant, "widened_linear", lambda *args: seen.append(args))
    subject = kernels.Subject(scheme, torch.randn(96, 64))
    x = kernels.activations(4, 64, CPU)
    subject.call(KERNELS["cuda_pipeline_w4a8_widened"], CANONICAL)(x, *subject.packs[CANONICAL][0])
    ((codes, scale, zero, packed, bias, *rest),) = seen
    q = scheme.input.quantize(x)
    assert torch.equal(codes, kernels.widen(q.codes, q.zero)) and codes.dtype == torch.bfloat16
    assert torch.equal(scale, q.scale) and zero is bias is None
    assert rest == ["8da4w-32", "", 96, torch.bfloat16] and len(packed) == 2


def test_what_is_launched_is_compiled_ahead(kernels, monkeypatch):
    monkeypatch.setattr(nvrtc, "refusal", lambda: None)
    monkeypatch.setattr(kernels, "device_row", lambda device: HOPPER)
    built = {}
    monkeypatch.setattr(
        kernels.tuner,
        "build",
        lambda cutter, scheme, cuts, device: built.update(
            {scheme.name: (cuts, cutter.types(scheme)[0])}
        ),
    )
    schemes = [get_scheme(name) for name in ("int4wo-64", "fp8dq")]
    kernels.build(schemes, [(256, 1024)], (1, 16, 64), torch.device("cuda", 0))
    assert {cut.tokens for cut in built["int4wo-64"][0]} >= {1, 16}
    assert built["int4wo-64"][1] == torch.bfloat16 and built["fp8dq"][1] == torch.float8_e4m3fn
    forget()


def test_speeds_are_noted_as_a_table_has_them(kernels):
    records = [
        {"scheme": "int8dq", "n": 8, "k": 16, "m": m, "us": us, "bf16_us": 3.0}
        for m, us in ((1, 2.0), (64, 4.0))
    ]
    records.append({"scheme": "int8dq", "n": 8, "k": 16, "m": 65, "failure": "none"})
    found = kernels.speeds(records)
    assert found == {"int8dq 8x16": [[1, 1.5], [64, 0.75]]}
