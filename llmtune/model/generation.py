"""Text out of a model: one question, or a conversation of several."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import torch

from llmtune.contract.errors import DataError
from llmtune.contract.examples import Message
from llmtune.contract.generation import Answer, Asked, GenerateConfig
from llmtune.model.content import for_template
from llmtune.model.generate import ContextFull, generate, has_template, require_prompt, stop_tokens
from llmtune.model.prompts import tokens_of
from llmtune.model.text_decoder import TextDecoder

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["ChatSession", "ContextFull", "GenerateConfig", "answer", "encode", "has_template", "plain_ids"]

Said: TypeAlias = str | list[dict[str, Any]]
"""What is said: text, or parts in OpenAI's shape, some of which show a picture, a video or a sound."""


class OffersTools(Protocol):
    """Tools that a model may call."""

    tools: list[dict[str, Any]]
    """In OpenAI's shape."""
    kept: frozenset[int]
    """Control tokens that answers show all the same, as a call begins with them."""

    def prompt(self, messages: list[Message]) -> Asked:
        """The prompt of a conversation, with the tools. Raises DataError where it has none."""
        ...

    def message(self, said: str, thinking: bool) -> Message:
        """An answer's text as a message, its calls apart; `thinking` says that its prompt has begun a thought."""
        ...


