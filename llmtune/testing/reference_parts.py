"""What the plugins of `reference.py` build."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmtune.contract.generation import Completion, GenerateConfig
from llmtune.contract.load_rules import TensorReader
from llmtune.contract.losses import StageLoss
from llmtune.contract.optimizers import OptimizerContext, ParameterGroup
from llmtune.contract.records import ModelEdit, RunContext
from llmtune.contract.stages import Batch, StageContext


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


class ReferenceAnswers:
    """A `Stage` that `RollsOut`: each answer becomes more likely by as much as its rewards are (REINFORCE)."""

    learns = ("prompt",)
    counts = "samples"
    answer_tokens = 6
    reads = splits = 1
    updates = 1

    def prepare(self, model: nn.Module, batches: Sequence[Batch], context: StageContext) -> list[Batch]:
        """One answer to each prompt, with its reward."""
        made, config = [], GenerateConfig(max_new_tokens=self.answer_tokens, temperature=1.0, top_p=1.0, top_k=0)
        for batch in batches:
            prompts = batch.prompts()
            seeds = [context.seed_of(sample) for sample in batch.sample_ids]
            answers = context.generate(model, prompts, config, seeds)
            texts = [str(context.tokenizer.decode([*each.prompt_ids])) for each in answers]
            completions = [
                Completion(
                    prompt=text, answer=each.text, prompt_ids=each.prompt_ids, ids=each.ids, cut=each.cut,
                    columns=columns,
                )
                for text, each, columns in zip(texts, answers, batch.columns, strict=True)
            ]  # fmt: skip
            rows = [([*each.prompt_ids, *each.ids], len(each.prompt_ids)) for each in completions]
            said = context.batch(rows, batch.sample_ids, prompts)
            said.extra = {"rewards": context.score(completions).nan_to_num(0.0).sum(1)}
            made.append(said)
        return made

    def update(self, number: int, prepared: Sequence[Batch], context: StageContext) -> Sequence[Batch]:
        """All answers."""
        return prepared

    def loss(self, model: nn.Module, batch: Batch, context: StageContext) -> StageLoss:
        """The sum over answers of minus their reward times their log-probability."""
        assert batch.target_sequence is not None
        rewards_S = batch.extra["rewards"]
        rewards_N = rewards_S.index_select(0, batch.target_sequence)
        total = -(rewards_N * context.token_logps(model, batch)).sum()
        return StageLoss(total=total, metrics={"reward": rewards_S.sum()})


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
