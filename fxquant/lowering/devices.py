"""Devices: one row of capabilities each. Rates are measured, or the data sheet's where marked."""

from __future__ import annotations

import platform
from functools import lru_cache
from pathlib import Path

import torch

from .kernel import Device

_CUDA_ROWS: dict[str, tuple[float, dict[str, float]]] = {
    # name in torch.cuda.get_device_name: bytes/s, operations/s (H200: measured, the rest: data sheet)
    "H200": (4.27e12, {"float32": 5e13, "bfloat16": 7.0e14, "int8": 1.15e15, "float8": 1.2e15}),
    "H100": (3.0e12, {"float32": 5e13, "bfloat16": 7.0e14, "int8": 1.15e15, "float8": 1.2e15}),
    "A100": (1.7e12, {"float32": 1.9e13, "bfloat16": 2.5e14, "int8": 5.0e14}),
    "L4": (2.7e11, {"float32": 2.5e13, "bfloat16": 1.0e14, "int8": 2.0e14, "float8": 2.0e14}),
}
_CUDA_DEFAULT = (1.0e12, {"float32": 2e13, "bfloat16": 1.5e14, "int8": 3.0e14, "float8": 3.0e14})

_CPU_PEAKS: dict[str, dict[str, float]] = {
    # per core, what oneDNN reaches in a large product; the first feature that a machine has
    "amx_int8": {"float32": 1.0e11, "bfloat16": 1.0e12, "int8": 2.7e12},
    "avx512_bf16": {"float32": 8.0e10, "bfloat16": 1.5e11, "int8": 3.0e11},
    "avx512_vnni": {"float32": 8.0e10, "bfloat16": 6.0e10, "int8": 3.0e11},
    "avx2": {"float32": 5.0e10, "bfloat16": 2.0e10, "int8": 8.0e10},
    "": {"float32": 1.0e10, "bfloat16": 5.0e9, "int8": 1.0e10},
}
_VECTOR_LIMIT = {"vector_bfloat16": ("bfloat16", 1.5e11), "vector_int8": ("int8", 3.0e11)}
"""What instructions on vectors reach, per core: our own kernels use no AMX tiles."""

_CPU_BANDWIDTH = 1.5e10
"""bytes/s for each core, up to eight; more share the memory controllers."""


def device_row(device: torch.device) -> Device:
    """The capabilities of ``device``; an unknown one gets a cautious row."""
    if device.type == "cuda":
        return _cuda_row(device.index if device.index is not None else torch.cuda.current_device())
    return _cpu_row(torch.get_num_threads(), device.type)


@lru_cache
def _cuda_row(index: int) -> Device:
    name = torch.cuda.get_device_name(index)
    major, minor = torch.cuda.get_device_capability(index)
    bandwidth, peak = next((r for k, r in _CUDA_ROWS.items() if k in name), _CUDA_DEFAULT)
    levels = (75, 80, 86, 89, 90, 100, 120)
    features = frozenset(f"sm{level}" for level in levels if major * 10 + minor >= level)
    if (major, minor) == (9, 0):  # wgmma and 227 KiB of shared memory: no later generation has both
        features |= {"hopper"}
    units = torch.cuda.get_device_properties(index).multi_processor_count
    return Device(
        name=name,
        type="cuda",
        bandwidth=bandwidth,
        peak=peak,
        launch=3e-6,
        features=features,
        units=units,
    )


@lru_cache
def _cpu_row(threads: int, type_: str) -> Device:
    features = cpu_features()
    best = _CPU_PEAKS[next(k for k in _CPU_PEAKS if not k or k in features)]
    vector = {name: min(best[kind], limit) for name, (kind, limit) in _VECTOR_LIMIT.items()}
    return Device(
        name=platform.processor() or platform.machine(),
        type=type_,
        bandwidth=_CPU_BANDWIDTH * min(threads, 8),
        peak={k: v * threads for k, v in (best | vector).items()},
        launch=1e-5,
        features=features,
        units=threads,
    )


@lru_cache
def cpu_features() -> frozenset[str]:
    """The instruction sets that Linux lists for this processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    flags = next((ln for ln in lines if ln.startswith(("flags", "Features"))), "")
    return frozenset(flags.partition(":")[2].split())
