"""Conversations become text, text becomes token ids with a mask. One rendering, positions instead of searches.

The ids are those of `tokenizer.apply_chat_template`. Which of them train follows from where the turns stand in the
rendered text: turn i begins where the conversation up to it ends, generation prompt included, and ends where the
conversation up to and with it ends, less what the template writes after the end-of-turn token.

Policy for text that spells special tokens: it becomes those tokens, as `apply_chat_template` has it. Nobody's data is
rewritten; positions still tell the turn's own end apart from such text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmtune.errors import DataError
from llmtune.examples import BadRow, Conversation, Message

_STAND_IN = "\ue000answer\ue000"  # private-use characters, which no text of a data set should hold
_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, kw_only=True)
class Turn:
    """Where the trained part of an assistant turn stands in a rendering, in characters."""

    start: int
    stop: int
    ended: bool
    """Whether it closes with a special token, so that the model learns to stop."""


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """One sample."""

    ids: np.ndarray
    """(tokens,) int32."""
    mask: np.ndarray
    """(tokens,) bool."""
    end_ids: tuple[int, ...]
    """Last trained token of each turn that closes with a special token."""


class Renderer:
    """Renders and tokenises conversations with a tokenizer's chat template."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        template_kwargs: dict[str, Any] | None = None,
        default_system: str | None = None,
        train_on_prompt: bool = False,
        mask_history: bool = False,
    ) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise DataError(
                f"{type(tokenizer).__name__} cannot tell where tokens stand in the text, which the loss mask needs; "
                "use a model with a tokenizer.json"
            )
        self.tokenizer = tokenizer
        self.template_kwargs = template_kwargs or {}
        self.default_system = default_system
        self.train_on_prompt, self.mask_history = train_on_prompt, mask_history
        # Some tokenizers list line breaks as added tokens (Gemma); those end no turn.
        added = {str(token) for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
        self._special = tuple(sorted((token for token in added if token.strip()), key=len, reverse=True))
        self._any_special = re.compile("|".join(map(re.escape, self._special)) or r"(?!)")

    def encode(self, conversations: Sequence[Conversation]) -> list[list[Encoded] | BadRow]:
        """Samples of each conversation, mostly one; BadRow where the template cannot render it faithfully."""
        results: list[list[Encoded] | BadRow] = []
        waiting: list[tuple[int, str, list[Turn]]] = []  # to be tokenised in one call, which uses all cores
        for row, conversation in enumerate(conversations):
            try:
                conversation = self._with_system(conversation)
                if self._marked(conversation) and not self.train_on_prompt:
                    results.append([self._encode_marked(conversation)])
                else:
                    results.append([])
                    waiting += [(row, text, turns) for text, turns in self.renderings(conversation)]
            except BadRow as bad:
                results[row:] = [bad]
        if waiting:
            for (row, _, turns), encoded in zip(waiting, self._tokenise(waiting), strict=True):
                kept = results[row]
                assert isinstance(kept, list)
                kept.append(_masked(*encoded, turns, self.train_on_prompt))
        return results

    def render(self, messages: list[Message], tools: list[dict[str, Any]] | None, prompt: bool = False) -> str:
        """The template's text; with `prompt` it ends where the assistant begins to speak."""
        if not messages:
            return ""
        return self._apply(messages, tools, tokenize=False, add_generation_prompt=prompt)

    def renderings(self, conversation: Conversation) -> list[tuple[str, list[Turn]]]:
        """The conversation's text and trained turns: one rendering, or several where the template needs it.

        Templates that write earlier turns otherwise than the latest (thinking removed, say) show a turn as the model
        has to produce it only while it is the latest. Such a turn trains in a rendering that ends there, together
        with all others that stand in it unchanged.
        """
        messages, tools = conversation.messages, conversation.tools
        full = self.render(messages, tools)
        self._check_texts(conversation, full)
        pending = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
        pending = pending[-1:] if self.mask_history else pending
        if self.train_on_prompt:
            body = _without_tail(full, self._special)
            ended = bool(self._any_special.search(full, len(body)))
            return [(full, [Turn(start=0, stop=len(full), ended=ended)])]
        seen = {len(messages): full}
        found, length = [], len(messages)
        while pending:
            text = seen[length]
            turns = {at: turn for at in pending if (turn := self._turn(messages, tools, at, text, seen))}
            found.append((text, list(turns.values())))
            pending = [at for at in pending if at not in turns]
            length = pending[-1] + 1 if pending else 0
        return found

    def _turn(self, messages: list[Message], tools: Any, at: int, text: str, seen: dict[int, str]) -> Turn | None:
        """Turn `at` in `text`, or None where `text` shows it otherwise than as the latest turn."""
        if at + 1 not in seen:
            seen[at + 1] = self.render(messages[: at + 1], tools)
        whole = seen[at + 1]
        same = _common(whole, text)
        written = self._written(messages, tools, at, whole)
        if same < len(whole) and (written is None or not self._any_special.search(whole[:same], written[1])):
            return None
        head = self.render(messages[:at], tools, prompt=True)
        has_prompt = at > 0 and "add_generation_prompt" in self._template(tools)
        if has_prompt and whole.startswith(head):
            start = len(head)
        elif probed := self._probe(messages, tools, at, whole):
            start, _ = probed  # the template gives no prompt, or another one than it writes before the answer
        else:
            raise BadRow("turns cannot be told apart", f"the template writes message {at + 1} in no recognisable place")
        tail = max(start, written[1] if written else start)
        ends = [match.end() for match in self._any_special.finditer(whole[:same], tail)]
        stop = ends[-1] if ends else written[1] if written else same
        return Turn(start=start, stop=stop, ended=bool(ends))

    def _written(self, messages: list[Message], tools: Any, at: int, whole: str) -> tuple[int, int] | None:
        """Where the text of message `at`, the last one in `whole`, stands in it; None if that cannot be told."""
        text = _answer(messages[at]).strip()
        if calls := messages[at].get("tool_calls"):
            name = calls[-1]["function"]["name"]
            after = whole.rfind(name)
            begin = whole.rfind(text, 0, after) if text else -1
            return (begin, after + len(name)) if begin >= 0 else None
        if self._any_special.search(text):
            return self._probe(messages, tools, at, whole)
        body = _without_tail(whole, self._special)
        begin = len(body) - len(text) if body.endswith(text) else whole.rfind(text)
        return (begin, begin + len(text)) if text and begin >= 0 else None

    def _probe(self, messages: list[Message], tools: Any, at: int, whole: str) -> tuple[int, int] | None:
        """The same, found at the cost of a rendering with a stand-in for the text that occurs nowhere else."""
        content = messages[at]["content"]
        thinking = content.removesuffix(_answer(messages[at]))
        for kept in dict.fromkeys(("", thinking)):  # thinking is kept where the template writes it elsewhere
            probe = self.render([*messages[:at], {**messages[at], "content": kept + _STAND_IN}], tools)
            before, found, after = probe.partition(_STAND_IN)
            if found and whole.startswith(before) and whole.endswith(after):
                return len(before), max(len(before), len(whole) - len(after))
        return None

    def _check_texts(self, conversation: Conversation, full: str) -> None:
        """BadRow if something of the conversation is missing in the rendering: a typo in the template, say."""
        hint = "; the template leaves it out. Mend it, or choose another `template`"
        for number, message in enumerate(conversation.messages, start=1):
            if not _shows(full, _answer(message)):
                what = f"the text of message {number} ({message['role']})"
                raise BadRow("text not rendered", f"{what} is not in the rendering{hint}")
            for call in message.get("tool_calls", ()):
                if call["function"]["name"] not in full:
                    what = f"the tool call in message {number}"
                    raise BadRow("text not rendered", f"{what} is not in the rendering{hint}")
        for tool in conversation.tools or ():
            if tool["function"]["name"] not in full:
                raise BadRow("text not rendered", f"the tool {tool['function']['name']} is not in the rendering{hint}")

    def _with_system(self, conversation: Conversation) -> Conversation:
        if not self.default_system or conversation.messages[0]["role"] == "system":
            return conversation
        system = {"role": "system", "content": self.default_system}
        return Conversation(messages=[system, *conversation.messages], tools=conversation.tools)

    def _template(self, tools: Any) -> str:
        return self.tokenizer.get_chat_template(None, tools)

    def _marked(self, conversation: Conversation) -> bool:
        return bool(_MARKED.search(self._template(conversation.tools)))

    def _encode_marked(self, conversation: Conversation) -> Encoded:
        """The template itself says which text the assistant generates."""
        messages, tools = conversation.messages, conversation.tools
        full = self.render(messages, tools)
        self._check_texts(conversation, full)
        encoded = self._apply(
            messages,
            tools,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True},
        )
        ids, mask = np.array(encoded["input_ids"], np.int32), np.array(encoded["assistant_masks"], bool)
        if self.mask_history:
            last = max(at for at, message in enumerate(messages) if message["role"] == "assistant")
            begin = _common(self.render(messages[:last], tools), full)
            mask &= np.array([stop > begin for _, stop in encoded["offset_mapping"]])
        (stops,) = np.nonzero(mask & ~np.append(mask[1:], False))
        special = {*self.tokenizer.convert_tokens_to_ids(list(self._special))}
        ends = tuple(int(ids[stop]) for stop in stops if int(ids[stop]) in special)
        return Encoded(ids=ids, mask=mask, end_ids=ends)

    def _apply(self, messages: list[Message], tools: Any, **options: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(messages, tools=tools, **options, **self.template_kwargs)
        except Exception as error:  # a template raises whatever it likes, from its own words to TypeError
            raise BadRow("template refuses", f"the chat template raised {type(error).__name__}: {error}") from error

    def _tokenise(self, waiting: Sequence[tuple[int, str, list[Turn]]]) -> list[tuple[np.ndarray, np.ndarray]]:
        # The template writes BOS itself where there is one, so none is added here.
        encoded = self.tokenizer(
            [text for _, text, _ in waiting],
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return [
            (np.array(ids, np.int32), np.array(offsets, np.int64).reshape(-1, 2))
            for ids, offsets in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        ]


def _masked(ids: np.ndarray, offsets: np.ndarray, turns: list[Turn], everything: bool) -> Encoded:
    """Mark every token that shares a character with a turn."""
    mask, ends = np.zeros(len(ids), bool), []
    for turn in turns:
        first = np.searchsorted(offsets[:, 1], turn.start, "right")
        stop = np.searchsorted(offsets[:, 0], turn.stop, "left")
        mask[first:stop] = True
        if turn.ended and stop > first and not everything:
            ends.append(int(ids[stop - 1]))
    return Encoded(ids=ids, mask=mask, end_ids=tuple(ends))


def _answer(message: Message) -> str:
    """A message's text without inline thinking, which templates move or drop."""
    content = message["content"]
    return content.rpartition("</think>")[2] if message["role"] == "assistant" else content


def _shows(full: str, text: str) -> bool:
    text = text.strip()
    if text in full or json.dumps(text, ensure_ascii=False)[1:-1] in full:
        return True
    return " ".join(text.split()) in " ".join(full.split())


def _without_tail(text: str, special: tuple[str, ...]) -> str:
    """`text` without the special tokens and white space it ends with."""
    text = text.rstrip()
    while text.endswith(special):
        token = next(token for token in special if text.endswith(token))
        text = text[: -len(token)].rstrip()
    return text


def _common(one: str, other: str) -> int:
    """Length of the longest common beginning."""
    if other.startswith(one):
        return len(one)
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[:middle] == other[:middle] else (low, middle - 1)
    return low
