"""What the compiler makes of the CUDA C++ kernels, where it could break them without a word: products that
run on while other registers are filled."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from fxquant.lowering import cuda_cuts, cuda_layout, cuda_pipeline, cuda_stream, nvrtc
from fxquant.lowering.cuda_cuts import Cut
from fxquant.lowering.cuda_shapes import Shape
from fxquant.scheme import get_scheme
from tests.conftest import DISASSEMBLER

pytestmark = pytest.mark.skipif(
    nvrtc.refusal() is not None or not DISASSEMBLER.is_file(), reason="needs NVRTC and nvdisasm"
)


def source_of(scheme: str, cut: Cut | Shape) -> str:
    module = cuda_stream if isinstance(cut, Shape) else cuda_pipeline
    return module.source(cuda_layout.format_of(get_scheme(scheme)), cut, False)


def machine_code(
    scheme: str, cut: Cut | Shape, folder: Path, source: str | None = None
) -> list[str]:
    """The instructions and labels of the kernel, in their order."""
    form = cuda_layout.format_of(get_scheme(scheme))
    constants = {"x_half": 0, "y_type": 1, "bias_type": 0, "activation": 0, "gated": 0}
    shape = cut if isinstance(cut, Shape) else cut.shape
    defines = dict(cuda_stream.defines(form, shape, **constants))
    file = folder / "kernel.cubin"
    text = source or source_of(scheme, cut)
    file.write_bytes(nvrtc.compile_source(text, defines, "sm_90a"))
    shown = subprocess.run(
        [DISASSEMBLER, "-c", file], check=True, capture_output=True, text=True
    ).stdout
    lines = (re.sub(r"^\s*/\*[0-9a-f]+\*/\s*", "", line).strip() for line in shown.split("\n"))
    return [line for line in lines if line]


def is_product(line: str) -> bool:
    return "GMMA" in line and "gdesc[URZ]" not in line  # that one only closes a group


def executed(code: list[str]) -> list[str]:
    """Two turns of the stages' loop, which has all products, and what follows it."""
    products = [i for i, line in enumerate(code) if is_product(line)]
    labels = {line[:-1]: i for i, line in enumerate(code) if line.startswith(".L_x")}
    for i in range(products[-1], len(code)):
        to = re.search(r"BRA `\((\.L_x_\d+)\)", code[i])
        if to and labels[to[1]] < products[0]:
            return code[labels[to[1]] : i + 1] * 2 + code[i + 1 : i + 60]
    raise AssertionError("no loop")


def registers(text: str) -> set[int]:
    return {int(n) for n in re.findall(r"\bR(\d+)", text)}


def written(line: str) -> set[int]:
    """Registers that an instruction writes, products aside."""
    found = re.match(r"(?:@!?U?P\d+ )?([A-Z0-9_]+)(\S*) R(\d+)(?:\.reuse)?[,;]", line)
    if not found or found[1].startswith(("ST", "RED")):
        return set()
    wide = 4 if ".128" in found[2] else 2 if re.search(r"\.64|\.WIDE", found[2]) else 1
    first = int(found[3])
    return set(range(first, first + (2 if found[1] == "CS2R" else wide)))


