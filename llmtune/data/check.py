"""Every row of a data set read and converted as training would, and rendered where a model is known: what it is, and
what is wrong."""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from llmtune.contract.errors import DataError
from llmtune.contract.examples import BadRow, Example
from llmtune.data.config import Source
from llmtune.data.formats import Chosen, Formats, read_row
from llmtune.data.formats.builtin import builtin_formats
from llmtune.data.piece import Bad
from llmtune.data.reading import Chunk, Found, HubAccess, Row, chunks, find, separated
from llmtune.data.workers import in_order
from llmtune.terminal import Shown

if TYPE_CHECKING:
    from llmtune.data.tokenise import Tokeniser

LOOKED_AT = 100
"""Rows that the format is detected from."""
_SPECIAL = re.compile(r"<\|\w+\|>|</?s>|\[/?INST\]|<(?:start|end)_of_turn>")
"""Text that is a special token of some widespread tokenizer."""
_PLACE = re.compile(r"\{\{ ?\w+ ?\}\}")
_ROWS = 1000
_SHOWN = 5
_EACH = 3
"""Bad rows of each reason that are listed, whatever came before."""


@dataclass(kw_only=True)
class Seen:
    """What some rows hold."""

    rows: int = 0
    bad: list[Bad] = field(default_factory=list)
    roles: Counter[str] = field(default_factory=Counter)
    turns: Counter[int] = field(default_factory=Counter)
    """Rows by their number of assistant messages."""
    answers: Counter[str] = field(default_factory=Counter)
    """Rows of each label, counted."""
    characters: int = 0
    longest: int = 0
    notes: Counter[str] = field(default_factory=Counter)
    firsts: dict[str, str] = field(default_factory=dict)
    """What each note means in the first row that it is true of."""
    hashes: array[int] = field(default_factory=lambda: array("Q"))
    numbers: array[int] = field(default_factory=lambda: array("Q"))
    origin: str = ""

    def add(self, example: Example, origin: str, number: int) -> None:
        """Count one good row."""
        texts = list(_texts(vars(example)))
        size = sum(map(len, texts))
        self.characters += size
        self.longest = max(self.longest, size)
        raw = json.dumps(vars(example), sort_keys=True, default=str)
        self.hashes.append(int.from_bytes(hashlib.blake2b(raw.encode("utf-8", "replace"), digest_size=8).digest()))
        self.numbers.append(number)
        messages = _messages(example)
        self.roles.update(message["role"] for message in messages)
        if messages:
            lost = len(vars(example).get("rejected", ()))
            self.turns[sum(message["role"] == "assistant" for message in messages[: len(messages) - lost])] += 1
        if (label := vars(example).get("label")) is not None:
            self.answers["wanted" if label else "not wanted"] += 1
        for note, found in _notes(example, texts):
            self.notes[note] += 1
            self.firsts.setdefault(note, f"{found} in {origin}{number}")


