"""Between the steps: log, evaluate, keep the best, save, and stop when asked to."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmtune import __version__
from llmtune.contract.errors import CheckpointError, LlmtuneError, PlanError, listed
from llmtune.contract.events import Evaluated, Event, Saved, StepDone
from llmtune.contract.generation import GenerateConfig
from llmtune.contract.stages import Measures, Remembers, RollsOut
from llmtune.data.batch_loader import evaluation_batches
from llmtune.distributed.fsdp2 import reshard
from llmtune.distributed.ranks import first_does, total
from llmtune.distributed.stopping import StopRequest
from llmtune.planning.decisions import decided
from llmtune.training import checkpoint
from llmtune.training.asked_model import SpreadModel
from llmtune.training.loop import LossScale, StepStats, evaluate, mean_metrics
from llmtune.training.manifest import Manifest, verify
from llmtune.training.measure import measured_model, of_answers, of_batches, of_models
from llmtune.training.measured import peak_memory_bytes
from llmtune.training.predict import answered_and_measured, predictor_of
from llmtune.training.run_folder import plain
from llmtune.training.save import write_adapter
from llmtune.training.step_folders import retain, step_folder

if TYPE_CHECKING:
    from llmtune.planning.plan import Plan
    from llmtune.training.log import Loggers
    from llmtune.training.objective import Objective
    from llmtune.training.predict import Predictor
    from llmtune.training.schedule import WarmedSchedule


IDLE_STEPS = 10
"""So many steps without a gradient are told."""


@dataclass
class TrainingCallbacks:
    """The `Watcher` of a training run."""

    plan: Plan
    objective: Objective
    optimizer: torch.optim.Optimizer
    loggers: Loggers | None
    """Only on rank 0."""
    observers: list[Any]
    stop: StopRequest
    mfu: Callable[[float], float | None] = lambda speed: None
    """Model FLOPs utilisation at so many tokens a second, where it is known."""
    scaler: LossScale | None = None
    origins: Mapping[str, str] = field(default_factory=dict)
    """Hashes that go into each checkpoint, see `llmtune.training.origins`."""
    schedule: WarmedSchedule | None = None
    tokens: int = 0
    window: list[StepStats] = field(default_factory=list)
    best_value: float | None = None
    best_step: int | None = None
    bad_evaluations: int = 0
    saved_step: int | None = None
    interrupted: bool = False
    stopped_early: bool = False
    left_evaluation: bool = False
    """Whether the evaluation of the last step was left, on request or by an error; a continued run begins with it."""
    idle: int = 0
    """Steps in a row, up to the last one, whose gradient was 0."""
    cursor: Mapping[str, Any] | None = None
    """Where a stream was after the last step; reading for the next one moves it on."""

    def after_step(self, step: int, stats: StepStats) -> bool:
        train = self.plan.recipe.train
        last = step >= self.plan.steps
        self.tokens += stats.tokens
        self.cursor = self.plan.data.batches.cursor()
        self.window.append(stats)
        self.notice_idle(step, stats.grad_norm, last)
        if self.loggers is not None:
            self.loggers.at(step)
        if step % train.logging_steps == 0 or step == 1 or last:
            self.log(step)
        if self.evaluates_at(step, last):
            self.evaluate(step)
        return self.end_step(step, last)

    def notice_idle(self, step: int, grad_norm: float, last: bool) -> None:
        """Say once that the steps of a while, or all of a short run, have learnt nothing."""
        self.idle = self.idle + 1 if grad_norm == 0 else 0
        if self.plan.ranks.first and (self.idle == IDLE_STEPS or (last and self.idle == step < IDLE_STEPS)):
            answers = isinstance(self.objective.stage, RollsOut)
            why = "the rewards told no answer from another" if answers else "no row moved the loss"
            steps = f"steps {step - self.idle + 1} to {step}"
            print(f"llmtune: the gradient was 0 in {steps}, so that nothing was learnt: {why}", file=sys.stderr)

    def end_step(self, step: int, last: bool) -> bool:
        """Save where it is time to. True if the run ends here."""
        # Asked on every step by every rank; at the last one there is nothing left to interrupt.
        self.interrupted = self.asked_to_stop() and (self.left_evaluation or not last)
        done = last or self.interrupted or self.stopped_early
        every = save_interval(self.plan)
        regular = every is not None and (step % every == 0 or done)
        if regular or self.interrupted or self._best_unsaved(step):
            self.save(step)
        return done

    def catch_up(self, step: int) -> bool:
        """Do the evaluation that was left at `step`, before a continued run goes on. True if the run ends here."""
        if not self.left_evaluation:
            return self.stopped_early
        self.evaluate(step)
        return self.end_step(step, step >= self.plan.steps)

    def _best_unsaved(self, step: int) -> bool:
        return self.plan.recipe.train.load_best_model_at_end and self.best_step == step and self.saved_step != step

    def asked_to_stop(self) -> bool:
        """Whether any rank was asked to; all ranks answer alike."""
        if self.plan.ranks.size == 1:
            return self.stop.asked
        return bool(total(torch.tensor(float(self.stop.asked), device=self.plan.device)).item())

    def log(self, step: int) -> None:
        """One line of metrics: means over the steps since the last one."""
        window, self.window = self.window, []
        speed = sum(s.tokens for s in window) / max(sum(s.seconds for s in window), 1e-9)
        mfu = self.mfu(speed)
        metrics = {
            "epoch": self.plan.data.batches.epoch(step),
            "loss": sum(stats.loss for stats in window) / len(window),
            "grad_norm": window[-1].grad_norm,
            "learning_rate": window[-1].learning_rate,
            "tokens": self.tokens,
            "tokens_per_second": speed,
            **({} if mfu is None else {"mfu": mfu}),
            "peak_memory_bytes": peak_memory_bytes(self.plan.device),
            **mean_metrics(window),
        }
        if self.loggers is not None:
            self.loggers.log(step, metrics)
        self.tell(StepDone(step=step, metrics=metrics))

    def evaluates_at(self, step: int, last: bool) -> bool:
        every = eval_interval(self.plan)
        return every is not None and (step % every == 0 or last)

    def evaluate(self, step: int) -> None:
        """Evaluate, remember the best, note if early stopping has run out of patience. Left early on request."""
        plan, train = self.plan, self.plan.recipe.train
        assert plan.data.prepared.evaluation is not None
        samples, feed = plan.data.prepared.evaluation, plan.data.batches
        batches = partial(
            evaluation_batches, samples, per_device=train.per_device_eval_batch_size, ranks=plan.ranks,
            flat=plan.data.batches.flat, pad_id=feed.pad_id, device=plan.device, media=feed.media,
        )  # fmt: skip
        sets = samples.by_set() if plan.recipe.data.eval_on_each_dataset else {"": None}
        parts = {name: partial(batches, chosen=chosen) for name, chosen in sets.items()}
        self.left_evaluation = True
        with self.stop.finishing(lambda: f"leaving the evaluation of step {step}, then saving"):
            metrics = evaluate(self.objective, parts, plan.device, self.asked_to_stop, of_batches(plan.parts))
            if metrics is not None and (of_answers(plan.parts) or of_models(plan.parts)):
                engine, config = plan.parts.one("engine_config"), GenerateConfig(**vars(plan.recipe.generation))
                predictor = predictor_of(plan.recipe, plan.model, engine, self.objective, config)
                questions = plan.data.questions
                more = answered_and_measured(of_answers(plan.parts), predictor, questions, self.asked_to_stop)
                metrics = None if more is None else metrics | more | self.benchmarks(predictor)
        self.left_evaluation = metrics is None
        if metrics is None:
            return
        if self.loggers is not None:
            self.loggers.log(step, {"epoch": feed.epoch(step), **metrics})
        self.tell(Evaluated(step=step, metrics=metrics))
        value = metrics.get(train.metric_for_best_model)
        if value is None and not self._reports(train.metric_for_best_model):  # else no row had it this time
            raise PlanError(
                f'metric_for_best_model: found "{train.metric_for_best_model}", allowed is one of {listed(metrics)}'
            )
        self.judge(step, math.nan if value is None else value)
        if self.schedule is not None and value is not None:
            self.schedule.evaluated(value, train.greater_is_better)
        patience = train.early_stopping_patience
        self.stopped_early = patience is not None and self.bad_evaluations >= patience

    def benchmarks(self, predictor: Predictor) -> dict[str, float]:
        """The chief metric of each benchmark of the recipe."""
        asked = SpreadModel(predictor, self.plan.model.module.config)
        found = [measured_model(part, asked) for part in of_models(self.plan.parts)]
        return {f"eval_{name}": next(iter(metrics.values())) for each in found for name, metrics in each.items()}

    def _reports(self, metric: str) -> bool:
        """Whether the stage says that an evaluation can have this metric."""
        stage, name = self.objective.stage, metric.removeprefix("eval_")
        return isinstance(stage, Measures) and (name in stage.metrics or name.startswith("rewards/"))

    def judge(self, step: int, value: float) -> None:
        """Remember the best value; count evaluations that gain less than the threshold. NaN is never better."""
        train = self.plan.recipe.train
        before = self.best_value
        gain = 0.0 if before is None else (value - before if train.greater_is_better else before - value)
        first = before is None and math.isfinite(value)
        if first or gain > 0:
            self.best_value, self.best_step = value, step
        if first or gain > train.early_stopping_threshold:
            self.bad_evaluations = 0
        else:
            self.bad_evaluations += 1

    def save(self, step: int) -> None:
        """Publish a checkpoint, then delete surplus ones. Collective."""
        if self.saved_step == step:
            return
        plan, root = self.plan, self.plan.output_dir / "checkpoints"
        manifest = Manifest(
            step=step, ranks=plan.ranks.size, rows=plan.data.batches.order.batch, recipe=plain(plan.recipe.resolved),
            plugins=plan.parts.fingerprint(), llmtune=__version__, data=plan.data.digest,
            revision=plan.model.files.revision, origins=self.origins,
            numbers={**self.state(), "decided": decided(plan), "aside": sorted(plan.model.ledger.aside)},
        )  # fmt: skip

        def extra(folder: Path) -> None:
            if plan.model.is_adapter:
                write_adapter(plan.model, folder / "adapter")

        reshard(self.objective)
        with self.stop.finishing(lambda: f"saving step {step}"):
            folder = checkpoint.save(root, plan.model.module, self.optimizer, manifest, plan.ranks, extra)
        self.saved_step = step
        if plan.ranks.first:
            keep = {folder} | ({step_folder(root, self.best_step)} if self.best_step else set())
            retain(root, plan.recipe.train.save_total_limit, keep)
        self.tell(Saved(step=step, folder=folder))

    def save_despite(self, error: LlmtuneError, step: int) -> None:
        """Save what was learnt up to `step`, though the next one, or its evaluation, met `error`. Collective."""
        if step:
            self.save(step)
            error.args = (f"{error}; step {step} is saved, and the same command goes on after it",)

    def state(self) -> dict[str, Any]:
        """What a continued run must know besides tensors."""
        return {
            "tokens": self.tokens,
            "best_value": self.best_value,
            "best_step": self.best_step,
            "bad_evaluations": self.bad_evaluations,
            "stopped_early": self.stopped_early,
            "left_evaluation": self.left_evaluation,
            "window": [asdict(stats) for stats in self.window],
            "loss_scale": self.scaler.state() if self.scaler else None,
            "schedule": self.schedule.state() if self.schedule else None,
            "stream": self.cursor,
            **({"stage": dict(stage.state())} if isinstance(stage := self.objective.stage, Remembers) else {}),
        }

    def restore(self, folder: Path, manifest: Manifest) -> None:
        """Go on from the numbers of a checkpoint. Raises CheckpointError where one is missing."""
        numbers = manifest.numbers
        try:
            self.tokens = numbers["tokens"]
            self.best_value, self.best_step = numbers["best_value"], numbers["best_step"]
            self.bad_evaluations = numbers["bad_evaluations"]
            self.stopped_early = numbers["stopped_early"]
            self.window = [StepStats(**stats) for stats in numbers["window"]]
            if isinstance(stage := self.objective.stage, Remembers):
                stage.restore(numbers["stage"])
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{folder}: its manifest lacks {error}, without which a run cannot go on") from error
        self.cursor = numbers.get("stream")
        self.left_evaluation = numbers.get("left_evaluation", False)
        self.saved_step = manifest.step
        if self.scaler and numbers.get("loss_scale"):
            self.scaler.restore(numbers["loss_scale"])
        if self.schedule is not None:
            self.schedule.restore(numbers.get("schedule"))

    def best(self) -> tuple[Path, Manifest] | str | None:
        """The best checkpoint if the recipe wants it at the end; a sentence where it is lost; None where none is
        wanted. The same on every rank. A lost one is forgotten."""
        if not self.plan.recipe.train.load_best_model_at_end or self.best_step is None:
            return None
        folder, step = step_folder(self.plan.output_dir / "checkpoints", self.best_step), self.best_step

        def look() -> Manifest | str:
            try:
                return verify(folder)
            except CheckpointError as error:
                return str(error)

        found = first_does(look)
        if isinstance(found, Manifest):
            return folder, found
        self.best_value = self.best_step = None
        return f"The best weights so far were those of step {step}, which are lost ({found})"

    def tell(self, event: Event) -> None:
        """Let observers watch; what they raise is reported and changes nothing."""
        if not self.plan.ranks.first:
            return
        for observer in self.observers:
            try:
                observer(event)
            except Exception as error:
                print(f"llmtune: an observer failed on {event.kind}: {type(error).__name__}: {error}", file=sys.stderr)


def eval_interval(plan: Plan) -> int | None:
    """Steps from one evaluation to the next, at the last step at the latest; None where nothing is evaluated."""
    train, data = plan.recipe.train, plan.data.prepared
    if data.evaluation is None or not len(data.evaluation):
        return None
    match train.eval_strategy:
        case "steps":
            return plan.every(train.eval_steps) or train.logging_steps
        case "epoch":
            return plan.data.batches.order.steps_per_epoch or plan.steps
    return None


def save_interval(plan: Plan) -> int | None:
    """Steps from one checkpoint to the next, at the last step at the latest; None where none is saved unasked."""
    match plan.recipe.train.save_strategy:
        case "steps":
            return plan.every(plan.recipe.train.save_steps)
        case "epoch":
            return plan.data.batches.order.steps_per_epoch or plan.steps
    return None
