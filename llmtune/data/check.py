"""Every row of a data set read and converted as training would, and rendered where a model is known: what it is, and
what is wrong."""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from llmtune.contract.errors import DataError, LlmtuneError
from llmtune.contract.examples import KINDS, BadRow, Example
from llmtune.data.config import DataConfig, Source
from llmtune.data.formats import LOOKED_AT, Chosen, Formats, read_row
from llmtune.data.formats.builtin import builtin_formats
from llmtune.data.making import media_files
from llmtune.data.reading import Chunk, HubAccess, Row, chunks, find, first_rows, separated
from llmtune.data.report import Bad, Losses, counts_text
from llmtune.data.workers import in_order
from llmtune.terminal import Shown

if TYPE_CHECKING:
    from llmtune.data.tokenise import Tokeniser

_SPECIAL = "text that may be read as a special token, see split_special_tokens"
_STRANGE = {
    "characters that were lost": re.compile("\ufffd"),
    "a place that nobody filled in": re.compile(r"\{\{ ?\w+ ?\}\}"),
    _SPECIAL: re.compile(r"<\|\w+\|>|</?s>|\[/?INST\]|<(?:start|end)_of_turn>"),
}
"""What texts of a good row should not hold, by what is said of it."""
_ROWS = 1000
_SHOWN = 5
_EACH = 3
"""Bad rows of each reason that are listed, whatever came before."""


@dataclass(kw_only=True)
class RowCounts:
    """What some rows hold, in numbers that add up."""

    rows: int = 0
    """Rows read, bad ones included."""
    roles: Counter[str] = field(default_factory=Counter)
    """Messages by role."""
    turns: Counter[int] = field(default_factory=Counter)
    """Rows by their number of assistant messages."""
    labels: Counter[str] = field(default_factory=Counter)
    characters: int = 0
    longest: int = 0
    """Characters of the longest row."""
    notes: Counter[str] = field(default_factory=Counter)
    """Good rows that may not be what was meant, by what is strange about them."""
    firsts: dict[str, str] = field(default_factory=dict)
    """What each note means in the first row that it is true of."""
    losses: Losses = field(default_factory=Losses)
    """What `cutoff_len` and the mask would cost, where rows were rendered."""

    def add(self, example: Example, place: str) -> None:
        """Count one good row."""
        texts = list(_texts(vars(example)))
        size = sum(map(len, texts))
        self.characters += size
        self.longest = max(self.longest, size)
        messages = _messages(example)
        self.roles.update(message["role"] for message in messages)
        if messages:
            lost = len(vars(example).get("rejected", ()))
            self.turns[sum(message["role"] == "assistant" for message in messages[: len(messages) - lost])] += 1
        if (label := vars(example).get("label")) is not None:
            self.labels["wanted" if label else "not wanted"] += 1
        for note, found in _notes(example, texts):
            self.notes[note] += 1
            self.firsts.setdefault(note, f"{found} in {place}")

    def add_all(self, later: RowCounts) -> None:
        """Count the rows that `later` has counted."""
        self.rows += later.rows
        self.roles += later.roles
        self.turns += later.turns
        self.labels += later.labels
        self.characters += later.characters
        self.longest = max(self.longest, later.longest)
        self.notes += later.notes
        self.firsts = later.firsts | self.firsts
        self.losses += later.losses


@dataclass(kw_only=True)
class _Seen(RowCounts):
    """One chunk of rows."""

    origin: str
    bad: list[Bad] = field(default_factory=list)
    hashes: array[int] = field(default_factory=lambda: array("Q"))
    """What each good row says."""
    numbers: array[int] = field(default_factory=lambda: array("Q"))
    """Where it stands, after `origin`."""