def faults(code: list[str]) -> list[str]:
    """Instructions that write what a product in flight reads, or read what it has not written yet."""
    flight: list[
        tuple[set[int], set[int]]
    ] = []  # groups of products: their left operands, their sums
    left: set[int] = set()
    sums: set[int] = set()
    found = []
    for line in executed(code):
        if is_product(line):
            parts = re.search(r"64x(\d+)x\S* R(\d+), (?:R(\d+), )?gdesc", line)
            assert parts is not None, line
            sums |= set(range(int(parts[2]), int(parts[2]) + int(parts[1]) // 2))
            left |= set(range(int(parts[3]), int(parts[3]) + 4)) if parts[3] else set()
            if "gsb0" in line:
                flight, left, sums = [*flight, (left, sums)], set(), set()
        elif "WARPGROUP.DEPBAR" in line:
            pending = int(re.search(r"gsb0, 0x(\d)", line)[1])  # type: ignore[index]
            flight = flight[len(flight) - pending :] if pending else []
        elif "GMMA" not in line:
            new = written(line)
            read = registers(line) - new
            for operand, result in flight:
                if new & (operand | result) or read & result:
                    found.append(line)
    return found


CUTS = [
    ("int4wo-64", Cut(1, 2, 64, 64, 6, 2)),
    ("int4wo-64", Cut(1, 2, 16, 64, 6, 2)),
    ("int4wo-64", Cut(2, 1, 16, 256, 4, 2)),
    ("int4wo-64", Cut(2, 1, 256, 64, 5)),
    ("int8wo", Cut(1, 1, 16, 128, 4, 1, 8)),
    ("8da4w-128", Cut(2, 2, 16, 256, 5)),
    ("int4wo-64", Cut(2, 1, 192, 128, 3, 1, 2)),
    ("int4wo-128", Cut(2, 1, 256, 64, 5)),
    ("int4wo-128", Cut(2, 2, 128, 64, 6, 1, 2)),
    ("int8dq", Cut(2, 1, 64, 128, 4)),
    ("int8dq", Cut(1, 1, 16, 256, 5, 2, 2)),
    ("fp8dq", Cut(1, 1, 64, 256, 6, 1, 2)),
    ("int4wo-64", Shape(8, 1, 2, 64, 128, 4, 1)),
    ("int8wo", Shape(4, 2, 1, 32, 128, 5, 1, 1, 2)),
    ("8da4w-32", Shape(4, 2, 2, 16, 128, 4, 1)),
]


@pytest.mark.parametrize(("scheme", "cut"), CUTS)
def test_products_in_flight_are_left_alone(scheme, cut, tmp_path):
    code = machine_code(scheme, cut, tmp_path)
    assert faults(code) == []
    products = [line for line in code if is_product(line)]
    closing = [line for line in products if "gsb0" in line]
    assert scheme == "8da4w-32" or len(closing) < len(products), "each waits for the one before"


@pytest.mark.parametrize("scheme", ["int8dq", "fp8dq"])
def test_products_of_a_stage_do_not_wait_for_each_other(scheme, tmp_path):
    """Copies of the loop would have to move the sums: ptxas then has each product wait for the one before."""
    cut = Cut(2, 1, 128, 128, 4)
    code = machine_code(scheme, cut, tmp_path)
    products = [i for i, line in enumerate(code) if is_product(line)]
    waits = [i for i in range(products[0], products[-1]) if "WARPGROUP.DEPBAR" in code[i]]
    assert len(products) == 4 and waits == []


def test_one_group_of_products_a_stage_would_be_noticed(tmp_path):
    scheme, cut = CUTS[0]
    source = source_of(scheme, cut)
    wrong = source.replace("TOKENS <= 32 && STEP % 128 == 0 ? 2 : 1", "2")
    assert wrong != source
    with pytest.raises(Exception, match="groups of products take turns"):
        machine_code(scheme, cut, tmp_path, wrong)
    wrong = re.sub(r"static_assert\(!WARPGROUP[^;]*;", "", wrong)
    assert faults(machine_code(scheme, cut, tmp_path, wrong))


def test_sums_that_are_not_settled_would_be_noticed(tmp_path):
    scheme, cut = "int8wo", Cut(1, 1, 16, 128, 4, 1, 8)
    source = source_of(scheme, cut)
    wrong = source.replace("    settle(sums);\n", "")
    assert wrong != source and faults(machine_code(scheme, cut, tmp_path, wrong))


BEGUN = [  # whether the next kernel begins before the end
    ("int4wo-64", Cut(1, 1, 16, 256, 6, 2), True),
    ("int4wo-64", Cut(2, 1, 64, 256, 4), False),
    ("8da4w-128", Cut(2, 2, 16, 256, 5), False),
    ("int8dq", Shape(4, 2, 1, 1, 256, 4), True),
    ("int8wo", Shape(4, 2, 1, 16, 64, 6, 1), True),
    ("8da4w-128", Shape(4, 2, 1, 16, 128, 4, 1), False),
]


@pytest.mark.parametrize(("scheme", "cut", "early"), BEGUN)
def test_the_next_kernel_begins_after_this_one_has_waited_or_not_before_its_end(
    scheme, cut, early, tmp_path
):
    code = machine_code(scheme, cut, tmp_path)
    begins, waits = (
        [i for i, line in enumerate(code) if name in line] for name in ("PREEXIT", "ACQBULK")
    )
    assert waits and len(begins) == early
    if begins and isinstance(
        cut, Cut
    ):  # and after all its loads; threads that copy themselves are in a loop
        assert begins[0] > max(i for i, line in enumerate(code) if "UTMALDG" in line)
    assert not begins or begins[0] > waits[0]


def test_every_cut_here_fits():
    for scheme, cut in CUTS:
        assert cut.fits(cuda_layout.format_of(get_scheme(scheme)), 4096), (scheme, cut)
    assert cuda_cuts.STEPS[-1] == 64, "the least number of k in a stage is among them"
