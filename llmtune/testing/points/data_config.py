"""Laws of formats: what a row becomes depends on the row alone, and a row that does not fit is refused in words."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llmtune.contract.errors import DataError
from llmtune.contract.examples import KINDS, BadRow
from llmtune.data.formats import Chosen, read_row
from llmtune.data.workers import in_order
from llmtune.testing.contract import Broken, Check, Subject

SPOILT: tuple[Any, ...] = (None, 3, 0.5, True, "", " ", [], {}, [None], [3], [{}], {"a": 1})
"""Values that a column may hold in somebody's file."""
_NO_ROWS = "Give the test rows that the format reads: laws(..., rows=[{...}])"


def laws(subject: Subject) -> list[Check]:
    """All of them."""
    return [
        declares_its_columns, converts_what_it_recognises, refuses_with_reasons, leaves_rows_alone,
        depends_on_the_row_alone,
    ]  # fmt: skip


def declares_its_columns(subject: Subject, folder: Path) -> None:
    """`kind` is one of llmtune's kinds of rows, and `required` are some of `columns`, all of them texts."""
    form = subject.built()
    if form.kind not in KINDS:
        raise Broken(f"`kind` is {form.kind!r}", f"Make it one of {', '.join(KINDS)}")
    spelt = [*form.columns, *form.required]
    if not all(isinstance(column, str) for column in spelt) or not form.columns:
        raise Broken(f"`columns` are {list(form.columns)!r}", "Name every column that `convert` reads")
    if lost := [column for column in form.required if column not in form.columns]:
        raise Broken(f"`required` names {lost[0]!r}, which `columns` does not", "Name it in both")


def converts_what_it_recognises(subject: Subject, folder: Path) -> None:
    """A row that fits is recognised, in words, and becomes an example of the declared kind that can be learnt from."""
    form = subject.built()
    for row in _rows(subject):
        why = form.recognise(row)
        if not isinstance(why, str) or not why.strip():
            raise Broken(
                f"recognise({row!r}) is {why!r}", "Say what the row is recognised by, as `data check` tells it"
            )
        try:
            example = _read(form, subject.name, row)
        except DataError as error:
            raise Broken(f"{row!r}: {error}", "Let `kind` say what `convert` returns") from error
        if isinstance(example, BadRow):
            raise Broken(f"{row!r} is refused ({example})", "Convert it, or leave it out of the test's rows")


def refuses_with_reasons(subject: Subject, folder: Path) -> None:
    """A row in which something is missing, empty or of another type, at any depth, is read or refused with a BadRow
    that has a reason; no other error, and nothing that cannot be learnt from."""
    form = subject.built()
    for row in _spoilt(_rows(subject), form.columns):
        form.recognise(row)
        try:
            found = _read(form, subject.name, row)
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            raise Broken(f"{row!r} ends in {said}", "Raise BadRow(reason, detail) for what does not fit") from error
        if isinstance(found, BadRow) and not (found.reason.strip() and found.detail.strip()):
            raise Broken(f"{row!r} is refused without a word", "Give BadRow a reason and what was found")


def leaves_rows_alone(subject: Subject, folder: Path) -> None:
    """Neither `recognise` nor `convert` changes the row."""
    form = subject.built()
    for row in _rows(subject):
        before = copy.deepcopy(row)
        form.recognise(row)
        form.convert(row)
        if row != before:
            raise Broken(f"{before!r} was changed to {row!r}", "Copy what is changed")


def depends_on_the_row_alone(subject: Subject, folder: Path) -> None:
    """A row becomes the same example each time, in any order, by any instance and in any process."""
    rows = _rows(subject)
    first = [_told(subject.built(), row) for row in rows]
    form = subject.built()
    backwards = [_told(form, row) for row in reversed(rows)][::-1]
    again = [_told(form, row) for row in rows]
    elsewhere = list(in_order(lambda row: _told(form, row), iter(rows), workers=2))
    for row, *found in zip(rows, first, backwards, again, elsewhere, strict=True):
        if any(one != found[0] for one in found):
            raise Broken(f"{row!r} is not always the same", "Keep no state, and ask neither clock nor random numbers")


def _rows(subject: Subject) -> Sequence[Mapping[str, Any]]:
    if not subject.rows:
        raise Broken("there is no row to try it on", _NO_ROWS)
    return subject.rows


def _read(form: Any, name: str, row: Mapping[str, Any]) -> Any:
    """The example that a run makes of the row, or the BadRow it is refused with."""
    try:
        return read_row(Chosen(format=form, name=name, why=""), row)
    except BadRow as bad:
        return bad


def _told(form: Any, row: Mapping[str, Any]) -> bytes:
    """All that an example says, as it travels between processes."""
    example = form.convert(row)
    return pickle.dumps((example.kind, asdict(example)))


def _spoilt(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    yield {}
    for row in rows:
        for column in columns:
            yield from ({**row, column: value} for value in SPOILT)
        yield from _spoilt_inside(row)


def _spoilt_inside(value: Any) -> Iterator[Any]:
    """`value` with one thing in it left out, or another in its place, at every depth."""
    if not isinstance(value, dict | list):
        return
    places = list(value) if isinstance(value, dict) else range(len(value))
    for at in places:
        less = copy.copy(value)
        del less[at]
        yield less
        for other in (*SPOILT, *_spoilt_inside(value[at])):
            changed = copy.copy(value)
            changed[at] = other
            yield changed