@dataclass(kw_only=True, repr=False)
class DataCheck(Shown, RowCounts):
    """What a data set is, and what is wrong with it. Print it to see it; false where rows are bad, or where the model
    that was to be asked cannot be had."""

    folds: ClassVar[bool] = True
    name: str
    format: str = ""
    why: str = ""
    """What the format was recognised by."""
    kind: str = ""
    """What its rows are: conversation, preference, labelled, prompt, text or tokens."""
    files: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    """Bad rows by reason."""
    bad: list[Bad] = field(default_factory=list)
    """The first bad rows, or all: `origin`, `reason`, `detail`, `row`."""
    duplicates: int = 0
    """Rows that repeat an earlier one."""
    repeated: list[tuple[str, str]] = field(default_factory=list)
    """The first of them: (the earlier row, the later one)."""
    rendered: bool = False
    """Whether each row was also rendered and tokenised as a model's training would."""
    unchecked: str = ""
    """What was not looked at, and how it is."""
    no_model: LlmtuneError | None = None
    """Why the model that was named cannot be had; then no row was rendered."""

    @property
    def ok(self) -> bool:
        """Whether every row can be used, as far as was asked."""
        return not self.exit_code

    @property
    def exit_code(self) -> int:
        """How `llmtune data check` ends."""
        return DataError.exit_code if self.reasons else self.no_model.exit_code if self.no_model else 0

    def __bool__(self) -> bool:
        return self.ok

    def as_dict(self) -> dict[str, Any]:
        """For machines."""
        bad = [{"origin": each.origin, "reason": each.reason, "detail": each.detail} for each in self.bad]
        found = {"ok": self.ok, **vars(self), "losses": vars(self.losses), "bad": bad}
        return json.loads(json.dumps(found, default=str))

    def __str__(self) -> str:
        files = f" in {self.files:,} files" if self.files > 1 else ""
        told = f"{self.format} ({self.why})" if self.format else "unknown, as no row could be read"
        lines = [f"{self.name}: {_rows(self.rows)}{files}", f"  format: {told}"]
        lines += [f"  {name}: {text}" for name, text in self._facts() if text]
        if self.ok:
            return "\n".join([*lines, "  every row can be used"])
        if not self.reasons:
            return "\n".join([*lines, "  every row can be read; whether it can be used is not known"])
        lines.append(f"  cannot be used: {_rows(self.reasons.total())} ({counts_text(self.reasons)})")
        lines += [f"    {each}" for each in self.bad]
        if hidden := self.reasons.total() - len(self.bad):
            lines.append(f"    ... and {hidden:,} more (--all shows them, --quarantine FILE writes them)")
        return "\n".join(lines)

    def _facts(self) -> Iterator[tuple[str, str]]:
        good = self.rows - self.reasons.total()
        yield "kind", self.kind
        yield "messages", counts_text(self.roles)
        if self.turns and self.kind != "prompt":
            several = sum(count for turns, count in self.turns.items() if turns > 1)
            told = f"several in {several:,} rows, {max(self.turns):,} at most"
            yield "answers in a row", told if several else ""
        yield "labels", counts_text(self.labels)
        if good:
            yield "characters", f"{self.characters:,}, {self.characters // good:,} a row, {self.longest:,} at most"
        yield "cutoff_len", self.losses.cut_text
        if self.duplicates:
            earlier, later = self.repeated[0]
            yield "duplicates", f"{_rows(self.duplicates)} said before, first {later} (as {earlier})"
        for note, count in self.notes.most_common():
            yield "note", f"{note} ({_rows(count)}, first {self.firsts[note]})"
        yield "not checked", self.unchecked


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
    no_model: LlmtuneError | None = None,
    config: DataConfig | None = None,
) -> DataCheck:
    """Read and convert the first `limit` rows of a data set (all, if None); render them, too, with a `tokeniser`.
    `config` says where media are.

    Without one, the result says that templates were not asked, and whether that is because a model was named and there
    is `no_model`. The first `keep` bad rows are kept (all, if None); `on_bad` is told of each.

    Raises:
        DataError: a file cannot be read, holds nothing, or no format fits.
    """
    found = find(source, base_dir, dataset_dir, access)
    result = DataCheck(name=found.spelling, files=len(found.files), no_model=no_model)

    def read() -> Iterator[Chunk]:
        # A hub data set is not downloaded whole for its first rows.
        return first_rows(chunks(found, rows=_ROWS, streaming=limit is not None), limit)

    first = [row for chunk in islice(read(), 1) for row in islice(chunk.rows(), LOOKED_AT)]
    if not first:
        raise DataError(f"{found.spelling}: 0 records; the file is empty")
    chosen = None
    if readable := [row.data for row in first if row.problem is None]:
        chosen = (formats or builtin_formats()).of(found, readable, KINDS)
        if tokeniser is None or tokeniser.media is not None:  # else a model that reads text only
            chosen = replace(chosen, media=media_files(config or DataConfig(), base_dir, found))
        result.format, result.kind = chosen.name, chosen.format.kind
        result.why = chosen.why + separated(found)
        result.rendered = tokeniser is not None
    what = "what the chat template of a model refuses"
    if no_model is not None:
        result.unchecked = f"{what}, and what trains; the recipe's model cannot be asked: {no_model}"
    elif tokeniser is None and result.kind not in ("", "text", "tokens"):
        result.unchecked = f"{what}; name a recipe, or a model: model=NAME"
    merge = _Merge(result, keep, on_bad)
    for seen in in_order(partial(_look, chosen, tokeniser), read(), workers):
        merge.add(seen)
    merge.finish()
    return result


