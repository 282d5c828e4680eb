"""benchmarks/sanitize*.py on the CPU: what the tools print, and what counts as clean."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from fxquant.lowering.kernel import KERNELS
from fxquant.scheme import get_scheme

FOLDER = str(Path(__file__).parents[1] / "benchmarks")


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(FOLDER)


@pytest.fixture
def sanitize():
    return importlib.import_module("sanitize")


OUTPUT = """\
========= COMPUTE-SANITIZER
=== device NVIDIA H200
=== case one
=== done
=== case two
========= Invalid __global__ read of size 16 bytes
=========     at stream_linear+0x1a0
=========     by thread (0,0,0) in block (1,0,0)
=========
=== done
========= Error: Race reported between Write access at stream_linear+0x10
=========     and Read access at stream_linear+0x20 [4 hazards]
=========
=== case three
=== failed RuntimeError: a launch failed
=== case four
=== end
========= Target application returned an error
========= ERROR SUMMARY: 2 errors
"""


def test_the_sanitizers_output_is_split_by_case(sanitize):
    found = sanitize.parse(OUTPUT)
    assert found["device"] == "NVIDIA H200" and found["summary"] == 2
    states = {name: sanitize.state(case) for name, case in found["cases"].items()}
    assert states == {
        "one": "clean",
        "two": "2 reported",  # the second came late, but before the next case
        "three": "failed RuntimeError: a launch failed",
        "four": "not finished",
    }
    assert found["cases"]["two"]["reports"][0].split("\n")[1] == "at stream_linear+0x1a0"
    assert found["outside"] == ["Target application returned an error"]
    assert sanitize.state(found["cases"].get("five")) == "not run"


SASS = """
        /*00e0*/    BAR.SYNC.DEFER_BLOCKING 0x1 ;            /* 0x0000040000007b1d */
                                                             /* 0x000fec0000010000 */
        /*00f0*/    LDS.U8 R2, [R2+UR22+0x281dc] ;           /* 0x0281dc1602027984 */
        /*0100*/    BAR.SYNC.DEFER_BLOCKING 0x1 ;            /* 0x0000040000007b1d */
        /*0110*/    LDS R2, [UR12+0x8] ;                     /* 0x0000080cff027984 */
        /*0120*/    STS.64 [UR5+0x10], R2 ;                  /* 0x0000100500007988 */
        /*0130*/    BAR.SYNC.DEFER_BLOCKING 0x1 ;            /* 0x0000040000007b1d */
        /*0140*/    STS.64 [UR5+0x281e0], R2 ;               /* 0x0281e00500007988 */
        /*0150*/    BAR.SYNC.DEFER_BLOCKING 0x1 ;            /* 0x0000040000007b1d */
        /*0160*/    STS.64 [UR5+0x281e0], R2 ;               /* 0x0281e00500007988 */
        /*0170*/    BAR.SYNC.DEFER_BLOCKING 0x0, 0x80 ;      /* 0x0000040000007b1d */
