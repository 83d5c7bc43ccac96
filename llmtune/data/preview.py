"""Samples as a model is trained on them, for people: which tokens count, where a turn ends, what shares a row."""

from __future__ import annotations

import io
import re
import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from llmtune.contract.errors import DataError, listed
from llmtune.data.thumbnail import thumbnail
from llmtune.data.token_text import Span, TokenText, visible

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from llmtune.data.tokens import TokenSamples
    from llmtune.data.units import SampleSlice, Units

_NAMES = {1: ("",), 2: ("chosen", "rejected")}
_MOST = 100_000
"""Characters of one sequence that are shown."""
_TRAINED = "#0b3d1a on #c9ecd0"
"""Both colours are named, so that it is readable whatever the page or the terminal looks like."""
_MANY = 4
"""Special tokens in a row that are shown once, with their number."""
_PRE = '<pre style="font-family: monospace; white-space: pre-wrap">{code}</pre>'
_PAGE = (
    '<!doctype html><meta charset="utf-8"><title>llmtune data preview</title>'
    f'<body style="max-width: 60em; margin: 2em auto">{_PRE}</body>\n'
)


@dataclass(frozen=True, kw_only=True)
class ShownSequence:
    """The tokens of one sequence."""

    name: str
    """`chosen` or `rejected`, where a sample is two sequences; else empty."""
    ids: np.ndarray
    """(tokens,) int32, as trained on."""
    mask: np.ndarray
    """(tokens,) bool."""
    spans: Sequence[Span]


@dataclass(frozen=True, kw_only=True)
class ShownSample:
    """One sample, with where it comes from."""

    title: str
    sequences: Sequence[ShownSequence]
    pictures: Sequence[str] = ()
    """Files of the pictures that it shows, each once."""


@dataclass(frozen=True, kw_only=True)
class Preview:
    """Samples to look at. `print` shows them in marks, `show` and a notebook in colour."""

    samples: Sequence[ShownSample]
    notes: Sequence[str] = ()

    def __str__(self) -> str:
        legend = ["[[...]] is trained on; [[0.5: ...]] counts 0.5; \u21b5 is a line's end, \u21e5 a tab"]
        return "\n".join(line.plain for line in self._lines(legend, _marked)).rstrip("\n")

    def show(self, file: Any = None) -> None:
        """Print in colour on a terminal, in marks elsewhere or where NO_COLOR is set."""
        console = _console(file=file or sys.stdout)
        if not console.is_terminal or console.color_system is None or console.no_color:
            encoding = getattr(console.file, "encoding", None) or "utf-8"
            print(str(self).encode(encoding, "backslashreplace").decode(encoding), file=console.file)
            return
        self._print(console)

    def html(self) -> str:
        """A page by itself."""
        return self._exported(_PAGE)

    def _repr_html_(self) -> str:
        return self._exported(_PRE)

    def _exported(self, page: str) -> str:
        console = _console(file=io.StringIO(), record=True)
        mark = secrets.token_hex(16)  # which no sample holds
        self._print(console, mark)
        found = console.export_html(inline_styles=True, code_format=page)
        for number, sample in enumerate(self.samples):
            found = found.replace(f"{mark}-{number}-", "".join(map(thumbnail, sample.pictures)))
        return found

    def _print(self, console: Console, mark: str = "") -> None:
        legend = [("trained on", _TRAINED), " \u00b7 not trained on \u00b7 ", ("special token", "bold")]
        for line in self._lines(legend, _coloured, mark):
            console.print(line)

    def _lines(
        self, legend: Sequence[Any], drawn: Callable[[Sequence[Span]], Iterator[Any]], mark: str = ""
    ) -> Iterator[Text]:
        """Everything in order; `drawn` makes strings and (string, style) of spans. A `mark`, if any, stands with the
        sample's number where pictures belong."""
        from rich.text import Text

        yield Text.assemble(*legend)
        for number, sample in enumerate(self.samples):
            yield Text.assemble("\n", (f"--- {sample.title}", "bold"))
            if mark and sample.pictures:
                yield Text(f"{mark}-{number}-")
            for sequence in sample.sequences:
                if sequence.name:
                    yield Text(f"- {sequence.name}", "underline")
                text = Text.assemble(*drawn(_shortened(_counted(sequence.spans))))
                text.rstrip()
                yield text
        yield Text("\n".join(["", *(f"note: {note}" for note in self.notes)]))


def make_preview(
    samples: Sequence[tuple[str, TokenSamples]],
    tokenizer: Any,
    *,
    count: int = 3,
    rows: Sequence[int | str] = (),
    notes: Sequence[str] = (),
) -> Preview:
    """The first `count` samples of the first part, or those that come from `rows`, of (name, samples) parts.

    A row is its number in its file, or the end of its origin: `chats.jsonl:5`.

    Raises:
        DataError: no sample comes from a row.
    """
    spelling = TokenText(tokenizer)
    if not rows:
        name, part = samples[0]
        picked = [(name, part, index) for index in range(min(count, len(part)))]
    else:
        picked = _from_rows(samples, [str(row) for row in rows])
    made = [_titled(name, part, index, _sequences(part, index, spelling)) for name, part, index in picked]
    return Preview(samples=made, notes=notes)


