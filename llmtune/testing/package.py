"""Check all plugins of an installed package against the contract."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llmtune.contract.errors import PluginError, did_you_mean, listed
from llmtune.contract.extension_points import EXTENSION_POINTS
from llmtune.recipe.registry import Registry
from llmtune.testing.contract import LawError, laws


def check_package(
    package: str, parameters: Mapping[str, Mapping[str, Any]] | None = None, say: Callable[[str], None] = print
) -> int:
    """Check every law of every plugin of `package`, the name that pip installed it by, and say how each fares.

    `parameters` are the keys of plugins by name, for those that cannot do without. Returns the number of broken laws, a
    plugin that cannot be used counting as one. Raises PluginError for a package that offers nothing.
    """
    listing = Registry().listing()
    rows = [row for row in listing if row.package == package and row.point in (*EXTENSION_POINTS, "")]
    if not rows:
        known = sorted({row.package for row in listing})
        raise PluginError(
            f"{package}: offers no plugin here, installed are {listed(known, 30)}.{did_you_mean(package, known)}"
        )
    broken = 0
    for row in rows:
        if row.state != "ok":
            say(f"{row.name}: {row.state}: {row.reason}")
            broken += 1
            continue
        say(f"{row.point} {row.name}")
        for law in laws(row.point, row.name, (parameters or {}).get(row.name)):
            with tempfile.TemporaryDirectory() as folder:
                try:
                    law(Path(folder))
                except LawError as error:
                    broken += 1
                    say(f"  broken  {law.__name__}: {error}")
                else:
                    say(f"  kept    {law.__name__}")
    return broken
