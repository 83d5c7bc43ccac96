"""The data sets of Axolotl's files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from llmtune.contract.errors import listed
from llmtune.conversion.draft import Draft
from llmtune.conversion.tables import table

_LOADERS = ("json", "csv", "parquet", "text", "arrow")
"""What `path` is where `data_files` names the files."""
_ENDINGS = (".json", ".jsonl", ".parquet", ".csv", ".txt")
_OWN_TEXT = ("alpaca", "alpaca_chat", "alpaca_w_system", "instruction", "oasst")
"""Types whose rows are written without a chat template there."""
_WRITES = {"chatml": "chatml", "llama3": "llama3", "zephyr": "zephyr"}
"""Types of pairs that write them with this template, whatever the tokenizer's is."""
_ANSWERS = {"assistant", "gpt", "function_call"}
"""Roles that train in any case."""
_ROLES = {"system", "user", "human", "assistant", "gpt", "tool", "observation", "function_call", "function"}


_PAIRED = {
    "intel": {"prompt": "question"}, "icr": {"prompt": "input"},
    "argilla": {"prompt": "instruction", "chosen": "chosen_response", "rejected": "rejected_response"},
}  # fmt: skip
"""What stands behind the dot of a type of pairs: what the columns of such rows are called."""
_STAGE_FORMATS = {"dpo": ("preference", ("prompt", "system", "chosen", "rejected")),
                  "kto": ("kto", ("prompt", "system", "completion", "label"))}  # fmt: skip
"""What rows of a stage are, and the columns that a mapping `type` or an entry renames by `field_COLUMN`."""
_TRIVIAL = ("{prompt}", "{chosen}", "{rejected}", "{completion}")


def take_datasets(draft: Draft) -> None:
    """`datasets`, `test_datasets` and `pretraining_dataset` as entries of `dataset`."""
    for there, here in (("datasets", "dataset"), ("pretraining_dataset", "dataset"), ("test_datasets", "eval_dataset")):
        given = draft.take(there)
        if not given:
            draft.ask_nothing(there, why="it is not set")
            continue
        several = enumerate(given if isinstance(given, list) else [given])
        made = [entry for number, each in several for entry in _entries(draft, f"{there}[{number}]", each)]
        draft.set(here, made, there)
        if there == "pretraining_dataset":
            draft.set("streaming", True, note="as pretraining_dataset does; it needs max_steps")
        elif "stage_config" not in draft.recipe and all(entry.get("format") == "text" for entry in made):
            draft.name("stage_config", "pt", note="rows of plain text")
    if policy := draft.take("excess_length_strategy"):
        draft.set("cutoff_policy", {"raise": "error"}.get(policy, policy), "excess_length_strategy")
    elif "stage_config" not in draft.recipe:
        draft.default("cutoff_policy", "drop")


def _entries(draft: Draft, place: str, given: Any) -> list[dict[str, Any]]:
    """A data set as one entry for each of its files; what it says beyond a path, a type and columns is listed."""
    row: dict[str, Any] = {"path": given} if isinstance(given, str) else dict(given)
    paths, entry = _paths(draft, place, row), _read_as(draft, place, row)
    split, subset = row.pop("split", None) or row.pop("train_on_split", None), row.pop("name", None)
    if "[" in str(split) and not paths[0].startswith("hub:"):
        draft.lost[f"{place}.split"] = f"{split} is part of a file; num_samples in the entry takes a number of rows"
        split = None
    entry |= {key: value for key, value in (("split", split), ("subset", subset)) if value is not None}
    if row.pop("ds_type", None):
        draft.idle[f"{place}.ds_type"] = "files tell their kind"
    for key in ("roles_to_train", "train_on_eos", "train_on_eot"):
        if (value := row.pop(key, None)) is not None:
            said = "the assistant's turns train with their ends"
            if value == "turn" or (isinstance(value, list) and value and set(value) <= _ANSWERS):
                draft.idle[f"{place}.{key}"] = said
            else:
                draft.lost[f"{place}.{key}"] = f"{said}; a message's own weight says otherwise (docs/data.md)"
    roles = row.pop("roles", None) or {}
    if strange := [name for names in roles.values() for name in names if name not in _ROLES]:
        draft.lost[f"{place}.roles"] = f"{listed(strange)}: tags in the entry name roles (user_tag, assistant_tag, ...)"
    elif roles:
        draft.idle[f"{place}.roles"] = "these roles are known"
    for key, value in row.items():
        if value not in (None, False, [], {}):
            draft.lost[f"{place}.{key}"] = "entries of dataset have no such key (docs/data.md lists them)"
    return [{"path": path, **entry} for path in paths]


