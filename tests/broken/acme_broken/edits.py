"""Wrong parts that edit a model. Each class is called like its plugin and is wrong in what it is named for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from acme_tuning import Ia3Config, Int8RowsConfig
from acme_tuning.ia3 import Ia3, Rescaled
from acme_tuning.int8_rows import Int8Linear, Int8Rows, RowsRule, quantise
from torch import Tensor, nn
from torch.nn import functional as F

from llmtune import ModelEdit, Part, RunContext


class _Rows(Int8Rows):
    rule: Any = RowsRule

    def __init__(self) -> None:
        super().__init__(Int8RowsConfig())

    def apply(self, model: nn.Module, context: RunContext) -> ModelEdit:
        change = super().apply(model, context)
        return replace(change, rules=[self.rule(rule.layer, rule.dtype) for rule in change.rules])


class SaysNoWord(_Rows):
    pass


class ForgetsARule(_Rows):
    def apply(self, model: nn.Module, context: RunContext) -> ModelEdit:
        change = super().apply(model, context)
        return replace(change, rules=change.rules[1:])


@dataclass(frozen=True)
class _Doubled(RowsRule):
    def restore(self, targets: Mapping[str, Tensor]) -> Tensor:
        return 2 * super().restore(targets)


class RestoresTheWrong(_Rows):
    rule = _Doubled


@dataclass(frozen=True)
class _OneScale(RowsRule):
    def convert(self, source: Tensor) -> dict[str, Tensor]:
        scale = source.float().abs().max() / 127
        values = ((source / scale).round().to(torch.int8), scale.expand(source.shape[0]).clone())
        return dict(zip(self.targets, values, strict=True))

    def convert_part(self, part: Part) -> dict[str, Tensor]:
        packed, scale = self.targets
        start, stop = part.rows(packed)
        rows = part.elements(start * part.shape[1], stop * part.shape[1]).reshape(-1, part.shape[1])
        own = rows.abs().max() / 127 if len(rows) else torch.ones(())  # not that of all ranks
        return {packed: (rows / own).round().to(torch.int8), scale: part.concatenate(own.expand(len(rows)).clone())}


class ScalesByItsPiece(_Rows):
    rule = _OneScale


@dataclass(frozen=True)
class _OneRank(RowsRule):
    def convert_part(self, part: Part) -> dict[str, Tensor]:
        packed, scale = self.targets
        start, stop = part.rows(packed)
        rows = part.elements(start * part.shape[1], stop * part.shape[1]).reshape(-1, part.shape[1])
        bytes_, own = quantise(rows)
        return {packed: bytes_, scale: part.concatenate(own) if start == 0 else own}


class GathersOnOneRank(_Rows):
    rule = _OneRank


class _Louder(Int8Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 1.01 * super().forward(x)


class ComputesOtherwise(_Rows):
    def apply(self, model: nn.Module, context: RunContext) -> ModelEdit:
        change = super().apply(model, context)
        for module in model.modules():
            if isinstance(module, Int8Linear):
                module.__class__ = _Louder
        return change


class _Gains(Ia3):
    def __init__(self) -> None:
        super().__init__(Ia3Config())


class TrainsTheBase(_Gains):
    def apply(self, model: nn.Module, context: RunContext) -> ModelEdit:
        return replace(super().apply(model, context), trainable=lambda name: "layers.1" in name)

    def save(self, model: nn.Module, tensors: Mapping[str, Tensor], folder: Path, context: RunContext) -> None:
        super().save(model, {name: gain for name, gain in tensors.items() if ".gain" in name}, folder, context)


class SavesTheBaseToo(_Gains):
    """A sound one: gains, and the last norm, which it saves and leaves where it is."""

    def apply(self, model: nn.Module, context: RunContext) -> ModelEdit:
        return replace(super().apply(model, context), trainable=lambda n: ".gain" in n or n == "model.norm.weight")


class ForgetsToSave(_Gains):
    save: Any = property()


class IsOfNoKind(_Gains):
    kind = "weight"


class TrainsWhatItDoesNotUse(_Gains):
    def apply(self, model: nn.Module, context: RunContext) -> ModelEdit:
        change = super().apply(model, context)
        model.idle = nn.Parameter(torch.empty(3, device="meta"))
        return replace(
            change, fresh={**change.fresh, "idle": nn.init.zeros_}, trainable=lambda n: n == "idle" or ".gain" in n
        )


class _Drifting(Rescaled):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.base.weight.data.mul_(0.999)
        return super().forward(x)


class MovesFrozenWeights(_Gains):
    def apply(self, model: nn.Module, context: RunContext) -> ModelEdit:
        change = super().apply(model, context)
        for module in model.modules():
            if isinstance(module, Rescaled):
                module.__class__ = _Drifting
        return change


class StartsAtRandom(_Gains):
    def apply(self, model: nn.Module, context: RunContext) -> ModelEdit:
        def after_load(model: nn.Module) -> None:
            for name, parameter in model.named_parameters():
                if name.endswith(".gain"):
                    parameter.data.add_(torch.randn_like(parameter), alpha=0.1)

        return replace(super().apply(model, context), after_load=[after_load])


class StartsByRank(_Gains):
    def _start(self, gain: Tensor) -> None:
        gain.fill_(1.0 + 0.1 * int(os.environ.get("RANK", 0)))


class MergesNothing(_Gains):
    def merge(self, model: nn.Module) -> None:
        for name, module in list(model.named_modules()):
            if isinstance(module, Rescaled):
                model.set_submodule(name, module.base)


class _Counting(Rescaled):
    seen = 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += self.training
        return super().forward(x) * (1 + 0.01 * self.seen)


class RemembersOutside(_Gains):
    def apply(self, model: nn.Module, context: RunContext) -> ModelEdit:
        change = super().apply(model, context)
        for module in model.modules():
            if isinstance(module, Rescaled):
                module.__class__ = _Counting
        return change


class OpensOtherwise(_Gains):
    def apply(self, model: nn.Module, context: RunContext) -> ModelEdit:
        change = super().apply(model, context)
        if context.mode == "infer":
            for module in model.modules():
                if isinstance(module, Rescaled):
                    module.register_forward_hook(lambda module, inputs, output: output * 0.9)
        return change


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return 1.1 * grad


class WrongGradient:
    """A loss whose value is right and whose gradient is not."""

    def apply(self, model: nn.Module, context: RunContext) -> ModelEdit:
        def op(hidden_ND: Tensor, head: nn.Module, targets_N: Tensor, transform: Any) -> Tensor:
            return F.cross_entropy(head(_Scaled.apply(hidden_ND)).float(), targets_N, reduction="sum")

        return ModelEdit(ops={"linear_cross_entropy": op}, report=["one loss"])


class WrongAnswer:
    def apply(self, model: Any, context: RunContext) -> ModelEdit:
        norm = model.model.norm
        norm.__class__ = type("Fast", (type(norm),), {"forward": lambda self, x: x * self.weight})
        return ModelEdit(report=["one norm"])


class DoesNothing:
    def apply(self, model: nn.Module, context: RunContext) -> ModelEdit:
        return ModelEdit(report=["not used"])


def _all_see_all(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **more: Any) -> Any:
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
    plain = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=more.get("scaling"))
    return plain.transpose(1, 2), None


class MixesDocuments:
    """Attention over the whole row, whatever the documents in it."""

    def apply(self, model: nn.Module, context: RunContext) -> ModelEdit:
        from transformers import AttentionInterface

        AttentionInterface.register("acme_all_see_all", _all_see_all)
        return ModelEdit(attention="acme_all_see_all", report=["attention"])
