"""Rows of one data set become sequences of at most `cutoff_len` tokens. Nothing here depends on other rows, so it runs
in any process."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from llmtune.contract.examples import (
    BadRow,
    Conversation,
    Example,
    Message,
    Preference,
    Prompt,
    Text,
    Tokens,
    UnpairedPreference,
)
from llmtune.data.formats import Chosen, read_row
from llmtune.data.piece import KeptColumns, Piece
from llmtune.data.reading import Row
from llmtune.data.render import Renderer
from llmtune.data.report import SHOWN, Bad
from llmtune.data.sequence import TokenSequence
from llmtune.data.template import require_template
from llmtune.media.content import with_contents
from llmtune.media.rows import NAMES

if TYPE_CHECKING:
    from llmtune.data.config import DataConfig
    from llmtune.media.processor import MediaProcessor

CHATS = (Conversation, Preference, UnpairedPreference, Prompt)
"""What a chat template renders."""


class Tokeniser:
    """Encodes rows as a recipe's data keys say."""

    def __init__(
        self, config: DataConfig, tokenizer: Any, tool_format: str | None = None, prompts: bool = False,
        media: MediaProcessor | None = None,
    ) -> None:  # fmt: skip
        """With `prompts` a conversation becomes the prompt of its last answer."""
        self.config, self.tokenizer, self.prompts, self.media = config, tokenizer, prompts, media
        self.renderer = Renderer(
            tokenizer,
            template_kwargs=config.template_variables,
            default_system=config.default_system,
            train_on_prompt=config.train_on_prompt,
            mask_history=config.mask_history,
            tool_format=tool_format,
            split_special_tokens=config.split_special_tokens,
            media=media,
        )
        whole = config.packing and not config.neat_packing
        self.cutoff = None if whole else config.cutoff_len  # concatenated samples are cut into rows later

    def encode(self, chosen: Chosen, rows: Iterable[Row], origin: str) -> Piece:
        """Samples of `rows`, whose numbers follow `origin` in what is said of them."""
        piece, examples, found = Piece(origin=origin), [], []
        for row in rows:
            piece.read += 1
            try:
                if row.problem is not None:
                    raise BadRow("unreadable", row.problem)
                example = read_row(chosen, row.data)
                if self.prompts and isinstance(example, Conversation):
                    example = asked(example, row.data)
                examples.append(example)
                found.append(row)
            except BadRow as bad:
                piece.bad.append(_bad(bad, row, origin))
        if any(isinstance(each, CHATS) for each in examples):
            require_template(self.tokenizer)
        for row, example, result in zip(found, examples, self._sequences(examples), strict=True):
            try:
                if isinstance(result, BadRow):
                    raise result
                self._keep(piece, row, example, result, origin)
            except BadRow as bad:
                piece.bad.append(_bad(bad, row, origin))
        return piece

    def _sequences(self, examples: Sequence[Example]) -> list[list[list[TokenSequence]] | BadRow]:
        """For each example its samples, each a list of sequences."""
        results: list[list[list[TokenSequence]] | BadRow] = [[] for _ in examples]
        chats: list[tuple[int, Conversation]] = []
        for at, example in enumerate(examples):
            try:
                if isinstance(example, Text):
                    results[at] = [[self._text(example)]]
                elif isinstance(example, Tokens):
                    results[at] = [[self._tokens(example)]]
                elif isinstance(example, Prompt):
                    results[at] = [[self._prompt(example)]]
                else:
                    chats += [(at, each) for each in _conversations(example)]
            except BadRow as bad:
                results[at] = bad
        encoded = self.renderer.encode([each for _, each in chats]) if chats else []
        for (at, _), result in zip(chats, encoded, strict=True):
            results[at] = _joined(examples[at], results[at], result)
        return results

    def _text(self, example: Text) -> TokenSequence:
        if example.media:
            return self.renderer.shown_text(example)
        self.renderer.check_unshown([example.text])
        ids = self.renderer.text(example.text)
        return TokenSequence(ids, np.ones(len(ids), bool))

    def _prompt(self, example: Prompt) -> TokenSequence:
        conversation = Conversation(
            messages=example.messages, tools=example.tools, template_kwargs=example.template_kwargs,
            media=example.media,
        )  # fmt: skip
        return self.renderer.prompt(conversation)

    def _tokens(self, example: Tokens) -> TokenSequence:
        ids = np.asarray(example.input_ids, np.int64)
        if len(ids) and (ids.min() < 0 or ids.max() >= len(self.tokenizer)):
            wrong = int(ids.min() if ids.min() < 0 else ids.max())
            raise BadRow("unknown token id", f"input_ids holds {wrong}, allowed are 0 to {len(self.tokenizer) - 1:,}")
        labels = ids if example.labels is None else np.asarray(example.labels)
        return TokenSequence(ids.astype(np.int32), labels != -100)

    def _keep(self, piece: Piece, row: Row, example: Example, samples: list[list[TokenSequence]], origin: str) -> None:
        """Cut the samples of a row to length and take them, unless nothing of them trains."""
        losses, kept = piece.losses, False
        losses.split_rows += len(samples) > 1
        for sample in [part for each in samples for part in self._fitting(piece, each, example)]:
            if not isinstance(example, Prompt) and not all(each.mask[1:].any() for each in sample):
                losses.no_target += 1
                losses.no_target_origins = [*losses.no_target_origins, f"{origin}{row.number}"][:SHOWN]
                continue
            kept = True
            piece.width = len(sample)
            piece.sequences += sample
            piece.labels += [example.label] if isinstance(example, UnpairedPreference) else []
            if self.media is not None or isinstance(example, Preference | Prompt):
                extra = example.extra if isinstance(example, Preference | Prompt) else {}
                piece.columns.append(
                    KeptColumns.of(extra, [each.shown and with_contents(each.shown) for each in sample])
                )
            piece.rows.append(len(piece.numbers))
        if kept:
            piece.numbers.append(row.number)

    def _fitting(self, piece: Piece, sample: list[TokenSequence], example: Example) -> list[list[TokenSequence]]:
        """The sample, or what `cutoff_policy` leaves of it."""
        for each in sample:
            piece.ends.update(each.end_ids)
        longest = max(len(each.ids) for each in sample)
        if self.cutoff is None or longest <= self.cutoff:
            return [sample]
        policy, losses = self.config.cutoff_policy, piece.losses
        if policy == "error":
            what = f"has {longest:,} tokens, allowed are cutoff_len={self.cutoff:,}"
            raise BadRow("too long", f"{what}; shorten it, or raise cutoff_len")
        if isinstance(example, Text) and policy == "truncate" and sample[0].shown is None:
            return [[sample[0].part(at, at + self.cutoff)] for at in range(0, longest, self.cutoff)]
        # Between the marks of a picture no sample can be cut, and what a cut leaves of its text is another text.
        if policy == "drop" or isinstance(example, Preference | Prompt) or sample[0].shown is not None:
            losses.too_long += 1
            losses.tokens_cut += sum(len(each.ids) for each in sample)
            return []
        (whole,) = sample
        # The last whole turn that fits and teaches something; else the beginning of the first answer.
        cut = max((at for at in whole.cuts if at <= self.cutoff and whole.mask[1:at].any()), default=self.cutoff)
        losses.truncated += 1
        losses.tokens_cut += len(whole.ids) - cut
        return [[whole.part(0, cut)]]


