"""The stage of groups of answers (GRPO). N targets · S answers · G answers of a prompt · P prompts · R rewards."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from llmtune import Batch, ModelSpec, RunContext, StageContext, StageLoss

from .advantages import moments
from .answering import (
    SAMPLING,
    Said,
    answered,
    batch_of,
    correction,
    counted,
    dealt,
    drawn_elsewhere,
    generate_config,
    judged,
    lengths,
    objections,
    reference_keys,
    reported,
    weighted,
)

if TYPE_CHECKING:
    from torch import Tensor

    from . import GrpoConfig

METRICS = ("reward", "reward_std", "frac_reward_zero_std", "completions/length", "completions/cut", "clipped")
"""All that is reported but what each reward says, and the distance from the reference where there is one."""
SMALL = 1e-4
"""Added to a deviation that is divided by, as TRL does."""


class Groups:
    """Group relative policy optimisation (Shao et al. 2024, arXiv 2402.03300): an answer is as good as its reward is
    above the mean of the answers to the same prompt, and all of its tokens alike."""

    learns = ("prompt",)
    without_dropout = True
    reads = 1

    def __init__(self, config: GrpoConfig) -> None:
        self.config = config
        self.generation = generate_config(config)
        self.answer_tokens = config.max_new_tokens
        self.updates, self.splits = config.num_iterations, config.num_generations
        self.metrics = (*METRICS, *SAMPLING, *(("kl",) if config.beta else ()))
        self.models: Mapping[str, ModelSpec] = (
            {"reference": ModelSpec(keys=reference_keys(config), key="ref_model")} if config.beta else {}
        )

    def check(self, context: RunContext, model: Any) -> Iterator[str]:
        """Rewards are what answers are told apart by."""
        yield from objections(self.config, context, model)

    def prepare(self, model: Any, batches: Sequence[Batch], context: StageContext) -> list[Batch]:
        """Answers to the prompts of a step, with their advantages: `num_generations` times as many batches."""
        config, groups = self.config, self.config.num_generations
        said = [one for batch in batches for one in answered(model, batch, context, self.generation, groups)]
        completions = [one.completion for one in said]
        scores_SR = context.score(completions)
        rewards_S = weighted(scores_SR, config.reward_weights)
        advantages_S, deviation_S = self.advantages(rewards_S, context)
        extra = {
            "advantages": advantages_S, "reward_std": deviation_S, "frac_reward_zero_std": (deviation_S == 0).float(),
            **judged(completions, scores_SR, rewards_S, context),
        }  # fmt: skip
        elsewhere = drawn_elsewhere(said, rewards_S, config, context)
        made = []
        for chosen in dealt(said, len(batches) * groups):
            spots = torch.tensor(chosen, dtype=torch.int64, device=rewards_S.device)
            rows: list[Said] = [said[at] for at in chosen]
            batch = batch_of(rows, context, masked=config.mask_truncated_completions)
            batch.extra = {name: values.index_select(0, spots) for name, values in extra.items()}
            if config.loss_type in ("bnpo", "dapo"):
                batch.weight = float(len(batch.targets))
            made.append(self._known(model, batch, rows, elsewhere, context))
        return made

    def advantages(self, rewards_S: Tensor, context: StageContext) -> tuple[Tensor, Tensor]:
        """(S,) how much better an answer is than those to its prompt, 0 where no reward says anything of it; and (S,)
        the deviation of the rewards of its prompt's answers. Collective."""
        grouped_PG = rewards_S.view(-1, self.config.num_generations)
        deviation_S = deviation(grouped_PG).repeat_interleave(self.config.num_generations)
        advantages_S = (grouped_PG - grouped_PG.nanmean(1, keepdim=True)).flatten()
        if self.config.scale_rewards == "group":
            advantages_S = advantages_S / (deviation_S + SMALL)
        elif self.config.scale_rewards == "batch":
            found = moments([rewards_S[~rewards_S.isnan()]], context)
            advantages_S = advantages_S / (math.sqrt(found.sample_variance) + SMALL)
        return advantages_S.nan_to_num(0.0), deviation_S

    def _known(self, model: Any, batch: Batch, rows: Sequence[Said], elsewhere: bool, context: StageContext) -> Batch:
        """The batch with what is known of its targets before the update: log-probabilities now, and the reference's."""
        heat, extra = self.config.temperature, dict(batch.extra)
        if self.updates > 1 or elsewhere:
            extra["old_logps"] = logps_N = context.token_logps(model, batch, heat)
            if elsewhere:
                extra |= correction(rows, batch, logps_N, self.config)
        if self.config.beta:
            extra["ref_logps"] = context.with_model("reference", lambda it, its: its.token_logps(it, batch, heat))
        return replace(batch, extra=extra)

    def update(self, number: int, prepared: Sequence[Batch], context: StageContext) -> Sequence[Batch]:
        """Every update learns from all answers."""
        return prepared

    def loss(self, model: Any, batch: Batch, context: StageContext) -> StageLoss:
        """The sum over answers of the mean over their tokens (`grpo`), or over tokens."""
        config = self.config
        advantages_S, count_S = batch.extra["advantages"], lengths(batch)
        logps_N = context.token_logps(model, batch, config.temperature)
        old_N = batch.extra.get("old_logps", logps_N.detach())
        said_by = batch.target_sequence
        log_ratio_N = logps_N - old_N
        if config.importance_sampling_level == "sequence":
            log_ratio_N = (batch.per_sequence(log_ratio_N) / count_S.clamp(min=1)).index_select(0, said_by)
        ratio_N, advantage_N = log_ratio_N.exp(), advantages_S.index_select(0, said_by)
        high = config.epsilon if config.epsilon_high is None else config.epsilon_high
        within_N = ratio_N.clamp(1 - config.epsilon, 1 + high)
        free_N = ratio_N if config.delta is None else ratio_N.clamp(max=config.delta)
        loss_N = -torch.min(free_N * advantage_N, within_N * advantage_N) * batch.extra.get("sampling/ratio", 1.0)
        metrics = {name: counted(values) for name, values in reported(batch.extra).items()}
        clipped_N = ((ratio_N < 1 - config.epsilon) & (advantage_N < 0)) | ((ratio_N > 1 + high) & (advantage_N > 0))
        metrics["clipped"] = counted(clipped_N.float())
        if config.beta:
            apart_N = batch.extra["ref_logps"] - logps_N
            kl_N = apart_N.exp() - apart_N - 1
            loss_N = loss_N + config.beta * kl_N * (ratio_N if config.use_bias_correction_kl else 1.0)
            metrics["kl"] = counted(kl_N.detach())
        if config.loss_type == "grpo":
            loss_N = loss_N / count_S.index_select(0, said_by)
        elif config.loss_type == "dr_grpo":
            loss_N = loss_N / config.max_new_tokens
        return StageLoss(total=loss_N.sum(), metrics=metrics)


def deviation(grouped_PG: Tensor) -> Tensor:
    """(P,) the deviation of the numbers in each group around their mean, from a sample; 0 where there is one."""
    count_P = (~grouped_PG.isnan()).sum(1)
    squares_P = (grouped_PG - grouped_PG.nanmean(1, keepdim=True)).square().nansum(1)
    return (squares_P / (count_P - 1).clamp(min=1)).sqrt()
