"""What is installed for each extension point, for people and for machines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from llmtune.contract.errors import listed
from llmtune.contract.extension_points import EXTENSION_POINTS, POINTS
from llmtune.contract.hookspecs import observe
from llmtune.contract.records import API_VERSION, Plugin


@dataclass(frozen=True, kw_only=True)
class Listed:
    """One line of `llmtune plugins`."""

    point: str
    """Empty where the module could not be asked."""
    name: str
    package: str
    version: str
    state: str
    """`ok`, `broken`, `blocked`, `incompatible` or `duplicate`."""
    reason: str = ""
    summary: str = ""
    requires: tuple[tuple[str, bool], ...] = ()
    """Python requirements and whether they are met."""
    plugin: Plugin | None = field(default=None, repr=False)


def question(point: str) -> str:
    """What an extension point decides, or what `observe` is for."""
    return POINTS[point].question if point in POINTS else str(observe.__doc__)


def listing_text(listing: Sequence[Listed], as_json: bool = False) -> str:
    """What is installed, by extension point; with `as_json` for machines."""
    if as_json:
        rows = [{name: value for name, value in vars(row).items() if name != "plugin"} for row in listing]
        for row in rows:
            row["requires"] = [{"requirement": text, "met": met} for text, met in row["requires"]]
        questions = [{"name": point, "question": question(point)} for point in EXTENSION_POINTS]
        return json.dumps({"api": API_VERSION, "extension_points": questions, "plugins": rows}, indent=1)
    parts = []
    for point in (*EXTENSION_POINTS, "observe", ""):
        rows = [row for row in listing if row.point == point]
        if rows or point in EXTENSION_POINTS:
            title = f"{point}: {question(point)}" if point else "Not usable:"
            parts.append(
                "\n".join([title, *("  " + (_line(row) if row else "(nothing installed)") for row in rows or [None])])
            )
    return "\n\n".join(parts)


def _line(row: Listed) -> str:
    text = f"{row.name:<18} {row.package + ' ' + row.version:<26} {row.summary}"
    if row.state != "ok":
        text += f" [{row.state}: {row.reason}]"
    missing = [requirement for requirement, met in row.requires if not met]
    return (text + (f"  [needs {listed(missing)}]" if missing else "")).rstrip()
