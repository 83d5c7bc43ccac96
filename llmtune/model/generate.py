"""Answers to a batch of prompts, by the `generate` of transformers. No answer depends on its batch."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llmtune.contract.errors import DataError, DivergedError, PlanError
from llmtune.contract.examples import ShownText
from llmtune.contract.generation import Answer, Asked, GenerateConfig, MediaReader
from llmtune.distributed.ranks import failing_together, from_all
from llmtune.model.content import for_template
from llmtune.model.modalities import placeholders_of
from llmtune.model.prefill import prefilled
from llmtune.model.prompts import NOTHING, PromptBatch, ends_in_media, sees_empty_places, shown_by, tokens_of
from llmtune.model.skeleton import config_value

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Watch = Callable[[Sequence[int | None]], bool]


class ContextFull(DataError):
    """Prompt and answer do not fit into the length the model was made for."""


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Asked],
    config: GenerateConfig | None = None,
    *,
    seeds: Sequence[int] | None = None,
    stop: Sequence[int] | None = None,
    watch: Watch | None = None,
    media: MediaReader | None = None,
) -> list[Answer]:
    """Answers to prompts, which are lists of token ids or show something that `media` reads, as `Engine.generate` says.

    Other batches differ in rounding, so that in float32 answers are the same but for ties, and in bfloat16 mostly.
    Raises ContextFull, DataError for a prompt that is empty or has numbers that are no tokens, and DivergedError where
    the model's logits are not finite.
    """
    config = config or GenerateConfig()
    if seeds is None:
        seeds = torch.randint(2**62, (len(prompts),)).tolist()
    spread = torch.distributed.is_initialized() and any(isinstance(value, DTensor) for value in model.parameters())
    stop = stop_tokens(model, tokenizer) if stop is None else stop
    with failing_together(spread):
        rows = [
            PromptRow(ids := tokens_of(prompt), room_of(model.config, len(ids), config), seed, shown_by(prompt))
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        for row in rows:
            require_prompt(row.ids, None if row.shown.media else vocabulary_of(model.config))
        if media is None and any(row.shown.media for row in rows):
            raise DataError("a prompt shows pictures, video or sound, and nothing was given that reads them (media)")
    # Beams that are sampled are drawn from one generator, so each prompt has a batch of its own.
    most = alike_up_to(model.config)
    alone = most is not None and any(len(row.ids) + row.room > most for row in rows)
    alone = alone or (sees_empty_places(model) and len({len(row.shown.media) for row in rows}) > 1)
    size = 1 if alone or (config.num_beams > 1 and config.do_sample) else max(1, len(rows))
    batches = [rows[start : start + size] for start in range(0, len(rows), size)]
    if spread:  # whoever has no rows left computes along, as the others gather its shards
        batches += [[]] * (max(from_all(len(batches))) - len(batches))
    with evaluating(model):
        return [
            answer
            for batch in batches
            for answer in _batch(model, tokenizer, batch, config, stop, watch, spread, media)
        ]


@dataclass(frozen=True)
class PromptRow:
    """A prompt of a batch."""

    ids: tuple[int, ...]
    room: int
    """Most tokens of its answer."""
    seed: int
    shown: ShownText = NOTHING


def _batch(
    model: Any, tokenizer: PreTrainedTokenizerBase, rows: Sequence[PromptRow], config: GenerateConfig,
    stop: Sequence[int], watch: Watch | None, spread: bool, media: MediaReader | None,
) -> list[Answer]:  # fmt: skip
    device, pad = next(model.parameters()).device, tokenizer.pad_token_id or 0
    asked = [*rows, *_fillers(rows, media)] if spread and media is not None else list(rows)
    asked = asked or [PromptRow((pad,), 1, 0)]
    again = len({(row.ids, row.shown) for row in asked}) < len(asked)
    whole = config.num_beams > 1 or any(ends_in_media(row.ids, media) for row in asked)
    if spread:  # ranks that a model is spread over read prompts together
        again, whole = (any(each) for each in zip(*from_all((again, whole)), strict=True))
    again = again and not whole
    width = max(1 + again, *(len(row.ids) for row in asked))  # what is read before leaves one token to go on from
    pads = [width - len(row.ids) for row in asked]
    prompts = PromptBatch(
        ids=[row.ids for row in asked], shown=[row.shown for row in asked], width=width, pad=pad, device=device,
        media=media,
    )  # fmt: skip
    drawn_beams = config.num_beams > 1 and config.do_sample
    finite, generators, never = RefusesNan(), [random.Random(row.seed) for row in asked], suppressing(model.config)
    settings: dict[str, Any] = {
        "do_sample": drawn_beams, "num_beams": config.num_beams, "use_cache": True, "repetition_penalty": 1.0,
        "max_new_tokens": max(row.room for row in asked), "eos_token_id": list(stop) or None, "pad_token_id": pad,
    }  # fmt: skip
    if drawn_beams:
        settings |= {"temperature": config.temperature, "top_p": config.top_p, "top_k": config.top_k}
    if config.num_beams > 1:
        settings["length_penalty"] = config.length_penalty
    once, number_B = prompts.distinct() if again else (prompts, None)
    with failing_together(spread):
        once.open()
    before = {} if number_B is None else prefilled(model, once, number_B, settings["max_new_tokens"])
    with seeded(asked[0].seed, device) if drawn_beams else nullcontext():
        said_BT = model.generate(
            input_ids=prompts.ids_BT, attention_mask=prompts.real_BT, synced_gpus=spread, **settings,
            **(before or prompts.tensors),
            logits_processor=LogitsProcessorList([finite, *processors(config, pads, generators, [*never])]),
            stopping_criteria=StoppingCriteriaList(
                [Ends(asked, width, stop, watch if config.num_beams == 1 and rows else None, len(rows))]
            ),
        )  # fmt: skip
    with failing_together(spread):
        if not finite.kept:
            raise DivergedError("the model's logits are not finite, so that it has no answers; its weights are damaged")
    said = said_BT[:, width:].tolist()
    return [_answer(tokenizer, row, tokens, config, stop) for row, tokens in zip(rows, said, strict=False)]


def _fillers(rows: Sequence[PromptRow], media: MediaReader) -> list[PromptRow]:
    """Prompts that show something blank of each kind that other ranks show and this one does not: a tower that is
    spread over ranks works on all of them or on none. Collective."""
    own = {medium.kind for row in rows for medium in row.shown.media}
    kinds = sorted(set().union(*from_all(own)))
    blank = media.fillers(kinds, [row.shown for row in rows])
    return [PromptRow(tuple(map(int, ids)), 1, 0, shown) for ids, shown, _ in blank]


def _answer(
    tokenizer: PreTrainedTokenizerBase, row: PromptRow, tokens: list[int], config: GenerateConfig, stop: Sequence[int]
) -> Answer:
    """What is between the prompt and the padding after the answer."""
    end = next((at for at, token in enumerate(tokens[: row.room]) if token in stop), None)
    ids = tokens[: row.room] if end is None else tokens[: end + 1]
    text = str(tokenizer.decode(ids, skip_special_tokens=config.skip_special_tokens)).strip()
    return Answer(prompt_ids=tuple(row.ids), ids=tuple(ids), cut=end is None, text=text)


def processors(
    config: GenerateConfig,
    pads: Sequence[int],
    generators: Sequence[random.Random],
    further: Sequence[LogitsProcessor] = (),
) -> Iterator[LogitsProcessor]:
    """What turns logits into choices, for rows with so much padding, in the order of transformers, with `further`
    ones after penalties of its own; sampling by row comes last and leaves one token."""
    if config.repetition_penalty != 1:
        yield RepetitionPenalty(config.repetition_penalty, pads)
    yield from further
    if not config.do_sample or config.num_beams > 1:
        return
    if config.temperature != 1:
        yield TemperatureLogitsWarper(config.temperature)
    if config.top_k:
        yield TopKLogitsWarper(config.top_k)
    if config.top_p < 1:
        yield TopPLogitsWarper(config.top_p)
    yield DrawsByRow(generators)


def suppressing(model_config: Any) -> Iterator[LogitsProcessor]:
    """What keeps the tokens that stand for pictures and sounds in prompts out of answers; nothing where there are
    none."""
    if tokens := placeholders_of(model_config):
        yield Suppresses(tokens)


class RefusesNan(LogitsProcessor):
    """Notes whether any logits were no numbers; asked at the end, so that no step waits for the device."""

    def __init__(self) -> None:
        self._kept: Tensor | bool = True

    @property
    def kept(self) -> bool:
        """Whether every row had a likeliest token."""
        return bool(self._kept)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._kept = torch.isfinite(scores.amax(-1)).all() & self._kept
        return scores


class RepetitionPenalty(RepetitionPenaltyLogitsProcessor):
    """transformers' penalty without that for padding, whose token is a real one elsewhere."""

    def __init__(self, penalty: float, pads: Sequence[int]) -> None:
        super().__init__(penalty)
        self.pads_B = torch.tensor(pads)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        pads = self.pads_B.to(input_ids.device).repeat_interleave(len(input_ids) // len(self.pads_B))
        padding = torch.arange(input_ids.shape[1], device=input_ids.device) < pads[:, None]
        return super().__call__(torch.where(padding, input_ids[:, -1:], input_ids), scores)


class Suppresses(LogitsProcessor):
    """Takes away all probability of some tokens."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens = tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        own = [token for token in self.tokens if token < scores.shape[-1]]  # some models have no output for them
        return scores.index_fill(-1, torch.tensor(own, dtype=torch.long, device=scores.device), -torch.inf)


class DrawsByRow(LogitsProcessor):
    """Draws each row's token with a generator of its own: the token where the summed probabilities pass its number."""

    def __init__(self, generators: Sequence[random.Random]) -> None:
        self.generators = generators

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        sums_BV = scores.float().softmax(-1).cumsum(-1, dtype=torch.float64)
        numbers = [[generator.random()] for generator in self.generators]
        numbers_B1 = torch.tensor(numbers, dtype=torch.float64).to(scores.device) * sums_BV[:, -1:]
        token_B1 = torch.searchsorted(sums_BV, numbers_B1, right=True).clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(-1, token_B1, 0.0)


class Ends(StoppingCriteria):
    """Ends a row where its room is used up, and all of them where the watcher says so."""

    def __init__(
        self, rows: Sequence[PromptRow], width: int, stop: Sequence[int], watch: Watch | None, watched: int
    ) -> None:
        """The watcher is told of the first `watched` rows."""
        self.rooms = [row.room for row in rows]
        self.width, self.stop, self.watch, self.watched = width, frozenset(stop), watch, watched
        self.ended = [False] * len(rows)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        used = input_ids.shape[1] - self.width
        full = [used >= room for room in self.rooms for _ in range(len(input_ids) // len(self.rooms))]
        if self.watch is not None:
            tokens = input_ids[:, -1].tolist()
            new = [None if ended else token for ended, token in zip(self.ended, tokens, strict=True)]
            self.ended = [
                ended or token in self.stop or over for ended, token, over in zip(self.ended, tokens, full, strict=True)
            ]
            if self.watch(new[: self.watched]):
                full = [True] * len(full)
        return torch.tensor(full, device=input_ids.device)


def limit_of(model_config: Any, config: GenerateConfig) -> int | None:
    """Most tokens of prompt and answer together; None where nothing limits them."""
    made_for = config_value(model_config.get_text_config(), "max_position_embeddings")
    wanted = None if config.max_new_tokens else config.max_length
    return min((limit for limit in (made_for, wanted) if limit), default=None)


def alike_up_to(model_config: Any) -> int | None:
    """Most tokens of rows that may share a batch; None where any may. Beyond them transformers takes other frequencies
    for all rows of a batch (rope type longrope), so that an answer would depend on what stands beside it."""
    rope = config_value(model_config.get_text_config(), "rope_parameters") or {}
    kinds = [rope, *(each for each in rope.values() if isinstance(each, dict))]
    found = [each["original_max_position_embeddings"] for each in kinds if each.get("rope_type") == "longrope"]
    return min(found, default=None)


def room_of(model_config: Any, prompt_tokens: int, config: GenerateConfig) -> int:
    """Most tokens of a model's answer to a prompt of so many. Raises ContextFull where it is none."""
    limit, filled = limit_of(model_config, config), config.max_length is not None and not config.max_new_tokens
    most = [] if filled else [config.max_new_tokens or 1024]
    room_tokens = min([*most, *([limit - prompt_tokens] if limit else [])])
    if room_tokens < 1:
        raise ContextFull(
            f"the conversation has {prompt_tokens} tokens, the limit for prompt and answer together is {limit}; "
            "start a new conversation, ask something shorter, or raise max_length if the model allows it"
        )
    return room_tokens


def vocabulary_of(model_config: Any) -> int:
    """How many tokens a model can read and say."""
    return int(model_config.get_text_config().vocab_size)


def require_prompt(ids: Sequence[int], words: int | None = None) -> None:
    """DataError for a prompt without tokens, and for numbers that are none of a model's `words`."""
    if not ids:
        raise DataError("the prompt is empty; give the text that is to be continued")
    if words is not None and (odd := [token for token in ids if not 0 <= token < words]):
        raise DataError(f"{odd[0]} is no token, there are {words}")


def require_head(model: PreTrainedModel) -> None:
    """PlanError where the model's outputs are no words."""
    if model.get_output_embeddings() is None:
        raise PlanError(
            f"{type(model).__name__} has no head over a vocabulary, so that it cannot answer; a reward model is "
            "asked by `llmtune reward`"
        )


def has_template(tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any]) -> bool:
    """Whether there is anything to write a conversation with."""
    return bool(tokenizer.chat_template or template_kwargs.get("chat_template"))


def stop_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any] | None = None
) -> list[int]:
    """Ids that end an answer: the model's and the tokenizer's end of text, and the template's end of turn."""
    stops: set[int] = set()
    for ids in (
        model.generation_config.eos_token_id,
        model.config.get_text_config().eos_token_id,
        tokenizer.eos_token_id,
    ):
        stops.update(ids if isinstance(ids, (list, tuple)) else () if ids is None else (ids,))
    return sorted(stops.union(turn_ends(tokenizer, template_kwargs or {})))


def turn_ends(tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any]) -> list[int]:
    """Ids of the special token that the template writes right after an assistant's message; none without one."""
    if not has_template(tokenizer, template_kwargs):
        return []
    marker = "llmtuneendofturn"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": marker}]
    turns = for_template(tokenizer, turns, template_kwargs)
    after = str(tokenizer.apply_chat_template(turns, tokenize=False, **template_kwargs)).rpartition(marker)[2].lstrip()
    special = {str(token): index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return [special[text] for text in special if after.startswith(text)]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off inside; every module's own mode is back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """torch's generators begin at `seed` inside, and are as they were afterwards."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
