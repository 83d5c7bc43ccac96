"""What the recipe's evaluators measure: of the tokens that are evaluated on, and of answers to the rows."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from llmtune.contract.errors import blaming, noting
from llmtune.contract.evaluation import MeasuresAnswers, MeasuresBatches, MeasuresModel
from llmtune.contract.losses import COUNT
from llmtune.distributed.ranks import first_does

if TYPE_CHECKING:
    from torch import Tensor

    from llmtune.contract.evaluation import AskedModel, Prediction
    from llmtune.contract.stages import Batch
    from llmtune.recipe.parts import BuiltPlugin, Parts
    from llmtune.training.objective import Objective


def of_batches(parts: Parts) -> list[BuiltPlugin]:
    """The evaluators that look at batches."""
    return [part for part in parts.at("eval_config") if isinstance(part.built, MeasuresBatches)]


def of_answers(parts: Parts) -> list[BuiltPlugin]:
    """The evaluators that look at answers."""
    return [part for part in parts.at("eval_config") if isinstance(part.built, MeasuresAnswers)]


def of_models(parts: Parts) -> list[BuiltPlugin]:
    """The evaluators that have questions of their own."""
    return [part for part in parts.at("eval_config") if isinstance(part.built, MeasuresModel)]


def measured_model(part: BuiltPlugin, model: AskedModel) -> Mapping[str, Mapping[str, float]]:
    """What an evaluator finds by its own questions. Random numbers go on as before. Collective."""
    before = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(), noting(part.full_label, "measure_model"):
            found = part.built.measure_model(model)
        return first_does(lambda: found)
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])


def measured_batch(objective: Objective, batch: Batch, evaluators: Sequence[BuiltPlugin]) -> dict[str, Tensor]:
    """Sums and counts of a batch, as `StageLoss.sums` names them."""
    found: dict[str, Tensor] = {}
    for part in evaluators:
        measure = part.built.measure_batch
        with noting(part.full_label, "measure_batch"):
            metrics = objective(lambda measure=measure: measure(objective.model, batch, objective.context))
        for name, (value, count) in metrics.items():
            found |= {name: value, name + COUNT: count}
    return found


def measured_answers(
    evaluators: Sequence[BuiltPlugin], predictions: Sequence[Prediction], prefix: str
) -> dict[str, float]:
    """What evaluators say of answers, each metric with `prefix` before its name. Collective."""
    found: dict[str, float] = {}
    labelled = [each for each in predictions if each.label is not None]
    for part in evaluators:
        given = labelled if part.built.needs_labels else predictions

        def measure(part: BuiltPlugin = part, given: Sequence[Prediction] = given) -> Mapping[str, float]:
            with blaming(part.full_label, "measure_answers"):
                return dict(part.built.measure_answers(given))

        found |= {prefix + name: float(value) for name, value in first_does(measure).items()}
    return found
