"""`dataset_info.json`: data sets with names, as LLaMA-Factory describes them.

https://github.com/hiyouga/LLaMA-Factory/blob/main/data/README.md
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtune.contract.errors import DataError, did_you_mean, listed

FILE = "dataset_info.json"
_PLACES = ("file_name", "hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")
_ALWAYS = {name: name for name in ("system", "tools", "chosen", "rejected", "kto_tag")}
_COLUMNS = {
    "alpaca": {
        "prompt": "instruction", "query": "input", "response": "output", "history": "history", **_ALWAYS,
    },
    "sharegpt": {"messages": "conversations", **_ALWAYS},
    "openai": {"messages": "messages", **_ALWAYS},
}  # fmt: skip
"""What the registry calls a column, and what the format here does."""
_TYPES = {
    **dict.fromkeys((*_PLACES, "formatting", "subset", "split", "folder"), str),
    "ranking": bool, "num_samples": int, "columns": dict, "tags": dict,
}  # fmt: skip
"""All keys of an entry."""
_NAMES = {str: "a text", bool: "true or false", int: "a whole number", dict: "an object of names"}
_MEDIA = ("images", "videos", "audios")
_TAGS = (
    "role_tag", "content_tag", "user_tag", "assistant_tag", "observation_tag", "function_tag", "system_tag",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One data set of a registry."""

    path: str
    """A path from `base_dir`, or `hub:` and an id."""
    base_dir: Path
    facts: Mapping[str, Any]
    """Fields of `Dataset` that the registry knows."""


def described(name: str, base_dir: Path, dataset_dir: Path | str | None, hub_key: str = "hf_hub_url") -> Entry | None:
    """The entry of `name`, or None where no registry holds it.

    `hub_key` is the key of an entry that names its place on the recipe's hub, which wins over those of other hubs.
    The registry is `dataset_info.json` in `dataset_dir`; without one, in `base_dir` or in its folder `data`.

    Raises:
        DataError: the registry is damaged, or describes the data set in a way that cannot be used.
    """
    folders = [base_dir / Path(dataset_dir).expanduser()] if dataset_dir is not None else [base_dir, base_dir / "data"]
    file = next((folder / FILE for folder in folders if (folder / FILE).is_file()), None)
    if file is None:
        if dataset_dir is not None:
            raise DataError(f"dataset_dir: {folders[0]} holds no {FILE}; check the folder")
        return None
    entries = _read(file, asked=dataset_dir is not None)
    if name in entries:
        return _entry(name, entries[name], file, hub_key)
    plain = not any(sign in name for sign in "/.:*?") and not (base_dir / name).exists()
    if plain and (near := did_you_mean(name, entries)):  # else the hub would be asked for it
        raise DataError(f"{name}: {file} has no data set of this name.{near} Write hub:{name} for one on the hub")
    return None


def _read(file: Path, asked: bool) -> dict[str, Any]:
    try:
        entries = json.loads(file.read_text("utf-8-sig"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read as JSON ({error}); mend it") from None
    named = isinstance(entries, dict) and all(isinstance(entry, dict) for entry in entries.values())
    if named:
        return entries
    if asked:
        raise DataError(f"{file}: found something else, allowed is an object of data sets by name; check dataset_dir")
    return {}  # the datasets library calls a file of its own so


def _entry(name: str, entry: Mapping[str, Any], file: Path, hub_key: str) -> Entry:
    where = f"{file}: {name}"
    if strange := [key for key in entry if key not in _TYPES]:
        near = did_you_mean(strange[0], _TYPES)
        raise DataError(f'{where} has the key "{strange[0]}", which is unknown.{near} Known: {listed(_TYPES, 20)}')
    for key, kind in _TYPES.items():
        if not isinstance(entry.get(key), kind | None):
            raise DataError(f"{where}: {key} is {json.dumps(entry[key])}, allowed is {_NAMES[kind]}")
    if (entry.get("num_samples") or 1) < 1:
        raise DataError(f"{where}: num_samples is {entry['num_samples']}, allowed is 1 or more; leave it out for all")
    formatting = entry.get("formatting") or "alpaca"
    if formatting not in _COLUMNS:
        raise DataError(f'{where} has formatting "{formatting}", allowed are {listed(_COLUMNS)}')
    facts: dict[str, Any] = {
        "format": formatting,
        "ranking": bool(entry.get("ranking")),
        "split": entry.get("split") or "train",
        "subset": entry.get("subset"),
        "num_samples": entry.get("num_samples"),
        "tags": _names(entry.get("tags"), _TAGS, f"{where}: tags"),
        **_columns(entry.get("columns"), formatting, where),
    }
    if facts["ranking"]:
        facts["format"] = "preference"
    elif "kto_tag" in facts["columns"]:
        facts["format"] = "kto"
    elif facts["exclusive"] and formatting == "alpaca" and "output" not in facts["columns"]:
        # A prompt without a response is what pretraining takes: plain text.
        facts |= {"format": "text", "columns": {"text": facts["columns"].get("instruction", "text")}}
    path = _path(entry, where, hub_key)
    if path.startswith("hub:"):
        facts["folder"] = entry.get("folder")
    elif entry.get("folder"):
        path = f"{path}/{entry['folder']}"
    return Entry(path=path, base_dir=file.parent, facts=facts)


def _path(entry: Mapping[str, Any], where: str, hub_key: str) -> str:
    if entry.get(hub_key):
        return f"hub:{entry[hub_key]}"
    if entry.get("script_url"):
        raise DataError(f"{where} is loaded by a script, which llmtune does not run; name a file or a hub data set")
    if entry.get("file_name"):
        return f"./{entry['file_name']}" if not Path(entry["file_name"]).is_absolute() else entry["file_name"]
    if elsewhere := [key for key in _PLACES if entry.get(key)]:
        other = ", or name its hub in hub_config" if elsewhere[0].endswith("_hub_url") else ""
        raise DataError(
            f"{where} is only at {elsewhere[0]}, which cannot be read; download it and give file_name{other}"
        )
    raise DataError(f"{where} names no place; give file_name or {hub_key}")


def _columns(columns: Any, formatting: str, where: str) -> dict[str, Any]:
    """Given columns replace all defaults: those not named are absent."""
    if columns is None:
        return {"columns": {}, "exclusive": False}
    known = _COLUMNS[formatting]
    named = _names(columns, (*known, *_MEDIA), f"{where}: columns")
    return {"columns": {known.get(key, key): value for key, value in named.items()}, "exclusive": True}


def _names(names: Mapping[str, str | None] | None, known: Sequence[str], where: str) -> dict[str, str]:
    """The names that are given, without nulls. DataError for one of something that is not `known`."""
    given = {key: value for key, value in (names or {}).items() if value is not None}
    if strange := [key for key in given if key not in known]:
        near = did_you_mean(strange[0], known)
        raise DataError(f'{where} has "{strange[0]}".{near} Allowed: {listed(known, 12)}')
    return given
