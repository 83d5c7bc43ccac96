"""The training loop. Its arithmetic reads top to bottom in `train`; nothing may sit between the steps."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.distributed.tensor import DTensor

from llmtune.contract.errors import DivergedError, PlanError, listed, noting
from llmtune.contract.losses import COUNT, means
from llmtune.contract.optimizers import ChangesWhatTrains
from llmtune.contract.stages import RollsOut
from llmtune.distributed.fsdp2 import reshard
from llmtune.distributed.placement import local, seeded_step
from llmtune.distributed.ranks import Ranks, total
from llmtune.training.measure import measured_batch
from llmtune.training.objective import prepared

if TYPE_CHECKING:
    from torch import Tensor, nn

    from llmtune.contract.losses import StageLoss
    from llmtune.contract.records import Distribute
    from llmtune.contract.stages import Batch
    from llmtune.data.batch_loader import BatchLoader
    from llmtune.recipe.parts import BuiltPlugin
    from llmtune.training.layerwise import LayerwiseUpdates
    from llmtune.training.objective import Objective
    from llmtune.training.router_balance import RouterBalance
    from llmtune.training.schedule import WarmedSchedule

TOKENS = ""
"""Name of the count of tokens among a step's sums, which no metric of a stage can have."""
ROUTERS = "router_aux_loss"
"""The metric that says how unequally busy experts are: the number that is chosen for a token, where equally."""


class Watcher(Protocol):
    """What the loop tells the outside between steps: log, evaluate, save. It may stop the run, nothing else."""

    def after_step(self, step: int, stats: StepStats) -> bool:
        """Called after each optimiser step (1-based number). True stops the run."""
        ...


@dataclass(frozen=True)
class StepStats:
    """Plain numbers of one optimiser step, the same on every rank."""

    loss: float
    """Mean over the step's weight, for sft nats per supervised token."""
    grad_norm: float
    """Global L2 norm before clipping."""
    learning_rate: float
    tokens: int
    seconds: float
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass
class Training:
    """All that a step needs."""

    objective: Objective
    optimizer: torch.optim.Optimizer
    optimizer_label: str
    """The plugin that made it, for errors."""
    schedule: WarmedSchedule
    distribute: Distribute
    batches: BatchLoader
    ranks: Ranks
    device: torch.device
    total_steps: int
    warmup_steps: int
    max_grad_norm: float
    seed: int
    scaler: LossScale | None = None
    balance: RouterBalance | None = None
    """Where the balance of a model's routers is part of the loss."""
    layerwise: LayerwiseUpdates | None = None
    """Where the optimiser updates during the backward pass."""
    first_step: int = 0
    at: int = 0
    """The step that is being done, from 1."""
    done: int = 0
    """The last step whose updates are in the weights."""

    def __post_init__(self) -> None:
        self.parameters = [parameter for parameter in self.objective.parameters() if parameter.requires_grad]
        """All that ever train; an optimiser may change which do at a time."""
        self.done = self.first_step


def train(run: Training, watcher: Watcher) -> int:
    """Run optimiser steps `first_step .. total_steps`; returns the number of the last one done.

    The loss is a sum over the micro-batches of all ranks, divided by the weight of the whole step before the first
    backward pass, so the gradient does not depend on how a step is split. Raises DivergedError, on all ranks and before
    the update, for a loss or gradient that is not finite.
    """
    run.objective.train()
    step = run.first_step
    while step < run.total_steps:
        started, run.at = time.perf_counter(), step + 1
        micros = list(prepared(run.objective, run.batches.step(step, run.device), step))
        begin_step(run, step)
        rate = set_learning_rate(run, step)
        tokens, done = tokens_of(run, micros, step), list[StepStats]()
        while len(done) < updates_of(run.objective):
            part = chosen(run.objective, len(done), micros)
            stats = update(run, part, step, len(done), 0.0 if done else tokens)
            if stats is not None:
                done.append(stats)
        for parameter in run.parameters:  # all train for whoever saves or looks between the steps
            parameter.requires_grad_(True)
        step = run.done = step + 1
        if watcher.after_step(step, summary(done, rate, time.perf_counter() - started)):
            break
        run.objective.train()
    return step


def begin_step(run: Training, step: int) -> None:
    """Let an optimiser that trains a part at a time choose it."""
    if isinstance(run.optimizer, ChangesWhatTrains):
        # FSDP2 hands `requires_grad` on when it gathers, and an evaluation leaves the root gathered.
        reshard(run.objective)
        with noting(run.optimizer_label, "at_step"):
            run.optimizer.at_step(step)


