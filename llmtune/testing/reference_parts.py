"""What the plugins of `reference.py` build."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmtune.contract.generation import Completion
from llmtune.contract.load_rules import TensorReader
from llmtune.contract.optimizers import OptimizerContext, ParameterGroup
from llmtune.contract.records import ModelEdit, RunContext
from llmtune.contract.stages import Batch, StageContext, StageLoss


class ReadAll:
    """An `Init`: every rank reads every tensor, whole."""

    whole = True

    def fetch(self, reader: TensorReader, key: str, rows: tuple[int, int] | None) -> Tensor:
        return reader.read(key)


class Vectors:
    """A `Peft` that trains norms and biases and asks nothing of the layers, however they are stored."""

    kind = "weights"

    def apply(self, model: nn.Module, context: RunContext) -> ModelEdit:
        """Parameters with one dimension that are not frozen by whoever made them, such as a quantiser's scales."""
        chosen = {
            name
            for name, parameter in model.named_parameters(remove_duplicate=False)
            if parameter.dim() == 1 and parameter.requires_grad and parameter.dtype.is_floating_point
        }
        return ModelEdit(trainable=chosen.__contains__, report=[f"{len(chosen)} vectors train"])

    def save(self, model: nn.Module, tensors: Mapping[str, Tensor], folder: Path, context: RunContext) -> None:
        """Nothing: the whole model is saved."""

    def merge(self, model: nn.Module) -> None:
        """Nothing: the base itself was trained."""


class ReferenceLoss:
    """A `Stage`: summed cross-entropy of the tokens that count."""

    def loss(self, model: nn.Module, batch: Batch, context: StageContext) -> StageLoss:
        return StageLoss(total=context.next_token_loss(model, batch))


class Evens:
    """A `Reward`: the share of an answer's tokens that are even numbers."""

    def score(self, completions: Sequence[Completion], context: StageContext) -> list[float]:
        return [sum(token % 2 == 0 for token in each.ids) / len(each.ids) for each in completions]


class Momentum:
    """An `OptimizerFactory`."""

    def create(self, groups: Sequence[ParameterGroup], context: OptimizerContext) -> torch.optim.Optimizer:
        # One parameter at a time: torch's list operations refuse parameters of different meshes.
        options: dict[str, Any] = {"momentum": 0.9, "foreach": False, "fused": False}
        params = [{"params": [p for _, p in group.parameters], "lr": group.lr} for group in groups]
        return torch.optim.SGD(params, **options)


class Flat:
    """A `Schedule`."""

    def factor(self, step: int, total_steps: int, warmup_steps: int) -> float:
        return 1.0