def asked(conversation: Conversation, row: Mapping[str, Any]) -> Prompt:
    """What the last answer of a conversation answers, with all columns of its row, and the answer as `answer` where no
    column has this name. Raises BadRow where nothing is asked."""
    at = max((n for n, each in enumerate(conversation.messages) if each["role"] in ("user", "tool")), default=None)
    if at is None:
        raise BadRow("no question", "the conversation has no user or tool message that could be answered")
    said = next((each["content"] for each in conversation.messages[at + 1 :] if each["role"] == "assistant"), None)
    messages = conversation.messages[: at + 1]
    columns = {name: value for name, value in row.items() if name not in NAMES}
    return Prompt(
        messages=messages, tools=conversation.tools, template_kwargs=conversation.template_kwargs,
        extra={**({} if said is None else {"answer": said}), **columns}, media=conversation.media,
    )  # fmt: skip


def _conversations(example: Example) -> list[Conversation]:
    """What of an example is rendered; only the answers that are learnt have a weight."""
    if isinstance(example, Conversation):
        return [example]
    if isinstance(example, Preference):
        return [
            Conversation(
                messages=[*_history(example.prompt), *answer],
                tools=example.tools,
                template_kwargs=example.template_kwargs,
                media=example.media,
            )
            for answer in (example.chosen, example.rejected)
        ]
    assert isinstance(example, UnpairedPreference)
    messages = [*_history(example.messages[:-1]), example.messages[-1]]
    return [
        Conversation(
            messages=messages, tools=example.tools, template_kwargs=example.template_kwargs, media=example.media
        )
    ]


def _history(messages: Sequence[Message]) -> list[Message]:
    return [{**each, "weight": 0} if each["role"] == "assistant" else each for each in messages]


def _joined(example: Example, before: Any, result: list[TokenSequence] | BadRow) -> list[list[TokenSequence]] | BadRow:
    """The samples of an example, one rendering after the other."""
    if isinstance(before, BadRow):
        return before
    if isinstance(result, BadRow):
        return result
    if isinstance(example, Conversation):
        return [[each] for each in result]
    if len(result) != 1:
        return BadRow(
            "answer in several renderings", "the template rewrites earlier turns of the answer; keep the last"
        )
    return [[*(before[0] if before else []), *result]]


def _bad(bad: BadRow, row: Row, origin: str) -> Bad:
    return Bad(f"{origin}{row.number}", bad.reason, bad.detail, row.data, bad.paths)
