"""Learning from the best of several answers, each token as much as an elder model believes it: a stage with a second
model, an engine that asks no model at all, and a reward. After rejection sampling: https://arxiv.org/abs/2308.01825.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llmtune import Answer, Batch, Completion, GenerateConfig, ModelSpec, StageContext, StageLoss

if TYPE_CHECKING:
    from acme_tuning import BestOfConfig


class BestOf:
    """The stage. N targets · A answers, `of` of them to each prompt · R rewards."""

    learns = ("prompt",)
    reads = updates = splits = 1

    def __init__(self, config: BestOfConfig) -> None:
        self.of, self.answer_tokens = config.of, config.answer_tokens
        keys = {"model": config.elder, "peft_config": None, "quant_config": None}
        self.models = {"elder": ModelSpec(keys=keys)}

    def prepare(self, model: Any, batches: Sequence[Batch], context: StageContext) -> list[Batch]:
        """For each batch of prompts one of their best answers."""
        return [self._answered(model, batch, context) for batch in batches]

    def _answered(self, model: Any, batch: Batch, context: StageContext) -> Batch:
        prompts = [prompt for prompt in batch.rows() for _ in range(self.of)]
        seeds = [number for _ in batch.rows() for number in range(self.of)]
        config = GenerateConfig(max_new_tokens=self.answer_tokens)
        answers = context.generate(model, prompts, config, seeds)
        completions = [
            Completion(
                prompt="", answer=answer.text, prompt_ids=answer.prompt_ids, ids=answer.ids, cut=answer.cut,
                columns=batch.columns[number // self.of],
            )
            for number, answer in enumerate(answers)
        ]  # fmt: skip
        worth_AR = context.score(completions)
        best = worth_AR.sum(1).view(-1, self.of).argmax(1).tolist()
        chosen = [answers[self.of * number + place] for number, place in enumerate(best)]
        rows = [([*answer.prompt_ids, *answer.ids], len(answer.prompt_ids)) for answer in chosen]
        made = context.batch(rows, batch.sample_ids)
        trust_N = context.with_model("elder", lambda elder, its: its.token_logps(elder, made)).exp()
        return replace(made, extra={"trust": trust_N})

    def update(self, number: int, prepared: Sequence[Batch], context: StageContext) -> Sequence[Batch]:
        """All of them at once."""
        return prepared

    def loss(self, model: Any, batch: Batch, context: StageContext) -> StageLoss:
        """Summed over answers: minus the log-probabilities of their tokens, each times the elder's probability."""
        trust_N = batch.extra["trust"]
        return StageLoss(total=-(trust_N * context.token_logps(model, batch)).sum(), metrics={"trust": trust_N.sum()})


class Parrot:
    """The engine: tokens that follow from the prompt's last one and the seed."""

    def generate(
        self,
        model: Any,
        tokenizer: Any,
        prompts: Sequence[Sequence[int]],
        config: GenerateConfig,
        *,
        seeds: Sequence[int] | None = None,
        stop: Sequence[int] | None = None,
        watch: Callable[[Sequence[int | None]], bool] | None = None,
    ) -> list[Answer]:
        """Answers of `max_new_tokens` tokens."""
        assert seeds is not None and config.max_new_tokens is not None
        answers = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            ids = tuple((sum(prompt) + 7 * seed * seed + 5 * place) % 90 + 5 for place in range(config.max_new_tokens))
            text = str(tokenizer.decode(ids)).strip()
            answers.append(Answer(prompt_ids=tuple(prompt), ids=ids, cut=True, text=text))
        return answers


class Small:
    """The reward: minus the sum of an answer's tokens, less still where the row's right answer is long."""

    def score(self, completions: Sequence[Completion], context: StageContext) -> list[float | None]:
        """A number for each answer."""
        return [-float(sum(each.ids)) - len(each.columns["answer"]) for each in completions]
