"""The contract of generation: how an answer is drawn, what it is, and what draws it. Tensors in annotations only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

from llmtune.contract.errors import PlanError
from llmtune.contract.examples import ShownText
from llmtune.contract.schema import Ge, Gt, Le

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class GenerationKeys:
    """How answers are drawn from the model, wherever it generates: in predictions and in chat."""

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
    max_new_tokens: Annotated[int, Ge(1)] | None = None
    """Most tokens of an answer; null is 1024. No answer goes beyond the length that the model was made for."""
    repetition_penalty: Annotated[float, Gt(0)] = 1.0
    """Above 1 makes tokens that occurred before less likely; 1 changes nothing."""
    length_penalty: float = 1.0
    """With beams: above 0 favours long answers, below 0 short ones."""
    skip_special_tokens: bool = True
    """Leave the template's control tokens out of the text."""


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(GenerationKeys):
    """How an answer is drawn from the model, with what only a command says: in a recipe, `max_length` would be taken
    for the length of the rows that are trained on."""

    max_length: Annotated[int, Ge(1)] | None = None
    """Most tokens of prompt and answer together; has no effect beside `max_new_tokens`."""
    default_system: str | None = None
    """System message of conversations that have none; null leaves it to the template. Not given, it is the one that
    the recipe trained with."""


@dataclass(frozen=True, kw_only=True)
class ShownPrompt:
    """A prompt that shows pictures, video or sound."""

    ids: tuple[int, ...]
    """Its tokens, as the model's processor makes them: with the places of what it shows."""
    shown: ShownText
    """The text as the template wrote it, and what it shows."""


Asked: TypeAlias = Sequence[int] | ShownPrompt
"""A prompt: its tokens, or where it shows anything, these with what it shows."""


class MediaReader(Protocol):
    """What makes tensors of what prompts show: a model's own processor."""

    @property
    def placeholders(self) -> Sequence[int]:
        """The tokens that stand for what is shown."""
        ...

    def fillers(self, kinds: Sequence[str], rows: Sequence[ShownText]) -> Sequence[tuple[Any, ShownText, Any]]:
        """Tokens and text of a prompt that shows something blank, and None, for each of `kinds` that no row shows."""
        ...

    def prompt_tensors(
        self,
        rows: Sequence[ShownText],
        ids: Sequence[Sequence[int]],
        width: int,
        given: Sequence[int] | None = None,
    ) -> Mapping[str, Tensor]:
        """What a model is given of prompts besides their tokens, where these are padded on the left to `width`; nothing
        where none shows anything. `given` says how many of each row's tokens are the prompt's, where others, already
        answered, follow. Raises DataError where a file has changed since `ids` were made."""
        ...


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model said to one prompt."""

    prompt_ids: tuple[int, ...]
    """The prompt's tokens, without padding."""
    ids: tuple[int, ...]
    """The answer's tokens; where it came to its end, the last one is the token that ended it."""
    cut: bool
    """Whether the limit came first: no token ended the answer."""
    text: str
    """The answer's tokens as text, without white space around it."""
    logps: tuple[float, ...] | None = field(default=None, compare=False)
    """The log-probability of each token where it was drawn, temperature and cuts included; NaN where it is not known of
    one. An engine tells it of all answers of a run that it computes otherwise than the model that trains; None is what
    that model itself says."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """An answer of the model to a prompt of the data, whose worth is asked."""

    prompt: str
    """The prompt as the template wrote it, control tokens and its marks of media included."""
    answer: str
    """The answer without control tokens and without white space around it."""
    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    """The answer's tokens; where it came to its end, the last one is the token that ended it."""
    cut: bool
    """Whether the limit of tokens came first: no token ended the answer."""
    columns: Mapping[str, Any]
    """The columns of the prompt's row, such as the right answer, as `Batch.columns` has them."""
    shown: ShownText | None = None
    """The text of the prompt with what it shows; None where it shows nothing."""

    @property
    def asked(self) -> Asked:
        """The prompt as it was answered."""
        return self.prompt_ids if self.shown is None else ShownPrompt(ids=self.prompt_ids, shown=self.shown)


class Engine(Protocol):
    """What generates, for chat, sample prompts, predictions and roll-outs."""

    def generate(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Asked],
        config: GenerateConfig,
        *,
        seeds: Sequence[int] | None = None,
        stop: Sequence[int] | None = None,
        watch: Callable[[Sequence[int | None]], bool] | None = None,
    ) -> list[Answer]:
        """Answers to prompts, which are lists of token ids, in their order; `ShownPrompt`s where it `TakesMedia`.

        An answer depends on its prompt and its seed alone, whatever prompts stand beside it. `seeds` has one for each
        prompt; None draws them from torch's generator. `stop` are the tokens that end an answer; None is `stop_tokens`
        of model and tokenizer. `watch` is called after each step with the new token of each answer, None where that one
        has ended; True ends them all. It is not called where `num_beams` is above 1.

        Where the model is spread over ranks, all of them call it, within the root module's forward, each with prompts
        of its own or none; ranks that share a batch give the same prompts and seeds.
        Raises ContextFull where a prompt leaves no room for an answer.
        """
        ...


