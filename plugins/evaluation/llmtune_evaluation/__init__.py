"""What is measured besides the loss: `eval_config: accuracy` and `eval_config: generate`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from llmtune import Ge, Plugin, hookimpl


@dataclass(frozen=True, kw_only=True)
class AccuracyConfig:
    """Token accuracy has no keys."""


@dataclass(frozen=True, kw_only=True)
class GenerateEvalConfig:
    """How generated answers are measured."""

    eval_num_beams: Annotated[int, Ge(1)] | None = None
    """Beams of the answers that evaluations in training generate; null is the recipe's `num_beams`."""
    use_stemmer: bool = False
    """Let ROUGE take English words of one stem for the same."""


def build_accuracy(config: AccuracyConfig) -> Any:
    """The evaluator of tokens."""
    from .accuracy import Accuracy

    return Accuracy()


def build_generate(config: GenerateEvalConfig) -> Any:
    """The evaluator of answers."""
    from .answers import AnswerMetrics

    generation = {} if config.eval_num_beams is None else {"num_beams": config.eval_num_beams}
    return AnswerMetrics(generation=generation, use_stemmer=config.use_stemmer)


@hookimpl
def eval_config() -> list[Plugin]:
    """`accuracy` and `generate`."""
    return [
        Plugin(
            name="accuracy", config=AccuracyConfig, build=build_accuracy,
            summary="The share of trained tokens that the model finds likeliest",
        ),
        Plugin(
            name="generate", config=GenerateEvalConfig, build=build_generate,
            summary="Answers are generated and compared with the rows': BLEU-4, ROUGE-1, ROUGE-2, ROUGE-L, exact match",
            requires=("sacrebleu>=2.4", "rouge-score>=0.1.2", "jieba>=0.42"),
        ),
    ]  # fmt: skip
