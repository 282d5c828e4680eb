"""What the solvers know of a linear's inputs: their Gram matrix and each channel's magnitude."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..errors import (
    InvalidOption,
    NoCalibrationData,
    NonFiniteActivation,
    ShapeMismatch,
    UnsupportedDtype,
)
from ..scheme import SLAB

STATE = ("hessian", "abs_sum", "abs_max", "tokens")


class Gram:
    """Running statistics of the inputs x [..., k] of a linear: sums over all tokens seen.

    hessian [k, k]: ``sum x^T x``, the Hessian of the squared output error but for a factor of two.
    abs_sum, abs_max [k]: sum and largest of ``|x|`` by input channel.
    tokens: how many vectors of k values these come from.

    All of ``dtype`` (float32, or float64) on ``device``. Products follow the process's own setting
    for float32 matrix products; TensorFloat-32 is exact for bfloat16 and float16 activations, and
    costs float32 ones three digits of the Hessian. ``layer`` is what errors call the inputs.
    """

    def __init__(
        self,
        features: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        layer: str = "input",
    ):
        if dtype not in (torch.float32, torch.float64):
            raise InvalidOption(
                name="dtype", value=dtype, expected="torch.float32 or torch.float64"
            )
        self.layer = layer
        self.tokens = 0
        with torch.inference_mode(False):  # or only inference mode could add to them later
            self.hessian = torch.zeros(features, features, dtype=dtype, device=device)
            self.abs_sum = torch.zeros(features, dtype=dtype, device=device)
            self.abs_max = torch.zeros(features, dtype=dtype, device=device)

    @property
    def features(self) -> int:
        return self.hessian.shape[0]

    @property
    def abs_mean(self) -> torch.Tensor:
        """Mean of ``|x|`` by input channel [k]; 0 before the first token."""
        return self.abs_sum / max(self.tokens, 1)

    @torch.no_grad()
    def add(self, x: torch.Tensor) -> Gram:
        """Count the tokens of ``x`` [..., k], of any floating dtype; returns itself.

        Raises ShapeMismatch, UnsupportedDtype, and NonFiniteActivation where a channel holds NaN
        or an infinity, or its square overflows; then nothing of ``x`` is counted.
        """
        if x.dim() == 0 or x.shape[-1] != self.features:
            expected = f"a last dimension of {self.features}"
            raise ShapeMismatch(
                what=f"{self.layer}: an input", found=tuple(x.shape), expected=expected
            )
        if not x.is_floating_point():
            floats = "torch.float32, torch.bfloat16, torch.float16, torch.float64"
            raise UnsupportedDtype(layer=self.layer, dtype=x.dtype, choices=floats)
        rows = x.reshape(-1, self.features).to(self.hessian.device)
        if rows.numel() == 0:
            return self
        largest = rows.abs().amax(0).to(self.hessian.dtype)  # amax keeps NaN
        bound = torch.maximum(largest, self.abs_max).square() * (self.tokens + len(rows))
        if not bool(torch.isfinite(bound).all()):
            channel = int((~torch.isfinite(bound)).nonzero()[0])
            raise NonFiniteActivation(layer=self.layer, shape=tuple(x.shape), channel=channel)
        torch.maximum(self.abs_max, largest, out=self.abs_max)
        for part in rows.split(max(SLAB // self.features, 1)):
            part = part.to(self.hessian.dtype)
            self.hessian.addmm_(part.T, part)
            self.abs_sum += part.abs().sum(0)
        self.tokens += len(rows)
        return self

    @torch.no_grad()
    def merge(self, other: Gram) -> Gram:
        """Count what ``other`` has counted too (another process's share); returns itself.

        Raises ShapeMismatch.
        """
        if other.features != self.features:
            raise ShapeMismatch(
                what=f"{self.layer}: a Gram to merge",
                found=tuple(other.hessian.shape),
                expected=tuple(self.hessian.shape),
            )
        self.hessian += other.hessian.to(self.hessian)
        self.abs_sum += other.abs_sum.to(self.abs_sum)
        torch.maximum(self.abs_max, other.abs_max.to(self.abs_max), out=self.abs_max)
        self.tokens += other.tokens
        return self

    def divided(self, scales: torch.Tensor) -> Gram:
        """The statistics of ``x / scales``, for positive ``scales`` [k]: of folded inputs.

        Raises ShapeMismatch.
        """
        if scales.shape != (self.features,):
            raise ShapeMismatch(
                what=f"{self.layer}: scales", found=tuple(scales.shape), expected=(self.features,)
            )
        inverse = 1 / scales.to(self.hessian)
        return self._of(
            self.hessian * inverse[:, None] * inverse,
            self.abs_sum * inverse,
            self.abs_max * inverse,
            self.tokens,
        )

    def to(self, device: torch.device | str) -> Gram:
        """The same statistics on ``device``; itself if they lie there already."""
        if self.hessian.device == torch.device(device):
            return self
        hessian, total, largest = (t.to(device) for t in (self.hessian, self.abs_sum, self.abs_max))
        return self._of(hessian, total, largest, self.tokens)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Plain tensors by name, ``tokens`` an int64 scalar; not copies."""
        return {
            "hessian": self.hessian,
            "abs_sum": self.abs_sum,
            "abs_max": self.abs_max,
            "tokens": torch.tensor(self.tokens),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, torch.Tensor], layer: str = "input") -> Gram:
        """The inverse of ``state_dict``; the Gram owns the tensors of ``state`` from then on.

        Raises InvalidOption (other names or another dtype), ShapeMismatch.
        """
        if set(state) != set(STATE):
            raise InvalidOption(name="state", value=sorted(state), expected=", ".join(STATE))
        hessian = state["hessian"]
        expected = {"hessian": (k := hessian.shape[-1:]) * 2, "abs_sum": k, "abs_max": k}
        for name, shape in expected.items():
            if state[name].shape != shape or hessian.dim() != 2:
                found = tuple(state[name].shape)
                raise ShapeMismatch(what=f"{layer}: {name}", found=found, expected=tuple(shape))
        gram = cls(0, dtype=hessian.dtype, layer=layer)
        return gram._of(hessian, state["abs_sum"], state["abs_max"], int(state["tokens"]))

    def _of(
        self, hessian: torch.Tensor, abs_sum: torch.Tensor, abs_max: torch.Tensor, tokens: int
    ) -> Gram:
        gram = Gram(0, dtype=hessian.dtype, layer=self.layer)
        gram.hessian, gram.abs_sum, gram.abs_max, gram.tokens = hessian, abs_sum, abs_max, tokens
        return gram


def hessian_for(
    gram: Gram | None, weight: torch.Tensor, *, solver: str, layer: str
) -> torch.Tensor:
    """The Hessian [k, k] for ``weight`` [n, k], on its device.

    Raises NoCalibrationData (no Gram, or no token in it), ShapeMismatch.
    """
    if gram is None or gram.tokens == 0:
        raise NoCalibrationData(layer=layer, solver=solver, choices="rtn, mse, hqq")
    if gram.features != weight.shape[1]:
        raise ShapeMismatch(
            what=f"{layer}: the Gram of its inputs",
            found=tuple(gram.hessian.shape),
            expected=(weight.shape[1], weight.shape[1]),
        )
    return gram.hessian.to(weight.device)
