"""Where the files of an adapter are, in PEFT's format."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from llmtune.contract.errors import PlanError
from llmtune.model.hub import fetch_files

if TYPE_CHECKING:
    from llmtune.contract.records import RunContext

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def subfolder_of(place: str, subfolder: str | None) -> str:
    """`subfolder` of a local folder, by its own name; a hub id stays."""
    return str(Path(place) / subfolder) if subfolder and Path(place).exists() else place


def peft_folder(place: str, context: RunContext, *, key: str, subfolder: str | None = None) -> Path:
    """Local folder of an adapter that the recipe's `key` names: `place` itself, the model folder of a run there, or a
    download from the hub; where there is a `subfolder`, that of each.

    A hub id may end in `@revision`. Raises PlanError if there is no adapter with safetensors weights, LoadError if the
    hub has none or cannot be reached.
    """
    place = subfolder_of(place, subfolder)
    for folder in (Path(place), Path(place) / "model"):
        if (folder / CONFIG).exists():
            if not (folder / WEIGHTS).exists():
                raise PlanError(f"{key}: {folder} has no {WEIGHTS}; save the adapter again with PEFT")
            return folder
    if Path(place).exists():
        raise PlanError(f"{key}: {place} holds no {CONFIG}; name a folder that PEFT or llmtune saved")
    inside = f"{subfolder}/" if subfolder else ""
    names = (inside + CONFIG, inside + WEIGHTS)
    return (
        fetch_files(place, names, key=key, cache_dir=context.cache_dir, token=context.token, hub=context.hub) / inside
    )
