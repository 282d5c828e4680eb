"""Measured tables: from readings to choices, whose table serves, and what explain says of speed."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

import fxquant
from fxquant import tuner
from fxquant.lowering import cuda_cuts, cuda_layout, cuda_pipeline, nvrtc, tuning
from fxquant.lowering.cuda_shapes import Shape, shape_for
from fxquant.lowering.select import select
from fxquant.lowering.tuning import (
    forget,
    proven_shapes,
    shipped_table,
    slower,
    tuned_kernels,
    tuned_shapes,
    tuned_table,
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


def test_cuts_that_were_the_fastest_somewhere_are_known_by_family(monkeypatch):
    few, many = [2, 1, 64, 256, 4, 1, 1], [2, 1, 256, 64, 5, 1, 1]
    cuts = {
        "int4wo-64 64x64": [[33, few]],
        "int4wo-128 8x8": [[0, many], [9, few]],
        "int8wo 8x8": [],
    }
    table = {section: {} for section in tuning.SECTIONS} | {"pipelines": cuts}
    monkeypatch.setattr(tuning, "tuned_table", lambda device: table)
    assert proven_shapes("other", "pipelines", "w4a16") == (tuple(few), tuple(many))
    assert proven_shapes("other", "pipelines", "w8a16") == ()


@pytest.mark.parametrize("rows", [33, 40, 64, 72, 80, 112, 160, 300, 2048])
@pytest.mark.parametrize("n, k", [(20480, 5120), (10240, 2560), (7168, 5120), (1024, 1024)])
def test_the_model_picks_what_it_thinks_the_fastest(n, k, rows):
    """Within what it distrusts unproven cuts by, and what is lost by cutting like numbers of rows alike."""
    form = cuda_layout.format_of(get_scheme("int4wo-64"))
    tokens = cuda_cuts.token_counts(rows)
    best = min(cut.time(form, n, rows) for cut in cuda_cuts.cuts(form, n, k, rows, tokens))
    for device in ("NVIDIA H200", "another"):
        cut = cuda_cuts.cut_for(get_scheme("int4wo-64"), n, k, rows, device)
        assert cut.fits(form, k)
        assert cut.time(form, n, rows) <= 1.01 * cuda_cuts.UNPROVEN * 1.2 * best


def test_a_proven_cut_is_preferred_to_one_that_is_little_faster():
    scheme = get_scheme("int4wo-64")
    proven = {(*s[:3], s[5]) for s in proven_shapes("NVIDIA H200", "pipelines", "w4a16")}
    cut = cuda_cuts._picked(
        "pipelines", cuda_layout.format_of(scheme), scheme, 9216, 4096, 256, "NVIDIA H200"
    )
    assert (*cut[:3], cut[5]) in proven


def test_clusters_do_not_find_places_everywhere():
    cut = cuda_cuts.Cut(2, 1, 128, 128, 4)
    assert not cut._replace(splits=4).shares(4096, 128), "32 clusters of 4 blocks"
    assert cut._replace(splits=2).shares(4096, 128)
    assert not cut._replace(splits=8).shares(896, 256), "14 clusters of 8 blocks"


def test_a_layer_that_was_read_for_many_rows_alone_is_adapted_for_few(monkeypatch):
    """The likest layer's cut for 16 rows has work for 8 of 132 multiprocessors here."""
    likest = [[0, [2, 2, 16, 128, 4, 1, 1]]]
    cuts = {"int4wo-64 8192x4096": likest, "int4wo-64 2048x4096": [[33, [1, 1, 48, 128, 4, 1, 2]]]}
    table = {section: {} for section in tuning.SECTIONS} | {"pipelines": cuts}
    monkeypatch.setattr(tuning, "tuned_table", lambda device: table)
    layer = ("some", "pipelines", "int4wo-64", 2048, 4096)
    assert tuning.measured_shape(*layer, 16) is None
    assert tuning.measured_shape(*layer, 40) == (1, 1, 48, 128, 4, 1, 2)
    few, many = (
        cuda_cuts.cut_for(get_scheme("int4wo-64"), 2048, 4096, rows, "some") for rows in (16, 40)
    )
    assert few.tiles(2048, 16) * few.splits == 64
    assert many == cuda_cuts.Cut(1, 1, 48, 128, 4, 1, 2)


