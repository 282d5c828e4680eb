"""What is compared: a row of data for every scheme, solver and smoothing, fxquant's and torchao's.

``CONTENDERS`` are tables by subject; adding one is adding a row. ``convert`` makes of a float model
what a row says.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import fxquant

KINDS = {"input": ("minmax", "channel", "sample")}
"""Static ranges, SmoothQuant, and the searches by output error."""

BASES = {"float32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A row. scheme: fxquant's, a key of TORCHAO, or a base.

    smooth, solver: what ``fxquant.quantize`` takes. ranges: the scheme itself needs statistics.
    compiled: ``fxquant.compile`` rewrites the float model's graph and the generated kernels run, instead
    of ``fxquant.quantize`` in place and the reference arithmetic. cuda: the row needs it.
    """

    name: str
    scheme: str
    library: str = "fxquant"
    smooth: Any = False
    solver: str = "rtn"
    ranges: bool = False
    compiled: bool = False
    cuda: bool = False

    @property
    def calibrated(self) -> bool:
        """Whether it looks at data."""
        if self.library == "torchao":
            return self.scheme in CALIBRATED
        return self.ranges or self.smooth is not False or self.solver == "gptq"


class Calibration:
    """A float model with its calibration batches; statistics are taken when a row first asks for them."""

    def __init__(self, model: nn.Module, batches: Sequence[Any], recipe: Callable[[str], Any]):
        self.model, self.batches, self.recipe = model, batches, recipe
        self._stats: fxquant.Stats | None = None

    @property
    def stats(self) -> fxquant.Stats:
        if self._stats is None:
            self._stats = fxquant.calibrate(
                self.model,
                self.batches,
                recipe=self.recipe("int8dq"),
                kinds=KINDS,
                compiled=False,
                progress=False,
            )
        return self._stats

    @torch.no_grad()
    def run(self, model: nn.Module) -> None:
        """All batches through ``model``, whose observers count them."""
        for batch in self.batches:
            model(**batch) if isinstance(batch, dict) else model(batch)


def convert(contender: Contender, data: Calibration) -> Callable[..., Any]:
    """A copy of the float model, quantized as the row says. Raises what the library raises."""
    model = copy.deepcopy(data.model)
    if contender.library == "float":
        return model.to(BASES[contender.scheme])
    if contender.library == "torchao":
        TORCHAO[contender.scheme](model, data)
        return model
    recipe = data.recipe(contender.scheme)
    options: dict[str, Any] = {}
    if contender.ranges or contender.smooth is not False:
        options |= {"stats": data.stats, "smooth": contender.smooth}
    if contender.compiled:
        return fxquant.compile(model, recipe=recipe, **options)
    if contender.solver != "rtn":
        options["solver"] = contender.solver
    if contender.solver == "gptq":
        options |= {"batches": data.batches, "progress": False}
    return fxquant.quantize(model, recipe, **options)


def _chosen(module: nn.Module, name: str) -> bool:
    """The linears that torchao quantizes: all but the head, as in fxquant's recipe."""
    return isinstance(module, nn.Linear) and "lm_head" not in name


def _plain(make: Callable[[Any], Any]) -> Callable[[nn.Module, Calibration], None]:
    """One call of quantize_ with the configuration that ``make`` builds from torchao.quantization."""

    def apply(model: nn.Module, data: Calibration) -> None:
        from torchao import quantization as ao

        ao.quantize_(model, make(ao), filter_fn=_chosen)

    return apply


def _calibrated(
    make: Callable[[Any, str], Any], first: str = "prepare"
) -> Callable[[nn.Module, Calibration], None]:
    """Observe, run the calibration batches, convert. make: the configuration of a step."""

    def apply(model: nn.Module, data: Calibration) -> None:
        from torchao import quantization as ao

        ao.quantize_(model, make(ao, first), filter_fn=_chosen)
        data.run(model)
        ao.quantize_(model, make(ao, "convert"), filter_fn=_chosen)

    return apply


