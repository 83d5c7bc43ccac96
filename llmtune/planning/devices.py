"""Devices by name or description: memory, speed, bandwidth."""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from llmtune.contract.errors import PlanError
from llmtune.distributed.ranks import pick_device

if TYPE_CHECKING:
    from llmtune.distributed.ranks import Ranks

GIB = 2**30

DEVICE_KEY = ("auto", "cpu", "cuda")
"""Values of the recipe's key `device`: devices of this machine, not descriptions of others."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """What a device has, by its maker's data sheet."""

    name: str
    memory: int
    """Bytes. What makers sell as "80 GB" is counted in GiB."""
    flops: float | None = None
    """Dense 16-bit matrix products a second (bfloat16, float16 where there is none), sums in float32; no sparsity."""
    bandwidth: float | None = None
    """Bytes a second between memory and chip."""
    kind: str = "cuda"
    """`cuda` or `cpu`."""
    bf16: bool = True
    """Whether it has bfloat16 units."""

    @property
    def reserve(self) -> int:
        """Bytes to leave free on a GPU: 1 GiB for the CUDA context, libraries and communication, and 4 % of the memory
        for what the allocator cannot use (fragments). Nothing on a CPU."""
        return int(GIB + 0.04 * self.memory) if self.kind == "cuda" else 0

    @property
    def usable(self) -> int:
        """Bytes that tensors may take."""
        return self.memory - self.reserve


def _gpu(name: str, gib: float, tflops: float, gb_per_s: float, bf16: bool = True) -> Device:
    return Device(name=name, memory=int(gib * GIB), flops=tflops * 1e12, bandwidth=gb_per_s * 1e9, bf16=bf16)


DEVICES = {
    device.name: device
    for device in (
        _gpu("b200", 180, 2250, 8000),
        _gpu("h200", 141, 989, 4800),
        _gpu("h100", 80, 989, 3350),
        _gpu("h100-pcie", 80, 756, 2000),
        _gpu("a100", 80, 312, 2039),
        _gpu("a100-40gb", 40, 312, 1555),
        _gpu("mi300x", 192, 1307, 5300),
        _gpu("l40s", 48, 362, 864),
        _gpu("rtx6000-ada", 48, 364, 960),
        _gpu("a6000", 48, 155, 768),
        _gpu("a40", 48, 150, 696),
        _gpu("l4", 24, 121, 300),
        _gpu("a10", 24, 125, 600),
        _gpu("rtx5090", 32, 210, 1792),
        _gpu("rtx4090", 24, 165, 1008),
        _gpu("rtx3090", 24, 71, 936),
        _gpu("v100", 32, 125, 900, bf16=False),
        _gpu("t4", 16, 65, 320, bf16=False),
    )
}
"""By the name a person writes. h100, h200, a100: SXM boards. Sources: the makers' data sheets and architecture white
papers; GeForce cards with float32 sums (half of the advertised rate)."""


def describe(text: str) -> Device:
    """A device of the table, or one with so much memory (`24GB`, `0.5GiB`). Raises PlanError for anything else."""
    name = text.strip().lower().replace(" ", "-").removeprefix("nvidia-")
    if name in DEVICES:
        return DEVICES[name]
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)\s*-?g(?:i?b)?", name):
        gib = float(match[1])
        if gib > 0:
            return Device(name=f"{gib:g} GB device", memory=int(gib * GIB))
    raise PlanError(f'device: found "{text}", allowed are {", ".join(DEVICES)}, or an amount of memory such as 24GB')


def chosen_device(key: str, described: str | None, anywhere: bool) -> tuple[torch.device, Device | None]:
    """torch's device to plan for, and the description where it is one: of another machine, or (`anywhere`) this one."""
    if described is not None:
        target = describe(described)
        return torch.device(target.kind), target
    device = pick_device(key)
    return device, this_device(device) if anywhere else None


def device_of_rank(target: Device | None, device: torch.device, ranks: Ranks) -> Device:
    """The device that each rank has: the described one, or its share of this machine's."""
    if target is not None:
        return target
    found = this_device(device)
    return replace(found, memory=found.memory // ranks.size) if found.kind == "cpu" else found


def size_text(count: float) -> str:
    """`12.34 GiB`, `56.7 MiB`."""
    return f"{count / GIB:,.2f} GiB" if count >= GIB else f"{count / 2**20:,.1f} MiB"


def free_host_memory() -> int:
    """Bytes of memory that a new process can use: what the machine has free, and the container's limit leaves."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    meminfo, group = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
    if meminfo.exists() and (found := re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())):
        free = 1024 * int(found[1])
    with contextlib.suppress(OSError, ValueError):  # no such files, or `max` in them, where nothing limits
        free = min(free, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return max(0, free)


def this_device(device: torch.device) -> Device:
    """The machine's own: its memory, and its speed where the table knows the name."""
    if device.type == "cpu":
        return Device(name="this machine's free memory", memory=free_host_memory(), kind="cpu")
    properties = torch.cuda.get_device_properties(device)
    words = set(re.split(r"[\s-]+", properties.name.lower()))
    known = next((found for name, found in DEVICES.items() if name in words), None)
    return Device(
        name=properties.name,
        memory=properties.total_memory,
        flops=known.flops if known else None,
        bandwidth=known.bandwidth if known else None,
        bf16=torch.cuda.is_bf16_supported(including_emulation=False),
    )