@dataclass(kw_only=True, repr=False)
class DataCheck(Shown):
    """What a data set is, and what is wrong with it. Print it to see it; false where rows are bad."""

    name: str
    format: str = ""
    why: str = ""
    """What the format was recognised by."""
    kind: str = ""
    """What its rows are: conversation, preference, labelled, prompt, text or tokens."""
    files: int = 0
    rows: int = 0
    """Rows read, bad ones included."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Bad rows by reason."""
    bad: list[Bad] = field(default_factory=list)
    """The first bad rows, or all: `origin`, `reason`, `detail`, `row`."""
    roles: Counter[str] = field(default_factory=Counter)
    """Messages by role."""
    turns: Counter[int] = field(default_factory=Counter)
    """Rows by their number of assistant messages."""
    labels: Counter[str] = field(default_factory=Counter)
    characters: int = 0
    longest: int = 0
    """Characters of the longest row."""
    duplicates: int = 0
    """Rows that repeat an earlier one."""
    repeated: list[tuple[str, str]] = field(default_factory=list)
    """The first of them: (the earlier row, the later one)."""
    notes: Counter[str] = field(default_factory=Counter)
    """Good rows that may not be what was meant, by what is strange about them."""
    firsts: dict[str, str] = field(default_factory=dict)
    """What each note means in the first row that it is true of."""
    rendered: bool = False
    """Whether each row was also rendered and tokenised as a model's training would."""
    unchecked: str = ""
    """What was not looked at, and how it is."""

    @property
    def ok(self) -> bool:
        """Whether every row can be used."""
        return not self.reasons

    def __bool__(self) -> bool:
        return self.ok

    def as_dict(self) -> dict[str, Any]:
        """For machines."""
        kept = {key: value for key, value in vars(self).items() if key != "bad"}
        bad = [{"origin": each.origin, "reason": each.reason, "detail": each.detail} for each in self.bad]
        return json.loads(json.dumps({"ok": self.ok, **kept, "bad": bad}, default=str))

    def __str__(self) -> str:
        files = f" in {self.files:,} files" if self.files > 1 else ""
        told = f"{self.format} ({self.why})" if self.format else "unknown, as no row could be read"
        lines = [f"{self.name}: {_rows(self.rows)}{files}", f"  format: {told}"]
        lines += [f"  kind: {self.kind}"] if self.kind else []
        lines += [f"  {name}: {text}" for name, text in self._facts() if text]
        lines += [f"  not checked: {self.unchecked}"] if self.unchecked else []
        if self.ok:
            return "\n".join([*lines, "  every row can be used"])
        lines.append(f"  cannot be used: {_rows(self.reasons.total())} ({_counts(self.reasons)})")
        lines += [f"    {bad_line(each)}" for each in self.bad]
        if hidden := self.reasons.total() - len(self.bad):
            lines.append(f"    ... and {hidden:,} more (--all shows them, --quarantine FILE writes them)")
        return "\n".join(lines)

    def _facts(self) -> Iterator[tuple[str, str]]:
        good = self.rows - self.reasons.total()
        yield "messages", _counts(self.roles)
        if self.turns and self.kind != "prompt":
            several = sum(count for turns, count in self.turns.items() if turns > 1)
            told = f"several in {several:,} rows, {max(self.turns):,} at most"
            yield "answers in a row", told if several else ""
        yield "labels", _counts(self.labels)
        if good:
            yield "characters", f"{self.characters:,}, {self.characters // good:,} a row, {self.longest:,} at most"
        if self.duplicates:
            earlier, later = self.repeated[0]
            yield "duplicates", f"{_rows(self.duplicates)} said before, first {later} (as {earlier})"
        for note, count in self.notes.most_common():
            yield "note", f"{note} ({_rows(count)}, first {self.firsts[note]})"


def check(
    source: Source,
    base_dir: Path,
    *,
    dataset_dir: Path | str | None = None,
    limit: int | None = None,
    keep: int | None = 20,
    formats: Formats | None = None,
    on_bad: Callable[[Bad], object] | None = None,
    workers: int | None = None,
    tokeniser: Tokeniser | None = None,
    access: HubAccess | None = None,
    why_not: str = "name a recipe, or a model: model=NAME",
) -> DataCheck:
    """Read and convert the first `limit` rows of a data set (all, if None); render them, too, with a `tokeniser`.

    Without one, the result says that templates were not asked, and `why_not`. The first `keep` bad rows are kept (all,
    if None); `on_bad` is told of each.

    Raises:
        DataError: a file cannot be read, holds nothing, or no format fits.
    """
    found = find(source, base_dir, dataset_dir, access)
    result = DataCheck(name=found.spelling, files=len(found.files))
    first = list(
        islice(
            (row for chunk in islice(chunks(found, streaming=limit is not None), 1) for row in chunk.rows()), LOOKED_AT
        )
    )
    if not first:
        raise DataError(f"{found.spelling}: 0 records; the file is empty")
    chosen = None
    if readable := [row.data for row in first if row.problem is None]:
        chosen = (formats or builtin_formats()).of(found, readable)
        result.format, result.kind = chosen.name, chosen.format.kind
        result.why = chosen.why + separated(found)
        result.rendered = tokeniser is not None
        if tokeniser is None and result.kind not in ("text", "tokens"):
            result.unchecked = f"what the chat template of a model refuses; {why_not}"
    merge = _Merge(result, keep, on_bad)
    for seen in in_order(partial(_look, chosen, tokeniser), _chunks(found, limit), workers):
        merge.add(seen)
    merge.finish()
    return result


def bad_line(bad: Bad) -> str:
    """Where, why and what, without saying the place twice."""
    return bad.detail if bad.detail.startswith(bad.origin) else f"{bad.origin}: {bad.reason}: {bad.detail}"


def quarantine_line(bad: Bad) -> str:
    """A bad row as one line of JSON."""
    return json.dumps({"origin": bad.origin, "reason": bad.reason, "detail": bad.detail, "row": bad.row}, default=str)


