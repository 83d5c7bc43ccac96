"""Conversations become text, text becomes token ids with a mask. One rendering, positions instead of searches.

The ids are those of `tokenizer.apply_chat_template`. Which of them train follows from where the turns stand in the
rendered text; see `turns`.

Policy for text that spells special tokens: it becomes those tokens, as `apply_chat_template` has it. Nobody's data is
rewritten; positions still tell the turn's own end apart from such text. With `split_special_tokens` it stays text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np

from llmtune.contract.errors import DataError
from llmtune.contract.examples import BadRow, Conversation, Message, ShownText, Text
from llmtune.data.literal import Literal
from llmtune.data.segments import Segments
from llmtune.data.sequence import TokenSequence
from llmtune.data.shapes import Shapes
from llmtune.data.tool_format import with_tools_as_text
from llmtune.data.turns import Script, Special, Turn, check_texts, common, without_thinking
from llmtune.media.marks import as_parts, kinds_in, with_marks_as
from llmtune.media.processor import MediaProcessor
from llmtune.model.content import reads_only_parts

_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Rendering(NamedTuple):
    """A template's text of a conversation."""

    text: str
    marks: tuple[tuple[int, int], ...] | None = None
    """(start, stop) characters of what a template with generation marks says the assistant generates."""


_NOTHING = Rendering("")


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
        media: MediaProcessor | None = None,
    ) -> None:
        """`tool_format` is the text of one (`tool_format.with_tools_as_text`); `media` encodes rows that show any."""
        if not getattr(tokenizer, "is_fast", False):
            raise DataError(
                f"{type(tokenizer).__name__} cannot tell where tokens stand in the text, which the loss mask needs; "
                "use a model with a tokenizer.json"
            )
        self.tokenizer = tokenizer
        self.template_kwargs = dict(template_kwargs or {})
        self.default_system = default_system
        self.train_on_prompt, self.mask_history = train_on_prompt, mask_history
        self.tool_format, self.split_special_tokens, self.media = tool_format, split_special_tokens, media
        self.special = Special(tokenizer)
        self._literal = Literal(tokenizer) if split_special_tokens else None
        self._segments, self._shapes = Segments(tokenizer, self.special, self._literal), Shapes(self.special)

    def encode(self, conversations: Sequence[Conversation]) -> list[list[TokenSequence] | BadRow]:
        """Samples of each conversation, mostly one; BadRow where the template cannot render it faithfully."""
        asked = [self._asked(conversation) for conversation in conversations]
        results: list[list[TokenSequence] | BadRow] = [[] for _ in asked]
        waiting: list[tuple[int, str, list[Turn]]] = []  # to be tokenised in one call
        masked = partial(_masked, special=self.special.ids if not self.train_on_prompt else ())
        for row, (conversation, full) in enumerate(zip(asked, self._renderings(asked), strict=True)):
            try:
                if isinstance(conversation, BadRow):
                    raise conversation
                if isinstance(full, BadRow):
                    raise full
                check_texts(conversation, full.text)
                found = self._trained(conversation, full)
                if conversation.media:
                    results[row] = [self._encode_shown(conversation, *each, masked) for each in found]
                else:
                    self.check_unshown([message["content"] for message in conversation.messages])
                    waiting += [(row, text, turns) for text, turns, _ in found]
            except BadRow as bad:
                results[row] = bad
        spans = [[(turn.start, turn.stop) for turn in turns] for _, _, turns in waiting]
        encoded = self._segments.encode([text for _, text, _ in waiting], spans)
        for (row, _, turns), (ids, tokens) in zip(waiting, encoded, strict=True):
            kept = results[row]
            assert isinstance(kept, list)
            kept.append(masked(ids, tokens, turns))
        return results

    def _encode_shown(
        self,
        conversation: Conversation,
        text: str,
        turns: list[Turn],
        length: int,
        masked: Callable[..., TokenSequence],
    ) -> TokenSequence:
        """The first `length` messages of a conversation that shows media, of which `text` is the rendering."""
        shown = self._shown(conversation, text, length)
        assert self.media is not None
        ids, tokens = self.media.encode(shown, [(turn.start, turn.stop) for turn in turns])
        sequence = masked(ids, tokens, turns)
        sequence.mask[np.isin(ids, self.media.placeholders)] = False  # which stand for media and are never said
        return sequence._replace(shown=shown)

    def _shown(self, conversation: Conversation, text: str, length: int) -> ShownText:
        """A rendering of the first `length` messages, with the media that these show. BadRow where it holds stand-ins,
        which no processor reads."""
        if self._literal is not None and self._literal.restored(text) != text:
            what = "the row shows media, and its text spells special tokens"
            raise BadRow("media in literal text", f"{what}, allowed without split_special_tokens; mend the text")
        count = sum(len(kinds_in(message["content"])) for message in conversation.messages[:length])
        return ShownText(text, tuple(conversation.media[:count]))

    def prompt(self, conversation: Conversation) -> TokenSequence:
        """A conversation up to where the assistant begins to speak, nothing of which trains. BadRow where it cannot be
        rendered."""
        conversation = self._written(self._with_system(self._thought(conversation)))
        text = self.render(conversation, conversation.messages, prompt=True)
        check_texts(conversation, text)
        if conversation.media and self.media is not None:
            shown = self._shown(conversation, text, len(conversation.messages))
            ids, _ = self.media.encode(shown, [])
            return TokenSequence(ids, np.zeros(len(ids), bool), shown=shown)
        self.check_unshown([message["content"] for message in conversation.messages])
        ((ids, _),) = self._segments.encode([text], [[]])
        return TokenSequence(ids, np.zeros(len(ids), bool))

    def answer(self, conversation: Conversation) -> str:
        """What the template writes of the last message, the assistant's, after the prompt that asks for it. BadRow
        where it cannot be rendered."""
        conversation = self._written(self._with_system(self._thought(conversation)))
        *asked, answer = conversation.messages
        full = self.render(conversation, conversation.messages)
        prompt = self.render(conversation, asked, prompt=True)
        return full[len(prompt) :] if full.startswith(prompt) else str(answer["content"])

    def text(self, text: str) -> np.ndarray:
        """(tokens,) of a plain text: what the tokenizer puts before it, once, and the end-of-sequence token after."""
        ids = self.tokenizer(text, verbose=False, split_special_tokens=self.split_special_tokens)["input_ids"]
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if bos is not None and ids[:2] == [bos, bos]:
            ids = ids[1:]
        if eos is not None and ids[-1:] != [eos]:
            ids = [*ids, eos]
        return np.array(ids, np.int32)

    def check_unshown(self, texts: Sequence[str]) -> None:
        """BadRow where a text of a row that shows nothing spells a token that stands for media, which the model would
        look for."""
        spelt = {found[0] for text in texts for found in self.special.pattern.finditer(text)}
        if self.media is None or self.split_special_tokens or not spelt:
            return
        with suppress(DataError):  # without a processor no row of the run shows any
            places = self.tokenizer.convert_ids_to_tokens(self.media.placeholders)
            if wrong := sorted(spelt.intersection(places)):
                what = f"a text says {wrong[0]}, which stands for media, and the row shows none"
                raise BadRow("place without media", f"{what}; take it out, or set split_special_tokens: true")

    def shown_text(self, example: Text) -> TokenSequence:
        """A plain text that shows media, with what stands before and after any text. Nothing that stands for media
        trains. BadRow where media cannot be read."""
        assert self.media is not None
        if self.split_special_tokens:
            raise BadRow(
                "media in literal text", "the row shows media, which split_special_tokens keeps from being read"
            )
        text, marks = with_marks_as(example.text, self.media.written, self.media.begin)
        text += self.tokenizer.eos_token or ""
        bounds = [0, *(at for mark in marks for at in mark), len(text)]
        between = [run for run in zip(bounds[::2], bounds[1::2], strict=True) if run[0] < run[1]]
        shown = ShownText(text, tuple(example.media))
        ids, places = self.media.encode(shown, between)
        mask = np.zeros(len(ids), bool)
        for first, stop in places:
            mask[first:stop] = True
        return TokenSequence(ids, mask, shown=shown)

    def render(self, conversation: Conversation, messages: list[Message], prompt: bool = False) -> str:
        """The template's text of `messages`; with `prompt` it ends where the assistant begins to speak."""
        return self._apply(conversation, messages, tokenize=False, add_generation_prompt=prompt)

    def _renderings(self, conversations: Sequence[Conversation | BadRow]) -> list[Rendering | BadRow]:
        """The template's text of each. One call renders all that differ in nothing but their messages."""
        results: list[Rendering | BadRow] = [each if isinstance(each, BadRow) else _NOTHING for each in conversations]
        alike: dict[str, list[int]] = {}
        for at, each in enumerate(conversations):
            if not isinstance(each, BadRow):
                alike.setdefault(f"{each.tools!r}{each.template_kwargs!r}", []).append(at)
        for places in alike.values():
            group = [each for each in (conversations[at] for at in places) if not isinstance(each, BadRow)]
            render = self._render_marked if self._marked(group[0]) and not self.train_on_prompt else self._render_all
            found: Sequence[Rendering | BadRow]
            try:
                found = render(group)
            except BadRow as bad:  # of one of them; who it is shows when each is rendered by itself
                found = [_tried(render, each) for each in group] if len(group) > 1 else [bad]
            for at, one in zip(places, found, strict=True):
                results[at] = one
        return results

    def _render_all(self, group: Sequence[Conversation]) -> list[Rendering]:
        texts = self._apply(group[0], [each.messages for each in group], tokenize=False)
        return [Rendering(text) for text in texts]

    def _render_marked(self, group: Sequence[Conversation]) -> list[Rendering]:
        """The template itself says which text the assistant generates."""
        from transformers.utils.chat_template_utils import render_jinja_template

        first = group[0]
        render: Any = render_jinja_template  # which is annotated to return one text
        try:
            texts, marks = render(
                # apply_chat_template, which gives no positions, drops what is None, too
                conversations=[
                    [{k: v for k, v in m.items() if v is not None} for m in self._for_template(each.messages)]
                    for each in group
                ],
                tools=first.tools,
                chat_template=self._template(first.tools),
                return_assistant_tokens_mask=True,
                **{**self.tokenizer.special_tokens_map, **self._variables(first)},
            )
        except Exception as error:  # a template raises whatever it likes, from its own words to TypeError
            raise _refused(error) from error
        return [Rendering(text, tuple(own)) for text, own in zip(texts, marks, strict=True)]

    def _trained(self, conversation: Conversation, rendering: Rendering) -> list[tuple[str, list[Turn], int]]:
        """The texts of a conversation with their trained turns and the number of messages in them: one, or several
        where the template needs it."""
        full, length = rendering.text, len(conversation.messages)
        if self.train_on_prompt:
            return [(full, [Turn(start=0, stop=len(full), ended=False)], length)]
        if rendering.marks is not None:
            return [(full, self._marked_turns(conversation, full, rendering.marks), length)]
        pending = _learnt(conversation.messages, self.mask_history)
        if quick := self._shapes.turns(conversation, full, pending):
            return [(full, quick, length)]
        script = Script(conversation, partial(self.render, conversation), self.special, full)
        found = script.renderings(pending, "add_generation_prompt" in self._template(conversation.tools))
        self._shapes.learn(conversation, script, pending, found)
        return found

    def _marked_turns(self, conversation: Conversation, full: str, marks: Sequence[tuple[int, int]]) -> list[Turn]:
        """What the template marks, less the answers that do not count. An end of turn that it writes right after a mark
        trains, too, or the model would never learn to stop."""
        messages, eos = conversation.messages, self.tokenizer.eos_token
        if eos:
            marks = [(start, stop + len(eos) * full.startswith(eos, stop)) for start, stop in marks]
        begin = 0
        if self.mask_history and (last := _learnt(messages, True)[0]):
            begin = common(self.render(conversation, messages[:last]), full)
        answers = [each.get("weight", 1.0) for each in messages if each["role"] == "assistant"]
        weights = [1.0] * len(marks)
        if not self.mask_history and any(weight != 1 for weight in answers):
            if len(marks) != len(answers):
                what = f"the template marks {len(marks)} answers, there are {len(answers)}"
                raise BadRow("weights cannot be told apart", what)
            weights = answers
        return [
            Turn(start=start, stop=stop, ended=full[:stop].rstrip().endswith(self.special.strings), weight=weight)
            for (start, stop), weight in zip(marks, weights, strict=True)
            if weight and start < stop and stop > begin
        ]

    def _asked(self, conversation: Conversation) -> Conversation | BadRow:
        """What is rendered for a conversation."""
        try:
            return self._written(self._with_system(self._thought(conversation)))
        except BadRow as bad:
            return bad

    def _written(self, conversation: Conversation) -> Conversation:
        if self._literal is not None:
            conversation = self._literal.guarded(conversation)
        return conversation if self.tool_format is None else with_tools_as_text(conversation, self.tool_format)

    def _thought(self, conversation: Conversation) -> Conversation:
        """The conversation, without its thinking where that is switched off."""
        if self._variables(conversation).get("enable_thinking") is not False:
            return conversation
        return replace(conversation, messages=without_thinking(conversation.messages))

    def _with_system(self, conversation: Conversation) -> Conversation:
        if not self.default_system or conversation.messages[0]["role"] == "system":
            return conversation
        system = {"role": "system", "content": self.default_system}
        return replace(conversation, messages=[system, *conversation.messages])

    def _template(self, tools: Any) -> str:
        return self.tokenizer.get_chat_template(None, tools)

    def _marked(self, conversation: Conversation) -> bool:
        return bool(_MARKED.search(self._template(conversation.tools)))

    def _variables(self, conversation: Conversation) -> dict[str, Any]:
        return {**self.template_kwargs, **conversation.template_kwargs}

    def _apply(self, conversation: Conversation, messages: Sequence[Any], **options: Any) -> Any:
        variables = self._variables(conversation)
        batch = bool(messages) and not isinstance(messages[0], Mapping)
        messages = [self._for_template(each) for each in messages] if batch else self._for_template(messages)
        try:
            return self.tokenizer.apply_chat_template(messages, tools=conversation.tools, **options, **variables)
        except Exception as error:
            raise _refused(error) from error

    def _for_template(self, messages: Sequence[Message]) -> Sequence[Message]:
        """The messages, those that show media with parts for their content; all of them where the template reads
        nothing else."""
        shows = self.media is not None
        return [
            as_parts(each) if self._only_parts or (shows and kinds_in(each["content"])) else each for each in messages
        ]

    @cached_property
    def _only_parts(self) -> bool:
        return reads_only_parts(self.tokenizer, self.template_kwargs)


