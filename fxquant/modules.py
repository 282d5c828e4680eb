"""QuantLinear: the holder of canonical codes and qparams of a linear, and of its inputs' qparams."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from . import ops as _ops  # noqa: F401  defines fxquant::linear
from .errors import ShapeMismatch
from .scheme import Quantized, Scheme, get_scheme
from .weights import RESIDENTS

CANONICAL = ("codes", "scale", "zero")
INPUT = ("smoothing", "input_scale", "input_zero", "input_group")
WITH_CODES = ("smoothing", "input_group")
"""What a checkpoint gives or takes away with the codes."""

Qparams = tuple[torch.Tensor, torch.Tensor | None]


def smoothed(x: torch.Tensor, smoothing: torch.Tensor) -> torch.Tensor:
    """``x`` [..., K] with each channel divided, in float32, rounded once."""
    # float() of a float32 value is a node too, and siblings would read one another's
    wide = x.float() if x.dtype.itemsize == 2 else x
    return (wide / smoothing).to(x.dtype)


def autocasted(x: Any) -> Any:
    """What an op that autocast knows makes of ``x``: under ``torch.autocast`` in its dtype."""
    known = x is not None and not x.is_meta and x.dtype != torch.float64
    if not known or not torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


def quantized_input(
    x: torch.Tensor, scheme: Scheme, smoothing: torch.Tensor | None, qparams: Qparams | None
) -> torch.Tensor:
    """The input ``x`` [..., K] of a QuantLinear through its codes, in the dtype of ``x``."""
    x = x if smoothing is None else smoothed(x, smoothing.to(x.device))
    if scheme.input is None:
        return x
    if qparams is None:
        return scheme.input.dequantize(scheme.input.quantize(x), x.dtype)
    scale, zero = (None if t is None else t.to(x.device) for t in qparams)
    codes = torch.ops.fxquant.quantize_static(x, scale, zero, scheme.name)
    return torch.ops.fxquant.dequantize(codes, scale, zero, scheme.name, "input", x.dtype)


_MOVES: WeakKeyDictionary[Any, dict[int, tuple[torch.Tensor, torch.Tensor]]] = WeakKeyDictionary()
"""By the function of one ``Module.to``: what it was given, and what that has become."""


def _once(fn: Any, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """``new``, or what ``fn`` made of ``old`` for another layer: what they shared they share still."""
    try:
        moved = _MOVES.setdefault(fn, {})
    except TypeError:  # a builtin outlives every move: nothing is kept for it
        return new
    return moved.setdefault(id(old), (old, new))[1]


def share_inputs(model: nn.Module, *_: Any) -> None:
    """Let the QuantLinears of one ``input_group`` hold the same tensors, where these are equal. A hook that
    ``quantize`` leaves on the model, for when a checkpoint has been loaded."""
    held: dict[tuple[int, str], list[torch.Tensor]] = {}
    for module in model.modules():
        if not isinstance(module, QuantLinear) or module.input_group is None:
            continue
        if module.input_group.is_meta:
            continue
        group = int(module.input_group)
        for name in INPUT:
            tensor = module._buffers[name]
            if tensor is None or tensor.is_meta:
                continue
            known = held.setdefault((group, name), [])
            twin = next((t for t in known if t.device == tensor.device and t.equal(tensor)), None)
            if twin is None:
                known.append(tensor)
            else:
                module._buffers[name] = twin


class QuantLinear(nn.Module):
    """``y = x @ dequantize(codes, scale, zero).T + bias`` in the arithmetic of its scheme; under
    ``torch.autocast``, as ``nn.Linear``, of an input in its dtype.

    codes [N, K] (sub-byte ones packed along K), scale [N, K / block], zero like scale or None;
    bias [N] or None. smoothing [K] float32 or None: what the inputs are divided by first, where no norm
    before the layer could take that up. input_scale [1] float32, input_zero [1] int32 or None: of a
    static scheme. input_group [1] int64 or None: the same for all layers that read one value; these hold
    the same tensors of the above, by which a compiled graph sees that it has to prepare the value once
    (``share_inputs``). Once a compiled graph holds the packed weight, the canonical tensors give up
    their memory; they are rebuilt when something reads them: ``codes``, ``scale``, ``zero``,
    ``state_dict()``, ``to()``, copying, running eagerly.
    """

    _codes: torch.Tensor
    _scale: torch.Tensor
    _zero: torch.Tensor | None
    smoothing: torch.Tensor | None
    input_scale: torch.Tensor | None
    input_zero: torch.Tensor | None
    input_group: torch.Tensor | None

    def __init__(
        self,
        scheme: str,
        q: Quantized,
        bias: torch.Tensor | None,
        in_features: int,
        *,
        smoothing: torch.Tensor | None = None,
        qparams: Qparams | None = None,
        group: torch.Tensor | None = None,
    ):
        super().__init__()
        self.scheme = scheme
        self.in_features = in_features
        self.out_features = q.codes.shape[0]
        for name, tensor in zip(CANONICAL, q, strict=True):
            self.register_buffer(f"_{name}", tensor)
        of_input = (smoothing, *(qparams or (None, None)), group)
        for name, tensor in zip(INPUT, of_input, strict=True):
            self.register_buffer(name, tensor)
        self.record: Any = None
        """What the solver of the codes noted (solvers.Record); not in checkpoints."""
        self.bias = bias if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self._watch()

    @classmethod
    def from_float(cls, linear: nn.Module, scheme: str) -> QuantLinear:
        """Quantize ``linear.weight`` [N, K]. On the meta device the result is on meta too."""
        row = get_scheme(scheme)
        weight = linear.weight.detach()  # type: ignore[union-attr, operator]
        return cls(row.name, row.weight.quantize_weight(weight), linear.bias, weight.shape[1])  # type: ignore

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``nn.Linear.forward``, its argument's name included."""
        if not torch.compiler.is_compiling():
            self._restore()
        x = input if self.smoothing is None else smoothed(input, self.smoothing)
        x, bias = autocasted(x), autocasted(self.bias)
        weight = (self._codes, self._scale, self._zero, bias, self.scheme, "")
        if self.input_scale is None:
            return torch.ops.fxquant.linear(x, *weight)
        qparams = self.input_scale, self.input_zero
        codes = torch.ops.fxquant.quantize_static(x, *qparams, self.scheme)
        return torch.ops.fxquant.linear(codes, *weight, *qparams, x.dtype)

    @property
    def codes(self) -> torch.Tensor:
        """Canonical codes, a copy."""
        return self.canonical().codes

    @property
    def scale(self) -> torch.Tensor:
        return self.canonical().scale

    @property
    def zero(self) -> torch.Tensor | None:
        return self.canonical().zero

    @property
    def weight(self) -> torch.Tensor:
        """The dequantized weight [N, K] in the bias's dtype, or float32; computed at each read. It is the
        one for inputs as they come: what reads it (``nn.MultiheadAttention`` does) does not smooth them."""
        dtype = torch.float32 if self.bias is None else self.bias.dtype
        weight = self.row.weight.dequantize(self.canonical(), dtype)
        return weight if self.smoothing is None else smoothed(weight, self.smoothing)

    @property
    def row(self) -> Scheme:
        return get_scheme(self.scheme)

    def canonical(self) -> Quantized:
        """Copies of the canonical tensors, wherever their content is held at present."""
        self._restore()
        return Quantized(*(None if t is None else t.clone() for t in self._tensors()))  # type: ignore

    def _tensors(self) -> list[torch.Tensor | None]:
        return [self._buffers[f"_{name}"] for name in CANONICAL]

    def _restore(self) -> None:
        for tensor in self._tensors():
            if tensor is not None:
                RESIDENTS.restore(tensor)

    def _watch(self) -> None:
        for tensor in self._tensors():
            if tensor is not None and tensor.device.type != "meta":
                RESIDENTS.evictable(tensor)

    def _apply(self, fn: Any, recurse: bool = True) -> QuantLinear:
        """Moves between devices; dtypes of codes and qparams belong to the scheme and stay."""
        self._restore()
        kept = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in kept.items():
            new = self._buffers[name]
            if old is not None and new is not None:
                kept_dtype = new if new.dtype == old.dtype else old.to(new.device)
                self._buffers[name] = _once(fn, old, kept_dtype) if name in INPUT else kept_dtype
        self._watch()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for name, tensor in zip(CANONICAL, self.canonical(), strict=True):
            if tensor is not None:
                destination[prefix + name] = tensor
        for name in INPUT:
            tensor = self._buffers[name]
            if tensor is not None:
                # a copy: safetensors takes no tensor twice
                destination[prefix + name] = tensor if keep_vars else tensor.detach().clone()
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors
    ):
        """Own copies of the tensors are kept, with ``assign`` too: their memory may be given up.

        Whether inputs are smoothed belongs to the codes, so ``smoothing`` comes and goes with them. What
        layers of one input shared becomes each one's own, until ``share_inputs``.
        """
        self._restore()
        assign = bool(local_metadata.get("assign_to_params_buffers"))
        for name, size in {
            "smoothing": self.in_features,
            "input_scale": 1,
            "input_zero": 1,
            "input_group": 1,
        }.items():
            given, held = state_dict.get(prefix + name), self._buffers[name]
            if given is not None and given.shape != (size,):
                found, expected = list(given.shape), [size]
                mismatch = ShapeMismatch(what=prefix + name, found=found, expected=expected)
                errors.append(str(mismatch))
            elif given is not None and (held is not None or name in WITH_CODES):
                device = None if self._codes.is_meta else self._codes.device
                self._buffers[name] = given.detach().to(device, copy=True)
            elif given is None and name in WITH_CODES and prefix + "codes" in state_dict:
                self._buffers[name] = None
            elif given is None and name not in WITH_CODES and held is not None and strict:
                missing.append(prefix + name)
        for name, tensor in zip(CANONICAL, self._tensors(), strict=True):
            if tensor is None:
                continue
            given = state_dict.get(prefix + name)
            if given is None:
                if strict:
                    missing.append(prefix + name)
            elif given.shape != tensor.shape or given.dtype != tensor.dtype:
                expected = f"{list(tensor.shape)} {tensor.dtype}"
                found = f"{list(given.shape)} {given.dtype}"
                errors.append(
                    str(ShapeMismatch(what=prefix + name, found=found, expected=expected))
                )
            elif tensor.device.type == "meta" or assign:
                self._buffers[f"_{name}"] = given.detach().clone()
            else:
                with torch.no_grad():
                    tensor.copy_(given)
        if self.bias is not None:
            key, bias = prefix + "bias", self.bias
            if key not in state_dict:
                if strict:
                    missing.append(key)
            elif bias.device.type == "meta" or assign:
                self.bias = nn.Parameter(state_dict[key].detach(), requires_grad=False)
            else:
                with torch.no_grad():
                    bias.copy_(state_dict[key])
        if strict:
            held = [name for name in INPUT if self._buffers[name] is not None]
            known = {prefix + n for n in (*CANONICAL, *held, "bias")}
            unexpected.extend(k for k in state_dict if k.startswith(prefix) and k not in known)
        self._watch()

    def __getstate__(self) -> dict[str, Any]:
        self._restore()
        return self.__dict__.copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._watch()

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return f"{self.in_features}, {self.out_features}, bias={bias}, scheme={self.scheme!r}"