def test_clusters_share_the_tiles_that_do_not_fill_a_wave():
    form = cuda_layout.format_of(get_scheme("int4wo-64"))
    whole = cuda_cuts.Cut(2, 1, 192, 128, 3)
    half = whole._replace(splits=2)
    assert whole.tiles(28672, 384) == 3 * 132 + 52 and half.shares(28672, 384)
    assert half.time(form, 28672, 384) == pytest.approx(3.6 / 4 * whole.time(form, 28672, 384))
    assert not half.shares(30720, 384), "84 tiles are too many for two blocks each"
    assert half.time(form, 30720, 384) == whole.time(form, 30720, 384)
    assert half not in cuda_cuts.splits_of(whole, form, 30720, 4096, 384)
    assert not half.shares(132 * 64, 384), "nothing is left"
    assert (half.waves(28672, 384), half.busy(28672, 384)) == (
        4,
        pytest.approx((3 + 104 / 132) / 4),
    )
    # what is launched: whole clusters, no more than find places, and one at least
    assert (
        cuda_pipeline.blocks_of(whole, 448, 132) == cuda_pipeline.blocks_of(half, 448, 132) == 132
    )
    assert cuda_pipeline.blocks_of(half._replace(splits=4), 448, 132) == 120
    assert cuda_pipeline.blocks_of(half._replace(splits=8), 5, 2) == 8
    assert cuda_pipeline.blocks_of(half._replace(blocks=2), 500, 114) == 228
    assert cuda_pipeline.blocks_of(half, 20, 132) == 40


def test_a_cut_of_one_token_is_not_taken_for_several(monkeypatch):
    """Whoever tunes one row alone: others take the likest layer's cut, adapted as if nothing were known."""
    row, form = get_scheme("int4wo-64"), cuda_layout.format_of(get_scheme("int4wo-64"))
    sibling = [[0, [8, 1, 2, 8, 128, 4, 0, 1, 1]]]
    cuts = {
        "int4wo-64 256x4096": [[0, [1, 8, 1, 1, 128, 3, 0, 1, 1]]],
        "int4wo-64 512x4096": sibling,
    }
    table = {section: {} for section in tuning.SECTIONS} | {"shapes": cuts}
    monkeypatch.setattr(tuning, "tuned_table", lambda device: table)
    assert shape_for(row, 256, 4096, 1, "some") == Shape(1, 8, 1, 1, 128, 3)
    several = shape_for(row, 256, 4096, 8, "some")
    assert several == Shape(8, 1, 1, 8, 128, 4) and several.fits(form, 4096)


@pytest.mark.parametrize("key", sorted(tuned_table("NVIDIA H200")["kernels"]))
def test_what_is_shipped_says_how_fast_it_is(key):
    speeds = tuned_table("NVIDIA H200")["speeds"]
    assert key in speeds and {rows for rows, _ in speeds[key]} >= {1, 16, 64, 129, 2048}


def test_what_is_slower_than_bfloat16_is_told(monkeypatch):
    speeds = {"int4wo-64 4096x4096": [[1, 2.9], [129, 0.83], [256, 0.97], [2048, 0.9]]}
    table = {section: {} for section in tuning.SECTIONS} | {"speeds": speeds}
    monkeypatch.setattr(tuning, "tuned_table", lambda device: table)

    def told(n, rows, scheme="int4wo-64"):
        return slower("some", scheme, "w4a16", n, 4096, rows)

    everywhere = "slower than bfloat16 (0.83x at 129, 0.90x at 2048 rows, measured on 4096x4096)"
    assert told(4096, None) == told(6144, None) == everywhere
    assert told(4096, 1) == told(4096, 8) == "", "one row is the nearest"
    assert told(4096, 256) == "", "within what readings repeat"
    assert "0.83x at 129 rows" in told(4096, 100) and "2048" not in told(4096, 100)
    assert told(128, 129) == "", "no layer like it was measured"
    assert told(4096, 129, "int4wo-128") == "", "another scheme"
    forget()
    layer = fxquant.graph.Layer(name="up", scheme="int4wo-64", slower=everywhere)
    report = fxquant.report.Report((layer,), 1)
    assert everywhere in report.reasons("up") and "0.83x" in str(report)


def test_the_speeds_of_readings_are_kept():
    readings = [
        tuner.Reading("int4wo-64", 64, 64, rows, kernel, None, seconds, 1.0)
        for rows, kernel, seconds in [(1, "a", 0.5), (1, "b", 2.0), (64, "b", 4.0)]
    ]
    assert tuner.best(readings)["speeds"] == {"int4wo-64 64x64": [[1, 2.0], [64, 0.25]]}
    coded = [dataclasses.replace(r, scheme="int8dq") for r in readings]
    assert tuner.best(coded)["speeds"] == {}, "their quantization is not in the readings"