@runtime_checkable
class TakesMedia(Protocol):
    """Optional on an `Engine`: its prompts may show pictures, video and sound. Its `generate`, of a model that reads
    any, is called with one more keyword, `media`: the `MediaReader` that reads them."""

    takes_media: bool


def takes_media(engine: Engine) -> bool:
    """Whether an engine answers prompts that show media."""
    return isinstance(engine, TakesMedia) and engine.takes_media


def asking(engine: Engine, label: str, media: MediaReader | None) -> Callable[..., list[Answer]]:
    """The `generate` of an engine for a model whose prompts `media` reads; None: they are text.

    Raises PlanError where a prompt shows something and the engine, which errors call `label`, takes text only.
    """
    if media is not None and takes_media(engine):
        takes: Any = engine
        return partial(takes.generate, media=media)

    def generate(model: Any, tokenizer: Any, prompts: Sequence[Asked], *args: Any, **options: Any) -> list[Answer]:
        if any(isinstance(prompt, ShownPrompt) for prompt in prompts):
            what = "answers prompts of text only, and one shows pictures, video or sound"
            raise PlanError(f"{label} {what}; leave engine_config out")
        return engine.generate(model, tokenizer, prompts, *args, **options)

    return generate


@dataclass(frozen=True, kw_only=True)
class AnswerRequest:
    """One answer that is asked for while others are being made."""

    model: str
    """The name of the served model that answers."""
    prompt_ids: tuple[int, ...]
    config: GenerateConfig
    room: int
    """Most tokens of the answer."""
    seed: int
    stop: frozenset[int]
    """Tokens that end the answer."""
    shown: ShownText | None = None
    """The text of the prompt with what it shows, where it shows anything."""
    top_logprobs: int | None = None
    """How many of the likeliest tokens are told at each place, with the token's own logarithm; None tells neither."""
    presence_penalty: float = 0.0
    """Taken from the logit of each token that the answer has already."""
    frequency_penalty: float = 0.0
    """Taken from a token's logit as many times as the answer has it already."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these tokens, before all else that changes them."""


class NewToken(NamedTuple):
    """The next token of an answer."""

    id: int
    logprob: float | None = None
    """The logarithm of its probability as the model has it, before temperature and cuts."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens at this place with their logarithms, the likeliest first."""


Deliver = Callable[[NewToken | Exception | None], None]
"""What is told of an answer, from any thread: its tokens as they come, at the end None, or the error that ended it."""


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A model that requests may name."""

    name: str
    folder: str
    """The folder, or the hub's id, of the model's files; of its base's, where there is an adapter."""
    adapter: str | None = None
    """The folder of an adapter as PEFT writes it."""
    dtype: str = "auto"
    """torch's name of the type that it is computed in, such as `bfloat16`; `auto` is that of its files."""
    differs: str | None = None
    """What of it these files lack, as half a sentence; None where they are all of it."""
    load: Callable[[], tuple[Any, Callable[[], AbstractContextManager[Any]]]]
    """Reads the weights: the model, and blocks in which it answers as this one."""
    media: MediaReader | None = None
    """What reads media that requests show, for an engine that `TakesMedia`; None where the model reads text only."""


class Serving(Protocol):
    """Models that answer requests as they come, many at a time."""

    def submit(self, request: AnswerRequest, deliver: Deliver) -> Callable[[], None]:
        """Begin an answer, which depends on the request alone; calling the result ends it early, without further
        deliveries being waited for."""
        ...

    def close(self) -> None:
        """End what is being answered, and let the models go."""
        ...


@runtime_checkable
class Serves(Protocol):
    """Optional on an `Engine`: it answers requests that come one by one, for `llmtune serve`."""

    def serve(self, models: Sequence[ServedModel]) -> Serving:
        """Make the models ready. Raises PlanError where it cannot serve them."""
        ...


@runtime_checkable
class ReadsFiles(Engine, Protocol):
    """Optional on an `Engine`: it reads a model from files, in a process of its own. `generate` looks at the config of
    the model that it is given, and whether what trains of it has changed, and needs no weights of it else."""

    def open(self, model: ServedModel, write: Callable[[Path], object] | None = None) -> None:
        """Let `generate` answer as `model`, until `close`.

        With `write` as the model in memory, which is `model` with an adapter that trains: it writes the adapter, as it
        is then, to a folder, as PEFT does. Collective, `write` too. Raises PlanError where it cannot.
        """
        ...

    def without_adapter(self) -> AbstractContextManager[None]:
        """A block in which `generate` answers as the model without its adapter."""
        ...

    def close(self) -> None:
        """Let the model go."""
        ...
