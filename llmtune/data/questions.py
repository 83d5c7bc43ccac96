"""Rows become questions for a model to answer: the prompt up to the last answer, and that answer, to compare with."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import islice

import numpy as np

from llmtune.contract.errors import DataError, listed
from llmtune.contract.examples import (
    BadRow,
    Conversation,
    Example,
    Preference,
    Prompt,
    ShownText,
    UnpairedPreference,
)
from llmtune.contract.generation import Asked, ShownPrompt
from llmtune.data.config import Source
from llmtune.data.formats import LOOKED_AT, Chosen, read_row
from llmtune.data.formats.choose import NOUNS
from llmtune.data.making import Making, check_bad_rows, drawn
from llmtune.data.reading import Chunk, Dataset, chunks, first_rows
from llmtune.data.report import Bad, SourceReport
from llmtune.data.template import require_template
from llmtune.data.workers import in_order

KINDS = ("conversation", "preference", "labelled", "prompt")
"""Rows that have a question."""


@dataclass(frozen=True)
class Question:
    """What a model is asked for one row."""

    row: str
    """Where the row stands: `path:line` or `path:row N`."""
    ids: tuple[int, ...]
    """The prompt's tokens."""
    label: str | None
    """The answer that the row has, as the model would say it; None where it has none."""
    shown: ShownText | None = None
    """The prompt's text and what it shows, where it shows anything."""

    @property
    def asked(self) -> Asked:
        """The prompt as engines take it."""
        return list(self.ids) if self.shown is None else ShownPrompt(ids=self.ids, shown=self.shown)


@dataclass(frozen=True, kw_only=True)
class QuestionReader:
    """Reads the questions of data sets."""

    make: Making
    most_tokens: int | None = None
    """Most tokens of a prompt, so that there is room for an answer; None is no limit."""
    skip_special_tokens: bool = True
    """Whether labels are without the template's control tokens, as answers are."""

    def read(self, entries: Sequence[Source], only: Collection[str] | None = None) -> list[Question]:
        """The questions of all rows of the data sets in their order, or of those rows `only`.

        Raises DataError where a data set cannot be read, holds no questions, or has rows that do not fit and that the
        recipe does not skip.
        """
        found: list[Question] = []
        for number, dataset in enumerate(self.make.find(entries)):
            own = self._of(dataset, only)
            if only is None and dataset.num_samples is not None and own:
                passes, rest = drawn(np.arange(len(own)), dataset.num_samples, self.make.seed, number)
                own = own * passes + [own[at] for at in sorted(rest)]
            found += own
        return found

    def _of(self, dataset: Dataset, only: Collection[str] | None) -> list[Question]:
        report, found = SourceReport(name=dataset.spelling), []
        rows = [row for chunk in islice(self._chunks(dataset), 1) for row in islice(chunk.rows(), LOOKED_AT)]
        if not rows:
            raise DataError(f"{dataset.spelling}: 0 records; the file is empty")
        if not (readable := [row.data for row in rows if row.problem is None]):
            report.rows = len(rows)
            for row in rows:
                report.add_bad(Bad(f"{dataset.spelling}:{row.number}", "unreadable", row.problem or "", None))
            check_bad_rows(self.make.config, report)
        chosen = self.make.chosen(dataset, readable, KINDS)
        if chosen.format.kind not in KINDS:
            raise DataError(
                f"{dataset.spelling}: holds {NOUNS[chosen.format.kind]}, which ask nothing; answers are predicted to "
                f"{listed([NOUNS[kind] for kind in KINDS])}. Name the format with data_config if it was read wrongly"
            )
        require_template(self.make.tokenizer)
        work = partial(_asked, self, chosen, only)
        for part in in_order(work, self._chunks(dataset), self.make.config.preprocessing_num_workers):
            report.rows += part.read
            found += part.questions
            for bad in part.bad:
                report.add_bad(bad)
            if only is not None and len(found) >= len(only):
                break
        check_bad_rows(self.make.config, report)
        return found

    def _chunks(self, dataset: Dataset) -> Iterator[Chunk]:
        config = self.make.config
        size, limit = config.preprocessing_batch_size, config.row_limit
        found = chunks(dataset, rows=min(size, limit or size), streaming=config.streaming)
        return first_rows(found, limit)

    def question(self, row: str, example: Example) -> Question:
        """The question of an example. Raises BadRow where it cannot be asked."""
        conversation, answered = _conversation(example)
        renderer, asked = self.make.tokeniser.renderer, conversation.messages
        label = None
        if answered:
            asked = asked[:-1]
            text = renderer.answer(conversation)
            label = (self._control.sub("", text) if self.skip_special_tokens else text).strip()
        if all(message["role"] == "system" for message in asked):
            raise BadRow("no question", "nothing is asked before the answer")
        prompt = renderer.prompt(replace(conversation, messages=asked))
        ids = prompt.ids.tolist()
        if self.most_tokens is not None and len(ids) > self.most_tokens:
            what = f"the prompt has {len(ids):,} tokens, and the model has room for {self.most_tokens:,} and an answer"
            raise BadRow("too long", what)
        return Question(row, tuple(ids), label, prompt.shown)

    @cached_property
    def _control(self) -> re.Pattern[str]:
        """What decoding leaves out of an answer: `<think>` and the like may be added tokens, and stay."""
        tokenizer = self.make.tokenizer
        added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        tokens = sorted(added | set(tokenizer.all_special_tokens), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, tokens)) or r"(?!)")


@dataclass
class _Part:
    """What some rows become."""

    read: int = 0
    questions: list[Question] = field(default_factory=list)
    bad: list[Bad] = field(default_factory=list)


def _asked(reader: QuestionReader, chosen: Chosen, only: Collection[str] | None, chunk: Chunk) -> _Part:
    part = _Part()
    for row in chunk.rows():
        origin = f"{chunk.origin}{row.number}"
        if only is not None and origin not in only:
            continue
        part.read += 1
        try:
            if row.problem is not None:
                raise BadRow("unreadable", row.problem)
            part.questions.append(reader.question(origin, read_row(chosen, row.data)))
        except BadRow as bad:
            part.bad.append(Bad(origin, bad.reason, bad.detail, row.data))
    return part


def _conversation(example: Example) -> tuple[Conversation, bool]:
    """What is asked, up to the last answer, and whether it ends with that one. An answer to be avoided is none."""
    assert isinstance(example, Conversation | Preference | UnpairedPreference | Prompt)
    messages = [*example.prompt, *example.chosen] if isinstance(example, Preference) else list(example.messages)
    answers = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
    answered = not isinstance(example, Prompt) and bool(answers)
    messages = messages[: answers[-1] + 1] if answered else messages
    if isinstance(example, UnpairedPreference) and not example.label:
        messages, answered = messages[:-1], False
    asked = Conversation(
        messages=messages, tools=example.tools, template_kwargs=example.template_kwargs, media=example.media
    )
    return asked, answered
