"""What stages over the model's own answers share. N targets · S answers · R rewards."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from llmtune import Batch, Completion, GenerateConfig, RunContext, ShownPrompt, StageContext

if TYPE_CHECKING:
    from torch import Tensor

    from . import AnswerKeys, RolloutReferenceKeys


class Said(NamedTuple):
    """An answer of this step."""

    completion: Completion
    sample: int
    """The number of its prompt's sample."""
    logps: Sequence[float] | None = None
    """Those of its tokens in the engine that drew them; None where that is the model."""


def generate_config(keys: AnswerKeys) -> GenerateConfig:
    """How the model answers."""
    return GenerateConfig(
        temperature=keys.temperature, top_p=keys.top_p, top_k=keys.top_k, max_new_tokens=keys.max_new_tokens,
    )  # fmt: skip


def reference_keys(keys: RolloutReferenceKeys) -> dict[str, Any]:
    """The keys of a recipe in which the reference differs from the trained model; none where it is its start."""
    found: dict[str, Any] = {}
    if keys.ref_model is not None:
        found |= {"model": keys.ref_model, "revision": None, "quant_config": None, "peft_config": None}
    if keys.ref_model_adapters is not None:
        found["peft_config"] = {"name": "lora", "adapter_name_or_path": keys.ref_model_adapters}
    if keys.ref_model_quantization_bit is not None:
        found["quant_config"] = {"name": "auto", "quantization_bit": keys.ref_model_quantization_bit}
    return found


