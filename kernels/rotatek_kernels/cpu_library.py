"""The compiled part for CPUs: built from the sources in `cpu`, for this processor, when first needed."""

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

from rotatek_kernels import cpu_layout

SOURCES = Path(__file__).with_name("cpu")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-fPIC", "-shared")
# Arguments of the functions of `cpu/seal.cpp`: places and numbers.
STEPS = {
    "rotatek_moments": "pnnnnnnppn",
    "rotatek_encode": "pnnnnnnppnpn",
    "rotatek_directions": "pnnnnpn",
    "rotatek_codes": "pnnnnpnpnpnppn",
}
COMPILERS = ("c++", "g++", "clang++")

_LOADED_IN = os.getpid()


@functools.cache
def load() -> ctypes.CDLL | None:
    """Open the library, compiled if need be; return None, after a warning that says why, where that fails.

    Where there is no C++ compiler (`CXX` names one, else ``c++``, ``g++`` or ``clang++`` is looked for) or the system
    is not Linux, it is None without a warning: nothing is wrong there.
    """
    try:
        compiler = find_compiler()
        return None if compiler is None else opened(build(compiler, FLAGS))
    except subprocess.CalledProcessError as error:
        reason = f"{shlex.join(error.cmd)} failed: {error.stderr.strip() or 'without a message'}"
    except (OSError, RuntimeError, ValueError, AttributeError) as error:
        reason = str(error)
    warnings.warn(
        "the code of rotatek_kernels for CPUs could not be compiled or opened; torch does its work, slower. " + reason,
        RuntimeWarning,
        stacklevel=2,
    )
    return None


def threads() -> int:
    """Count the threads to run on; one in a forked process, which has none of the threads that OpenMP waits for."""
    return torch.get_num_threads() if os.getpid() == _LOADED_IN else 1


def opened(path: Path) -> ctypes.CDLL:
    """Open the library and declare the types of its functions."""
    library = ctypes.CDLL(str(path))
    library.rotatek_attend.argtypes = (ctypes.c_void_p,)
    library.rotatek_attend.restype = ctypes.c_int64
    for name, types in STEPS.items():
        step = getattr(library, name)
        step.argtypes = [ctypes.c_void_p if kind == "p" else ctypes.c_int64 for kind in types]
        step.restype = None
    return library


def find_compiler() -> list[str] | None:
    """Find the command of a C++ compiler, on Linux; ValueError if `CXX` is none."""
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
    """Compile the shared library, if the cache folder does not have it whole, and return its path.

    The folder is ``rotatek`` under `XDG_CACHE_HOME` (``~/.cache`` by default). The name says for which source, flags,
    compiler and processor a library is, and what is in it: opening half a file could end the process.
    """
    command = [*compiler, *flags]
    sources = [path.read_text() for path in sorted((*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")))]
    layout = cpu_layout.header()
    key = hashlib.sha256("\0".join([*sources, layout, *command, _openmp(), _processor()]).encode()).hexdigest()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rotatek"
    name = f"attend-{key[:16]}"
    for library in folder.glob(f"{name}-*.so"):
        if library.name == f"{name}-{_digest(library)}.so":
            return library
        library.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        made = Path(place) / "made.so"
        (Path(place) / "layout.h").write_text(layout)
        libraries = [_openmp()] if _openmp() else []
        units = [str(path) for path in sorted(SOURCES.glob("*.cpp"))]
        call = [*command, "-I", place, *units, *libraries, "-o", str(made)]
        subprocess.run(call, check=True, capture_output=True, text=True, errors="replace")  # noqa: S603
        # At once, so that processes that compile at the same time do not meet half a file.
        return made.replace(folder / f"{name}-{_digest(made)}.so")


def _digest(library: Path) -> str:
    return hashlib.sha256(library.read_bytes()).hexdigest()[:16]


def _openmp() -> str:
    """Find torch's own OpenMP library, if it brings one: idle threads of another would be in the way of ours."""
    path = Path(torch.__file__).parent / "lib" / "libgomp.so.1"
    return str(path) if path.exists() else ""


@functools.cache
def _processor() -> str:
    """Name what ``-march=native`` goes by, so that machines that share a home folder do not share a library."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {features}"
