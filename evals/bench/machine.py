"""The machine, the versions and the commit that figures belong to."""

import contextlib
import importlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

VERSIONS = ("torch", "triton", "transformers", "pytest", "pytest-xdist", "numpy")
ROOT = Path(__file__).parents[2]


def hardware(device: str) -> dict[str, Any]:
    """Say what machine this is."""
    torch = importlib.import_module("torch")
    found: dict[str, Any] = {"cpu": processor(), "cores": os.cpu_count(), "system": platform.platform()}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "multiprocessors": properties.multi_processor_count}
        found["gpu GiB"] = properties.total_memory / 2**30
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm", "--format=csv,noheader"]
        with contextlib.suppress(OSError):
            found["driver, clock"] = subprocess.run(  # noqa: S603
                query, capture_output=True, text=True, check=False
            ).stdout.partition("\n")[0]
    else:
        found |= {"threads": torch.get_num_threads(), "load average": os.getloadavg()[0]}
    return found


def processor() -> str:
    """Name the processor."""
    with contextlib.suppress(OSError):
        for text in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if text.startswith("model name"):
                return text.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Name the versions that figures belong to."""
    found = {"python": platform.python_version()}
    for name in VERSIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    found["cuda"] = str(importlib.import_module("torch").version.cuda)
    return found


def commit(checkout: Path = ROOT) -> str:
    """Name the commit of a checkout, this one by default, and whether files differ from it."""
    told = []
    for command in (["git", "rev-parse", "HEAD"], ["git", "status", "--porcelain", "--untracked-files=no"]):
        try:
            run = subprocess.run(  # noqa: S603
                command, cwd=checkout, capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError):
            return "unknown"
        told.append(run.stdout.strip())
    return told[0] + (", with changes" if told[1] else "")