def answered(model: Any, batch: Batch, context: StageContext, config: GenerateConfig, answers: int = 1) -> list[Said]:
    """`answers` answers to each prompt of a batch, one after the other. Collective."""
    prompts = batch.prompts()
    samples = [sample for sample in batch.sample_ids for _ in range(answers)]
    seeds = [context.seed_of(sample, draw) for sample in batch.sample_ids for draw in range(answers)]
    found = context.generate(model, [prompt for prompt in prompts for _ in range(answers)], config, seeds)
    columns = batch.columns or ({},) * len(prompts)
    shown = [prompt.shown if isinstance(prompt, ShownPrompt) else None for prompt in prompts]
    texts = [
        context.tokenizer.decode(ids) if its is None else its.text for its, ids in zip(shown, batch.rows(), strict=True)
    ]
    return [
        Said(
            Completion(
                prompt=texts[at // answers], answer=answer.text, prompt_ids=answer.prompt_ids, ids=answer.ids,
                cut=answer.cut, columns=columns[at // answers], shown=shown[at // answers],
            ),
            sample,
            answer.logps,
        )
        for at, (answer, sample) in enumerate(zip(found, samples, strict=True))
    ]  # fmt: skip


def dealt(said: Sequence[Said], batches: int) -> list[list[int]]:
    """The numbers of the answers in so many batches of about as many each, those of like length together."""
    order = sorted(range(len(said)), key=lambda at: -len(said[at].completion.prompt_ids + said[at].completion.ids))
    bounds = [len(order) * at // batches for at in range(batches + 1)]
    return [order[start:stop] for start, stop in pairwise(bounds)]


def batch_of(said: Sequence[Said], context: StageContext, masked: bool = False) -> Batch:
    """Prompts and answers as one batch, in which the answers train; with `masked` not those that were cut."""
    rows = []
    for completion, *_ in said:
        ids = [*completion.prompt_ids, *completion.ids]
        rows.append((ids, len(ids) if masked and completion.cut else len(completion.prompt_ids)))
    return context.batch(rows, [one.sample for one in said], [one.completion.asked for one in said])


SAMPLING = ("sampling/ratio", "sampling/logp_difference")
"""What is reported of answers that another engine has drawn: means over tokens."""


def lengths(batch: Batch) -> Tensor:
    """(S,) trained tokens of each answer."""
    return batch.per_sequence(torch.ones(len(batch.targets), device=batch.targets.device))


def drawn_elsewhere(said: Sequence[Said], rewards_S: Tensor, keys: AnswerKeys, context: StageContext) -> bool:
    """Whether a step's answers, on whatever rank, are to be corrected for the engine that drew them. Collective."""
    told = rewards_S.new_tensor(float(sum(one.logps is not None for one in said)))
    return keys.sampling_correction is not None and bool(context.total(told))


def correction(said: Sequence[Said], batch: Batch, logps_N: Tensor, keys: AnswerKeys) -> dict[str, Tensor]:
    """(N,) each, for `Batch.extra`: what the loss of a target is multiplied by, as the engine drew it with another
    probability than the model's, and how far the logarithms of the two are apart."""
    counts = lengths(batch).long().tolist()
    drawn = [
        torch.full((count,), math.nan) if one.logps is None else torch.tensor(one.logps[:count])
        for one, count in zip(said, counts, strict=True)
    ]
    apart_N = logps_N - torch.cat([*drawn, torch.empty(0)]).to(logps_N)
    log_ratio_N = apart_N.nan_to_num(0.0)
    level, _, beyond = str(keys.sampling_correction).partition("_")
    if level == "sequence":
        log_ratio_N = batch.per_sequence(log_ratio_N).index_select(0, batch.target_sequence)
    ratio_N = log_ratio_N.exp()
    held_N = ratio_N.clamp(keys.sampling_clip_min or 0.0, keys.sampling_clip_max or math.inf)
    if beyond == "mask":
        held_N = torch.where(held_N == ratio_N, ratio_N, 0.0)
    return dict(zip(SAMPLING, (held_N, apart_N.abs()), strict=True))


def objections(keys: AnswerKeys, context: RunContext, model: Any) -> Iterator[str]:
    """What keeps a model from answering, and its answers from being judged."""
    if model.get_output_embeddings() is None:
        yield f"the model is to answer, and {type(model).__name__} has no head over a vocabulary"
    weights, rewards = keys.reward_weights, len(context.rewards)
    if weights is not None and len(weights) != rewards:
        yield (
            f"reward_weights: found {len(weights)} numbers, allowed is one for each of the {rewards} rewards in "
            "reward_config, in their order, or null for 1 each"
        )


def weighted(rewards_SR: Tensor, weights: Sequence[float] | None) -> Tensor:
    """(S,) the sum of an answer's rewards, each times its weight; NaN where no reward says anything of the answer."""
    weights_R = rewards_SR.new_tensor(weights or [1.0] * rewards_SR.shape[1])
    return torch.where(rewards_SR.isnan().all(1), torch.nan, (rewards_SR * weights_R).nansum(1))


def judged(
    said: Sequence[Completion], scores_SR: Tensor, rewards_S: Tensor, context: StageContext
) -> dict[str, Tensor]:
    """(S,) each: what is reported of answers, for `Batch.extra`."""
    return {
        "reward": rewards_S, "cut": rewards_S.new_tensor([float(each.cut) for each in said]),
        "length": rewards_S.new_tensor([float(len(each.ids)) for each in said]),
        **{f"rewards/{name}": scores_SR[:, at] for at, name in enumerate(context.rewards)},
    }  # fmt: skip


def reported(extra: Mapping[str, Tensor], *more: str) -> dict[str, Tensor]:
    """What of a batch's `extra` is reported, under the names of metrics: rewards, `judged`, `SAMPLING`, and names with
    the beginnings `more`."""
    named = {"length": "completions/length", "cut": "completions/cut", "frac_reward_zero_std": "frac_reward_zero_std"}
    begin = ("reward", "sampling/", *more)
    return {named.get(name, name): extra[name] for name in extra if name in named or name.startswith(begin)}


def counted(values: Tensor) -> tuple[Tensor, Tensor]:
    """A metric over the values that are numbers: their sum and how many they are."""
    real = ~values.isnan()
    return torch.where(real, values, 0.0).sum().float(), real.sum().float()
