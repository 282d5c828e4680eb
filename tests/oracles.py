"""The oracles a kernel must satisfy: exact probes, the float64 bound, the layout's round trip.

Every function takes a kernel's name or its ``Kernel``, builds its own seeded sample, raises
AssertionError with the worst place in words, and returns what it measured.

The reference is the scheme's own meaning, never a second kernel: activations quantized and
dequantized by ``scheme.input`` (where there is one), weights dequantized by ``scheme.weight``,
the product, the bias and the activation in float64.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

import fxquant.lowering  # noqa: F401  (fills KERNELS)
from fxquant.affine import pack_codes, storage_dtype
from fxquant.lowering.kernel import KERNELS, Kernel
from fxquant.ops import ACTIVATIONS, GATES, finish, outputs
from fxquant.scheme import Quantized, Scheme, get_scheme

EXACT_INTEGERS = 2**24
"""float32 holds every integer up to here, so a sum that stays below is exact in any order."""

UNIT_ROUNDOFF = {
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
    # Not float32's own 2**-24: adding K terms in float32 errs like 2**-25 * sqrt(K) of the result's
    # spread, which is 2**-20 at K = 4096 (the 6 / sqrt(3) below is the margin). A single rounding
    # of a weight or an activation to bfloat16 or float16 is still 2**9 times over the bound.
    torch.float32: 2.0**-20,
}


@dataclass(frozen=True)
class Sample:
    """One linear with data: x [m, k], canonical weight, bias [n] or None."""

    scheme: Scheme
    x: torch.Tensor
    weight: Quantized
    bias: torch.Tensor | None

    @property
    def shape(self) -> tuple[int, int, int]:
        n = self.weight.codes.shape[0]
        return self.x.shape[0], n, self.x.shape[1]

    @property
    def served(self) -> Sample:
        """The same in the scheme whose kernels serve this one: 3-bit codes as 4-bit ones."""
        row = self.scheme.product
        return replace(self, scheme=row, weight=self.scheme.weight.recoded(self.weight, row.weight))

    def to(self, device: str | torch.device) -> Sample:
        def move(t: torch.Tensor | None) -> torch.Tensor | None:
            return None if t is None else t.to(device)

        weight = Quantized(*(move(t) for t in self.weight))  # type: ignore[arg-type]
        return replace(self, x=self.x.to(device), weight=weight, bias=move(self.bias))


def exact_sample(
    scheme: Scheme | str,
    m: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    bias: bool = False,
    seed: int = 0,
) -> Sample:
    """Small integers times powers of two: every product, sum and scale is exact in float32.

    Dynamic activations hold the extremes that make their scale a power of two. The codes take their
    full range as long as the largest possible sum stays under EXACT_INTEGERS, and shrink above.
    """
    scheme = get_scheme(scheme) if isinstance(scheme, str) else scheme
    g = torch.Generator().manual_seed(seed + 1009 * m + 9176 * n + k)
    x, largest = _exact_activations(scheme, m, k, g)
    weight = _exact_weight(scheme, n, k, EXACT_INTEGERS // (4 * max(k, 1) * largest), g)
    b = _integers(-64, 65, (n,), g) * 2.0**-14 if bias else None
    return Sample(scheme, x.to(dtype), weight, None if b is None else b.to(dtype))


def random_sample(
    scheme: Scheme | str,
    m: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    bias: bool = False,
    seed: int = 0,
) -> Sample:
    """Gaussian activations and weights, the weights quantized by the scheme itself."""
    scheme = get_scheme(scheme) if isinstance(scheme, str) else scheme
    g = torch.Generator().manual_seed(seed + 1009 * m + 9176 * n + k)
    x = torch.randn(m, k, generator=g).to(dtype)
    w = torch.randn(n, k, generator=g) * k**-0.5
    b = torch.randn(n, generator=g).to(dtype) if bias else None
    return Sample(scheme, x, scheme.weight.quantize(w), b)


def operands(
    sample: Sample, device: str | torch.device = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations and weight as the scheme sees them, in float64.

    Activations are quantized on ``device``: CUDA divides by a constant through its reciprocal, so
    its scale may differ in the last bit, and a code on a half with it.
    """
    spec = sample.scheme.input
    x = sample.x.double()
    if spec is not None and x.numel():
        x = spec.dequantize(spec.quantize(sample.x.to(device)), torch.float64).cpu()
    return x, sample.scheme.weight.dequantize(sample.weight, torch.float64)


