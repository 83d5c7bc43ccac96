"""Evaluators that are wrong in one way each."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from llmtune import Prediction


class _Batches:
    metrics: Sequence[str] = ("rightness",)

    def measure_batch(self, model: Any, batch: Any, context: Any) -> Mapping[str, Any]:
        right = context.likeliest(model, batch) == batch.targets
        return {"rightness": (right.sum(), right.new_tensor(len(right), dtype=right.sum().dtype))}


class _Answers:
    metrics: Sequence[str] = ("length",)
    generation: Mapping[str, Any] = {}
    needs_labels = False

    def measure_answers(self, predictions: Sequence[Prediction]) -> Mapping[str, float]:
        return {"length": sum(len(each.predict) for each in predictions) / max(1, len(predictions))}


class NamesNothing(_Batches):
    metrics: Sequence[str] = ()


class TakesTheMeanOfRows(_Batches):
    def measure_batch(self, model: Any, batch: Any, context: Any) -> Mapping[str, Any]:
        total, count = super().measure_batch(model, batch, context)["rightness"]
        return {"rightness": (total / count.clamp(min=1), count.clamp(max=1))}


class LooksAtPadding(_Batches):
    def measure_batch(self, model: Any, batch: Any, context: Any) -> Mapping[str, Any]:
        total, count = super().measure_batch(model, batch, context)["rightness"]
        return {"rightness": (total, count + batch.input_ids.numel())}


class SwitchesToTraining(_Batches):
    def measure_batch(self, model: Any, batch: Any, context: Any) -> Mapping[str, Any]:
        return super().measure_batch(model.train(), batch, context)


class SeesItsRank(_Batches):
    def measure_batch(self, model: Any, batch: Any, context: Any) -> Mapping[str, Any]:
        total, count = super().measure_batch(model, batch, context)["rightness"]
        return {"rightness": (total + int(os.environ.get("RANK", 0)), count)}


class RemembersAnswers(_Answers):
    def __init__(self) -> None:
        self.seen: list[Prediction] = []

    def measure_answers(self, predictions: Sequence[Prediction]) -> Mapping[str, float]:
        self.seen += predictions
        return super().measure_answers(self.seen)


class DividesByWords(_Answers):
    def measure_answers(self, predictions: Sequence[Prediction]) -> Mapping[str, float]:
        return {"length": sum(len(each.predict) / len(each.predict.split()) for each in predictions)}


class MeasuresNothing:
    metrics: Sequence[str] = ("nothing",)
