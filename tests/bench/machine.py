"""What a benchmark tells about the machine, and what it measures of it."""

import os
import platform
import resource
import sys
from pathlib import Path

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def machine() -> dict:
    import torch

    found = Path("/proc/cpuinfo")
    lines = found.read_text(encoding="utf-8").splitlines() if found.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    described = {"cpu": cpu, "cores": os.cpu_count(), "memory_gib": round(memory, 1), "system": platform.system()}
    described |= {"python": platform.python_version(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    return described | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


def peak_mib() -> float:
    """The largest resident set of this process, in MiB, since its start or `reset_peak`."""
    if STATUS.exists():
        line = next(line for line in STATUS.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB; bytes on macOS
    return peak / 2 ** (20 if sys.platform == "darwin" else 10)


def own_mib() -> float:
    """What this process holds now that is no page of a file, in MiB; Linux."""
    line = next(line for line in STATUS.read_text(encoding="utf-8").splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) / 2**10


def reset_peak() -> None:
    """Count the peak from here on, where the system can: Linux."""
    if RESET.exists():
        RESET.write_text("5", encoding="utf-8")


def matmul_rate(dtype_name: str, rows: int = 2048, inner: int = 2560, columns: int = 9728) -> float:
    """Operations per second of one large product in this dtype, the fastest of 10."""
    import torch
    from torch.utils.benchmark import Timer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = (torch.randn(n, inner, dtype=getattr(torch, dtype_name), device=device) for n in (rows, columns))
    names = {"linear": torch.nn.functional.linear, "a": a, "b": b}
    timer = Timer("linear(a, b)", globals=names, num_threads=torch.get_num_threads())  # its own default is one
    timer.timeit(2)
    return 2 * rows * inner * columns / min(timer.timeit(1).median for _ in range(10))