def _smoothquant(ao: Any, step: str) -> Any:
    from torchao.prototype.smoothquant import SmoothQuantConfig

    return SmoothQuantConfig(base_config=_int8dq(ao), step=step, alpha=0.5)


def _awq(size: int) -> Callable[[Any, str], Any]:
    def make(ao: Any, step: str) -> Any:
        from torchao.prototype.awq import AWQConfig

        return AWQConfig(_tile_packed(size, "tinygemm")(ao), step=step)

    return make


def _gptq(ao: Any, step: str) -> Any:
    from torchao.prototype.gptq import GPTQConfig

    return GPTQConfig(step=step, base_config=_int8wo(ao))


def _int8dq(ao: Any) -> Any:
    return ao.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)


def _int8wo(ao: Any) -> Any:
    return ao.Int8WeightOnlyConfig(set_inductor_config=False)


def _tile_packed(size: int, algorithm: str) -> Callable[[Any], Any]:
    """int4 for CUDA, the only packing that torch itself can run: zero points by tinygemm or HQQ."""
    return lambda ao: ao.Int4WeightOnlyConfig(
        group_size=size,
        int4_packing_format="tile_packed_to_4d",
        int4_choose_qparams_algorithm=algorithm,
        set_inductor_config=False,
    )


def _intx(bits: int, size: int, mapping: str = "ASYMMETRIC", algorithm: str = "AFFINE"):
    """Groups on any device, codes held as int8. HQQ there searches scales alone, symmetric."""

    def make(ao: Any) -> Any:
        from torchao.quantization.quantize_.workflows import IntxChooseQParamsAlgorithm

        return ao.IntxWeightOnlyConfig(
            weight_dtype=getattr(torch, f"int{bits}"),
            granularity=ao.PerGroup(size),
            mapping_type=ao.MappingType[mapping],
            intx_choose_qparams_algorithm=IntxChooseQParamsAlgorithm[algorithm],
        )

    return make


SIZES = (128, 64, 32)

CALIBRATED: dict[str, Callable[[nn.Module, Calibration], None]] = {
    "int8dq smoothquant": _calibrated(_smoothquant),
    "int8wo gptq": _calibrated(_gptq, first="observe"),
    **{f"int4wo-{size} awq": _calibrated(_awq(size)) for size in SIZES},
}
TORCHAO: dict[str, Callable[[nn.Module, Calibration], None]] = {
    **CALIBRATED,
    "int8wo": _plain(_int8wo),
    "int8dq": _plain(_int8dq),
    "fp8wo": _plain(lambda ao: ao.Float8WeightOnlyConfig(set_inductor_config=False)),
    "fp8dq": _plain(
        lambda ao: ao.Float8DynamicActivationFloat8WeightConfig(
            granularity=ao.PerRow(), set_inductor_config=False
        )
    ),
}
for _size in SIZES:
    TORCHAO |= {
        f"int4-{_size}": _plain(_intx(4, _size)),
        f"int4-{_size} hqq": _plain(_intx(4, _size, "SYMMETRIC", "HQQ_SCALE_ONLY")),
        f"int3-{_size}": _plain(_intx(3, _size)),
        f"int2-{_size}": _plain(_intx(2, _size)),
        f"int4wo-{_size}": _plain(_tile_packed(_size, "tinygemm")),
        f"int4wo-{_size} hqq": _plain(_tile_packed(_size, "hqq")),
        f"8da4w-{_size}": _plain(
            lambda ao, size=_size: ao.Int8DynamicActivationIntxWeightConfig(
                weight_dtype=torch.int4, weight_granularity=ao.PerGroup(size)
            )
        ),
    }


def _torchao(*schemes: str, cuda: bool = False) -> list[Contender]:
    return [Contender(name=f"torchao {s}", scheme=s, library="torchao", cuda=cuda) for s in schemes]