def _paths(draft: Draft, place: str, row: dict[str, Any]) -> list[str]:
    """Where the rows are: files, a folder, or a set on the hub."""
    path, files = str(row.pop("path", None) or ""), row.pop("data_files", None)
    names = [str(file) for file in (files if isinstance(files, list) else [files] if files else [])]
    if names and path in ("", *_LOADERS):
        return names
    local = path.startswith((".", "/", "~", "hub:")) or path.endswith(_ENDINGS) or Path(path).expanduser().exists()
    if names and local:
        return [f"{path.rstrip('/')}/{name}" for name in names]
    if names:
        draft.lost[f"{place}.data_files"] = "a set on the hub is read whole; download the files and name those"
    return [path if local else f"hub:{path}"]


def _read_as(draft: Draft, place: str, row: dict[str, Any]) -> dict[str, Any]:
    """The format of the rows, with its columns and tags."""
    kind, stage = row.pop("type", None), draft.chosen("stage_config")
    if stage == "grpo" and kind:
        draft.lost[f"{place}.type"] = (
            f"{kind} makes rows by a function of your own; write them with `prompt` and the columns that rewards read "
            "(docs/how-to/rewards.md)"
        )
        return {}
    if stage in _STAGE_FORMATS:
        return _read_as_answers(draft, place, row, kind, *_STAGE_FORMATS[stage])
    columns = {}
    if isinstance(kind, dict):
        names = ("system", "instruction", "input", "output")
        columns = {key: name for key in names if (name := kind.get(f"field_{key}"))}
        _lose_texts(draft, place, kind, ("system_prompt", "system_format", "format", "no_input_format"))
        kind = "alpaca"
    word = re.split(r"[.:]", str(kind))[0]
    found = dict(table("axolotl_types").get(word, {"format": "auto"})) if kind else {}
    if lost := found.pop("lost", None):
        draft.lost[f"{place}.type"] = lost
    if word in _OWN_TEXT:
        draft.check.append(
            f"{place}: Axolotl writes rows of type {word} as a text of its own (### Instruction: ...), here the chat "
            "template writes them; template: alpaca is nearest to it"
        )
    entry = {key: value for key, value in found.items() if value != "auto"}
    column = row.pop("field", None) if word == "completion" else None
    if column := row.pop("text_column", None) or column:
        columns = {"text": column}
        entry["format"] = "text"
    return entry | _messages(row, entry, columns)


def _read_as_answers(
    draft: Draft, place: str, row: dict[str, Any], kind: Any, form: str, names: tuple[str, ...]
) -> dict[str, Any]:
    """Rows of a stage that learns from pairs or labelled answers."""
    columns: dict[str, str] = {}
    if isinstance(kind, dict):
        row |= {key: value for key, value in kind.items() if key.startswith("field_")}
        _lose_texts(draft, place, kind, ("prompt_format", "chosen_format", "rejected_format", "completion_format"))
    elif kind:
        word, _, columns_of = str(kind).partition(".")
        columns = dict(_PAIRED.get(columns_of, {}))
        if word in _WRITES:
            draft.default("template", _WRITES[word], note=f"of the type {kind}")
    for name in names:
        column = row.pop(f"field_{name}", None)
        if column and column != name:
            columns[name] = column
    return {"format": form} | _messages(row, {"format": form}, columns)


def _lose_texts(draft: Draft, place: str, kind: dict[str, Any], keys: tuple[str, ...]) -> None:
    """Texts of a type that are written around columns."""
    for key in keys:
        if kind.get(key) and kind[key] not in _TRIVIAL:
            said = "the chat template writes rows; a text of your own is a template (docs/data.md)"
            draft.lost[f"{place}.type.{key}"] = said


def _messages(row: dict[str, Any], entry: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    """What columns and the keys of messages are called, as far as an entry of `dataset` has to say it; the format where
    these tell it."""
    mapping, tags, made = row.pop("message_property_mappings", None) or {}, {}, {}
    for key in ("role", "content"):
        old = row.pop(f"message_field_{key}", None)
        if (name := mapping.get(key) or old) and name != key:
            tags[f"{key}_tag"] = name
    messages, tools = row.pop("field_messages", None), row.pop("field_tools", None)
    form = entry.get("format")
    if form not in ("preference", "kto") and (tags or messages or mapping):
        form = made["format"] = "sharegpt" if tags.get("role_tag") == "from" else "openai"
    own = "conversations" if form == "sharegpt" else "messages"
    if messages and messages != own:
        columns = {**columns, own: messages}
    if tools and tools != "tools":
        columns = {**columns, "tools": tools}
    return made | ({"tags": tags} if tags else {}) | ({"columns": columns} if columns else {})
