"""Conversations become text, text becomes token ids with a mask. One rendering, positions instead of searches.

The ids are those of `tokenizer.apply_chat_template`. Which of them train follows from where the turns stand in the
rendered text; see `turns`.

Policy for text that spells special tokens: it becomes those tokens, as `apply_chat_template` has it. Nobody's data is
rewritten; positions still tell the turn's own end apart from such text. With `split_special_tokens` it stays text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from llmtune.data.literal import Literal
from llmtune.data.segments import Segments
from llmtune.data.shapes import Shapes
from llmtune.data.tool_format import with_tools_as_text
from llmtune.data.turns import Script, Special, Turn, check_texts, common
from llmtune.errors import DataError
from llmtune.examples import BadRow, Conversation, Message

_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """One sequence."""

    ids: np.ndarray
    """(tokens,) int32."""
    mask: np.ndarray
    """(tokens,) bool."""
    weights: np.ndarray | None = None
    """(tokens,) float32, what a trained token counts; None: all count 1."""
    end_ids: tuple[int, ...] = ()
    """Last trained token of each turn that closes with a special token."""
    cuts: tuple[int, ...] = ()
    """Numbers of tokens after which a turn of the assistant is whole: where a sample may be cut."""


class Renderer:
    """Renders and tokenises conversations with a tokenizer's chat template."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        template_kwargs: Mapping[str, Any] | None = None,
        default_system: str | None = None,
        train_on_prompt: bool = False,
        mask_history: bool = False,
        tool_format: str | None = None,
        split_special_tokens: bool = False,
    ) -> None:
        """`tool_format` is the text of one; see `tool_format.with_tools_as_text`."""
        if not getattr(tokenizer, "is_fast", False):
            raise DataError(
                f"{type(tokenizer).__name__} cannot tell where tokens stand in the text, which the loss mask needs; "
                "use a model with a tokenizer.json"
            )
        self.tokenizer = tokenizer
        self.template_kwargs = dict(template_kwargs or {})
        self.default_system = default_system
        self.train_on_prompt, self.mask_history = train_on_prompt, mask_history
        self.tool_format, self.split_special_tokens = tool_format, split_special_tokens
        self.special = Special(tokenizer)
        self._literal = Literal(tokenizer) if split_special_tokens else None
        self._segments, self._shapes = Segments(tokenizer, self.special, self._literal), Shapes()

    def encode(self, conversations: Sequence[Conversation]) -> list[list[Encoded] | BadRow]:
        """Samples of each conversation, mostly one; BadRow where the template cannot render it faithfully."""
        asked = [self._asked(conversation) for conversation in conversations]
        results: list[list[Encoded] | BadRow] = [[] for _ in asked]
        waiting: list[tuple[int, str, list[Turn]]] = []  # to be tokenised in one call
        for row, (conversation, full) in enumerate(zip(asked, self._renderings(asked), strict=True)):
            try:
                if isinstance(conversation, BadRow):
                    raise conversation
                if isinstance(full, BadRow):
                    raise full
                check_texts(conversation, full)
                if self._marked(conversation) and not self.train_on_prompt:
                    results[row] = [self._encode_marked(conversation, full)]
                else:
                    waiting += [(row, text, turns) for text, turns in self._trained(conversation, full)]
            except BadRow as bad:
                results[row] = bad
        spans = [[(turn.start, turn.stop) for turn in turns] for _, _, turns in waiting]
        encoded = self._segments.encode([text for _, text, _ in waiting], spans)
        for (row, _, turns), (ids, tokens) in zip(waiting, encoded, strict=True):
            kept = results[row]
            assert isinstance(kept, list)
            kept.append(_masked(ids, tokens, turns, self.train_on_prompt))
        return results

    def prompt(self, conversation: Conversation) -> np.ndarray:
        """(tokens,) of a conversation up to where the assistant begins to speak. BadRow where it cannot be rendered."""
        conversation = self._written(self._with_system(conversation))
        text = self.render(conversation, conversation.messages, prompt=True)
        check_texts(conversation, text)
        ((ids, _),) = self._segments.encode([text], [[]])
        return ids

    def text(self, text: str) -> np.ndarray:
        """(tokens,) of a plain text: what the tokenizer puts before it, once, and the end-of-sequence token after."""
        ids = self.tokenizer(text, verbose=False, split_special_tokens=self.split_special_tokens)["input_ids"]
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if bos is not None and ids[:2] == [bos, bos]:
            ids = ids[1:]
        if eos is not None and ids[-1:] != [eos]:
            ids = [*ids, eos]
        return np.array(ids, np.int32)

    def render(self, conversation: Conversation, messages: list[Message], prompt: bool = False) -> str:
        """The template's text of `messages`; with `prompt` it ends where the assistant begins to speak."""
        return self._apply(conversation, messages, tokenize=False, add_generation_prompt=prompt)

    def _renderings(self, conversations: Sequence[Conversation | BadRow]) -> list[str | BadRow]:
        """The template's text of each. One call renders all that differ in nothing but their messages."""
        results: list[str | BadRow] = [each if isinstance(each, BadRow) else "" for each in conversations]
        alike: dict[str, list[int]] = {}
        for at, each in enumerate(conversations):
            if not isinstance(each, BadRow):
                alike.setdefault(f"{each.tools!r}{each.template_kwargs!r}", []).append(at)
        for places in alike.values():
            group = [each for each in (conversations[at] for at in places) if not isinstance(each, BadRow)]
            try:
                texts = self._apply(group[0], [each.messages for each in group], tokenize=False)
            except BadRow:  # of one of them; who it is shows when each is rendered by itself
                texts = [self._rendering(each) for each in group]
            for at, text in zip(places, texts, strict=True):
                results[at] = text
        return results

    def _rendering(self, conversation: Conversation) -> str | BadRow:
        try:
            return self.render(conversation, conversation.messages)
        except BadRow as bad:
            return bad

    def _trained(self, conversation: Conversation, full: str) -> list[tuple[str, list[Turn]]]:
        """The texts of a conversation with their trained turns: one, or several where the template needs it."""
        if self.train_on_prompt:
            body = self.special.without_tail(full)
            ended = bool(self.special.pattern.search(full, len(body)))
            return [(full, [Turn(start=0, stop=len(full), ended=ended)])]
        pending = _learnt(conversation.messages, self.mask_history)
        if quick := self._shapes.turns(conversation, full, pending):
            return [(full, quick)]
        script = Script(conversation, partial(self.render, conversation), self.special, full)
        found = script.renderings(pending, "add_generation_prompt" in self._template(conversation.tools))
        self._shapes.learn(conversation, script, pending, found)
        return found

    def _asked(self, conversation: Conversation) -> Conversation | BadRow:
        """What is rendered for a conversation."""
        try:
            return self._written(self._with_system(conversation))
        except BadRow as bad:
            return bad

    def _written(self, conversation: Conversation) -> Conversation:
        if self._literal is not None:
            guarded = self._literal.guarded(conversation)
            if guarded is not conversation and self._marked(conversation):
                what = (
                    "a text spells special tokens, and split_special_tokens cannot be used with a template that marks"
                )
                raise BadRow("special tokens in text", f"{what} its answers itself")
            conversation = guarded
        return conversation if self.tool_format is None else with_tools_as_text(conversation, self.tool_format)

    def _with_system(self, conversation: Conversation) -> Conversation:
        if not self.default_system or conversation.messages[0]["role"] == "system":
            return conversation
        system = {"role": "system", "content": self.default_system}
        return Conversation(
            messages=[system, *conversation.messages],
            tools=conversation.tools,
            template_kwargs=conversation.template_kwargs,
        )

    def _template(self, tools: Any) -> str:
        return self.tokenizer.get_chat_template(None, tools)

    def _marked(self, conversation: Conversation) -> bool:
        return bool(_MARKED.search(self._template(conversation.tools)))

    def _encode_marked(self, conversation: Conversation, full: str) -> Encoded:
        """The template itself says which text the assistant generates."""
        messages = conversation.messages
        encoded = self._apply(
            conversation,
            messages,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True},
        )
        ids, mask = np.array(encoded["input_ids"], np.int32), np.array(encoded["assistant_masks"], bool)
        if self.mask_history:
            last = _learnt(messages, True)[0]
            begin = common(self.render(conversation, messages[:last]), full) if last else 0
            mask &= np.array([stop > begin for _, stop in encoded["offset_mapping"]])
        weights = _weights_of_runs(messages, mask) if not self.mask_history else None
        if weights is not None:
            mask &= weights > 0
        (stops,) = np.nonzero(mask & ~np.append(mask[1:], False))
        special = {*self.tokenizer.convert_tokens_to_ids(list(self.special.strings))}
        ends = tuple(int(ids[stop]) for stop in stops if int(ids[stop]) in special)
        return Encoded(ids=ids, mask=mask, weights=weights, end_ids=ends, cuts=tuple(int(stop) + 1 for stop in stops))

    def _apply(self, conversation: Conversation, messages: Sequence[Any], **options: Any) -> Any:
        variables = {**self.template_kwargs, **conversation.template_kwargs}
        try:
            return self.tokenizer.apply_chat_template(messages, tools=conversation.tools, **options, **variables)
        except Exception as error:  # a template raises whatever it likes, from its own words to TypeError
            raise BadRow("template refuses", f"the chat template raised {type(error).__name__}: {error}") from error


