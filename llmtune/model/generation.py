"""Text out of a model: one question, or a conversation of several."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import TextIteratorStreamer

from llmtune.contract.errors import DataError
from llmtune.contract.generation import Answer, GenerateConfig
from llmtune.model.generate import ContextFull, generate, has_template, stop_tokens

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["ChatSession", "ContextFull", "GenerateConfig", "answer", "encode", "has_template", "plain_ids"]


@dataclass
class ChatSession:
    """Questions and answers with one model; every answer sees all turns before it.

    With `completes` there are no turns: each text is continued as it is, which is all that a model without chat
    template can do.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Handed to `apply_chat_template`, for instance another `chat_template`."""
    config: GenerateConfig = field(default_factory=GenerateConfig)
    messages: list[dict[str, str]] = field(default_factory=list)
    completes: bool = False
    generate: Callable[..., list[Answer]] = generate
    """The `generate` of an `Engine`."""
    seed: int | None = None
    """What each answer is drawn from; None draws one from torch's generator."""
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    """Gives a block in which the model answers."""
    base: Callable[[], AbstractContextManager[Any]] | None = None
    """The `around` in which the base answers, without the adapter; None where there is no adapter to switch off."""
    thinking: bool = False
    """Whether the last prompt has begun a thought, which the answer goes on with."""

    def ask(self, text: str) -> str:
        """The whole answer to `text`. Works on sharded models, if every rank asks the same. Raises like `stream`."""
        asked, prompt = self._prepare(text)
        said = self._answer(prompt).text
        self._keep(asked, said)
        return said

    def stream(self, text: str) -> Generator[str, None, None]:
        """The answer to `text`, piece by piece. A caller that stops early ends it there: what it saw is kept.

        Raises ContextFull if the conversation leaves no room for an answer; the question is then not kept.
        """
        if self.config.num_beams > 1:  # the best beam is known at the end only
            yield self.ask(text)
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

    def _prepare(self, text: str) -> tuple[list[dict[str, str]], list[int]]:
        """The conversation with `text` at its end, and the tokens of the prompt."""
        asked = [*self.messages, {"role": "user", "content": text}]
        if self.completes:
            return asked, plain_ids(self.tokenizer, text)[0].tolist()
        prompt = encode(self.tokenizer, self.with_system(asked), self.template_kwargs)[0].tolist()
        self.thinking = str(self.tokenizer.decode(prompt[-8:])).rstrip().endswith("<think>")
        return asked, prompt

    def _answer(self, prompt: list[int], watch: Callable[[Sequence[int | None]], bool] | None = None) -> Answer:
        stop = stop_tokens(self.model, self.tokenizer, self.template_kwargs)
        seeds = None if self.seed is None else [self.seed]
        with self.around():
            return self.generate(
                self.model, self.tokenizer, [prompt], self.config, seeds=seeds, stop=stop, watch=watch
            )[0]

    def _pieces(self, prompt: list[int]) -> Iterator[str]:
        """Pieces of the answer. It is made in a thread of its own; leaving the iterator stops it at the next token."""
        device = next(self.model.parameters()).device
        left, failures = threading.Event(), []
        streamer: Any = TextIteratorStreamer(self.tokenizer, skip_special_tokens=self.config.skip_special_tokens)

        def watch(tokens: Sequence[int | None]) -> bool:
            streamer.put(torch.tensor([token for token in tokens if token is not None]))
            return left.is_set()

        def work() -> None:
            try:
                if device.type == "cuda":
                    torch.cuda.set_device(device)  # each thread starts out on device 0
                self._answer(prompt, watch)
            except BaseException as error:
                failures.append(error)
            streamer.end()  # or the reader would wait for ever

        thread = threading.Thread(target=work, daemon=True, name="llmtune-generate")
        thread.start()
        try:
            yield from filter(None, streamer)
        finally:
            left.set()
            thread.join()
        if failures:
            raise failures[0]

    def _keep(self, asked: list[dict[str, str]], said: str) -> None:
        if not self.completes:
            self.messages = [*asked, {"role": "assistant", "content": said}]

    def with_system(self, messages: list[dict[str, str]]) -> list[dict[str, str]]:
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
    if not ids:
        raise DataError("the prompt is empty; give the text that is to be continued")
    return torch.tensor([ids])


def encode(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], template_kwargs: Mapping[str, Any]
) -> Tensor:
    """Token ids (1, T) of the conversation up to where the assistant's answer starts."""
    if not has_template(tokenizer, template_kwargs):
        raise DataError("the model's tokenizer has no chat template, so it cannot chat; name one with template")
    encoded: Any = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True, **template_kwargs
    )
    return encoded["input_ids"]
