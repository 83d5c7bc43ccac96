"""How fast this machine's CPU multiplies matrices, in float32 and in bfloat16: measured once, then remembered.

No table of CPUs says it: with AMX bfloat16 is several times as fast as float32, with AVX-512 alone twice as fast on one
machine and half as fast on the next.
"""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from filelock import FileLock

from llmtune.folders import cache_root, write_durably
from llmtune.model.sizes import ModelSizes

BUDGET_S = 0.1
"""Seconds of computing that a measurement takes after the first products; one of each kind is timed in any case."""
MOST_NUMBERS = 2**21
"""The largest matrix to measure with; a larger one says nothing new and takes longer."""


@dataclass(frozen=True, kw_only=True)
class CpuSpeed:
    """Floating-point operations a second of one core on a layer's matrix products, forward and backward."""

    float32: float
    bfloat16: float


def cpu_speed(sizes: ModelSizes) -> CpuSpeed:
    """The speeds for a model of these sizes, from the file of this machine or measured now and written to it.

    Processes of one machine measure in turn, so that they find the same.
    """
    path, shape, key = cache_root() / "cpu_speed.json", _shape(sizes), machine_key(sizes)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            known = _read(path)
            if key not in known:
                known[key] = asdict(measure(*shape))
                write_durably(path, json.dumps(known, indent=1))
            return CpuSpeed(**known[key])
    except OSError:  # a cache that cannot be written to only costs the time of measuring again
        return measure(*shape)


def measure(rows: int, width: int, inner: int) -> CpuSpeed:
    """Time `(rows, width) @ (width, inner)` and its gradient in both types, in turns; the fastest of each counts.

    On one core, in time that this thread was computing: what else the machine does then hardly matters.
    """
    products: dict[torch.dtype, Callable[[], object]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        hidden, weight, grad = (
            torch.ones(size, dtype=dtype) for size in ((rows, width), (inner, width), (rows, inner))
        )
        products[dtype] = lambda h=hidden, w=weight, g=grad: (h @ w.t(), g @ w)
    fastest = dict.fromkeys(products, float("inf"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            for product in products.values():  # the first time is for making ready
                product()
            ends = time.thread_time() + BUDGET_S
            while time.thread_time() < ends or float("inf") in fastest.values():
                for dtype, product in products.items():
                    started = time.thread_time()
                    product()
                    fastest[dtype] = min(fastest[dtype], time.thread_time() - started)
    finally:
        torch.set_num_threads(threads)
    work = 4.0 * rows * width * inner
    return CpuSpeed(float32=work / fastest[torch.float32], bfloat16=work / fastest[torch.bfloat16])


def _shape(sizes: ModelSizes) -> tuple[int, int, int]:
    """Rows, width and inner width to measure with: the model's where its matrices are small, else smaller in step."""
    shrink = min(1.0, (MOST_NUMBERS / (sizes.width * sizes.inner)) ** 0.5)
    return 128, max(1, int(sizes.width * shrink)), max(1, int(sizes.inner * shrink))


def machine_key(sizes: ModelSizes) -> str:
    """What the speeds depend on, as a short hash: the CPU, torch, and the shapes."""
    facts = [platform.machine(), platform.processor(), torch.__version__, torch.backends.cpu.get_cpu_capability()]
    facts += map(str, _shape(sizes))
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
        facts += sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]


def _read(path: Path) -> dict[str, dict[str, float]]:
    """What the file holds; nothing where it is not there or not ours."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {key: asdict(CpuSpeed(**speeds)) for key, speeds in found.items()}
    except (FileNotFoundError, ValueError, TypeError, AttributeError):
        return {}