def _learnt(messages: Sequence[Message], last_only: bool) -> list[int]:
    """The assistant messages that count."""
    found = [at for at, each in enumerate(messages) if each["role"] == "assistant" and each.get("weight") != 0]
    return found[-1:] if last_only else found


def _masked(ids: np.ndarray, tokens: Sequence[tuple[int, int]], turns: Sequence[Turn], everything: bool) -> Encoded:
    """The turns' tokens marked, with their weights."""
    mask = np.zeros(len(ids), bool)
    weights = np.ones(len(ids), np.float32) if any(turn.weight != 1 for turn in turns) else None
    for (first, stop), turn in zip(tokens, turns, strict=True):
        mask[first:stop] = True
        if weights is not None:
            weights[first:stop] = turn.weight
    ended = [tokens[at] for at, turn in enumerate(turns) if turn.ended and not everything]
    ends = tuple(int(ids[stop - 1]) for first, stop in ended if stop > first)
    return Encoded(ids=ids, mask=mask, weights=weights, end_ids=ends, cuts=tuple(sorted(stop for _, stop in tokens)))


def _weights_of_runs(messages: Sequence[Message], mask: np.ndarray) -> np.ndarray | None:
    """(tokens,) the weights of the messages, where the template marks a run of tokens for each answer."""
    answers = [each.get("weight", 1.0) for each in messages if each["role"] == "assistant"]
    if all(weight == 1 for weight in answers):
        return None
    (starts,) = np.nonzero(mask & ~np.concatenate([[False], mask[:-1]]))
    (stops,) = np.nonzero(mask & ~np.append(mask[1:], False))
    if len(starts) != len(answers):
        raise BadRow(
            "weights cannot be told apart", f"the template marks {len(starts)} answers, there are {len(answers)}"
        )
    weights = np.ones(len(mask), np.float32)
    for start, stop, weight in zip(starts, stops, answers, strict=True):
        weights[start : stop + 1] = weight
    return weights
