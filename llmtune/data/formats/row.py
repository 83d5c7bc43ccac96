"""One row, with the format that was chosen for its data set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llmtune.contract.errors import DataError, blaming, listed
from llmtune.contract.examples import BadRow, Conversation, DataFormat, Example, Preference, Prompt, UnpairedPreference
from llmtune.data.messages import check_conversation, kind
from llmtune.data.misspelt import as_names, misspelt
from llmtune.media.files import MediaFiles
from llmtune.media.rows import NAMES, columns_in, shown


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """A format and how this data set's columns fit it."""

    format: DataFormat
    name: str
    why: str
    """What it was recognised by, or that it was named."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """The format's columns and what they are called here."""
    exclusive: bool = False
    """Whether columns that `columns` does not name are as if they were not there."""
    media: MediaFiles | None = None
    """Where the data set's media are; None where the model reads text only."""


def read_row(chosen: Chosen, data: Any) -> Example:
    """The row as a checked example.

    Raises:
        BadRow: it cannot be used; a reason to count by and the detail.
        DataError: the format makes other examples than it says.
    """
    if not isinstance(data, Mapping):
        needed = listed(chosen.format.required or chosen.format.columns)
        raise BadRow("not an object", f"the row is {kind(data)}, allowed is an object with {needed}")
    row = _renamed(chosen, data)
    files = columns_in(row)
    row = {column: value for column, value in row.items() if column not in NAMES}
    _check_columns(chosen, row)
    with blaming(f"data_config: {chosen.name}", f"convert of {listed(row, 6)}", but=BadRow):
        example = chosen.format.convert(row)
    if getattr(example, "kind", None) != chosen.format.kind:
        what = f"says its rows become {chosen.format.kind}, and made {type(example).__name__} of one"
        raise DataError(f"format {chosen.name} {what}; the package that offers it has to be mended")
    check_example(example)
    return shown(example, files, chosen.media)


def _renamed(chosen: Chosen, row: Mapping[str, Any]) -> dict[str, Any]:
    if not chosen.columns:
        return dict(row)
    taken = {theirs: ours for ours, theirs in chosen.columns.items()}
    kept = {} if chosen.exclusive else {c: v for c, v in row.items() if c not in taken and c not in chosen.columns}
    return kept | {ours: row[theirs] for theirs, ours in taken.items() if theirs in row}


def _check_columns(chosen: Chosen, row: Mapping[str, Any]) -> None:
    form = chosen.format
    if wrong := misspelt(as_names(row), tuple(form.columns)):
        raise BadRow("misspelt column", f'{chosen.name} has no column "{wrong[0]}". Did you mean "{wrong[1]}"?')
    if missing := [name for name in form.required if name not in row]:
        column = chosen.columns.get(missing[0], missing[0])
        there = listed(row) or "no columns"
        raise BadRow(f"no {missing[0]}", f'{chosen.name} needs the column "{column}", found {there}')


def check_example(example: Example) -> None:
    """BadRow unless the roles follow each other and there is something to learn."""
    if isinstance(example, Preference):
        for side in (example.chosen, example.rejected):
            check_conversation([*example.prompt, *side])
    elif isinstance(example, Conversation | UnpairedPreference):
        check_conversation(example.messages)
    elif isinstance(example, Prompt):
        check_conversation(example.messages, answered=False)
