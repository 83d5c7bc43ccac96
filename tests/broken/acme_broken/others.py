"""Wrong parts that edit no model: stages, optimisers, schedules, and the like."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmtune import (
    Batch,
    LoggerStart,
    ParallelDims,
    RunContext,
    RunStatus,
    SampleAnswer,
    StageContext,
    StageLoss,
    TensorReader,
)


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
    in_host_memory = False

    def layout(self, ranks: int) -> ParallelDims:
        return ParallelDims(shard=max(1, ranks - 1))


class SumsGradients:
    """Whole copies on all ranks, whose gradients are summed: the loop wants their mean."""

    in_host_memory = False

    def layout(self, ranks: int) -> ParallelDims:
        return ParallelDims(shard=ranks)

    def before_backward(self, root: nn.Module, last: bool) -> None:
        for parameter in root.parameters():
            if parameter.requires_grad and last and not parameter.is_meta and not hasattr(parameter, "acme"):
                parameter.acme = parameter.register_post_accumulate_grad_hook(self._sum)

    def _sum(self, parameter: Tensor) -> None:
        torch.distributed.all_reduce(parameter.grad)

    def apply(self, root: nn.Module, layers: Sequence[nn.Module], mesh: Any, context: RunContext) -> None:
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


class LeavesHome(_Logger):
    """Made as for the former contract: it knows the run's folder alone."""


class _Follows:
    """Keeps to its own folder."""

    def begin(self, start: LoggerStart) -> None:
        self.folder, self.open = start.folder, True

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        pass

    def finish(self) -> None:
        pass


class HopesForTheBest(_Follows):
    def ended(self, status: RunStatus) -> None:
        self.state = {"done": "FINISHED", "failed": "FAILED"}[status]


class QuotesTheFirstWord(_Follows):
    def log_samples(self, step: int, samples: Sequence[SampleAnswer]) -> None:
        self.words = [sample.answer.split()[0] for sample in samples]


class PaintsOnce(_Follows):
    def log_picture(self, step: int, name: str, png: bytes) -> None:
        with (self.folder / f"{name}.png").open("xb") as file:
            file.write(png)


class WantsTheMainThread(_Follows):
    def begin(self, start: LoggerStart) -> None:
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)


class ShiftsRows:
    whole = False

    def fetch(self, reader: TensorReader, key: str, rows: tuple[int, int] | None) -> Tensor:
        return reader.read(key) if rows is None else reader.rows(key, max(0, rows[0] - 1), max(0, rows[1] - 1))


class Rounds:
    whole = True

    def fetch(self, reader: TensorReader, key: str, rows: tuple[int, int] | None) -> Tensor:
        return reader.read(key).bfloat16().float()
