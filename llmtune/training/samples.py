"""What a model answers to the recipe's sample prompts, before and after it is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmtune.contract.generation import asking
from llmtune.contract.loggers import SampleAnswer
from llmtune.data.prompts import in_line
from llmtune.model.generation import ChatSession, GenerateConfig, has_template
from llmtune.planning.prompts import writer_of
from llmtune.terminal import doing

if TYPE_CHECKING:
    from llmtune.planning.plan import Plan
    from llmtune.training.objective import Objective

SAMPLE_TOKENS = 64
"""Most tokens of an answer to a sample prompt, where the recipe does not say."""


def sample_answers(plan: Plan, objective: Objective, when: str) -> list[str]:
    """Greedy answers to the recipe's `sample_prompts`. Collective: every rank generates the same."""
    recipe, module, tokenizer, media = plan.recipe, plan.model.module, plan.model.tokenizer, plan.model.media
    if recipe.train.sample_prompts:
        doing.info("Answering the sample prompts %s training", when)
    longest = recipe.generation.max_new_tokens or SAMPLE_TOKENS
    config = GenerateConfig(do_sample=False, max_new_tokens=longest, default_system=recipe.data.default_system)
    variables, writer = recipe.data.template_variables, writer_of(recipe, tokenizer, media)
    engine = plan.parts.one("engine_config")
    objective.eval()
    answers = [
        objective(
            lambda question=question: ChatSession(
                module, tokenizer, variables, config, completes=not has_template(tokenizer, variables),
                generate=asking(engine.built, engine.full_label, media), write=writer.asked,
            ).ask(in_line(question))
        )
        for question in recipe.train.sample_prompts
    ]  # fmt: skip
    objective.train()
    return answers


def as_samples(plan: Plan, answers: Sequence[str]) -> list[SampleAnswer]:
    """The answers with their questions, as loggers take them."""
    questions = plan.recipe.train.sample_prompts if answers else ()
    return [SampleAnswer(question=asked, answer=said) for asked, said in zip(questions, answers, strict=True)]