def test_few_cuts_serve_all_numbers_of_rows():
    """Each is a kernel to compile: layers that were not measured are cut alike for like numbers of rows."""
    scheme = get_scheme("int4wo-64")
    cuts = {cuda_cuts.cut_for(scheme, 2560, 2560, rows, "NVIDIA H200") for rows in range(33, 1025)}
    assert len(cuts) <= 30, len(cuts)


def test_a_measured_kernel_that_cannot_be_used_leaves_its_rows_to_others(monkeypatch):
    """float16 has no widened kernel: integers for some rows, cuBLAS on the weight written out for many."""
    monkeypatch.setattr(nvrtc, "refusal", lambda: None)
    device = dataclasses.replace(HOPPER, name="NVIDIA H200")

    def at(dtype, rows):
        one = problem("8da4w-32", 28672, 4096, dtype=dtype, device=device)
        return select(one).at(rows).name

    assert [at(torch.bfloat16, m) for m in (8, 16, 64, 2048)] == [
        "cuda_w4a8", "cuda_pipeline_w4a8", *["cuda_pipeline_w4a8_widened"] * 2,
    ]  # fmt: skip
    assert [at(torch.float16, m) for m in (8, 16, 2048)] == [
        "cuda_w4a8", "cuda_pipeline_w4a8", "cuda_dequantize_w4a8",
    ]  # fmt: skip
    assert at(torch.float32, 2048) == "cuda_w4a8", "nothing else of its layout takes float32"
    plan = select(problem("8da4w-32", 28672, 4096, dtype=torch.float16, device=device)).steps
    firsts = [first for _, first in plan]
    assert firsts == sorted(set(firsts)) and firsts[0] == 0


@pytest.mark.parametrize("scheme", ["int8dq", "fp8dq"])
def test_8_bit_products_take_the_pipeline_where_k_is_whole_rows(scheme, monkeypatch):
    """Rows of 128 bytes; another k leaves its rows to kernels that read the same weight."""
    monkeypatch.setattr(nvrtc, "refusal", lambda: None)
    device = dataclasses.replace(HOPPER, name="NVIDIA H200")
    for n, k in ((4096, 4096), (896, 4864), (28672, 4096)):
        choice = select(problem(scheme, n, k, device=device))
        assert choice.measured and choice.at(64).name == "cuda_pipeline_w8a8"
    other = select(problem(scheme, 4096, 4096 + 64, device=device))
    assert other.measured and other.layout is choice.layout
    names = {other.at(m).name for m in (1, 17, 64, 256, 2048)}
    assert "cuda_pipeline_w8a8" not in names and "dequantize" not in names
    assert "128" in other.refused["cuda_pipeline_w8a8"]


def test_a_siblings_reading_of_the_same_layer_comes_before_the_schemes_own_of_another(monkeypatch):
    device, family = "NVIDIA H200", "w4a16"
    table = copy.deepcopy(tuning.tuned_table(device))
    monkeypatch.setattr(tuning, "tuned_table", lambda device: table)
    tuning.tuned_shapes.cache_clear()
    for section in ("kernels", "shapes"):
        table[section].pop("int4wo-128 14336x4096", None)
    sibling = [tuple(step) for step in table["kernels"]["int4wo-64 14336x4096"]]
    assert tuning.tuned_kernels(device, "int4wo-128", family, 14336, 4096) == sibling
    own = [tuple(step) for step in table["kernels"]["int4wo-128 28672x4096"]]
    assert tuning.tuned_kernels(device, "int4wo-128", family, 28672, 4096) == own
    cuts = tuning.tuned_shapes(device, "shapes", "int4wo-128", family, 14336, 4096, 1)
    assert list(cuts[0]) == table["shapes"]["int4wo-64 14336x4096"][0][1]
    cuts = tuning.tuned_shapes(device, "shapes", "int4wo-64", family, 28672, 4096, 1)
    assert list(cuts[0]) == table["shapes"]["int4wo-64 28672x4096"][0][1]


@pytest.mark.parametrize("section", ["shapes", "pipelines", "widened"])
def test_every_cut_that_is_shipped_fits(section):
    for entry, cuts in tuned_table("NVIDIA H200")[section].items():
        scheme, _, size = entry.partition(" ")
        form = cuda_layout.format_of(get_scheme(scheme))
        form = form.taking(torch.bfloat16) if section == "widened" else form
        kind = Shape if section == "shapes" else cuda_cuts.Cut
        k = int(size.partition("x")[2])
        assert all(kind(*cut).fits(form, k) for _, cut in cuts), entry
        firsts = [first for first, _ in cuts]
        assert firsts == sorted(set(firsts)), entry
