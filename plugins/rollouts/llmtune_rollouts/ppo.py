"""The stage of a policy and its value function (PPO). N targets · S answers · R rewards · D width."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from llmtune import Batch, ModelEdit, ModelSpec, RunContext, StageContext, StageLoss

from .adaptive import KlCoefficient, RunningScale
from .advantages import gae, moments, whitened
from .answering import (
    SAMPLING,
    Said,
    answered,
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

    from . import PpoConfig

HEAD = "value_head"
"""The module that says how much reward is still to come."""
METRICS = (
    "policy_loss", "value_loss", "clipped", "value_clipped", "values", "returns", "reward", "explained_variance",
    "completions/length", "completions/cut", *SAMPLING, "kl", "kl_coef",
)  # fmt: skip
"""All that is reported but what each reward says."""
EPSILON = torch.finfo(torch.float32).eps
"""Added to a deviation of scores that is divided by, as TRL does."""


class Policy:
    """Proximal policy optimisation (Schulman et al. 2017, arXiv 1707.06347) of answers (Ziegler et al. 2019, arXiv
    1909.08593): a token is as good as the reward that follows it is above what the value head expected."""

    learns = ("prompt",)
    without_dropout = True
    splits = 1

    def __init__(self, config: PpoConfig) -> None:
        self.config = config
        self.generation = generate_config(config)
        self.answer_tokens = config.max_new_tokens
        self.reads = config.ppo_buffer_size
        self.updates = config.ppo_buffer_size * config.ppo_epochs
        self.metrics = METRICS if config.init_kl_coef else tuple(name for name in METRICS if name != "kl")
        self.models: Mapping[str, ModelSpec] = (
            {"reference": ModelSpec(keys=reference_keys(config), key="ref_model")} if config.init_kl_coef else {}
        )
        self.kl_coef = KlCoefficient(config.init_kl_coef, config.ppo_target, config.horizon)
        self.scale = RunningScale()

    def state(self) -> dict[str, Any]:
        """What has adapted to the steps before."""
        return {"kl_coef": self.kl_coef.value, "scores": self.scale._asdict()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.kl_coef.value = state["kl_coef"]
        self.scale = RunningScale(**state["scores"])

    def check(self, context: RunContext, model: Any) -> Iterator[str]:
        """Answers need a head over the vocabulary, and whole rows."""
        yield from objections(self.config, context, model)

    def apply(self, model: Any, context: RunContext) -> ModelEdit:
        """Add the value head, which starts from 0: it expects nothing and moves nothing until it has learnt."""
        width = model.config.get_text_config().hidden_size
        head = nn.Linear(width, 1, device="meta", dtype=context.trainable_dtype)
        model.add_module(HEAD, head)
        fresh = {f"{HEAD}.{name}": torch.zero_ for name, _ in head.named_parameters()}
        report = f"value head of {width + 1:,} parameters, which trains and is no part of the result"
        return ModelEdit(fresh=fresh, aside=frozenset(fresh), roles={f"{HEAD}.weight": "head"}, report=(report,))

    def prepare(self, model: Any, batches: Sequence[Batch], context: StageContext) -> list[Batch]:
        """Answers to the prompts of a step, with the advantages of their tokens; as many batches."""
        config = self.config
        laid = list(self._laid(model, batches, context))
        scored = self._scored(laid, context, adapts=model.training)
        elsewhere = drawn_elsewhere([one for rows in laid for one in rows], scored[0]["score"], config, context)
        made = [self._known(model, rows, scores, elsewhere, context) for rows, scores in zip(laid, scored, strict=True)]
        rewards = [batch.extra["token_rewards"] for batch in made]
        values = [batch.extra["old_values"] for batch in made]
        if config.ppo_whiten_rewards:
            rewards = whitened(rewards, context, shift=False)
        ahead = [
            gae(rewards_N, values_N, batch.target_sequence, config.gamma, config.lam)
            for rewards_N, values_N, batch in zip(rewards, values, made, strict=True)
        ]
        returns = [ahead_N + values_N for ahead_N, values_N in zip(ahead, values, strict=True)]
        unexplained, variance = moments(ahead, context).variance, moments(returns, context).variance
        for batch, returns_N, advantages_N in zip(made, returns, whitened(ahead, context), strict=True):
            answers = {"kl_coef": self.kl_coef.value}
            if variance:
                answers["explained_variance"] = 1 - unexplained / variance
            same = {name: returns_N.new_full((batch.sequences,), value) for name, value in answers.items()}
            batch.extra = {**batch.extra, "returns": returns_N, "advantages": advantages_N, **same}
        if config.init_kl_coef and model.training:
            kl = moments([batch.extra["kl"][~batch.extra["score"].isnan()] for batch in made], context)
            self.kl_coef.update(kl.mean, kl.count)
        return made

    def _laid(self, model: Any, batches: Sequence[Batch], context: StageContext) -> Iterator[list[Said]]:
        """The answers in as many batches, those of like length together, but each in its part of the step."""
        parts = self.reads if model.training else 1
        size = len(batches) // parts
        for first in range(0, size * parts, size):
            own = batches[first : first + size]
            said = [one for batch in own for one in answered(model, batch, context, self.generation)]
            yield from ([said[at] for at in chosen] for chosen in dealt(said, size))

    def _scored(self, laid: Sequence[Sequence[Said]], context: StageContext, adapts: bool) -> list[dict[str, Tensor]]:
        """What is known of each batch's answers, `score` being what is learnt from: NaN where no reward says anything
        of an answer. Collective."""
        said = [one.completion for rows in laid for one in rows]
        scores_SR = context.score(said)
        rewards_S = weighted(scores_SR, self.config.reward_weights)
        known = judged(said, scores_SR, rewards_S, context)
        score_S = rewards_S - self.config.missing_eos_penalty * known["cut"]
        if self.config.ppo_score_norm:
            found = moments([score_S[~score_S.isnan()]], context)
            scale = self.scale.joined(found)
            score_S = ((score_S.double() - scale.mean) / (scale.deviation + EPSILON)).float()
            self.scale = scale if adapts else self.scale
        extra = {"score": score_S, **known}
        parts = {name: values.split([len(rows) for rows in laid]) for name, values in extra.items()}
        return [{name: values[at] for name, values in parts.items()} for at in range(len(laid))]

    def _known(
        self, model: Any, rows: Sequence[Said], scores: Mapping[str, Tensor], elsewhere: bool, context: StageContext
    ) -> Batch:
        """The answers as a batch, with what is known of their tokens before an update."""
        heat, score_S = self.config.temperature, scores["score"]
        sequences = []
        for (completion, *_), silent in zip(rows, score_S.isnan().tolist(), strict=True):
            ids = [*completion.prompt_ids, *completion.ids]
            sequences.append((ids, len(ids) if silent else len(completion.prompt_ids)))
        batch = context.batch(sequences, [one.sample for one in rows], [one.completion.asked for one in rows])
        batch.weight = float(len(batch.targets))
        logps_N, values_N = self._seen(model, batch, context)
        rewards_N, extra = torch.zeros_like(logps_N), dict(scores)
        if self.config.init_kl_coef:
            ref_N = context.with_model("reference", lambda it, its: its.token_logps(it, batch, heat))
            rewards_N = -self.kl_coef.value * (logps_N - ref_N)
            kl_S = batch.per_sequence(logps_N - ref_N)
            extra["kl"] = torch.where(score_S.isnan(), torch.nan, kl_S)
        last_S = lengths(batch).long().cumsum(0) - 1
        rewards_N = rewards_N.index_add(0, last_S[~score_S.isnan()], score_S[~score_S.isnan()])
        if elsewhere:
            extra |= correction(rows, batch, logps_N, self.config)
        batch.extra = {**extra, "old_logps": logps_N, "old_values": values_N, "token_rewards": rewards_N}
        return batch

    def _seen(self, model: Any, batch: Batch, context: StageContext) -> tuple[Tensor, Tensor]:
        """(N,) log-probabilities and (N,) expected rewards of the targets, float32, from one forward pass."""
        logps_N, states_ND = context.logps_and_states(model, batch, self.config.temperature)
        head = model.get_submodule(HEAD)
        with torch.autocast(states_ND.device.type, enabled=False):
            return logps_N, F.linear(states_ND.float(), head.weight.float(), head.bias.float()).squeeze(-1)

    def update(self, number: int, prepared: Sequence[Batch], context: StageContext) -> Sequence[Batch]:
        """Each epoch learns from all parts of the step, one an update, in an order of its own."""
        epoch, turn = divmod(number, self.reads)
        order = list(range(self.reads))
        random.Random(context.seed_of(epoch)).shuffle(order)
        size = len(prepared) // self.reads
        return prepared[order[turn] * size : (order[turn] + 1) * size]

    def loss(self, model: Any, batch: Batch, context: StageContext) -> StageLoss:
        """The sum over tokens of the clipped objective of the policy, and `vf_coef` times that of the values."""
        config, extra = self.config, batch.extra
        logps_N, values_N = self._seen(model, batch, context)
        ratio_N = (logps_N - extra["old_logps"]).exp()
        free_N = -extra["advantages"] * ratio_N
        held_N = -extra["advantages"] * ratio_N.clamp(1 - config.cliprange, 1 + config.cliprange)
        policy_N = torch.max(free_N, held_N) * extra.get("sampling/ratio", 1.0)
        moved_N = (values_N - extra["old_values"]).clamp(-config.cliprange_value, config.cliprange_value)
        error_N = (values_N - extra["returns"]).square()
        held_error_N = (extra["old_values"] + moved_N - extra["returns"]).square()
        value_N = 0.5 * torch.max(error_N, held_error_N)
        tokens = {
            "policy_loss": policy_N, "value_loss": value_N, "clipped": (held_N > free_N).float(),
            "value_clipped": (held_error_N > error_N).float(), "values": values_N, "returns": extra["returns"],
        }  # fmt: skip
        told = tokens | reported(extra, "kl", "explained_variance")
        metrics = {name: counted(numbers.detach()) for name, numbers in told.items()}
        return StageLoss(total=(policy_N + config.vf_coef * value_N).sum(), metrics=metrics)
