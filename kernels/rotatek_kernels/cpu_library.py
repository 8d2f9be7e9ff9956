"""The compiled part of the CPU attention: built from the sources in `cpu`, for this processor, when first needed."""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch

SOURCES = Path(__file__).with_name("cpu")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-fPIC", "-shared")
COMPILERS = ("c++", "g++", "clang++")


@functools.cache
def load() -> ctypes.CDLL | None:
    """The library; None, after a warning that says why, where it cannot be compiled or opened.

    Where there is no C++ compiler (`CXX` names one, else ``c++``, ``g++`` or ``clang++`` is looked for) or the system
    is not Linux, it is None without a warning: nothing is wrong there.
    """
    try:
        compiler = find_compiler()
        return None if compiler is None else opened(build(compiler, FLAGS))
    except subprocess.CalledProcessError as error:
        said = f"{shlex.join(error.cmd)} said: {error.stderr.strip() or 'nothing'}"
    except (OSError, RuntimeError, ValueError, AttributeError) as error:
        said = str(error)
    warnings.warn(
        "the attention of rotatek_kernels on CPUs could not be compiled or opened; torch does its work, slower. "
        + said,
        RuntimeWarning,
        stacklevel=2,
    )
    return None


def opened(path: Path) -> ctypes.CDLL:
    """The library with the types of its function."""
    library = ctypes.CDLL(str(path))
    library.rotatek_attend.argtypes = (ctypes.c_void_p, ctypes.c_double)
    library.rotatek_attend.restype = ctypes.c_int64
    return library


def find_compiler() -> list[str] | None:
    """The command of a C++ compiler, on Linux; ValueError if `CXX` is none."""
    if sys.platform != "linux":
        return None
    try:
        named = shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:
        raise ValueError(f"CXX must be the command of a compiler, got {os.environ['CXX']!r}: {error}") from None
    if named:
        return named
    found = next((name for name in COMPILERS if shutil.which(name)), None)
    return None if found is None else [found]


def build(compiler: list[str], flags: tuple[str, ...]) -> Path:
    """The shared library, compiled if the cache folder does not have it whole.

    The folder is ``rotatek`` under `XDG_CACHE_HOME` (``~/.cache`` by default). The name says for which source, flags,
    compiler and processor a library is, and what is in it: opening half a file could end the process.
    """
    command = [*compiler, *flags]
    sources = [path.read_text() for path in sorted((*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")))]
    key = hashlib.sha256("\0".join([*sources, *command, _openmp(), _processor()]).encode()).hexdigest()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rotatek"
    name = f"attend-{key[:16]}"
    for library in folder.glob(f"{name}-*.so"):
        if library.name == f"{name}-{_digest(library)}.so":
            return library
        library.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        made = Path(place) / "made.so"
        libraries = [_openmp()] if _openmp() else []
        call = [*command, str(SOURCES / "attend.cpp"), *libraries, "-o", str(made)]
        subprocess.run(call, check=True, capture_output=True, text=True, errors="replace")  # noqa: S603
        # At once, so that processes that compile at the same time do not meet half a file.
        return made.replace(folder / f"{name}-{_digest(made)}.so")


def _digest(library: Path) -> str:
    return hashlib.sha256(library.read_bytes()).hexdigest()[:16]


def _openmp() -> str:
    """torch's own OpenMP library, if it brings one: with another, its idle threads and ours would be in the way."""
    path = Path(torch.__file__).parent / "lib" / "libgomp.so.1"
    return str(path) if path.exists() else ""


@functools.cache
def _processor() -> str:
    """What ``-march=native`` goes by, so that machines that share a home folder do not share a library."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {features}"