def reference(
    sample: Sample, epilogue: str = "", device: str | torch.device = "cpu"
) -> torch.Tensor:
    """y [m, n] in float64."""
    x, w = operands(sample, device)
    y = x @ w.T
    return finish(y if sample.bias is None else y + sample.bias.double(), epilogue)


def run(kernel: Kernel | str, sample: Sample, epilogue: str = "") -> torch.Tensor:
    """y [m, n] of the kernel, its dtype and shape checked."""
    kernel = KERNELS[kernel] if isinstance(kernel, str) else kernel
    served = sample.served
    packed = kernel.layout.pack(served.scheme, served.weight)
    with torch.no_grad():
        y = kernel.compute(served.scheme, served.x, packed, served.bias, epilogue)
    m, n, _ = sample.shape
    n = outputs(n, epilogue)
    assert y.shape == (m, n), f"{kernel.name}: y is {tuple(y.shape)}, expected {(m, n)}"
    assert y.dtype == sample.x.dtype, f"{kernel.name}: y is {y.dtype}, x is {sample.x.dtype}"
    return y


def assert_equal(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Bit for bit (NaN never passes); tells how many differ and the first."""
    if not torch.equal(found, expected):
        bad = (found != expected).nonzero()
        first = tuple(bad[0].tolist())
        raise AssertionError(
            f"{what}: {len(bad)} of {expected.numel()} values differ, first at {first}: "
            f"{found[first].item()!r}, expected {expected[first].item()!r}"
        )


def exact_probe(
    kernel: Kernel | str,
    scheme: Scheme | str,
    m: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    bias: bool = False,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> torch.Tensor:
    """Oracle 1: on exact_sample the kernel equals the reference rounded once. Returns its y."""
    sample = exact_sample(scheme, m, n, k, dtype, bias, seed)
    y = run(kernel, sample.to(device))
    what = f"{_name(kernel)}, {sample.scheme.name}, {m}x{n}x{k}, {dtype}, bias={bias}"
    # float32 first: the reference is exact there, so this is one rounding, not two
    assert_equal(y.cpu(), reference(sample, device=device).float().to(dtype), what)
    return y


def narrow_float8_probe(
    kernel: Kernel | str, m: int, n: int, k: int, dtype: torch.dtype, device: str | torch.device
) -> None:
    """As the exact probe, with sums that fit the 14 bits in which Hopper adds float8 products.

    At most 64 values of a row differ from zero, one of them 448, so that its scale is one.
    """
    g = torch.Generator().manual_seed(m + n + k)
    x = torch.randint(-2, 3, (m, k), generator=g).float()
    order = torch.rand(m, k, generator=g).argsort(1)
    x.scatter_(1, order[:, 64:], 0)
    x.scatter_(1, order[:, :1], 448)
    codes = torch.randint(-4, 5, (n, k), generator=g).float().to(torch.float8_e4m3fn)
    scale = 2.0 ** torch.randint(-3, 3, (n, 1), generator=g)
    sample = Sample(get_scheme("fp8dq"), x.to(dtype), Quantized(codes, scale, None), None)
    y = run(kernel, sample.to(device)).cpu()
    assert_equal(y, reference(sample).float().to(dtype), f"{_name(kernel)} {m}x{n}x{k}")


BEFORE_BIAS = ("tinygemm",)
"""Kernels of torch's that know no bias: the product is rounded before it is added."""


def bound_ratio(
    sample: Sample, y: torch.Tensor, epilogue: str = "", before_bias: bool = False
) -> torch.Tensor:
    """|y - reference| over its allowance ``6 u / sqrt(3) * sqrt(sum x^2 w^2) + u |y|``, [m, n]; the
    rounding of the product, too, if that comes ``before_bias``.

    The activations this project fuses have slopes within [-0.13, 1.13]: with one, the allowance
    grows by 1.13. Of a product ``act(g) v`` both factors have theirs: ``d(act(g)) |v| + |act(g)| d(v)``,
    their product, and three roundings more (g, v and act(g) may be rounded before).
    """
    x, w = operands(sample, y.device)
    u = UNIT_ROUNDOFF[sample.x.dtype]
    ref = reference(sample, epilogue, y.device)
    slope = 1.0 if not epilogue else 1.13
    inner = reference(sample, device=y.device)
    allowed = 6 * u / 3**0.5 * (x.square() @ w.square().T).sqrt() + u * inner.abs()
    if before_bias and sample.bias is not None:
        allowed += u * (inner - sample.bias.double()).abs()
    if epilogue in GATES:
        (_, v), (dg, dv) = inner.chunk(2, -1), (allowed + u * inner.abs()).chunk(2, -1)
        active = ACTIVATIONS[GATES[epilogue]](inner.chunk(2, -1)[0]).abs()
        allowed = slope * dg * v.abs() + active * dv + slope * dg * dv + 2 * u * ref.abs()
    else:
        allowed = slope * allowed
    # a result that is exactly zero (no terms, or all of them zero) has no allowance but itself
    smallest = torch.finfo(sample.x.dtype).tiny
    return (y.cpu().double() - ref).abs() / (allowed + smallest)


def elementwise_bound(
    kernel: Kernel | str,
    scheme: Scheme | str,
    m: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    bias: bool = False,
    device: str | torch.device = "cpu",
    epilogue: str = "",
    seed: int = 0,
) -> float:
    """Oracle 2: every element within its allowance of the float64 reference. Returns the worst."""
    sample = random_sample(scheme, m, n, k, dtype, bias, seed)
    y = run(kernel, sample.to(device), epilogue)
    ratio = bound_ratio(sample, y, epilogue, _name(kernel) in BEFORE_BIAS)
    if not ratio.numel():
        return 0.0
    worst = ratio.max().item()
    if not worst <= 1.0:
        place = divmod(int(ratio.nan_to_num(torch.inf).argmax()), n)
        raise AssertionError(
            f"{_name(kernel)}, {sample.scheme.name}, {m}x{n}x{k}, {dtype}, bias={bias}, "
            f"{epilogue}: error {worst:.3g} x the allowance at {place}"
        )
    return worst


def recipe_sqnr(
    kernel: Kernel | str,
    scheme: Scheme | str,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    m: int = 64,
    n: int = 128,
    k: int = 1024,
) -> float:
    """Oracle 3: signal to noise in dB against the float linear, at least the scheme's floor."""
    scheme = get_scheme(scheme) if isinstance(scheme, str) else scheme
    g = torch.Generator().manual_seed(0)
    x = torch.randn(m, k, generator=g).to(dtype)
    w = torch.randn(n, k, generator=g) * k**-0.5
    sample = Sample(scheme, x, scheme.weight.quantize(w), None)
    y = run(kernel, sample.to(device)).cpu().double()
    exact = x.double() @ w.double().T
    sqnr = 20 * torch.log10(exact.norm() / (exact - y).norm()).item()
    assert sqnr >= scheme.sqnr, (
        f"{_name(kernel)}, {scheme.name}: {sqnr:.2f} dB, floor {scheme.sqnr} dB"
    )
    return sqnr


def layout_round_trip(
    kernel: Kernel | str, scheme: Scheme | str, n: int, k: int, device: str | torch.device = "cpu"
) -> list[torch.Tensor]:
    """``unpack(pack(q))`` is q bit for bit, on random codes of the full range."""
    kernel = KERNELS[kernel] if isinstance(kernel, str) else kernel
    scheme = get_scheme(scheme) if isinstance(scheme, str) else scheme
    weight = random_sample(scheme, 0, n, k, torch.float32).weight
    if not weight.codes.is_floating_point():
        info = torch.iinfo(weight.codes.dtype)
        g = torch.Generator().manual_seed(n + k)
        codes = torch.randint(info.min, info.max + 1, weight.codes.shape, generator=g)
        weight = weight._replace(codes=codes.to(weight.codes.dtype))
    weight = Quantized(*(None if t is None else t.to(device) for t in weight))  # type: ignore
    row = scheme.product
    packed = kernel.layout.pack(row, scheme.weight.recoded(weight, row.weight))
    back = row.weight.recoded(kernel.layout.unpack(row, packed, n, k), scheme.weight)
    for name, before, after in zip(Quantized._fields, weight, back, strict=True):
        assert (before is None) == (after is None), f"{kernel.layout.name}: {name} is {after}"
        if before is None or after is None:
            continue
        assert (before.dtype, before.shape) == (after.dtype, after.shape), (
            f"{kernel.layout.name}: {name} came back as {after.dtype} {tuple(after.shape)}"
        )
        before, after = before.contiguous(), after.contiguous()
        same = torch.equal(before.view(torch.uint8), after.view(torch.uint8))
        assert same, f"{kernel.layout.name}: {name} changed on its way through pack and unpack"
    return packed


def _name(kernel: Kernel | str) -> str:
    return kernel if isinstance(kernel, str) else kernel.name


def _integers(low: int, high: int, shape: tuple[int, ...], g: torch.Generator) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=g).double()


