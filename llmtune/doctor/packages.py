"""Installed packages, as far as their metadata tells: versions, the window that llmtune is tested in, what is twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distributions, requires, version
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

NEWEST_TESTED = {"torch": "2.13", "transformers": "5.24", "peft": "0.21", "bitsandbytes": "0.50"}
"""The newest minor versions that the tests have passed with; the oldest are those of llmtune's requirements."""
FURTHER = {
    "peft": "peft", "bitsandbytes": "bitsandbytes", "flash-attn": "flash_attn", "liger-kernel": "liger_kernel",
    "triton": "triton",
}  # fmt: skip
"""Optional packages that runs use where they are, and the modules that show whether they load."""
BESIDE = ("accelerate", "datasets", "deepspeed", "kernels", "matplotlib", "torchvision", "trl", "vllm", "xformers")
"""Packages that are only named."""


class Finding(NamedTuple):
    """Something that is wrong."""

    what: str
    to_do: str


@dataclass(frozen=True, kw_only=True)
class PackageVersion:
    """A package that llmtune or a plugin asks for, or uses where it is."""

    name: str
    version: str | None
    wanted: str
    """The specifier of llmtune's own requirement; empty for optional packages."""

    @property
    def remark(self) -> str:
        """How the version stands to the tested window."""
        newest = NEWEST_TESTED.get(self.name)
        if self.version is None:
            return "not installed"
        if newest is None:
            return self.wanted
        window = " ".join(filter(None, ["tested", self.wanted, f"up to {newest}.*"]))
        return window + ("; this one is newer" if self.is_newer else "")

    @property
    def is_newer(self) -> bool:
        """Whether no test has seen a version as new as this one."""
        newest = NEWEST_TESTED.get(self.name)
        try:
            return newest is not None and Version(self.version or "0").release[:2] > Version(newest).release
        except InvalidVersion:
            return False


def found(name: str) -> str | None:
    """The installed version; None without one."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def requirements() -> list[Requirement]:
    """What llmtune cannot do without."""
    wanted = [Requirement(text) for text in requires("llmtune") or ()]
    return [each for each in wanted if not each.marker or each.marker.evaluate({"extra": ""})]


def package_versions() -> list[PackageVersion]:
    """llmtune's requirements, then the optional packages that are installed."""
    wanted = requirements()
    optional = [name for name in (*FURTHER, *BESIDE) if found(name)]
    return [
        *(PackageVersion(name=each.name, version=found(each.name), wanted=str(each.specifier)) for each in wanted),
        *(PackageVersion(name=name, version=found(name), wanted="") for name in optional),
    ]


def package_findings() -> Iterator[Finding]:
    """Requirements that are not met, and packages that are installed twice."""
    for wanted in requirements():
        have = found(wanted.name)
        fix = f'run: pip install "{wanted.name}{wanted.specifier}"'
        if wanted.name == "torch":
            fix += " (as the selector on pytorch.org says for CPU or for your version of CUDA)"
        if have is None:
            yield Finding(f"{wanted.name} is not installed, which llmtune cannot do without", fix)
        elif not wanted.specifier.contains(have, prereleases=True):
            yield Finding(f"{wanted.name} {have} is installed, and {wanted.specifier} is needed", fix)
    times = Counter((canonicalize_name(each.name), str(each.locate_file(""))) for each in distributions() if each.name)
    for (name, place), number in times.items():
        if number > 1:
            yield Finding(
                f"{place} holds the metadata of {number} versions of {name}, so that nobody knows which one runs",
                f"run: pip uninstall -y {name} (until none is left), then install it again",
            )
