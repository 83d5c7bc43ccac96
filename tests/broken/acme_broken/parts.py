"""What the wrong parts do. Each class is called like its plugin and is wrong in what it is named for."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from acme_tuning import Ia3Config, Int8RowsConfig
from acme_tuning.ia3 import Ia3, Rescaled
from acme_tuning.int8_rows import Int8Linear, Int8Rows, RowsRule, quantise
from torch import Tensor, nn
from torch.nn import functional as F

from llmtune import Batch, Change, Layout, Part, Situation, StageContext, StageLoss, TensorReader


class _Rows(Int8Rows):
    rule: Any = RowsRule

    def __init__(self) -> None:
        super().__init__(Int8RowsConfig())

    def apply(self, model: nn.Module, situation: Situation) -> Change:
        change = super().apply(model, situation)
        return replace(change, rules=[self.rule(rule.layer, rule.dtype) for rule in change.rules])


class SaysNoWord(_Rows):
    pass


class ForgetsARule(_Rows):
    def apply(self, model: nn.Module, situation: Situation) -> Change:
        change = super().apply(model, situation)
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
    def apply(self, model: nn.Module, situation: Situation) -> Change:
        change = super().apply(model, situation)
        for module in model.modules():
            if isinstance(module, Int8Linear):
                module.__class__ = _Louder
        return change


class _Gains(Ia3):
    def __init__(self) -> None:
        super().__init__(Ia3Config())


class TrainsTheBase(_Gains):
    def apply(self, model: nn.Module, situation: Situation) -> Change:
        return replace(super().apply(model, situation), trainable=lambda name: "layers.1" in name)


class TrainsWhatItDoesNotUse(_Gains):
    def apply(self, model: nn.Module, situation: Situation) -> Change:
        change = super().apply(model, situation)
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
    def apply(self, model: nn.Module, situation: Situation) -> Change:
        change = super().apply(model, situation)
        for module in model.modules():
            if isinstance(module, Rescaled):
                module.__class__ = _Drifting
        return change


class StartsAtRandom(_Gains):
    def apply(self, model: nn.Module, situation: Situation) -> Change:
        def settle(model: nn.Module) -> None:
            for name, parameter in model.named_parameters():
                if name.endswith(".gain"):
                    parameter.data.add_(torch.randn_like(parameter), alpha=0.1)

        return replace(super().apply(model, situation), settle=[settle])


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
    def apply(self, model: nn.Module, situation: Situation) -> Change:
        change = super().apply(model, situation)
        for module in model.modules():
            if isinstance(module, Rescaled):
                module.__class__ = _Counting
        return change


class OpensOtherwise(_Gains):
    def apply(self, model: nn.Module, situation: Situation) -> Change:
        change = super().apply(model, situation)
        if situation.mode == "infer":
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

    def apply(self, model: nn.Module, situation: Situation) -> Change:
        def op(hidden_ND: Tensor, head: nn.Module, targets_N: Tensor, transform: Any) -> Tensor:
            return F.cross_entropy(head(_Scaled.apply(hidden_ND)).float(), targets_N, reduction="sum")

        return Change(ops={"linear_cross_entropy": op}, report=["one loss"])


class WrongAnswer:
    def apply(self, model: Any, situation: Situation) -> Change:
        norm = model.model.norm
        norm.__class__ = type("Fast", (type(norm),), {"forward": lambda self, x: x * self.weight})
        return Change(report=["one norm"])


class DoesNothing:
    def apply(self, model: nn.Module, situation: Situation) -> Change:
        return Change(report=["not used"])


def _all_see_all(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **more: Any) -> Any:
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
    plain = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=more.get("scaling"))
    return plain.transpose(1, 2), None


class MixesDocuments:
    """Attention over the whole row, whatever the documents in it."""

    def apply(self, model: nn.Module, situation: Situation) -> Change:
        from transformers import AttentionInterface

        AttentionInterface.register("acme_all_see_all", _all_see_all)
        return Change(attention="acme_all_see_all", report=["attention"])


class _Stage:
    def loss(self, model: nn.Module, batch: Batch, context: StageContext) -> StageLoss:
        return StageLoss(total=self.total(model, batch, context))

    def total(self, model: Any, batch: Batch, context: StageContext) -> Tensor:
        return context.next_token_loss(model, batch)


class TakesTheMean(_Stage):
    def total(self, model: Any, batch: Batch, context: StageContext) -> Tensor:
        return super().total(model, batch, context) / batch.weight


class DetachesAPart(_Stage):
    def total(self, model: Any, batch: Batch, context: StageContext) -> Tensor:
        plain = super().total(model, batch, context)
        return plain + plain.detach() * plain / 100


class CountsPadding(_Stage):
    def total(self, model: Any, batch: Batch, context: StageContext) -> Tensor:
        return super().total(model, batch, context) + 0.01 * model(**batch.model_inputs()).logits.float().square().sum()


class NudgesWeights(_Stage):
    def total(self, model: Any, batch: Batch, context: StageContext) -> Tensor:
        model.model.norm.weight.data.mul_(0.99)
        return super().total(model, batch, context)


class Climbs(_Stage):
    def total(self, model: Any, batch: Batch, context: StageContext) -> Tensor:
        down = super().total(model, batch, context)
        return 2 * down.detach() - down


class LosesRanks:
    alone = False

    def layout(self, ranks: int) -> Layout:
        return Layout(shard=max(1, ranks - 1))


class SumsGradients:
    """Whole copies on all ranks, whose gradients are summed: the loop wants their mean."""

    alone = False

    def layout(self, ranks: int) -> Layout:
        return Layout(shard=ranks)

    def before_backward(self, root: nn.Module, last: bool) -> None:
        for parameter in root.parameters():
            if parameter.requires_grad and last and not parameter.is_meta and not hasattr(parameter, "acme"):
                parameter.acme = parameter.register_post_accumulate_grad_hook(self._sum)

    def _sum(self, parameter: Tensor) -> None:
        torch.distributed.all_reduce(parameter.grad)

    def apply(self, root: nn.Module, layers: Sequence[nn.Module], mesh: Any, situation: Situation) -> None:
        """Everything stays whole."""


class _Descent(torch.optim.Optimizer):
    """Plain descent, with a running mean; `spoil` names what is wrong."""

    def __init__(self, groups: Any, lr: float, spoil: str) -> None:
        super().__init__(groups, {"lr": lr, "decay": 0.0})
        self.own_rate, self.spoil, self.means = lr, spoil, {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            rate = self.own_rate if self.spoil == "rate" else group["lr"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                means = self.means.setdefault(parameter, {}) if self.spoil == "state" else self.state[parameter]
                mean = means.setdefault("mean", torch.zeros_like(parameter))
                mean.mul_(0.5).add_(parameter.grad)
                parameter.mul_(1 - rate * group["decay"])
                parameter.add_(mean, alpha=rate if self.spoil == "sign" else -rate)


class _Factory:
    spoil = ""

    def create(self, decay: Any, no_decay: Any, lr: float) -> torch.optim.Optimizer:
        lists = [[p for _, p in decay], [p for _, p in no_decay]]
        groups = [{"params": lists[0], "decay": 0.1}, {"params": lists[1], "decay": 0.1 * (self.spoil == "decay")}]
        return _Descent(groups[: 1 if self.spoil == "drop" else 2], lr, self.spoil)


class HasItsOwnRate(_Factory):
    spoil = "rate"


class DecaysAll(_Factory):
    spoil = "decay"


class HidesItsState(_Factory):
    spoil = "state"


class GoesUphill(_Factory):
    spoil = "sign"


class DropsVectors(_Factory):
    spoil = "drop"


class _Schedule:
    def factor(self, step: int, total_steps: int, warmup_steps: int) -> float:
        return 1.0 - min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))


class Undocumented(_Schedule):
    pass


class OutOfBounds(_Schedule):
    pass


class Mutable(_Schedule):
    pass


class DrawsNumbers(_Schedule):
    pass


class SumsUpNothing(_Schedule):
    pass


class HasNoEntry(_Schedule):
    pass


class Doubles(_Schedule):
    def factor(self, step: int, total_steps: int, warmup_steps: int) -> float:
        return 2 * super().factor(step, total_steps, warmup_steps)


class StartsLow(_Schedule):
    def factor(self, step: int, total_steps: int, warmup_steps: int) -> float:
        return 0.5 * super().factor(step, total_steps, warmup_steps)


class CountsCalls(_Schedule):
    calls = 0

    def factor(self, step: int, total_steps: int, warmup_steps: int) -> float:
        self.calls += 1
        return 1.0 / self.calls


class DividesByZero(_Schedule):
    def factor(self, step: int, total_steps: int, warmup_steps: int) -> float:
        return 1.0 - (step - warmup_steps) / (total_steps - warmup_steps)


class _Logger:
    def start(self, folder: Path, recipe: Mapping[str, Any]) -> None:
        self.file = (folder / "acme.txt").open("a")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        print(step, dict(metrics), file=self.file)

    def finish(self) -> None:
        if hasattr(self, "file"):
            self.file.close()


class HatesNan(_Logger):
    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        assert all(value == value for value in metrics.values()), "NaN"


class WritesEarly(_Logger):
    def __init__(self) -> None:
        Path("acme-early.txt").write_text("here")


class NeedsAStart(_Logger):
    def finish(self) -> None:
        self.file.close()


class ShiftsRows:
    whole = False

    def fetch(self, reader: TensorReader, key: str, rows: tuple[int, int] | None) -> Tensor:
        return reader.read(key) if rows is None else reader.rows(key, max(0, rows[0] - 1), max(0, rows[1] - 1))


class Rounds:
    whole = True

    def fetch(self, reader: TensorReader, key: str, rows: tuple[int, int] | None) -> Tensor:
        return reader.read(key).bfloat16().float()