def _exact_activations(
    scheme: Scheme, m: int, k: int, g: torch.Generator
) -> tuple[torch.Tensor, int]:
    """x [m, k], and the largest integer that stands for one of its values."""
    spec, step = scheme.input, 2.0**-6
    if spec is None:
        return _integers(-4, 5, (m, k), g) * step, 4
    if spec.dtype.is_floating_point:  # float8: scale = absmax / 448, and small integers are codes
        x = _integers(-8, 9, (m, k), g)
        low, high, largest = 448, 448, 448
    elif spec.mapping == "asymmetric":  # scale = (max - min) / 255
        x = _integers(-100, 156, (m, k), g)
        low, high, largest = -100, 155, 255
        if k == 1:  # then zero is the other extreme
            low = high = 255
    else:  # scale = absmax / 127.5; 127.5 itself becomes the code 127, -127.5 the code -128
        x = _integers(-127, 128, (m, k), g)
        low, high, largest = 127.5, -127.5, 128
    if x.numel():
        at = torch.rand(m, k, generator=g).argsort(1)
        x.scatter_(1, at[:, :1], float(low))
        x.scatter_(1, at[:, -1:], float(high))
    return x * step, largest


def _exact_weight(scheme: Scheme, n: int, k: int, limit: int, g: torch.Generator) -> Quantized:
    """Codes whose integers stay within ``limit`` (at least 1), scales of three powers of two."""
    spec, step = scheme.weight, 2.0**-8
    limit = max(limit, 1)
    per_row = 1 if spec.group_size is None else k // spec.group_size
    scale = (step * 2 ** _integers(0, 3, (n, per_row), g)).to(spec.scale_dtype)
    if spec.dtype.is_floating_point:
        codes = _integers(-15, 16, (n, k), g) * 2 ** _integers(0, 3, (n, k), g)
        return Quantized(codes.clamp(-limit, limit).to(spec.dtype), scale, None)
    middle = 2 ** (spec.bits - 1)
    span = min(middle, limit)
    codes = _integers(-span, min(span, middle - 1) + 1, (n, k), g)
    zero = None
    if spec.zero_point_domain == "float":
        codes += middle
        zero = (step * _integers(-8, 9, (n, per_row), g)).to(spec.scale_dtype)
    return Quantized(pack_codes(codes.to(storage_dtype(spec.dtype)), spec.dtype), scale, zero)