def _solved(scheme: str, solvers: Sequence[str] = ("mse", "hqq", "gptq", "awq")) -> list[Contender]:
    """Weights alone, to nearest and in better ways; AWQ is a smoothing with its own search."""
    rows = [Contender(name=scheme, scheme=scheme)]
    for solver in solvers:
        way = {"smooth": "awq"} if solver == "awq" else {"solver": solver}
        rows.append(Contender(name=f"{scheme} {solver}", scheme=scheme, **way))
    return rows


def _smoothed(scheme: str, *alphas: Any, ranges: bool = False) -> list[Contender]:
    rows = [Contender(name=scheme, scheme=scheme, ranges=ranges)]
    for alpha in alphas:
        name = f"{scheme} smooth {alpha}"
        rows.append(Contender(name=name, scheme=scheme, smooth=alpha, ranges=ranges))
    return rows


def _compiled(scheme: str, *alphas: Any) -> list[Contender]:
    """The one line on the float model, whose graph is rewritten and whose kernels run."""
    rows = []
    for alpha in alphas:
        name = f"{scheme} compiled" if alpha is False else f"{scheme} smooth {alpha} compiled"
        rows.append(Contender(name=name, scheme=scheme, smooth=alpha, compiled=True))
    return rows


FLOAT = [Contender(name=name, scheme=name, library="float") for name in BASES]
INT8 = [
    Contender(name="int8wo", scheme="int8wo"),
    *_smoothed("int8dq", 0.5, 0.6, "auto"),
    *_smoothed("int8static", 0.5, "auto", ranges=True),
    *_smoothed("int8static-sym", 0.5, ranges=True),
]
FP8 = [
    Contender(name="fp8wo", scheme="fp8wo"),
    Contender(name="fp8dq", scheme="fp8dq"),
    Contender(name="fp8static", scheme="fp8static", ranges=True),
]
TORCHAO_INT8 = [
    *_torchao("int8wo", "int8dq", "int8dq smoothquant"),
    *_torchao("int8wo gptq", cuda=True),
]

PLAIN = [
    *FLOAT,
    *INT8,
    Contender(name="int8wo gptq", scheme="int8wo", solver="gptq"),
    *FP8,
    *(row for size in SIZES for row in _smoothed(f"8da4w-{size}", "auto")),
    *(row for size in SIZES for row in _solved(f"int4wo-{size}")),
    *(
        row
        for bits in (3, 2)
        for size in SIZES
        for row in _solved(f"int{bits}wo-{size}", ("hqq", "gptq"))
    ),
    *_compiled("int8dq", False),
    *_compiled("int4wo-128", False),
    *TORCHAO_INT8,
    *_torchao("fp8wo"),
    *_torchao("fp8dq", cuda=True),
    *_torchao(*(f"8da4w-{size}" for size in SIZES)),
    *_torchao(*(f"int4-{size}{how}" for size in SIZES for how in ("", " hqq"))),
    *_torchao(*(f"int{bits}-{size}" for bits in (3, 2) for size in SIZES)),
    *_torchao(
        *(f"int4wo-{size}{how}" for size in SIZES for how in ("", " hqq", " awq")), cuda=True
    ),
]
OUTLIERS = [
    *FLOAT,
    *INT8,
    *_compiled("int8dq", 0.5),
    *FP8,
    *_smoothed("8da4w-32", 0.5, "auto"),
    *_solved("int4wo-128"),
    *TORCHAO_INT8,
    *_torchao("int4-128"),
    *_torchao("int4wo-128", "int4wo-128 awq", cuda=True),
]
MINILM = [
    *FLOAT,
    *INT8,
    *_compiled("int8dq", False, 0.5, 0.6, "auto"),
    *FP8,
    *_smoothed("8da4w-32", "auto"),
    *_solved("int4wo-128"),
    *TORCHAO_INT8,
    *_torchao("8da4w-32", "int4-128"),
]

CONTENDERS = {"plain": PLAIN, "outliers": OUTLIERS, "minilm": MINILM}
"""By subject: the trained model, its twin with outliers, MiniLM."""