def _from_rows(parts: Sequence[tuple[str, TokenSamples]], wanted: Sequence[str]) -> list[tuple[str, TokenSamples, int]]:
    found: dict[str, list[tuple[str, TokenSamples, int]]] = {row: [] for row in wanted}
    ends = {row: re.compile(rf"(^|[\D]){re.escape(row)}$" if row.isdigit() else rf"{re.escape(row)}$") for row in found}
    for name, part in parts:
        for index in range(len(part)):
            origin = part.origin(index)
            for row, end in ends.items():
                if end.search(origin):
                    found[row].append((name, part, index))
    if absent := [row for row, samples in found.items() if not samples]:
        some = next((part.origin(0) for _, part in parts if len(part)), "none")
        raise DataError(
            f"rows: no sample comes from {listed(absent)}; it may be beyond the data's end, left out, or cut off. Rows "
            f"are named like {some}; `llmtune data check` lists those that cannot be used"
        )
    return [each for samples in found.values() for each in samples]


def make_pack_preview(samples: TokenSamples, units: Units, tokenizer: Any, *, count: int = 3) -> Preview:
    """The first `count` packed rows, sample by sample."""
    spelling, made = TokenText(tokenizer), []
    for number in range(min(count, len(units))):
        pieces, place = units.pieces(number), 0
        used = int(units.tokens[number])
        told = f"{units.kind} {number + 1:,} of {len(units):,}, {used:,} of {units.room:,} tokens"
        for at, piece in enumerate(pieces, start=1):
            sequences = _piece(samples, piece, spelling, first=at == 1) if units.kind == "row" else None
            sequences = sequences or _sequences(samples, piece.sample, spelling)
            size = sum(len(sequence.ids) for sequence in sequences)
            bounds = f"sample {at} of {len(pieces)} at {place:,} to {place + size:,}"
            made.append(_titled(f"{told}, {bounds}", samples, piece.sample, sequences))
            place += size
    notes = ("samples of a pack do not see each other",) if units.kind == "pack" else ()
    return Preview(samples=made, notes=notes)


def _sequences(samples: TokenSamples, index: int, spelling: TokenText) -> list[ShownSequence]:
    """All of a sample."""
    found = []
    for name, part in zip(_NAMES[samples.width], samples.sequences(index), strict=True):
        weights = None if samples.weights is None else samples.weights[part]
        found.append(_sequence(name, spelling, samples.ids[part], samples.mask[part], weights))
    return found


def _piece(samples: TokenSamples, piece: SampleSlice, spelling: TokenText, first: bool) -> list[ShownSequence]:
    """What of a sample is in a row of concatenated ones; nothing stands before the row's first token."""
    from llmtune.data.batch_loader import joined

    document = joined(samples, [piece])
    mask = np.array(document.mask)
    mask[:1] &= not first
    return [_sequence("", spelling, document.ids, mask, document.weights)]


def _sequence(
    name: str, spelling: TokenText, ids: np.ndarray, mask: np.ndarray, weights: np.ndarray | None
) -> ShownSequence:
    ids, mask = np.array(ids), np.array(mask)
    return ShownSequence(name=name, ids=ids, mask=mask, spans=spelling.spans(ids, mask, weights))


def _titled(name: str, samples: TokenSamples, index: int, sequences: Sequence[ShownSequence]) -> ShownSample:
    tokens = sum(len(each.ids) for each in sequences)
    trained = sum(int(each.mask.sum()) for each in sequences)
    facts = [name, samples.origin(index), f"{tokens:,} tokens", f"{trained:,} trained on"]
    if len(samples.set_names) > 1:
        facts.insert(2, samples.set_names[samples.set_of(index)])
    if samples.labels is not None:
        facts.append("wanted" if samples.labels[index] else "not wanted")
    if samples.media_kinds and (names := samples.media_names(index)):
        facts.append(f"shows {listed(names)}")
    pictures = samples.pictures(index) if samples.media_kinds else []
    return ShownSample(title=", ".join(fact for fact in facts if fact), sequences=sequences, pictures=pictures)


def _counted(spans: Sequence[Span]) -> list[Span]:
    """The spans, a special token that stands many times in a row, as those of a picture do, once with their number."""
    found: list[Span] = []
    for _, alike in groupby(spans, lambda span: (span.text, span.special, span.trained, span.weight)):
        same = list(alike)
        if len(same) < _MANY or not same[0].special:
            found += same
        else:
            found.append(replace(same[0], text=f"{same[0].text}\u00d7{len(same):,}", tokens=len(same)))
    return found


def _shortened(spans: Sequence[Span]) -> list[Span]:
    """The spans up to `_MOST` characters, and how much there is beyond."""
    left, found = _MOST, []
    for number, span in enumerate(spans):
        if len(span.text) > left:
            more = sum(each.tokens for each in spans[number:])
            return [*found, replace(span, text=f"{span.text[:left]} ... (up to {more:,} tokens more)", tokens=0)]
        left -= len(span.text)
        found.append(span)
    return found


def _marked(spans: Sequence[Span]) -> Iterator[str]:
    """Text with marks around what trains, whether or not it is special."""
    for (trained, weight), alike in groupby(spans, lambda span: (span.trained, span.weight)):
        text = visible("".join(span.text for span in alike))
        yield f"[[{'' if weight == 1 else f'{weight:g}: '}{text}]]" if trained else text


def _coloured(spans: Sequence[Span]) -> Iterator[tuple[str, str]]:
    """Text in colour where it trains, and bold where it is special."""
    for span in spans:
        if span.weight != 1:
            yield f"({span.weight:g}\u00d7)", "italic"
        yield visible(span.text), " ".join([_TRAINED] * span.trained + ["bold"] * span.special)


def _console(**options: Any) -> Console:
    from rich.console import Console

    # A notebook takes what is returned to it, and would show what is printed here besides.
    return Console(highlight=False, soft_wrap=True, force_jupyter=False, **options)
