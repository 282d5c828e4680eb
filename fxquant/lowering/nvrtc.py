"""CUDA C++ of ``cuda/``: compiled by NVRTC for one set of constants, kept in the user's cache, launched.

torch brings NVRTC and cuda-bindings; no toolkit is needed. A binary's name is the hash of all that
could change it, and a variant takes a second to compile once for a machine.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from ..errors import BuildFailed
from .native import cache_dir


@lru_cache
def bindings() -> tuple[Any, Any]:
    """cuda.bindings' (driver, nvrtc). Raises ImportError or what its loader raises."""
    from cuda.bindings import driver, nvrtc

    nvrtc.nvrtcVersion()  # loads the library
    return driver, nvrtc


@lru_cache
def refusal() -> str | None:
    """Why CUDA C++ cannot be compiled here, or None."""
    try:
        bindings()
    except (ImportError, RuntimeError, OSError) as error:
        return f"needs NVRTC and cuda-bindings: {str(error).splitlines()[0]}"
    return None


def checked(result: tuple, what: str) -> Any:
    """The values of a call of cuda.bindings. Raises BuildFailed for an error code."""
    code, *values = result
    if int(code) != 0:
        raise BuildFailed(compiler="NVRTC", output=f"{what}: {code.name}")
    return values[0] if len(values) == 1 else values


def compile_source(text: str, defines: Mapping[str, int], arch: str) -> bytes:
    """The machine code of ``text`` for ``arch`` ("sm_90a"). Raises BuildFailed with the log."""
    _, nvrtc = bindings()
    source = text.encode()
    options = [f"--gpu-architecture={arch}", "-std=c++17", "-w"]
    options += [f"-D{key}={int(value)}" for key, value in defines.items()]
    version = checked(nvrtc.nvrtcVersion(), "version")
    digest = hashlib.sha256(repr((version, options)).encode() + source).hexdigest()
    path = cache_dir() / f"{digest}.cubin"
    if path.is_file():
        return path.read_bytes()
    program = checked(nvrtc.nvrtcCreateProgram(source, b"fxquant.cu", 0, [], []), "create")
    encoded = [option.encode() for option in options]
    (code,) = nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)
    if int(code) != 0:
        log = b" " * checked(nvrtc.nvrtcGetProgramLogSize(program), "log")
        nvrtc.nvrtcGetProgramLog(program, log)
        raise BuildFailed(compiler="NVRTC", output=f"{dict(defines)}: {log.decode()[:2000]}")
    binary = b" " * checked(nvrtc.nvrtcGetCUBINSize(program), "size")
    checked(nvrtc.nvrtcGetCUBIN(program, binary), "cubin")
    nvrtc.nvrtcDestroyProgram(program)
    handle, partial = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "wb") as file:
        file.write(binary)
    os.replace(partial, path)
    return binary


@dataclass(frozen=True)
class Function:
    """A kernel on one device, ready to launch."""

    handle: Any
    threads: int
    device: int
    overlap: bool

    def launch(self, grid: tuple[int, int, int], shared: int, arguments: bytes) -> None:
        """Launch on torch's current stream of the device with one struct as the argument. shared: bytes of
        shared memory.

        With ``overlap`` the kernel may start before its predecessor has ended (programmatic
        dependent launch); it waits inside.
        """
        if torch.cuda.current_device() != self.device:
            with torch.cuda.device(self.device):
                return self.launch(grid, shared, arguments)
        driver, _ = bindings()
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.blockDimX, config.blockDimY, config.blockDimZ = self.threads, 1, 1
        config.sharedMemBytes = shared
        config.hStream = torch.cuda.current_stream(self.device).cuda_stream
        if self.overlap:
            config.attrs = [_overlap()]
            config.numAttrs = 1
        block = ctypes.create_string_buffer(arguments, len(arguments))
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(block))
        (code,) = driver.cuLaunchKernelEx(config, self.handle, ctypes.addressof(pointers), 0)
        if int(code) != 0:
            raise RuntimeError(f"the launch of a CUDA kernel failed: {code.name}")
        return None


@lru_cache
def _overlap() -> Any:
    driver, _ = bindings()
    attribute = driver.CUlaunchAttribute()
    kind = driver.CUlaunchAttributeID
    attribute.id = kind.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value.programmaticStreamSerializationAllowed = 1
    return attribute


def _allow_all_shared(kernel: Any, device: int) -> None:
    """Let a launch take all the shared memory that a block may have, beside what the kernel has anyway."""
    driver, _ = bindings()
    ours, most = driver.CUfunction_attribute, driver.CUdevice_attribute
    limit = most.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
    size = checked(driver.cuDeviceGetAttribute(limit, device), "shared memory")
    static = ours.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES
    size -= checked(driver.cuKernelGetAttribute(static, kernel, device), "shared memory")
    dynamic = ours.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    checked(driver.cuKernelSetAttribute(dynamic, size, kernel, device), "shared memory")


@lru_cache
def function(
    text: str,
    entry: str,
    defines: tuple[tuple[str, int], ...],
    threads: int,
    device: int,
    overlap: bool,
) -> Function:
    """The kernel ``entry`` of the source ``text`` with these constants, on the device of that index.

    overlap: the kernel waits for its predecessor by itself (``griddepcontrol.wait``).
    """
    driver, _ = bindings()
    major, minor = torch.cuda.get_device_capability(device)
    arch = f"sm_{major}{minor}" + ("a" if major >= 9 else "")
    binary = compile_source(text, dict(defines), arch)
    library = checked(driver.cuLibraryLoadData(binary, [], [], 0, [], [], 0), "load")
    kernel = checked(driver.cuLibraryGetKernel(library, entry.encode()), entry)
    _allow_all_shared(kernel, device)
    handle = driver.CUfunction(int(kernel))
    return Function(handle, threads, device, overlap=overlap and major >= 9)
