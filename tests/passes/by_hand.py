"""Static quantization written out: the oracle of what the passes make of it."""

from __future__ import annotations

import torch


def float32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32))


def by_hand(scheme: str, x: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """``x`` through codes of a range: what a static input means, in float64 but for the float32 scale."""
    low, high = float32(low), float32(high)
    if scheme == "fp8static":
        return e4m3(x, float32(max(-low, high) / 448))
    if scheme == "int8static-sym":
        scale, zero = float32(max(-low, high) / 127.5), 0
    else:
        low, high = min(low, 0.0), max(high, 0.0)
        scale = float32((high - low) / 255)
        zero = -128 - round(low / scale)
    return ((x / scale).round().add(zero).clamp(-128, 127) - zero) * scale


def e4m3(x: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).double() * scale


def weight_by_hand(scheme: str, w: torch.Tensor) -> torch.Tensor:
    largest = w.abs().amax(1, keepdim=True)
    if scheme == "fp8static":
        return e4m3(w, (largest / 448).float().double())
    scale = (largest / 127.5).float().double()
    return (w / scale).round().clamp(-128, 127) * scale
