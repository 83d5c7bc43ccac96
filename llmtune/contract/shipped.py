"""Tables that ship with llmtune, as YAML files beside its modules."""

from __future__ import annotations

from importlib import resources
from typing import Any


def shipped(package: str, name: str) -> Any:
    """What a YAML file of a package of llmtune holds."""
    import yaml  # most of what imports this module reads no table

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml, where PyYAML has it, is ten times as fast
    return yaml.load(resources.files(package).joinpath(name).read_text(encoding="utf-8"), loader)
