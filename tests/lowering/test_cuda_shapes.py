"""How ``cuda_stream``'s blocks may be cut: what fits, and the shared memory it takes."""

from __future__ import annotations

import pytest

from fxquant.lowering import cuda_layout, cuda_stream, nvrtc
from fxquant.lowering.cuda_shapes import Shape
from fxquant.scheme import get_scheme
from tests.lowering.test_cuda_kernels import needs_compiler

COUNTED = [
    (scheme, step)
    for scheme in (
        "int4wo-64",
        "int4wo-128",
        "int2wo-32",
        "int8wo",
        "8da4w-32",
        "8da4w-128",
        "int8dq",
    )
    for step in (32, 128, 256)
    if step % cuda_layout.format_of(get_scheme(scheme)).unit == 0
]


@needs_compiler
@pytest.mark.parametrize("scheme, step", COUNTED)
def test_shared_memory_is_counted_as_the_source_does(scheme, step):
    """What begins off a line has room for that, rows of one token take whole lines, and what a block makes of
    its row lies behind all of that."""
    form, k = cuda_layout.format_of(get_scheme(scheme)), 4096
    own = (form, form._replace(x_type=1)) if form.x_bits == 8 else (form,)
    shapes = [
        Shape(2, 2, 1, tokens, step, 3, fixed=fixed) for tokens, fixed in ((1, 0), (8, 0), (1, 1))
    ]
    cases = [(f, shape) for f in own for shape in shapes if shape.fits(f, k)]
    assert len(cases) == 2 + (form.x_bits == 8 or (form.bits, form.chunk > 0) == (4, True))
    for f, shape in cases:
        made = shape.activations(f, k)
        text = cuda_stream.source(f, shape, False)
        text += f'\nstatic_assert(STAGE_BYTES == {shape.stage_bytes(f)}, "of a stage");'
        text += f'\nstatic_assert(SHARED_BYTES == {shape.shared(f)}, "of the ring");'
        text += (
            f'\nstatic_assert(!MADE || ROW_CODES + {k} / STEP * MADE_BYTES == {made}, "behind it");'
        )
        more = {"x_half": 0, "y_type": 1, "bias_type": 0, "activation": 0}
        nvrtc.compile_source(text, dict(cuda_stream.defines(f, shape, **more)), "sm_90a")


def test_wgmma_takes_only_what_the_instruction_has():
    integer, half, float8 = (
        cuda_layout.format_of(get_scheme(s)) for s in ("8da4w-32", "int4wo-64", "fp8dq")
    )
    good = Shape(4, 1, 2, 32, 128, 3, 1)
    assert good.fits(integer, 4096) and good.fits(half, 4096) and not good.fits(float8, 4096)
    assert good._replace(tokens=40).fits(half, 4096), "any multiple of 8"
    assert not good._replace(tokens=40).fits(integer, 4096), "above 32, of 16"
    assert good._replace(tokens=48).fits(integer, 4096)
    assert not good._replace(step=64).fits(integer, 4096), "rows of 128 bytes"
    for wrong in (good._replace(stages=2), good._replace(warps_n=2), good._replace(tokens=12)):
        assert not wrong.fits(half, 4096), wrong
    assert not good.fits(half, 4096 + 64), "k is not whole steps"


def test_an_odd_cut_is_paired_for_gates():
    form = cuda_layout.format_of(get_scheme("int8wo"))
    even = Shape(4, 2, 2, 1, 128, 4)
    assert even.paired(form, 4096) == even
    assert Shape(1, 16, 1, 1, 128, 3).paired(form, 4096) == Shape(1, 8, 2, 1, 128, 3)
    wide = Shape(7, 1, 1, 1, 256, 6)
    assert wide.fits(form, 4096) and wide.paired(form, 4096).fits(form, 4096)
    assert wide.paired(form, 4096).warps_n % 2 == 0 or wide.paired(form, 4096).row_tiles % 2 == 0
