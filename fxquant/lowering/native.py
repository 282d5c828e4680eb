"""The C++ kernels of ``native/``: built at first use, kept in the user's cache, called by ctypes.

The sources include no torch header, so one build takes seconds. A library's name is the hash of
all that could change it (sources, flags, compiler, processor): a changed one is never loaded.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from ..errors import BuildFailed
from .devices import cpu_features

SOURCES = Path(__file__).parent / "native"
TIMEOUT = 300
"""Seconds for a build. One takes 4 to 8."""

_I64, _INT, _POINTER = ctypes.c_int64, ctypes.c_int, ctypes.c_void_p
ARGUMENTS = (
    *(_I64, _I64, _I64, _I64),  # m, n, k, groups
    *(_INT, _INT, _INT),  # format, activation, threads
    *(_POINTER, _INT, _POINTER, _POINTER),  # x, its dtype, x_scale, x_zero
    *(_POINTER, _POINTER, _POINTER, _POINTER),  # weight, scale, zero, weight_sum
    *(_POINTER, _INT, _POINTER, _INT),  # bias, its dtype, y, its dtype
)


@lru_cache
def compiler() -> tuple[str, ...] | None:
    """The command that Inductor would use too: ``CXX``, else the first of g++ and clang++; or None."""
    named = shlex.split(os.environ.get("CXX", ""))
    if named:
        return tuple(named) if shutil.which(named[0]) else None
    return next(((found,) for name in ("g++", "clang++") if (found := shutil.which(name))), None)


def refusal() -> str | None:
    """Why there are no native kernels on this machine, or None. Builds them if that was not tried.

    Whoever asks is about to choose a kernel, hence to compile: the seconds are spent either way,
    and a compiler that does not work is one more reason to choose another kernel.
    """
    if compiler() is None:
        return "needs a C++ compiler: neither CXX nor g++ nor clang++ was found"
    try:
        library()
    except BuildFailed as error:
        return f"needs a C++ compiler that works: {str(error).splitlines()[0]}"
    return None


def flags(portable: bool) -> list[str]:
    native = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    common = ["-std=c++17", "-O3", native, "-fopenmp", "-shared", "-fPIC", "-w"]
    return [*common, "-DFXQUANT_PORTABLE"] if portable else common


def cache_dir() -> Path:
    """The directory of built libraries: ours alone, since what lies in it is executed."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(base) / "fxquant"
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = path.lstat()
    ours = not hasattr(os, "getuid") or status.st_uid == os.getuid()
    if not stat.S_ISDIR(status.st_mode) or not ours:
        raise BuildFailed(compiler="no compiler", output=f"{path} is not a directory of this user")
    if status.st_mode & 0o077:
        path.chmod(0o700)
    return path


_failures: dict[bool, BuildFailed] = {}


@lru_cache
def _load(portable: bool) -> Callable[..., int]:
    path = build(portable)
    try:
        function = ctypes.CDLL(str(path)).fxquant_linear
    except (OSError, AttributeError) as error:
        raise BuildFailed(compiler=path.name, output=str(error)) from error
    function.argtypes = ARGUMENTS
    function.restype = ctypes.c_int
    return function


def library(portable: bool = False) -> Callable[..., int]:
    """``fxquant_linear`` of native.cpp; ``portable`` leaves out everything but plain C++.

    Raises BuildFailed, at every call the same: a failed build is not tried again.
    """
    if portable in _failures:
        raise _failures[portable]
    try:
        return _load(portable)
    except BuildFailed as error:
        _failures[portable] = error
        raise


def build(portable: bool = False) -> Path:
    """The shared library, compiled unless the cache has it. Raises BuildFailed."""
    command = compiler()
    if command is None:
        raise BuildFailed(compiler="g++ or clang++", output="there is no C++ compiler")
    sources = sorted(p for p in SOURCES.iterdir() if p.suffix in (".h", ".cpp"))
    digest = hashlib.sha256()
    parts = [*command, *flags(portable), _run([*command, "--version"], command), platform.machine()]
    for part in [*parts, *sorted(cpu_features())]:
        digest.update(part.encode() + b"\0")
    for source in sources:
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    try:
        folder = cache_dir()
        path = folder / f"{digest.hexdigest()}.so"
        if path.is_file():
            return path
        handle, partial = tempfile.mkstemp(suffix=".so", dir=folder)
        os.close(handle)
    except OSError as error:
        raise BuildFailed(compiler=command[0], output=f"no cache directory: {error}") from error
    try:
        _run([*command, *flags(portable), str(SOURCES / "native.cpp"), "-o", partial], command)
        os.replace(partial, path)  # another process may have been faster: the same file
    finally:
        Path(partial).unlink(missing_ok=True)
    return path


def _run(arguments: list[str], command: tuple[str, ...]) -> str:
    try:
        done = subprocess.run(
            arguments, capture_output=True, text=True, timeout=TIMEOUT, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildFailed(compiler=command[0], output=str(error)) from error
    if done.returncode:
        raise BuildFailed(compiler=command[0], output=done.stderr.strip()[:2000] or "no message")
    return done.stdout
