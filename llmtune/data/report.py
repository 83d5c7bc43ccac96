"""What became of the data, in numbers, for the log and for `llmtune plan`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from llmtune.data.tokens import TokenSamples

SHOWN = 5
"""Bad rows that a message spells out; all of them are counted."""


class Bad(NamedTuple):
    """A row that cannot be used."""

    origin: str
    reason: str
    """A few words to count by."""
    detail: str
    row: Any
    """As it was read; None where its bytes could not be."""
    paths: tuple[str, ...] = ()
    """The files for which it cannot be used, as long as they stay what they are."""

    def __str__(self) -> str:
        """Where, why and what, without saying the place twice."""
        return self.detail if self.detail.startswith(self.origin) else f"{self.origin}: {self.reason}: {self.detail}"

    def json_line(self) -> bytes:
        """A line of a quarantine file."""
        told = {name: value for name, value in self._asdict().items() if name != "paths"}
        text = json.dumps(told, ensure_ascii=False, default=str) + "\n"
        return text.encode("utf-8", "backslashreplace")


def counts_text(counts: Counter[Any]) -> str:
    """`user 30, assistant 28`, the most frequent first."""
    return ", ".join(f"{what} {count:,}" for what, count in counts.most_common())


@dataclass(kw_only=True)
class SourceReport:
    """One data set."""

    name: str
    format: str = ""
    why: str = ""
    """What the format was recognised by, or that it was named."""
    kind: str = ""
    """What its rows are: conversation, preference, labelled, prompt, text or tokens."""
    rows: int = 0
    """Rows read, bad ones included."""
    samples: int = 0
    num_samples: int | None = None
    """Rows that were asked for, where not all of them were."""
    bad: Counter[str] = field(default_factory=Counter)
    """Rows that cannot be used, by reason."""
    examples: list[str] = field(default_factory=list)
    """The first few bad rows, spelt out with their origin."""

    def as_json(self) -> dict[str, Any]:
        """Its fields, as JSON can hold them."""
        return {**vars(self), "bad": dict(self.bad), "examples": [*self.examples]}

    @staticmethod
    def restored(spelt: dict[str, Any]) -> SourceReport:
        """The report that `as_json` gave."""
        return replace(SourceReport(**spelt), bad=Counter(spelt["bad"]))

    def add_bad(self, bad: Bad) -> None:
        """Count a bad row; the first ones are kept to be shown."""
        self.bad[bad.reason] += 1
        if len(self.examples) < SHOWN:
            self.examples.append(str(bad))

    def bad_lines(self) -> list[str]:
        """Counts by reason, then the examples."""
        hidden = self.bad.total() - len(self.examples)
        more = [f"  ... and {hidden:,} more"] if hidden else []
        first = f"{self.bad.total():,} of {self.rows:,} rows ({counts_text(self.bad)}):"
        return [first, *(f"  {line}" for line in self.examples), *more]


@dataclass(frozen=True, kw_only=True)
class PartReport:
    """The samples of training or of evaluation."""

    samples: int
    tokens: int
    supervised_tokens: int
    longest: int

    @staticmethod
    def of(samples: TokenSamples) -> PartReport:
        """Count `samples`."""
        return PartReport(
            samples=len(samples),
            tokens=samples.tokens,
            supervised_tokens=int(samples.trained.sum()),
            longest=samples.longest,
        )

    @property
    def share(self) -> float:
        """The part of the tokens that is trained on."""
        return self.supervised_tokens / max(1, self.tokens)

    def __str__(self) -> str:
        trained = f"{self.supervised_tokens:,} trained on ({self.share:.0%}), " if self.supervised_tokens else ""
        return f"{self.samples:,} samples, {self.tokens:,} tokens, {trained}longest {self.longest:,}"


@dataclass(kw_only=True)
class Losses:
    """What `cutoff_len` and the mask cost."""

    truncated: int = 0
    """Samples cut to cutoff_len."""
    too_long: int = 0
    """Samples left out because they are longer than cutoff_len."""
    tokens_cut: int = 0
    """Tokens of both."""
    no_target: int = 0
    """Samples without a trained token, dropped."""
    no_target_origins: list[str] = field(default_factory=list)
    split_rows: int = 0
    """Conversations that became several samples because the template writes earlier turns differently."""

    @property
    def cut_text(self) -> str:
        """What `cutoff_len` cost; empty where it cost nothing."""
        counts = {"cut": self.truncated, "left out": self.too_long}
        said = [f"{count:,} samples {what}" for what, count in counts.items() if count]
        return ", ".join([*said, f"{self.tokens_cut:,} tokens lost"]) if said else ""

    def __add__(self, other: Losses) -> Losses:
        sums = {key: value + vars(other)[key] for key, value in vars(self).items()}
        return Losses(**{**sums, "no_target_origins": sums["no_target_origins"][:SHOWN]})


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """Everything that was found, left out, cut and kept."""

    sources: Sequence[SourceReport]
    losses: Losses
    cutoff_len: int
    train: PartReport
    evaluation: PartReport | None = None
    end_of_turn: tuple[str, ...] = ()
    """Tokens that close the trained turns, most frequent first; generation has to stop at them."""
    notes: tuple[str, ...] = ()
    bad_rows: tuple[Path, ...] = ()
    """JSON Lines of the rows that were left out: `origin`, `reason`, `detail`, `row`."""

    @property
    def rows(self) -> int:
        """Rows read, bad ones included."""
        return sum(source.rows for source in self.sources)

    @property
    def dropped(self) -> Counter[str]:
        """Rows and samples left out, by reason."""
        total = sum((source.bad for source in self.sources), Counter[str]())
        lost = {"no trained token": self.losses.no_target, "longer than cutoff_len": self.losses.too_long}
        return total + Counter({reason: count for reason, count in lost.items() if count})

    def __str__(self) -> str:
        lines = [
            f"{source.name}: {source.format}, {source.why}, {source.rows:,} rows"
            if source.why.startswith("as named")
            else f"{source.name}: detected: {source.format} ({source.why}), {source.rows:,} rows"
            for source in self.sources
        ]
        for source in self.sources:
            if source.bad:
                first, *rest = source.bad_lines()
                lines += [f"skipped from {source.name}: {first}", *rest]
        lost = self.losses
        if cut := lost.cut_text:
            lines.append(f"cutoff_len {self.cutoff_len:,}: {cut}")
        if lost.no_target:
            first = lost.no_target_origins[0]
            lines.append(f"dropped: {lost.no_target:,} samples without a trained token, first {first}")
        if lost.split_rows:
            lines.append(f"split: {lost.split_rows:,} conversations, as the template rewrites their earlier turns")
        lines.append(f"train: {self.train}")
        if self.evaluation:
            lines.append(f"evaluation: {self.evaluation}")
        if self.end_of_turn:
            lines.append(f"turns end with {', '.join(self.end_of_turn)}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])