"""
RACE = "========= Error: Race reported between Read access at k+0xf0 in a.py:74\n"
RACE += "=========     and Write access at k+0x{} in a.py:74 [13 hazards]\n========= \n"


def test_a_handshake_of_warps_is_no_race_and_any_other_is(sanitize):
    assert sanitize.handshake.offsets(SASS) == [0xF0, 0x140]
    assert sanitize.handshake.offsets(SASS.replace("LDS.U8", "LDS")) == []
    start = "=== case one\n=== handshake k+0xf0 k+0x140\n"
    end = "=== done\n=== end\n========= RACECHECK SUMMARY: 1 hazard displayed\n"
    found = sanitize.parse(start + RACE.format("140") + end)
    assert found["handshakes"] == 1 and sanitize.clean(found | {"code": 9}, ["one"])
    assert not sanitize.clean(found | {"code": 1}, ["one"])
    assert not sanitize.clean(found | {"code": 9, "summary": 2}, ["one"])
    for other in (RACE.format("160"), RACE.replace("k+0xf0", "k+0x110").format("140")):
        found = sanitize.parse(start + other + end)
        assert found["handshakes"] == 0 and not sanitize.clean(found | {"code": 9}, ["one"])
    elsewhere = sanitize.parse("=== case one\n" + RACE.format("140") + end)
    assert not sanitize.clean(elsewhere | {"code": 9}, ["one"])


def test_every_lane_arrives_for_racecheck_and_nothing_else_changes(monkeypatch):
    known = importlib.import_module("sanitize_cases")
    form = known.cuda_layout.format_of(get_scheme("int4wo-64"))
    cut = known.Cut(2, 1, 64, 128, 4)
    plain = known.cuda_pipeline.source(form, cut, False)
    monkeypatch.setattr(known.cuda_pipeline, "source", known.cuda_pipeline.source)
    known.let_every_lane_arrive()
    changed = known.cuda_pipeline.source(form, cut, False)
    differ = [
        pair
        for pair in zip(plain.splitlines(), changed.splitlines(), strict=True)
        if pair[0] != pair[1]
    ]
    assert len(differ) == 2 and all("empty" in after for _, after in differ)


def test_clean_means_that_all_ran_and_nothing_was_said(sanitize):
    quiet = "=== case one\n=== done\n=== end\n========= RACECHECK SUMMARY: 0 hazards displayed\n"
    found = sanitize.parse(quiet) | {"code": 0}
    assert sanitize.clean(found, ["one"])
    assert not sanitize.clean(found, ["one", "two"])
    assert not sanitize.clean(found | {"code": 9}, ["one"])
    assert not sanitize.clean(sanitize.parse(OUTPUT) | {"code": 9}, ["one"])
    silent = sanitize.parse("=== case one\n=== done\n=== end\n") | {"code": 0}
    assert not sanitize.clean(silent, ["one"]), "a tool that says nothing has not looked"
    worse = sanitize.parse("========= Error: no such device\n" + quiet) | {"code": 0}
    assert not sanitize.clean(worse, ["one"])


def test_a_report_of_both_tools(sanitize, monkeypatch, tmp_path):
    texts = {"": "=== device G\n" + "".join(f"=== case {n}\n=== done\n" for n in ("one", "two"))}
    quiet = "========= {} SUMMARY: 0 found\n=== case one\n=== done\n=== case two\n=== done\n"
    texts |= {"memcheck": quiet.format("ERROR"), "racecheck": quiet.format("RACECHECK")}
    seen = {}

    def ran(prefix, names, deadline, **environment):
        tool = prefix[prefix.index("--tool") + 1] if prefix else ""
        seen[tool] = (prefix, environment)
        return {**sanitize.parse(texts[tool]), "code": 0, "tail": "the end"}

    known = tmp_path / "compute-sanitizer"
    known.write_text("#!/bin/sh\necho ' --print-limit arg'\necho 'Version 2025.3.0'\n")
    known.chmod(0o755)
    monkeypatch.setattr(sanitize, "ran", ran)
    monkeypatch.setattr(sanitize, "executable", lambda: str(known))
    monkeypatch.setattr(sanitize, "names_of", lambda part: ["one", "two"])
    assert sanitize.main(["--out", str(tmp_path)]) == 0
    assert seen["memcheck"][0][3:] == ["--error-exitcode", "9", "--print-limit", "300"]
    assert "PYTORCH_NO_CUDA_MEMORY_CACHING" in seen["memcheck"][1]
    report = json.loads((tmp_path / "sanitize.json").read_text())
    assert report["clean"] and report["gpu"] == "G"
    assert "| two" in (tmp_path / "sanitize.md").read_text()

    texts["memcheck"] = OUTPUT
    assert sanitize.main(["--out", str(tmp_path)]) == 1
    page = (tmp_path / "sanitize.md").read_text()
    assert "NOT clean" in page and "Invalid __global__ read" in page and "the end" in page
    texts[""] = "Traceback\n"
    seen.clear()
    assert sanitize.main(["--out", str(tmp_path)]) == 1 and list(seen) == [""]
    monkeypatch.setattr(sanitize, "executable", lambda: None)
    assert sanitize.main(["--out", str(tmp_path)]) == 1


def test_cases_cover_every_kernel_of_ours_and_both_products(sanitize):
    cases = importlib.import_module("sanitize_cases")
    found = sanitize.cases()
    ours = {name for name in KERNELS if name.startswith(("cuda_", "triton_"))}
    ours |= {"quantize_rows", *cases.WIDENERS}  # which are behind all that quantize activations
    assert {case.kernel for case in found} | {"cuda_dequantize_w4a8"} == ours
    assert len({case.name for case in found}) == len(found)
    for kernel, schemes in cases.STREAM.items():
        for scheme in schemes:
            cuts = [c.cut for c in found if (c.kernel, c.scheme) == (kernel, scheme)]
            assert {c.warpgroup for c in cuts} == ({0} if scheme == "fp8dq" else {0, 1})
            assert {c.warps_k > 1 for c in cuts} == {c.splits > 1 for c in cuts} == {False, True}
            for cut in cuts:  # every pipeline is filled again at least once
                assert cut.stages * cut.step * cut.warps_k * cut.splits < cases.STREAM_K
    for kernel, schemes in cases.PIPELINE.items():
        for scheme in schemes:
            mine = [c for c in found if (c.kernel, c.scheme) == (kernel, scheme)]
            assert {c.cut.splits > 1 for c in mine} == {False, True}
            assert {c.cut.warpgroups > 1 for c in mine} == {False, True}
            for c in mine:  # the ring too, and blocks that walk have several tiles
                assert c.cut.stages * c.cut.step * c.cut.splits < c.k
                tiles = -(-c.n // c.cut.rows) * -(-c.rows // c.cut.tokens)
                assert c.cut.splits > 1 or tiles > cases.FEW * c.cut.blocks
