"""Faster operations that compute the same: `kernel_config: auto`."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from llmtune import Plugin, hookimpl, split_names

KERNELS = (
    "liger_linear_cross_entropy",
    "linear_cross_entropy",
    "packed_attention",
    "liger_rms_norm",
    "liger_swiglu",
    "liger_rope",
)
"""Every id, each a module of this package. Of two ids for one operation `auto` takes the first that suits."""


@dataclass(frozen=True, kw_only=True)
class AutoKernelsConfig:
    """Which operations are replaced. Each id has a section in the README of llmtune-kernels."""

    include_kernels: str | bool | None = "auto"
    """`auto` or true: every kernel that suits the model and the device. null or false: none. A comma list of ids:
    only these, and it is an error if one of them cannot run here."""

    def __post_init__(self) -> None:
        for name in self.asked_for or ():
            if name not in KERNELS:
                near = get_close_matches(name, KERNELS, n=1)
                hint = f' Did you mean "{near[0]}"?' if near else ""
                raise ValueError(
                    f'include_kernels: no such kernel "{name}".{hint} Known: {", ".join(sorted(KERNELS))}; '
                    "or auto, true, false, null alone"
                )

    @property
    def asked_for(self) -> tuple[str, ...] | None:
        """Ids in the recipe's order, each once; None for `auto`."""
        if self.include_kernels is True or self.include_kernels == "auto":
            return None
        return tuple(dict.fromkeys(split_names(self.include_kernels or None)))


def _build(config: AutoKernelsConfig) -> Any:
    from llmtune_kernels.selection import Kernels

    return Kernels(config.asked_for)


@hookimpl
def kernel_config() -> list[Plugin]:
    """Offer `auto`."""
    return [
        Plugin(
            name="auto",
            config=AutoKernelsConfig,
            build=_build,
            summary="Every faster operation that suits model and device, or a list of them",
        )
    ]