@dataclass
class ChatSession:
    """Questions and answers with one model; every answer sees all turns before it.

    Where `tools` are offered an answer may call them, and what is said next is the result, see `open_calls`.
    With `completes` there are no turns: each text is continued as it is, which is all that a model without chat
    template can do.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Handed to `apply_chat_template`, for instance another `chat_template`."""
    config: GenerateConfig = field(default_factory=GenerateConfig)
    messages: list[Message] = field(default_factory=list)
    completes: bool = False
    generate: Callable[..., list[Answer]] = generate
    """The `generate` of an `Engine`."""
    write: Callable[[list[Message]], Asked] | None = None
    """Makes the prompt of messages that may show pictures, video and sound; None: they are text."""
    seed: int | None = None
    """What each answer is drawn from; None draws one from torch's generator."""
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    """Gives a block in which the model answers."""
    base: Callable[[], AbstractContextManager[Any]] | None = None
    """The `around` in which the base answers, without the adapter; None where there is no adapter to switch off."""
    tools: OffersTools | None = None
    offer: Callable[[Any], OffersTools] | None = None
    """Makes `tools` of a list in OpenAI's shape, or of a file's path; None where there are no turns."""
    thinking: bool = False
    """Whether the last prompt has begun a thought, which the answer goes on with."""

    @property
    def open_calls(self) -> list[dict[str, Any]]:
        """The calls of the last answer, in OpenAI's shape, that have no result yet: what is said next is the result of
        the first one, and the model answers when it has all."""
        at = max((at for at, message in enumerate(self.messages) if message["role"] == "assistant"), default=None)
        return [] if at is None else self.messages[at].get("tool_calls", [])[len(self.messages) - 1 - at :]

    def ask(self, text: Said) -> str:
        """The whole answer to `text`. Works on sharded models, if every rank asks the same. Raises like `stream`."""
        if self._is_one_of_several_results(text):
            return ""
        asked, prompt = self._prepare(text)
        answer, decoder = self._answer(prompt), self._decoder()
        said = answer.text if self.tools is None else "".join([*map(decoder.push, answer.ids), decoder.rest()]).strip()
        self._keep(asked, said)
        return said

    def stream(self, text: Said) -> Generator[str, None, None]:
        """The answer to `text`, piece by piece. A caller that stops early ends it there: what it saw is kept.

        Raises ContextFull if the conversation leaves no room for an answer; the question is then not kept.
        """
        if self.config.num_beams > 1:  # the best beam is known at the end only
            yield self.ask(text)
            return
        if self._is_one_of_several_results(text):
            return
        asked, prompt = self._prepare(text)
        said: list[str] = []
        try:
            for piece in self._pieces(prompt):
                said.append(piece)
                yield piece
        finally:
            if said:
                self._keep(asked, "".join(said).strip())

    def clear(self) -> None:
        """Forget all turns."""
        self.messages = []

    def _said(self, text: Said) -> list[Message]:
        """The conversation with `text` at its end: a question, or the result of a call."""
        if not self.open_calls:
            return [*self.messages, {"role": "user", "content": text}]
        call = self.open_calls[0]
        result = {"role": "tool", "tool_call_id": call["id"], "name": call["function"]["name"], "content": text}
        return [*self.messages, result]

    def _is_one_of_several_results(self, text: Said) -> bool:
        """Whether `text` is a result, now kept, after which others are awaited."""
        if awaited := len(self.open_calls) > 1:
            self.messages = self._said(text)
        return awaited

    def _prepare(self, text: Said) -> tuple[list[Message], Asked]:
        """The conversation with `text` at its end, and its prompt."""
        asked = self._said(text)
        if self.completes:
            if not isinstance(text, str):
                what = "the tokenizer has no chat template, which writes where pictures and sounds stand"
                raise DataError(f"{what}; name one: template=NAME")
            return asked, plain_ids(self.tokenizer, text)[0].tolist()
        whole = self.with_system(asked)
        if self.tools is not None:
            prompt = self.tools.prompt(whole)
        elif self.write is not None:
            prompt = self.write(whole)
        else:
            prompt = encode(self.tokenizer, whole, self.template_kwargs)[0].tolist()
        self.thinking = str(self.tokenizer.decode(list(tokens_of(prompt)[-8:]))).rstrip().endswith("<think>")
        return asked, prompt

    def _answer(self, prompt: Asked, watch: Callable[[Sequence[int | None]], bool] | None = None) -> Answer:
        stop = stop_tokens(self.model, self.tokenizer, self.template_kwargs)
        seeds = None if self.seed is None else [self.seed]
        with self.around():
            return self.generate(
                self.model, self.tokenizer, [prompt], self.config, seeds=seeds, stop=stop, watch=watch
            )[0]

    def _pieces(self, prompt: Asked) -> Iterator[str]:
        """Pieces of the answer. It is made in a thread of its own; leaving the iterator stops it at the next token."""
        device = next(self.model.parameters()).device
        left, failures = threading.Event(), []
        pieces: SimpleQueue[str | None] = SimpleQueue()
        decoder = self._decoder()

        def watch(tokens: Sequence[int | None]) -> bool:
            for token in tokens:
                if token is not None:
                    pieces.put(decoder.push(token))
            return left.is_set()

        def work() -> None:
            try:
                if device.type == "cuda":
                    torch.cuda.set_device(device)  # each thread starts out on device 0
                self._answer(prompt, watch)
                pieces.put(decoder.rest())
            except BaseException as error:
                failures.append(error)
            pieces.put(None)  # or the reader would wait for ever

        thread = threading.Thread(target=work, daemon=True, name="llmtune-generate")
        thread.start()
        try:
            yield from filter(None, iter(pieces.get, None))
        finally:
            left.set()
            thread.join()
        if failures:
            raise failures[0]

    def _decoder(self) -> TextDecoder:
        kept = self.tools.kept if self.tools is not None else frozenset()
        return TextDecoder(self.tokenizer, self.config.skip_special_tokens, kept)

    def _keep(self, asked: list[Message], said: str) -> None:
        if not self.completes:
            message = {"role": "assistant", "content": said}
            self.messages = [*asked, message if self.tools is None else self.tools.message(said, self.thinking)]

    def with_system(self, messages: list[Message]) -> list[Message]:
        """The messages, led by the default system message where they have none."""
        if self.config.default_system is None or messages[0]["role"] == "system":
            return messages
        return [{"role": "system", "content": self.config.default_system}, *messages]


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    question: str,
    config: GenerateConfig | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> str:
    """The model's answer to one question."""
    return ChatSession(model, tokenizer, template_kwargs or {}, config or GenerateConfig()).ask(question)


def plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Token ids (1, T) of a text that is to go on, with the beginning of text that the tokenizer puts in front."""
    ids = list(tokenizer(text)["input_ids"])
    if ids and ids[-1] == tokenizer.eos_token_id:  # some tokenizers end every text
        ids.pop()
    require_prompt(ids)
    return torch.tensor([ids])


def encode(tokenizer: PreTrainedTokenizerBase, messages: list[Message], template_kwargs: Mapping[str, Any]) -> Tensor:
    """Token ids (1, T) of the conversation up to where the assistant's answer starts."""
    if not has_template(tokenizer, template_kwargs):
        raise DataError("the model's tokenizer has no chat template, so it cannot chat; name one with template")
    turns = for_template(tokenizer, messages, template_kwargs)
    encoded: Any = tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_tensors="pt", return_dict=True, **template_kwargs
    )
    return encoded["input_ids"]