def _refused(error: Exception) -> BadRow:
    return BadRow("template refuses", f"the chat template raised {type(error).__name__}: {error}")


def _tried(render: Callable[[Sequence[Conversation]], list[Rendering]], one: Conversation) -> Rendering | BadRow:
    try:
        return render([one])[0]
    except BadRow as bad:
        return bad


def _learnt(messages: Sequence[Message], last_only: bool) -> list[int]:
    """The assistant messages that count."""
    found = [at for at, each in enumerate(messages) if each["role"] == "assistant" and each.get("weight") != 0]
    return found[-1:] if last_only else found


def _masked(
    ids: np.ndarray, tokens: Sequence[tuple[int, int]], turns: Sequence[Turn], *, special: Collection[int]
) -> TokenSequence:
    """The turns' tokens marked, with their weights."""
    mask = np.zeros(len(ids), bool)
    weights = np.ones(len(ids), np.float32) if any(turn.weight != 1 for turn in turns) else None
    ends = []
    for (first, stop), turn in zip(tokens, turns, strict=True):
        mask[first:stop] = True
        if weights is not None:
            weights[first:stop] = turn.weight
        if turn.ended:  # a template that marks its answers may mark the line break after the end, too
            ends += [int(token) for token in ids[max(first, stop - 3) : stop] if int(token) in special][-1:]
    return TokenSequence(ids, mask, weights, end_ids=tuple(ends), cuts=tuple(sorted(stop for _, stop in tokens)))
