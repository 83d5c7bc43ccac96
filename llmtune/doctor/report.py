"""The report as a whole: what is here, what is wrong, what to do about it."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from llmtune import __version__
from llmtune.contract.environment import remarks
from llmtune.contract.errors import counted, listed
from llmtune.contract.records import API_VERSION
from llmtune.doctor import machine
from llmtune.doctor.packages import FURTHER, Finding, PackageVersion, found, package_findings, package_versions
from llmtune.doctor.probe import TORCH, probe
from llmtune.recipe.listing import Listed
from llmtune.recipe.registry import Registry
from llmtune.terminal import Shown, doing

Rows = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class DoctorReport(Shown):
    """What `llmtune doctor` says. It holds no secrets, and paths without the user's name."""

    sections: dict[str, Rows]
    problems: list[Finding]
    notes: list[str]
    """What is no problem and may surprise."""

    def as_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        problems = [finding._asdict() for finding in self.problems]
        return {**self.sections, "problems": problems, "notes": self.notes}

    def __str__(self) -> str:
        parts = []
        for title, rows in self.sections.items():
            width = max(map(len, rows), default=0)
            parts.append("\n".join([title, *(f"  {name:<{width}}  {text}" for name, text in rows.items())]))
        parts.append("\n".join(["notes", *(f"  - {note}" for note in self.notes)]) if self.notes else "")
        if self.problems:
            lines = [f"  {at}. {what}\n     {to_do}" for at, (what, to_do) in enumerate(self.problems, 1)]
            parts.append("\n".join([f"{counted(len(self.problems), 'problem')} found", *lines]))
        else:
            parts.append("No problems found.")
        return "\n\n".join(filter(None, parts))


def examine() -> DoctorReport:
    """Look at everything. Libraries are imported in a process of their own; nothing is fetched from anywhere."""
    versions, problems = package_versions(), list(package_findings())
    modules = _modules()
    if modules:
        doing.info("Importing %s in a process of their own", listed(modules))
    loaded = probe(modules) if modules else {}
    problems += _load_findings(loaded)
    listing = Registry().listing()
    problems += _plugin_findings(listing)
    disks = list(machine.disks())
    problems += [finding for _, _, finding in disks if finding]
    sections = {
        "llmtune": {
            "version": f"{__version__}, plugin interface {API_VERSION}",
            "python": f"{platform.python_version()} ({machine.short(sys.executable)})", "system": platform.platform(),
        },
        "packages": {each.name: _version_text(each, loaded) for each in versions},
        "devices": _devices(loaded.get(TORCH, {}).get("facts", {})),
        "machine": {"processor": machine.processor(), "memory": machine.memory()},
        "disks": {name: text for name, text, _ in disks},
        "plugins": _plugins(listing),
        "environment": machine.environment(),
    }  # fmt: skip
    notes = [f"{each.name} {each.version} is newer than any that llmtune was tested with" for each in versions
             if each.is_newer]  # fmt: skip
    return DoctorReport(sections=sections, problems=problems, notes=[*notes, *_lacking(listing), *remarks()])


def _modules() -> list[str]:
    """The modules to import, torch first; none without it."""
    if not found(TORCH):
        return []
    return [module for name, module in {TORCH: TORCH, "transformers": "transformers", **FURTHER}.items() if found(name)]


def _version_text(package: PackageVersion, loaded: dict[str, Any]) -> str:
    error = loaded.get(FURTHER.get(package.name, package.name), {}).get("error")
    broken = "; cannot be imported" if error else ""
    return f"{package.version or '-':<14}{package.remark}{broken}".rstrip()


def _load_findings(loaded: dict[str, Any]) -> Iterator[Finding]:
    for module, said in loaded.items():
        if error := said.get("error"):
            name = next((name for name, its in FURTHER.items() if its == module), module)
            yield Finding(
                f"{name} cannot be imported ({error})",
                f"install it again, in a version that fits python and torch: pip install --force-reinstall {name}"
                + ("" if module in (TORCH, "transformers") else f", or uninstall it: pip uninstall {name}"),
            )
    facts, driver = loaded.get(TORCH, {}).get("facts"), machine.driver()
    if facts and not facts["devices"]:
        if why := facts.get("no device"):
            yield Finding(
                f"torch is built for CUDA {facts['cuda build']} and sees no GPU ({why})",
                "install a driver for that CUDA, look at CUDA_VISIBLE_DEVICES, or train on the CPU: device: cpu",
            )
        elif driver:
            yield Finding(
                f"NVIDIA's driver {driver} is here, and this torch is built for the CPU only",
                "install torch as the selector on pytorch.org says for your version of CUDA",
            )


def _devices(facts: dict[str, Any]) -> Rows:
    rows = {
        f"GPU {at}": f"{each['name']}, {each['free'] / machine.GIB:.1f} GiB free of "
        f"{each['memory'] / machine.GIB:.1f} GiB, compute capability {each['capability']}, "
        f"{'bf16' if each['bf16'] else 'no bf16'}"
        for at, each in enumerate(facts.get("devices", ()))
    }
    if facts:
        built = f"CUDA {facts['cuda build']}" if facts["cuda build"] else "the CPU"
        rows["torch"] = f"built for {built}, {counted(facts['threads'], 'thread')}"
    return {"driver": machine.driver() or "none of NVIDIA", **rows}


def _plugins(listing: Sequence[Listed]) -> Rows:
    packages: dict[str, list[Listed]] = {}
    for row in listing:
        packages.setdefault(row.package, []).append(row)
    rows = {}
    for package, offers in packages.items():
        versions = {row.plugin.api for row in offers if row.plugin}
        names = [row.name if row.state == "ok" else f"{row.name} ({row.state})" for row in offers]
        api = f", interface {listed(sorted(versions))}" if versions - {API_VERSION} else ""
        rows[package] = f"{offers[0].version}{api}: {listed(dict.fromkeys(names), 40)}"
    return rows


def _plugin_findings(listing: Sequence[Listed]) -> Iterator[Finding]:
    if all(row.package == "llmtune" for row in listing):
        yield Finding(
            "no plugins are installed, and every method of training is one",
            "run: pip install ./plugins/* (in llmtune's source tree)",
        )
    fixes = {
        "broken": "install the package again, in a version for this llmtune; or uninstall it",
        "incompatible": "update the package, or llmtune",
        "duplicate": "uninstall one of the packages, or name it in LLMTUNE_BLOCK_PLUGINS",
    }
    for reason, state, package in dict.fromkeys((row.reason, row.state, row.package) for row in listing):
        if state in fixes:
            names = listed(row.name for row in listing if (row.reason, row.package) == (reason, package))
            yield Finding(f"plugin {names} of {package} is {state}: {reason}", fixes[state])


def _lacking(listing: Sequence[Listed]) -> Iterator[str]:
    for row in listing:
        if missing := [text for text, met in row.requires if not met]:
            words = " ".join(f'"{text}"' for text in missing)
            yield f"{row.point} {row.name} needs what is not installed, if a recipe is to name it: pip install {words}"
