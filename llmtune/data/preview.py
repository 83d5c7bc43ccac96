"""Samples as a model is trained on them, for people: which tokens count, where a turn ends, what shares a row."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from llmtune.contract.errors import DataError, listed
from llmtune.data.token_text import Span, TokenText, visible

if TYPE_CHECKING:
    from rich.text import Text

    from llmtune.data.tokens import TokenSamples
    from llmtune.data.units import SampleSlice, Units

_NAMES = {1: ("",), 2: ("chosen", "rejected")}
_OPEN, _CLOSE = "[[", "]]"
_MOST = 100_000
"""Characters of one sequence that are shown."""
_PAGE = """<!doctype html><meta charset="utf-8"><title>llmtune data preview</title>
<body style="max-width: 60em; margin: 2em auto; font-family: sans-serif">"""


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


@dataclass(frozen=True, kw_only=True)
class Preview:
    """Samples to look at. `print` shows them in marks, `show` in colour, a notebook as HTML."""

    samples: Sequence[ShownSample]
    notes: Sequence[str] = ()

    def __str__(self) -> str:
        lines = [f"{_OPEN}...{_CLOSE} is trained on; {_OPEN}0.5: ...{_CLOSE} counts 0.5; \u21b5 is a line's end"]
        for sample in self.samples:
            lines += ["", f"--- {sample.title}"]
            for sequence in sample.sequences:
                lines += [f"- {sequence.name}"] if sequence.name else []
                lines.append("".join(map(_marked, _alike(_shortened(sequence.spans)))).rstrip("\n"))
        return "\n".join([*lines, "", *(f"note: {note}" for note in self.notes)]).rstrip("\n")

    def show(self, file: Any = None) -> None:
        """Print in colour on a terminal, in marks elsewhere or where NO_COLOR is set."""
        from rich.console import Console

        console = Console(file=file or sys.stdout, highlight=False, soft_wrap=True)
        if not console.is_terminal or console.color_system is None or console.no_color:
            encoding = getattr(console.file, "encoding", None) or "utf-8"
            print(str(self).encode(encoding, "backslashreplace").decode(encoding), file=console.file)
            return
        for line in self._rich():
            console.print(line)

    def _rich(self) -> Iterator[Text]:
        from rich.text import Text

        yield Text.assemble(("trained on", _style(True)), " ", ("not trained on", _style(False)), " ",
                            ("special token", _style(False, True)))  # fmt: skip
        for sample in self.samples:
            yield Text.assemble("\n", (sample.title, "bold"))
            for sequence in sample.sequences:
                if sequence.name:
                    yield Text(sequence.name, "bold underline")
                text = Text()
                for span in _shortened(sequence.spans):
                    if span.trained and span.weight != 1:
                        text.append(f"({span.weight:g}\u00d7)", "bold yellow")
                    text.append(visible(span.text), _style(span.trained, span.special))
                text.rstrip()
                yield text
        for note in self.notes:
            yield Text(f"\nnote: {note}")

    def _repr_html_(self) -> str:
        parts = [f"<p>{_html('trained on', True)} {_html('not trained on', False)}</p>"]
        for sample in self.samples:
            parts.append(f"<p><b>{escape(sample.title)}</b></p>")
            for sequence in sample.sequences:
                parts.append(f"<p><i>{escape(sequence.name)}</i></p>" if sequence.name else "")
                shown = "".join(_html_span(span) for span in _shortened(sequence.spans))
                parts.append(
                    f'<pre style="white-space: pre-wrap; border-left: 3px solid #ccc; padding: .5em">{shown}</pre>'
                )
        return "".join([*parts, *(f"<p>note: {escape(note)}</p>" for note in self.notes)])

    def html(self) -> str:
        """A page by itself."""
        return f"{_PAGE}{self._repr_html_()}</body>\n"


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
    return ShownSample(title=", ".join(fact for fact in facts if fact), sequences=sequences)


def _shortened(spans: Sequence[Span]) -> Iterator[Span]:
    """The spans up to `_MOST` characters, and how much there is beyond."""
    left = _MOST
    for number, span in enumerate(spans):
        if len(span.text) > left:
            more = sum(each.tokens for each in spans[number:])
            yield Span(text=f"{span.text[:left]} ... (up to {more:,} tokens more)", tokens=0, trained=span.trained)
            return
        left -= len(span.text)
        yield span


def _alike(spans: Iterator[Span]) -> Iterator[Span]:
    """Spans that only differ in being special, joined: marks tell what trains."""
    held: Span | None = None
    for span in spans:
        if held is not None and (held.trained, held.weight) == (span.trained, span.weight):
            held = Span(text=held.text + span.text, tokens=0, trained=span.trained, weight=span.weight)
            continue
        if held is not None:
            yield held
        held = span
    if held is not None:
        yield held


def _marked(span: Span) -> str:
    weight = f"{span.weight:g}: " if span.weight != 1 else ""
    return f"{_OPEN}{weight}{visible(span.text)}{_CLOSE}" if span.trained else visible(span.text)


def _style(trained: bool, special: bool = False) -> str:
    if special:
        return "bold black on green" if trained else "cyan"
    return "bold green" if trained else "bright_black"


def _html_span(span: Span) -> str:
    weight = f"<sub>{span.weight:g}\u00d7</sub>" if span.trained and span.weight != 1 else ""
    return weight + _html(visible(span.text), span.trained, span.special)


def _html(text: str, trained: bool, special: bool = False) -> str:
    colours = "background: #c9ecd0; color: #0b3d1a" if trained else "color: #777"
    return f'<span style="{colours}{"; font-weight: bold" if special else ""}">{escape(text)}</span>'