class _Merge:
    """Adds up what was seen in chunks, in their order."""

    def __init__(self, into: DataCheck, keep: int | None, on_bad: Callable[[Bad], object] | None) -> None:
        self.into, self.keep, self.on_bad = into, keep, on_bad
        self.kept: Counter[str] = Counter()
        self.chunks: list[tuple[str, array[int], array[int]]] = []  # origin, hashes, numbers

    def add(self, seen: _Seen) -> None:
        self.into.add_all(seen)
        self.chunks.append((seen.origin, seen.hashes, seen.numbers))
        for bad in seen.bad:
            self.into.reasons[bad.reason] += 1
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
        hashes = np.concatenate([np.array(hashes, np.uint64) for _, hashes, _ in self.chunks])
        _, first, which = np.unique(hashes, return_index=True, return_inverse=True)
        (again,) = np.nonzero(first[which] != np.arange(len(hashes)))
        self.into.duplicates = len(again)
        self.into.repeated = [(self._place(int(first[which[row]])), self._place(int(row))) for row in again[:_SHOWN]]

    def _place(self, row: int) -> str:
        """Where the good row number `row` stands."""
        for origin, _, numbers in self.chunks:
            if row < len(numbers):
                return f"{origin}{numbers[row]}"
            row -= len(numbers)
        raise IndexError(row)


def _look(chosen: Chosen | None, tokeniser: Tokeniser | None, chunk: Chunk) -> _Seen:
    """One chunk, in whichever process."""
    seen, rows, refused = _Seen(origin=chunk.origin), list(chunk.rows()), {}
    if chosen is not None and tokeniser is not None:
        refused, seen.losses = _refused(chosen, tokeniser, chunk.origin, rows)
    for row in rows:
        seen.rows += 1
        place = f"{chunk.origin}{row.number}"
        try:
            if row.problem is not None or chosen is None:
                raise BadRow("unreadable", row.problem or "no row shows what the format is")
            example = read_row(chosen, row.data)
            if row.number in refused:
                raise refused[row.number]
        except BadRow as bad:
            seen.bad.append(Bad(place, bad.reason, bad.detail, row.data))
            continue
        seen.add(example, place)
        raw = json.dumps(vars(example), sort_keys=True, default=str)
        seen.hashes.append(int.from_bytes(hashlib.blake2b(raw.encode("utf-8", "replace"), digest_size=8).digest()))
        seen.numbers.append(row.number)
    return seen


def _refused(chosen: Chosen, tokeniser: Tokeniser, origin: str, rows: list[Row]) -> tuple[dict[int, BadRow], Losses]:
    """Why rows give no sample to train on, by their number, and what the others lose."""
    piece = tokeniser.encode(chosen, rows, origin)
    bad = {each.origin: BadRow(each.reason, each.detail) for each in piece.bad}
    refused = {row.number: bad[place] for row in rows if (place := f"{origin}{row.number}") in bad}
    if piece.losses.no_target:
        used = {*refused, *piece.numbers}
        for row in [row for row in rows if row.number not in used]:
            lost = tokeniser.encode(chosen, [row], origin).losses  # by itself, to know what became of it
            if lost.no_target:
                why = f"cutoff_len={tokeniser.cutoff:,} cut it and " if lost.truncated else ""
                refused[row.number] = BadRow("nothing to train on", f"{why}none of its tokens trains")
    return refused, piece.losses


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
    for note, pattern in _STRANGE.items():
        if example.kind == "text" and note == _SPECIAL:
            continue
        if found := next((found for text in texts if (found := pattern.search(text))), None):
            yield note, found[0].replace("\ufffd", "U+FFFD")


def _rows(count: int) -> str:
    return f"{count:,} row{'' if count == 1 else 's'}"