def update(run: Training, micros: Sequence[Batch], step: int, number: int, tokens: float) -> StepStats | None:
    """Update the weights once, for the time `number` of this step; `tokens` are this rank's that it adds to the run's.
    None where gradients overflowed in float16, so that it has to be repeated with the smaller scale now set."""
    weight = total(torch.tensor(sum(micro.weight for micro in micros), dtype=torch.float64, device=run.device))
    weight /= run.ranks.dims.tensor  # a tensor group computes one result; it counts once
    with nullcontext() if run.layerwise is None else run.layerwise.updating(len(micros)):
        sums = forward_backward(run, micros, weight, step, number)
    norm = global_norm(run.parameters) if run.layerwise is None else run.layerwise.norm()
    sums[TOKENS] = torch.tensor(tokens, device=run.device, dtype=torch.float64)
    loss, grad_norm, metrics = read_back(run, sums, norm)
    tokens = metrics.pop(TOKENS)
    if run.scaler is not None and run.scaler.overflowed(grad_norm):
        run.optimizer.zero_grad(set_to_none=True)
        return None
    require_finite(run, loss, grad_norm, step, micros)
    clip(run, norm, grad_norm)
    if run.layerwise is None:
        with noting(run.optimizer_label, "step"):
            run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
    return StepStats(loss, grad_norm, 0.0, round(tokens), 0.0, metrics)


def updates_of(objective: Objective) -> int:
    """Updates of the weights in a step."""
    return objective.stage.updates if isinstance(objective.stage, RollsOut) else 1


def chosen(objective: Objective, number: int, micros: Sequence[Batch]) -> Sequence[Batch]:
    """The prepared micro-batches that an update of a step learns from: all, unless the stage makes several updates."""
    if not isinstance(objective.stage, RollsOut):
        return micros
    with noting(objective.stage_label, "update"):
        return objective.stage.update(number, micros, objective.context)


def tokens_of(run: Training, micros: Sequence[Batch], step: int) -> float:
    """What this rank adds to the step's tokens: those of the data, or of what was said to them."""
    if not isinstance(run.objective.stage, RollsOut):
        return run.batches.share_of_tokens(step)
    return float(sum(micro.tokens for micro in micros))


def summary(done: Sequence[StepStats], rate: float, seconds: float) -> StepStats:
    """The step that some updates make together: means of their losses and metrics, the gradient norm of the last."""
    loss = sum(stats.loss for stats in done) / len(done)
    tokens = sum(stats.tokens for stats in done)
    return StepStats(loss, done[-1].grad_norm, rate, tokens, seconds, mean_metrics(done))


def mean_metrics(done: Sequence[StepStats]) -> dict[str, float]:
    """The mean of each metric over those that have it: a step may have no rows that it is about."""
    found: dict[str, list[float]] = {}
    for name, value in (pair for stats in done for pair in stats.metrics.items()):
        found.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in found.items()}


def forward_backward(
    run: Training, micros: Sequence[Batch], weight: Tensor, step: int, update: int = 0
) -> dict[str, Tensor]:
    """All micro-batches of an update. Returns detached sums over this rank's share, divided by `weight`."""
    sums: dict[str, Tensor] = {}
    # FSDP2 averages gradients over the ranks of its mesh; times their number, the mean is the sum we want.
    factor = run.ranks.size // run.ranks.dims.tensor * (run.scaler.scale if run.scaler else 1.0)
    divisor = torch.where(weight > 0, weight, 1.0).float()

    def forward(number: int) -> StageLoss:
        # Dropout is a function of (seed, step, micro-batch, rank): nothing to save, nothing that evaluation disturbs.
        seeded_step(run.seed, step, number + update * len(micros), run.ranks.stream)
        return run.objective(micros[number])

    if run.balance is not None:
        run.balance.begin_step(forward, micros)
    for number, micro in enumerate(micros):
        run.distribute.before_backward(run.objective, number == len(micros) - 1)
        with nullcontext([]) if run.balance is None else run.balance.share(micro) as balance:
            result = forward(number)
        loss = result.total / divisor
        if run.balance is not None:
            loss = loss + run.balance.coefficient * balance[0]
            sums[ROUTERS] = sums.get(ROUTERS, 0) + balance[0].detach()
        if run.layerwise is not None:
            run.layerwise.require_finite(loss, step)
        if not loss.requires_grad:
            raise PlanError(
                "model: a batch reaches nothing that trains, as rows without pictures do where a projector or towers "
                "train alone; take rows that show what these read, or train the language model, too"
            )
        (loss * factor).backward()
        found = result.sums()
        for name, value in found.items():
            has_own_count = name.endswith(COUNT) or name + COUNT in found
            share = value.detach() if has_own_count else value.detach() / divisor
            sums[name] = sums[name] + share if name in sums else share
    return sums


def set_learning_rate(run: Training, step: int) -> float:
    """Warm-up, then the schedule, as transformers defines them; returns the rate of the first group."""
    factor = run.schedule.factor(step, run.total_steps, run.warmup_steps)
    for group in run.optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
    return float(run.optimizer.param_groups[0]["lr"])


def global_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """L2 norm of all gradients over all ranks and shards, each number counted once; a scalar on the device."""
    # Gradients that are spread alike are summed together: torch cannot mix meshes in one operation.
    alike: dict[Any, list[Tensor]] = {}
    for grad in (p.grad for p in parameters if p.grad is not None):
        spread = (grad.device_mesh, grad.placements) if isinstance(grad, DTensor) else None
        alike.setdefault(spread, []).append(grad)
    norms = [torch.nn.utils.get_total_norm(grads) for grads in alike.values()]
    whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    return whole[0] if len(whole) == 1 else torch.linalg.vector_norm(torch.stack(whole))


