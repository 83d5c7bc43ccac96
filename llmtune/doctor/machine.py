"""The machine, without torch: processors, memory, disks, the driver, the environment."""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from llmtune.contract.environment import variables
from llmtune.doctor.packages import Finding
from llmtune.folders import cache_root
from llmtune.recipe.secrets import is_secret

GIB = 2**30
ENOUGH_DISK = 10 * GIB
"""Free bytes below which a disk is told of: a 7B model has 15 GiB, its adapter's checkpoints a few."""
DRIVER = Path("/proc/driver/nvidia/version")
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy")
"""Variables that libraries read which fetch models."""


def processor() -> str:
    """The name of the processor, and how many of its cores this process may use."""
    names = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if "sched_getaffinity" in dir(os) else os.cpu_count()
    return f"{name}, {cores} of {os.cpu_count()} cores for this process"


def memory() -> str:
    """Memory of the machine, and what of it is free."""
    amounts = dict(re.findall(r"^(\w+): +(\d+) kB", "\n".join(_lines("/proc/meminfo")), re.M))
    if not {"MemTotal", "MemAvailable"} <= amounts.keys():
        return "not known on this system"
    total, free = (int(amounts[name]) * 1024 / GIB for name in ("MemTotal", "MemAvailable"))
    limits = [int(line) for line in _lines("/sys/fs/cgroup/memory.max") if line.isdigit()]
    limit = f"; a container's limit of {limits[0] / GIB:.1f} GiB" if limits else ""
    return f"{free:.1f} GiB free of {total:.1f} GiB{limit}"


def driver() -> str | None:
    """The version of NVIDIA's driver; None without one."""
    text = " ".join(_lines(DRIVER))
    said = re.search(r"Kernel Module.*?(\d+\.\d+[.\d]*)", text)
    return said[1] if said else text or None


def _lines(path: str | Path) -> list[str]:
    with suppress(OSError, UnicodeDecodeError):
        return Path(path).read_text().splitlines()
    return []


def places() -> dict[str, Path]:
    """Folders that fill up."""
    hub = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    return {"home": Path.home(), "llmtune's cache": cache_root(), "hub's cache": Path(hub), "here": Path.cwd()}


def disks() -> Iterator[tuple[str, str, Finding | None]]:
    """(name, free space, what is wrong) of each place that fills up."""
    for name, place in places().items():
        existing = next(folder for folder in (place, *place.absolute().parents) if folder.is_dir())
        usage, shown = shutil.disk_usage(existing), short(place)
        text, finding = f"{shown}: {usage.free / GIB:.1f} GiB free of {usage.total / GIB:.1f} GiB", None
        if not os.access(existing, os.W_OK):
            text += ", cannot be written to"
            finding = Finding(f"{shown} ({name}) cannot be written to", "change its permissions, or use another folder")
        elif usage.free < ENOUGH_DISK:
            finding = Finding(
                f"{shown} ({name}) has {usage.free / GIB:.1f} GiB left",
                "free some, or move it: LLMTUNE_CACHE, HF_HOME and output_dir name other places",
            )
        yield name, text, finding


def environment() -> dict[str, str]:
    """The variables that llmtune, or a library that fetches models for it, reads and that are set; no secrets."""
    names = [*variables(), *(name for name in os.environ if name.startswith("LLMTUNE_")), *PROXIES]
    return {name: _shown(name, os.environ[name]) for name in dict.fromkeys(names) if os.environ.get(name)}


def _shown(name: str, value: str) -> str:
    if is_secret(name.lower()):
        return "<set, not shown>"
    return short(re.sub(r"(://)[^/@\s]+@", r"\1<hidden>@", value))


def short(value: str | Path) -> str:
    """A path without the user's name, where it lies in the home folder."""
    text, home = str(value), str(Path.home())
    return "~" + text.removeprefix(home) if text == home or text.startswith(f"{home}/") else text
