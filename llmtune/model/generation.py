"""Text out of a model: one question, or a conversation of several."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from llmtune.contract.errors import DataError
from llmtune.contract.schema import Ge, Gt, Le
from llmtune.model.skeleton import config_value

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """How an answer is drawn from the model."""

    do_sample: bool = True
    """Draw each token at random by its probability; false always takes the likeliest."""
    temperature: Annotated[float, Gt(0)] = 0.95
    """Divides the logits before sampling; below 1 the likely becomes likelier."""
    top_p: Annotated[float, Gt(0), Le(1)] = 0.7
    """Sample from the fewest tokens whose probabilities add up to this."""
    top_k: Annotated[int, Ge(0)] = 50
    """Sample from this many likeliest tokens; 0 is all."""
    num_beams: Annotated[int, Ge(1)] = 1
    """Number of beams searched; above 1 an answer arrives whole instead of streaming."""
    max_length: Annotated[int, Ge(1)] | None = None
    """Most tokens of prompt and answer together; has no effect beside `max_new_tokens`."""
    max_new_tokens: Annotated[int, Ge(1)] | None = None
    """Most tokens of an answer; null is what `max_length` leaves, or 1024. No answer goes beyond the length that the
    model was made for."""
    repetition_penalty: Annotated[float, Gt(0)] = 1.0
    """Above 1 makes tokens that occurred before less likely; 1 changes nothing."""
    length_penalty: float = 1.0
    """With beams: above 0 favours long answers, below 0 short ones."""
    default_system: str | None = None
    """System message of conversations that have none; null leaves it to the template. Not given, it is the one that
    the recipe trained with."""
    skip_special_tokens: bool = True
    """Leave the template's control tokens out of the text."""


class ContextFull(DataError):
    """Prompt and answer do not fit into the length the model was made for."""


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

    def ask(self, text: str) -> str:
        """The whole answer to `text`. Works on sharded models, if every rank asks the same. Raises like `stream`."""
        asked, inputs = self._prepare(text)
        with evaluating(self.model):
            said = _whole_answer(self.model, self.tokenizer, inputs, self.config.skip_special_tokens)
        self._keep(asked, said)
        return said

    def stream(self, text: str) -> Generator[str, None, None]:
        """The answer to `text`, piece by piece. A caller that stops early ends it there: what it saw is kept.

        Raises ContextFull if the conversation leaves no room for an answer; the question is then not kept.
        """
        if self.config.num_beams > 1:  # the best beam is known at the end only
            yield self.ask(text)
            return
        asked, inputs = self._prepare(text)
        said: list[str] = []
        try:
            with evaluating(self.model):
                for piece in _pieces(self.model, self.tokenizer, inputs, self.config.skip_special_tokens):
                    said.append(piece)
                    yield piece
        finally:
            if said:
                self._keep(asked, "".join(said).strip())

    def clear(self) -> None:
        """Forget all turns."""
        self.messages = []

    def _prepare(self, text: str) -> tuple[list[dict[str, str]], dict[str, Any]]:
        """The conversation with `text` at its end, and what `generate` needs for the answer."""
        import torch

        asked = [*self.messages, {"role": "user", "content": text}]
        if self.completes:
            prompt_1T = plain_ids(self.tokenizer, text)
        else:
            prompt_1T = encode(self.tokenizer, self._with_system(asked), self.template_kwargs)
        prompt_1T = prompt_1T.to(next(self.model.parameters()).device)
        pad = self.tokenizer.pad_token_id
        return asked, _settings(self.config) | {
            "input_ids": prompt_1T,
            "attention_mask": torch.ones_like(prompt_1T),
            "max_new_tokens": _room(self.model, prompt_1T.shape[1], self.config),
            "eos_token_id": stop_tokens(self.model, self.tokenizer, self.template_kwargs) or None,
            "pad_token_id": 0 if pad is None else pad,
        }

    def _keep(self, asked: list[dict[str, str]], said: str) -> None:
        if not self.completes:
            self.messages = [*asked, {"role": "assistant", "content": said}]

    def _with_system(self, messages: list[dict[str, str]]) -> list[dict[str, str]]:
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


def has_template(tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any]) -> bool:
    """Whether there is anything to write a conversation with."""
    return bool(tokenizer.chat_template or template_kwargs.get("chat_template"))


def plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Token ids (1, T) of a text that is to go on, with the beginning of text that the tokenizer puts in front."""
    import torch

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


def stop_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any] | None = None
) -> list[int]:
    """Ids that end an answer: the model's and the tokenizer's end of text, and the template's end of turn.

    The end of turn is the special token that the template writes right after an assistant's message.
    """
    stops: set[int] = set()
    for ids in (
        model.generation_config.eos_token_id,
        model.config.get_text_config().eos_token_id,
        tokenizer.eos_token_id,
    ):
        stops.update(ids if isinstance(ids, (list, tuple)) else () if ids is None else (ids,))
    kwargs = dict(template_kwargs or {})
    if has_template(tokenizer, kwargs):
        marker = "llmtuneendofturn"
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": marker}]
        after = str(tokenizer.apply_chat_template(turns, tokenize=False, **kwargs)).rpartition(marker)[2].lstrip()
        special = {str(token): index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        stops.update(special[text] for text in special if after.startswith(text))
    return sorted(stops)


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Dropout off inside; every module's own mode is back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _room(model: PreTrainedModel, prompt_tokens: int, config: GenerateConfig) -> int:
    made_for = config_value(model.config.get_text_config(), "max_position_embeddings")
    wanted = None if config.max_new_tokens else config.max_length
    limits = [limit for limit in (made_for, wanted) if limit]
    most = [config.max_new_tokens or 1024] if wanted is None else []
    room_tokens = min([*most, *(limit - prompt_tokens for limit in limits)])
    if room_tokens < 1:
        raise ContextFull(
            f"the conversation has {prompt_tokens} tokens, the limit for prompt and answer together is {min(limits)}; "
            "start a new conversation (/clear), ask something shorter, or raise max_length if the model allows it"
        )
    return room_tokens


def _settings(config: GenerateConfig) -> dict[str, Any]:
    """Keyword arguments of `generate`; sampling settings only where sampling is on, as transformers warns otherwise."""
    settings: dict[str, Any] = {
        "do_sample": config.do_sample,
        "num_beams": config.num_beams,
        "repetition_penalty": config.repetition_penalty,
        "use_cache": True,
    }
    if config.do_sample:
        settings |= {"temperature": config.temperature, "top_p": config.top_p, "top_k": config.top_k}
    if config.num_beams > 1:
        settings["length_penalty"] = config.length_penalty
    return settings


def _whole_answer(
    model: Any, tokenizer: PreTrainedTokenizerBase, inputs: dict[str, Any], skip_special_tokens: bool
) -> str:
    answer_T = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
    return str(tokenizer.decode(answer_T, skip_special_tokens=skip_special_tokens)).strip()


def _pieces(
    model: Any, tokenizer: PreTrainedTokenizerBase, inputs: dict[str, Any], skip_special_tokens: bool
) -> Iterator[str]:
    """Pieces of the answer. `generate` runs in a thread of its own; leaving the iterator stops it at the next token."""
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

    device = inputs["input_ids"].device
    left, failures = threading.Event(), []
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=skip_special_tokens)

    class Left(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
            return torch.full((len(input_ids),), left.is_set(), device=input_ids.device)

    def work() -> None:
        try:
            if device.type == "cuda":
                torch.cuda.set_device(device)  # each thread starts out on device 0
            model.generate(**inputs, streamer=streamer, stopping_criteria=StoppingCriteriaList([Left()]))
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
