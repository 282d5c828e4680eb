"""Measured tables: from readings to choices, whose table serves, and what explain says of speed."""

from __future__ import annotations

import fxquant
from fxquant import tuner
from fxquant.lowering import cuda_cuts, nvrtc, tuning
from fxquant.lowering.select import select
from fxquant.lowering.tuning import (
    forget,
    proven_shapes,
    shipped_table,
    slower,
    tuned_kernels,
    tuned_shapes,
)
from fxquant.scheme import get_scheme
from tests.lowering.test_cuda_kernels import HOPPER, problem


def test_the_fastest_readings_become_the_table(tmp_path, monkeypatch):
    def reading(rows, kernel, shape, seconds):
        return tuner.Reading("int4wo-64", 512, 256, rows, kernel, shape, seconds, 1.0)

    few, many = (1, 4, 2, 1, 128, 4, 0), (4, 1, 2, 64, 128, 3, 1)
    readings = [
        reading(1, "cuda_w4a16", few, 1.0),
        reading(1, "cuda_w4a16", many, 2.0),
        reading(64, "cuda_w4a16", many, 1.0),
        reading(64, "cuda_dequantize", None, 3.0),
        reading(4096, "cuda_dequantize", None, 1.0),
    ]
    table = tuner.best(readings)
    assert table["kernels"] == {"int4wo-64 512x256": [["cuda_w4a16", 0], ["cuda_dequantize", 65]]}
    assert table["shapes"] == {"int4wo-64 512x256": [[0, list(few)], [2, list(many)]]}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(nvrtc, "refusal", lambda: None)
    forget()
    tuner.save(table, tmp_path / "fxquant" / "some_Hopper.json")
    try:
        steps = [("cuda_w4a16", 0), ("cuda_dequantize", 65)]
        assert tuned_kernels(HOPPER.name, "int4wo-64", "w4a16", 512, 256) == steps
        assert tuned_kernels(HOPPER.name, "int4wo-64", "w4a16", 640, 256) == steps, "the likest"
        assert tuned_kernels(HOPPER.name, "int4wo-128", "w4a16", 512, 256) == steps, "the family"
        assert tuned_kernels(HOPPER.name, "int4wo-64", "w4a16", 8192, 256) == [], "none is near"
        assert tuned_kernels(HOPPER.name, "int8wo", "w8a16", 512, 256) == [], "another family"
        assert tuned_shapes(HOPPER.name, "shapes", "int4wo-64", "w4a16", 512, 256, 40)[0] == many
        assert tuned_shapes(HOPPER.name, "shapes", "int4wo-128", "w4a16", 640, 256, 1)[0] == few, (
            "the likest"
        )
        assert tuned_shapes(HOPPER.name, "shapes", "int8wo", "w8a16", 512, 256, 1) == ()
        choice = select(problem("int4wo-64", 512, 256))
        assert choice.plan == "cuda_w4a16<65;cuda_dequantize"
    finally:
        monkeypatch.delenv("XDG_CACHE_HOME")
        forget()


def test_a_device_without_a_table_takes_its_kins():
    ours = "NVIDIA H200"
    assert shipped_table("NVIDIA H100 80GB HBM3") == shipped_table(ours)
    assert (
        shipped_table("NVIDIA H200 NVL")
        == shipped_table("NVIDIA GH200 480GB")
        == shipped_table(ours)
    )
    assert shipped_table(ours).is_file()
    assert not shipped_table("NVIDIA A100-SXM4-80GB").exists()
    kernels = tuned_kernels("NVIDIA H100 80GB HBM3", "int4wo-64", "w4a16", 4096, 4096)
    assert kernels == tuned_kernels(ours, "int4wo-64", "w4a16", 4096, 4096)


def test_cuts_that_were_the_fastest_somewhere_are_known_by_family():
    proven = proven_shapes("NVIDIA H200", "pipelines", "w4a16")
    assert proven and set(
        tuned_shapes("NVIDIA H200", "pipelines", "int4wo-64", "w4a16", 4096, 4096, 256)
    ) <= {*proven}
    assert all(len(shape) == len(cuda_cuts.Cut._fields) for shape in proven)
    assert proven_shapes("some other", "pipelines", "w4a16") == ()


def test_what_is_slower_than_bfloat16_is_told(monkeypatch):
    speeds = {"int4wo-64 4096x4096": [[1, 2.9], [129, 0.83], [2048, 0.97]]}
    table = {section: {} for section in tuning.SECTIONS} | {"speeds": speeds}
    monkeypatch.setattr(tuning, "tuned_table", lambda device: table)

    def told(n, rows, scheme="int4wo-64"):
        return slower("some", scheme, "w4a16", n, 4096, rows)

    everywhere = "slower than bfloat16 (0.83x at 129, 0.97x at 2048 rows, measured on 4096x4096)"
    assert told(4096, None) == told(6144, None) == everywhere
    assert told(4096, 1) == told(4096, 8) == "", "one row is the nearest"
    assert "0.83x at 129 rows" in told(4096, 100) and "2048" not in told(4096, 100)
    assert told(128, 129) == "", "no layer like it was measured"
    assert told(4096, 129, "int4wo-128") == "", "another scheme"
    layer = fxquant.graph.Layer(name="up", scheme="int4wo-64", slower=everywhere)
    report = fxquant.report.Report((layer,), 1)
    assert everywhere in report.reasons("up") and "0.83x" in str(report)


def test_the_speeds_of_readings_are_kept():
    readings = [
        tuner.Reading("int4wo-64", 64, 64, rows, kernel, None, seconds, 1.0)
        for rows, kernel, seconds in [(1, "a", 0.5), (1, "b", 2.0), (64, "b", 4.0)]
    ]
    assert tuner.best(readings)["speeds"] == {"int4wo-64 64x64": [[1, 2.0], [64, 0.25]]}


def test_few_cuts_serve_all_numbers_of_rows():
    """Each is a kernel to compile: layers that were not measured are cut alike for like numbers of rows."""
    scheme = get_scheme("int4wo-64")
    cuts = {cuda_cuts.cut_for(scheme, 2560, 2560, rows, "NVIDIA H200") for rows in range(33, 1025)}
    assert len(cuts) <= 30, len(cuts)