class _Merge:
    """Adds up what was seen in chunks, in their order."""

    def __init__(self, into: DataCheck, keep: int | None, on_bad: Callable[[Bad], object] | None) -> None:
        self.into, self.keep, self.on_bad = into, keep, on_bad
        self.hashes, self.numbers = array("Q"), array("Q")
        self.kept: Counter[str] = Counter()
        self.origins: list[tuple[int, str]] = []  # rows before, label

    def add(self, seen: Seen) -> None:
        into = self.into
        into.rows += seen.rows
        into.characters += seen.characters
        into.longest = max(into.longest, seen.longest)
        into.roles += seen.roles
        into.turns += seen.turns
        into.labels += seen.answers
        into.notes += seen.notes
        into.firsts = seen.firsts | into.firsts
        if not self.origins or self.origins[-1][1] != seen.origin:
            self.origins.append((len(self.hashes), seen.origin))
        self.hashes += seen.hashes
        self.numbers += seen.numbers
        for bad in seen.bad:
            into.reasons[bad.reason] += 1
            if self.on_bad is not None:
                self.on_bad(bad)
            self._keep(bad)

    def _keep(self, bad: Bad) -> None:
        """The first ones; those of a rarer reason take the place of the last of a frequent one."""
        kept, reasons = self.into.bad, self.kept
        if self.keep is not None and len(kept) >= self.keep:
            frequent, most = reasons.most_common(1)[0]
            if reasons[bad.reason] >= min(_EACH, most):
                return
            del kept[max(at for at, each in enumerate(kept) if each.reason == frequent)]
            reasons[frequent] -= 1
        kept.append(bad)
        reasons[bad.reason] += 1

    def finish(self) -> None:
        """Find the rows that say the same."""
        hashes = np.frombuffer(self.hashes, np.uint64) if len(self.hashes) else np.zeros(0, np.uint64)
        _, first, which = np.unique(hashes, return_index=True, return_inverse=True)
        (again,) = np.nonzero(first[which] != np.arange(len(hashes)))
        self.into.duplicates = len(again)
        self.into.repeated = [(self._place(int(first[which[row]])), self._place(int(row))) for row in again[:_SHOWN]]

    def _place(self, row: int) -> str:
        label = next(label for before, label in reversed(self.origins) if before <= row)
        return f"{label}{self.numbers[row]}"


class _FirstRows(NamedTuple):
    """Some rows of a chunk."""

    origin: str
    found: Sequence[Row]

    def rows(self) -> Iterator[Row]:
        return iter(self.found)


def _chunks(found: Found, limit: int | None) -> Iterator[Chunk | _FirstRows]:
    # A hub data set is not downloaded whole for its first rows.
    for chunk in chunks(found, rows=_ROWS, streaming=limit is not None):
        if limit is None:
            yield chunk
            continue
        rows = list(islice(chunk.rows(), limit))
        limit -= len(rows)
        yield _FirstRows(chunk.origin, rows)
        if not limit:
            return


def _look(chosen: Chosen | None, tokeniser: Tokeniser | None, chunk: Chunk | _FirstRows) -> Seen:
    """One chunk, in whichever process."""
    seen, rows, refused = Seen(origin=chunk.origin), list(chunk.rows()), {}
    if chosen is not None and tokeniser is not None:
        refused = {bad.origin: bad for bad in tokeniser.encode(chosen, rows, chunk.origin).bad}
    for row in rows:
        seen.rows += 1
        try:
            if row.problem is not None or chosen is None:
                raise BadRow("unreadable", row.problem or "no row shows what the format is")
            example = read_row(chosen, row.data)
            if (bad := refused.get(f"{chunk.origin}{row.number}")) is not None:
                seen.bad.append(bad)
            else:
                seen.add(example, chunk.origin, row.number)
        except BadRow as bad:
            seen.bad.append(Bad(f"{chunk.origin}{row.number}", bad.reason, bad.detail, row.data))
    return seen


def _messages(example: Example) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for name in ("prompt", "messages", "chosen", "rejected"):
        found += vars(example).get(name, ())
    return found


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, each in value.items():
            if key != "role":
                yield from _texts(each)
    elif isinstance(value, list):
        if value and isinstance(value[0], int):
            return
        for each in value:
            yield from _texts(each)


def _notes(example: Example, texts: Iterable[str]) -> Iterator[tuple[str, str]]:
    """What may not have been meant, and the text that makes one think so."""
    texts = list(texts)
    if any("\ufffd" in text for text in texts):
        yield "characters that were lost", "U+FFFD"
    if place := next((found[0] for text in texts if (found := _PLACE.search(text))), None):
        yield "a place that nobody filled in", place
    if example.kind != "text" and (
        token := next((found[0] for text in texts if (found := _SPECIAL.search(text))), None)
    ):
        yield "text that may be read as a special token, see split_special_tokens", token


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counter.most_common())


def _rows(count: int) -> str:
    return f"{count:,} row{'' if count == 1 else 's'}"
