"""A linear with quantized weights on the CPU: the layout and the op of the C++ kernels.

    y[m, n] = act(x_scale[m] * (sum_g scale[n, g] * sum_k x[m, k] * q[n, k]
                                + corrections for the zero points) + bias[n])

With int8 activations the inner sum is an exact integer; with float ones it is float32, and the
activations are used as they are. Each element is summed in one order, so a row's result depends
neither on the other rows nor on the number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, reduce
from operator import or_

import torch

from ..errors import InvalidOption, ShapeMismatch, UnsupportedDtype
from ..scheme import Quantized, Scheme, get_scheme
from . import native
from .kernel import Layout

PANEL = 64
"""Output channels that are stored together, and computed together: four vectors of 16."""

ACTIVATIONS = {"": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}


# Layout ------------------------------------------------------------------------------------------


def _format(scheme: Scheme) -> str:
    """How codes lie in a lane of 32 bits (engines.h): a key of FORMATS."""
    if scheme.weight.dtype.is_floating_point:
        return "e4m3"
    bytewise = scheme.weight.bits == 4 and scheme.input is not None
    return f"u{scheme.weight.bits}" + "_bytes" * bytewise


FORMATS: dict[str, tuple[int, list[int]]] = {
    # the number in engines.h, and the bit at which each code of a lane starts
    "u8": (0, [0, 8, 16, 24]),
    "e4m3": (1, [0, 8, 16, 24]),
    "u4": (2, [16 * (k % 2) + 4 * (k // 2) for k in range(8)]),
    "u2": (3, [16 * (k % 2) + 2 * (k // 2) for k in range(16)]),
    "u4_bytes": (4, [8 * (k % 4) + 4 * (k // 4) for k in range(8)]),
}


def _to_panels(rows: torch.Tensor) -> torch.Tensor:
    """[n, steps, ...] with the panels one after the other, each [steps, channels, ...]; same shape."""
    whole = rows.shape[0] // PANEL * PANEL
    panels = rows[:whole].reshape(-1, PANEL, *rows.shape[1:]).transpose(1, 2)
    flat = torch.cat([panels.flatten(), rows[whole:].transpose(0, 1).flatten()])
    return flat.reshape(rows.shape)


def _from_panels(rows: torch.Tensor) -> torch.Tensor:
    """The inverse of ``_to_panels``."""
    n, steps, *rest = rows.shape
    whole = n // PANEL * PANEL
    panels = rows[:whole].reshape(-1, steps, PANEL, *rest).transpose(1, 2)
    tail = rows[whole:].reshape(steps, n - whole, *rest).transpose(0, 1)
    return torch.cat([panels.reshape(whole, steps, *rest), tail])


def _offset(scheme: Scheme) -> int:
    """Codes are stored unsigned: 8-bit integers with their sign bit flipped."""
    return 0x80 if scheme.weight.dtype == torch.int8 else 0


def pack(scheme: Scheme, q: Quantized) -> list[torch.Tensor]:
    """Canonical codes and qparams as [weight, scale] and, where there is one, zero or weight_sum.

    weight: uint8 [n, steps, 4], in panels: for 64 channels at a time [steps, channels, 4], a lane
    of 4 bytes holding the next 32 / bits codes of the channel (zero beyond k). scale: float32 [n],
    or bfloat16 [n, groups] in panels; zero like it. weight_sum: float32 [n], the sum of the
    dequantized channel, by which asymmetric activations are corrected.
    """
    bits, spec = scheme.weight.bits, scheme.weight
    stored = q.codes.view(torch.uint8)
    codes = torch.stack([(stored >> shift) & (2**bits - 1) for shift in range(0, 8, bits)], -1)
    codes = codes.flatten(-2) ^ _offset(scheme)
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[1] % (32 // bits)))
    octets: list[list[torch.Tensor]] = [[], [], [], []]
    lanes = codes.reshape(codes.shape[0], -1, 32 // bits).unbind(-1)
    for code, place in zip(lanes, FORMATS[_format(scheme)][1], strict=True):
        octets[place // 8].append(code << (place % 8))
    weight = _to_panels(torch.stack([reduce(or_, parts) for parts in octets], -1))
    if spec.group_size is None:
        return [weight, q.scale[:, 0].clone()]
    packed = [weight, *(_to_panels(t) for t in (q.scale, q.zero) if t is not None)]
    if scheme.input is not None:
        packed.append(spec.dequantize(q, torch.float64).sum(1).float())
    return packed


def unpack(scheme: Scheme, packed: Sequence[torch.Tensor], n: int, k: int) -> Quantized:
    """The canonical codes [n, k * bits / 8] and qparams [n, groups], bit for bit."""
    bits, spec = scheme.weight.bits, scheme.weight
    octets = _from_panels(packed[0]).unbind(-1)
    places = FORMATS[_format(scheme)][1]
    lanes = torch.stack([(octets[p // 8] >> (p % 8)) & (2**bits - 1) for p in places], -1)
    codes = (lanes.flatten(1)[:, :k] ^ _offset(scheme)).reshape(n, -1, 8 // bits).unbind(-1)
    stored = reduce(or_, [code << (bits * i) for i, code in enumerate(codes)])
    if bits == 8:
        stored = stored.view(spec.dtype)
    if spec.group_size is None:
        return Quantized(stored, packed[1].unsqueeze(1), None)
    has_zero = spec.zero_point_domain == "float"
    return Quantized(stored, _from_panels(packed[1]), _from_panels(packed[2]) if has_zero else None)


LAYOUT = Layout(name="panels", pack=pack, unpack=unpack)


# Op ----------------------------------------------------------------------------------------------

LIBRARY = torch.library.Library("fxquant", "FRAGMENT")
LIBRARY.define(
    "native_linear(Tensor x, Tensor? x_scale, Tensor? x_zero, Tensor[] packed, Tensor? bias,"
    " str scheme, str epilogue, ScalarType dtype) -> Tensor"
)
Spec = tuple[str, torch.dtype, tuple[int, ...]]
"""What a tensor is called, its dtype and its shape."""
Dtypes = tuple[torch.dtype, ...]

REAL = (torch.float32, torch.bfloat16, torch.float16)


@lru_cache(maxsize=1024)
def _signature(name: str, n: int, k: int) -> tuple[int, int, Dtypes, bool, tuple[Spec, ...]]:
    """Format, groups, types of x, whether it has a scale, the packed tensors, of a scheme at [n, k]."""
    scheme = get_scheme(name)
    spec = scheme.weight
    if spec.group_size is not None and k % spec.group_size:
        raise ShapeMismatch(
            what="x", found=("M", k), expected=f"(M, multiple of {spec.group_size})"
        )
    groups = 1 if spec.group_size is None else k // spec.group_size
    qparam = (spec.scale_dtype, (n,) if spec.group_size is None else (n, groups))
    tensors: list[Spec] = [("weight", torch.uint8, (n, -(-k * spec.bits // 32), 4))]
    tensors.append(("scale", *qparam))
    if spec.zero_point_domain == "float":
        tensors.append(("zero", *qparam))
    if scheme.input is not None and spec.group_size is not None:
        tensors.append(("weight_sum", torch.float32, (n,)))
    # float8 activations come as the bfloat16 numbers that they are
    kinds: dict[torch.dtype | None, Dtypes]
    kinds = {None: REAL, torch.int8: (torch.int8,), torch.float8_e4m3fn: (torch.bfloat16,)}
    x_dtypes = kinds[None if scheme.input is None else scheme.input.dtype]
    return FORMATS[_format(scheme)][0], groups, x_dtypes, scheme.input is not None, tuple(tensors)


def _at(t: torch.Tensor | None, spec: Spec, keep: list[torch.Tensor]) -> int | None:
    """The address of ``t`` once it is as the kernel reads it; a copy made for that goes to ``keep``."""
    if t is None:
        return None
    what, dtype, shape = spec
    if t.dtype is not dtype or t.shape != shape or not t.is_cpu:
        if t.shape != shape:
            raise ShapeMismatch(what=what, found=tuple(t.shape), expected=shape)
        raise UnsupportedDtype(
            layer=what, dtype=f"{t.dtype} on {t.device}", choices=f"{dtype} on cpu"
        )
    if not t.is_contiguous():
        t = t.contiguous()
        keep.append(t)
    return t.data_ptr()


def _one_of(dtypes: Dtypes, dtype: torch.dtype, what: str) -> torch.dtype:
    if dtype not in dtypes:
        raise UnsupportedDtype(layer=what, dtype=dtype, choices=", ".join(map(str, dtypes)))
    return dtype


def native_linear(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    x_zero: torch.Tensor | None,
    packed: Sequence[torch.Tensor],
    bias: torch.Tensor | None,
    scheme: str,
    epilogue: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    """y [m, n] of ``dtype`` (float32, bfloat16, float16), contiguous.

    x: [m, k] of the same types; int8, or bfloat16 for float8, where the scheme quantizes
    activations: then with x_scale float32 [m, 1], and x_zero int32 [m, 1] if they are asymmetric.
    packed: as ``pack`` returns it. bias: [n]. epilogue: one of ACTIVATIONS.

    Raises ShapeMismatch, UnsupportedDtype, InvalidOption, BuildFailed.
    """
    if x.dim() != 2:
        raise ShapeMismatch(what="x", found=tuple(x.shape), expected="(M, K)")
    (m, k), n = x.shape, packed[0].shape[0]
    form, groups, x_dtypes, scaled, specs = _signature(scheme, n, k)
    if len(packed) != len(specs):
        names = ", ".join(what for what, _, _ in specs)
        raise ShapeMismatch(what="packed", found=f"{len(packed)} tensors", expected=names)
    if (x_scale is not None) != scaled or (x_zero is not None) != (specs[-1][0] == "weight_sum"):
        raise InvalidOption(
            name="x_scale, x_zero", value=(x_scale, x_zero), expected=f"what {scheme} quantizes to"
        )
    if epilogue not in ACTIVATIONS:
        raise InvalidOption(name="epilogue", value=epilogue, expected=f"one of {[*ACTIVATIONS]}")
    y = torch.empty(m, n, dtype=_one_of(REAL, dtype, "y"))
    keep: list[torch.Tensor] = []
    at = {spec[0]: _at(t, spec, keep) for t, spec in zip(packed, specs, strict=True)}
    x_dtype = _one_of(x_dtypes, x.dtype, "x")
    bias_dtype = torch.float32 if bias is None else _one_of(REAL, bias.dtype, "bias")
    arguments = (
        *(m, n, k, groups, form, ACTIVATIONS[epilogue], torch.get_num_threads()),
        *(_at(x, ("x", x_dtype, (m, k)), keep), DTYPES[x_dtype]),
        _at(x_scale, ("x_scale", torch.float32, (m, 1)), keep),
        _at(x_zero, ("x_zero", torch.int32, (m, 1)), keep),
        *(at["weight"], at["scale"], at.get("zero"), at.get("weight_sum")),
        *(_at(bias, ("bias", bias_dtype, (n,)), keep), DTYPES[bias_dtype]),
        *(y.data_ptr(), DTYPES[dtype]),
    )
    if y.numel() and native.library()(*arguments):
        raise MemoryError(f"native_linear: no memory for activations of {m} x {k}")
    return y


LIBRARY.impl("native_linear", native_linear, "CPU")


@torch.library.register_fake("fxquant::native_linear", lib=LIBRARY)
def _fake(x, x_scale, x_zero, packed, bias, scheme, epilogue, dtype):
    return x.new_empty(x.shape[0], packed[0].shape[0], dtype=dtype)