def read_back(run: Training, sums: Mapping[str, Tensor], norm: Tensor) -> tuple[float, float, dict[str, float]]:
    """The step's one wait for the device: it is what lets a bad update be stopped before it happens."""
    names = list(sums)
    packed = total(torch.stack([sums[name].double() for name in names])) / run.ranks.dims.tensor
    *values, grad_norm = torch.cat([packed, norm.double().reshape(1).to(packed.device)]).tolist()
    numbers = dict(zip(names, values, strict=True))
    scale = run.scaler.scale if run.scaler else 1.0
    numbers = means(numbers)
    return numbers.pop("loss"), grad_norm / scale, numbers


def require_finite(run: Training, loss: float, grad_norm: float, step: int, micros: Sequence[Batch]) -> None:
    """Stop a run that would otherwise write NaN into its weights."""
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return
    rows = listed([run.batches.origin(sample) for micro in micros for sample in micro.sample_ids], 16)
    good = "stopped before the update, so the weights and the last checkpoint are good"
    if run.layerwise is not None:
        good = "layers were updated during the backward pass, so the weights are spoilt; the last checkpoint is good"
    raise DivergedError(
        f"step {step + 1}: the loss is {loss} and the gradient norm {grad_norm}; {good}. Rows on this rank: {rows}. "
        "Lower learning_rate, or look at these rows"
    )


def clip(run: Training, norm: Tensor, grad_norm: float) -> None:
    """Scale gradients to `max_grad_norm` (0: never), and undo loss scaling."""
    scale = run.scaler.scale if run.scaler else 1.0
    limit = run.max_grad_norm
    factor = min(1.0, limit / (grad_norm + 1e-6)) if limit else 1.0
    if factor * scale == 1.0 and scale == 1.0:
        return
    torch._foreach_mul_([local(p.grad) for p in run.parameters if p.grad is not None], factor / scale)


class LossScale:
    """Dynamic loss scaling for float16 (Micikevicius et al. 2018, https://arxiv.org/abs/1710.03740)."""

    def __init__(self, scale: float = 2.0**15, grow_after: int = 500) -> None:
        self.scale = scale
        self.grow_after = grow_after
        self.good_steps = 0

    def overflowed(self, grad_norm: float) -> bool:
        """Whether this step must be repeated with the smaller scale now set."""
        if math.isfinite(grad_norm):
            self.good_steps += 1
            if self.good_steps % self.grow_after == 0:
                self.scale *= 2.0
            return False
        self.good_steps = 0
        self.scale /= 2.0
        if self.scale < 1.0:
            raise DivergedError(
                "float16 gradients overflow even without loss scaling; use bf16 or a lower learning_rate"
            )
        return True

    def state(self) -> dict[str, Any]:
        return {"scale": self.scale, "good_steps": self.good_steps}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.scale, self.good_steps = state["scale"], state["good_steps"]


@torch.no_grad()
def evaluate(
    objective: Objective,
    parts: Mapping[str, Callable[[], Iterable[Batch]]],
    device: torch.device,
    leave: Callable[[], bool] = lambda: False,
    evaluators: Sequence[BuiltPlugin] = (),
) -> dict[str, float] | None:
    """Mean loss (and the stage's metrics) per unit of weight over all ranks' batches, and what `evaluators` measure:
    `eval_loss` of all parts, and `eval_<name>_loss` of each where there are several. None if `leave`, asked before each
    batch, says to end early."""
    objective.eval()
    metrics: dict[str, float] = {}
    whole: dict[str, float] = {}
    for part, batches in parts.items():
        sums: dict[str, Tensor] = {}
        weight = torch.zeros((), dtype=torch.float64, device=device)
        for batch in portions(objective, batches()):
            if leave():
                objective.train()
                return None
            result = objective(batch)
            weight += batch.weight
            for name, value in {**result.sums(), **measured_batch(objective, batch, evaluators)}.items():
                sums[name] = sums.get(name, 0) + value.double()
        found = total(torch.stack([*sums.values(), weight])).tolist()
        numbers = dict(zip([*sums, ""], found, strict=True))
        whole = {name: whole.get(name, 0.0) + value for name, value in numbers.items()}
        if len(parts) > 1:
            metrics |= _means(numbers, f"eval_{part}_")
    objective.train()
    return _means(whole, "eval_") | metrics


def portions(objective: Objective, batches: Iterable[Batch]) -> Iterable[Batch]:
    """Batches to evaluate on, as the stage prepares them: one after the other where it lets the model answer, so that
    a request to stop need not wait for all answers; else all together."""
    if not isinstance(objective.stage, RollsOut):
        return prepared(objective, batches)
    return (made for batch in batches for made in prepared(objective, [batch]))


def _means(sums: Mapping[str, float], prefix: str) -> dict[str, float]:
    """Sums over the weight, which goes by the empty name."""
    found = means({name: value for name, value in sums.items() if name}, sums[""] or 1.0)
    return {prefix + name: value for name, value in found.items()}
