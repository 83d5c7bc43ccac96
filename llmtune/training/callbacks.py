"""Between the steps: log, evaluate, keep the best, save, and stop when asked to."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch

from llmtune import __version__
from llmtune.contract.errors import PlanError, listed
from llmtune.contract.records import Evaluated, Event, Saved, StepDone
from llmtune.data.batch_loader import evaluation_batches
from llmtune.data.stream_loader import StreamLoader
from llmtune.distributed.fsdp2 import reshard
from llmtune.distributed.ranks import total
from llmtune.training import checkpoint
from llmtune.training.loop import LossScale, StepStats, evaluate
from llmtune.training.run_folder import plain
from llmtune.training.save import write_adapter

if TYPE_CHECKING:
    from llmtune.planning.plan import Plan
    from llmtune.training.log import Loggers
    from llmtune.training.objective import Objective


class StopRequest:
    """SIGTERM and Ctrl-C set a flag; the run saves at the next step and ends. A second Ctrl-C ends it at once."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        import threading

        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._set)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _set(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True


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
    tokens: int = 0
    window: list[StepStats] = field(default_factory=list)
    best_value: float | None = None
    best_step: int | None = None
    bad_evaluations: int = 0
    saved_step: int | None = None
    interrupted: bool = False
    stopped_early: bool = False

    def after_step(self, step: int, stats: StepStats) -> bool:
        train = self.plan.recipe.train
        last = step >= self.plan.steps
        self.tokens += stats.tokens
        self.window.append(stats)
        if self.loggers is not None:
            self.loggers.at(step)
        if step % train.logging_steps == 0 or step == 1 or last:
            self.log(step)
        if self.evaluates_at(step, last):
            self.stopped_early = self.evaluate(step)
        # Asked on every step by every rank; at the last one there is nothing left to interrupt.
        self.interrupted = self.asked_to_stop() and not last
        done = last or self.interrupted or self.stopped_early
        regular = train.save_steps is not None and (step % train.save_steps == 0 or done)
        if regular or self.interrupted or self._best_unsaved(step):
            self.save(step)
        return done

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
        mean = {name: sum(s.metrics[name] for s in window) / len(window) for name in window[-1].metrics}
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
            **mean,
        }
        if self.loggers is not None:
            self.loggers.log(step, metrics)
        self.tell(StepDone(step=step, metrics=metrics))

    def evaluates_at(self, step: int, last: bool) -> bool:
        train, data = self.plan.recipe.train, self.plan.data.prepared
        if data.evaluation is None or not len(data.evaluation):
            return False
        match train.eval_strategy:
            case "steps":
                return step % (train.eval_steps or train.logging_steps) == 0 or last
            case "epoch":
                return step % (self.plan.data.batches.order.steps_per_epoch or self.plan.steps) == 0 or last
        return False

    def evaluate(self, step: int) -> bool:
        """Evaluate, remember the best. True if early stopping has run out of patience."""
        plan, train = self.plan, self.plan.recipe.train
        assert plan.data.prepared.evaluation is not None
        samples, feed = plan.data.prepared.evaluation, plan.data.batches
        batches = partial(
            evaluation_batches, samples, per_device=train.per_device_eval_batch_size, ranks=plan.ranks,
            flat=plan.data.batches.flat, pad_id=feed.pad_id, device=plan.device,
        )  # fmt: skip
        sets = samples.by_set() if plan.recipe.data.eval_on_each_dataset else {"": None}
        parts = {name: partial(batches, chosen=chosen) for name, chosen in sets.items()}
        metrics = evaluate(self.objective, parts, plan.device)
        if self.loggers is not None:
            self.loggers.log(step, {"epoch": feed.epoch(step), **metrics})
        self.tell(Evaluated(step=step, metrics=metrics))
        if train.metric_for_best_model not in metrics:
            raise PlanError(
                f'metric_for_best_model: found "{train.metric_for_best_model}", allowed is one of {listed(metrics)}'
            )
        self.judge(step, metrics[train.metric_for_best_model])
        return train.early_stopping_patience is not None and self.bad_evaluations >= train.early_stopping_patience

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
        manifest = checkpoint.Manifest(
            step=step, ranks=plan.ranks.size, rows=plan.data.batches.order.batch, recipe=plain(plan.recipe.resolved),
            plugins=plan.parts.fingerprint(), llmtune=__version__, data=plan.data.digest,
            revision=plan.model.files.revision, numbers=self.state(),
        )  # fmt: skip

        def extra(folder: Path) -> None:
            if plan.model.is_adapter:
                write_adapter(plan.model, folder / "adapter")

        reshard(self.objective)
        folder = checkpoint.save(root, plan.model.module, self.optimizer, manifest, plan.ranks, extra)
        self.saved_step = step
        if plan.ranks.first:
            keep = {folder} | ({checkpoint.step_folder(root, self.best_step)} if self.best_step else set())
            checkpoint.retain(root, plan.recipe.train.save_total_limit, keep)
        self.tell(Saved(step=step, folder=folder))

    def state(self) -> dict[str, Any]:
        """What a continued run must know besides tensors."""
        return {
            "tokens": self.tokens,
            "best_value": self.best_value,
            "best_step": self.best_step,
            "bad_evaluations": self.bad_evaluations,
            "stopped_early": self.stopped_early,
            "window": [asdict(stats) for stats in self.window],
            "loss_scale": self.scaler.state() if self.scaler else None,
            "stream": self.plan.data.batches.cursor() if isinstance(self.plan.data.batches, StreamLoader) else None,
        }

    def restore(self, manifest: checkpoint.Manifest) -> None:
        numbers = manifest.numbers
        self.tokens = numbers["tokens"]
        self.best_value, self.best_step = numbers["best_value"], numbers["best_step"]
        if self.best_step is not None and not self._folder(self.best_step).exists():
            # Continued from another folder's checkpoint: its best step is not here to return to.
            self.best_value = self.best_step = None
        self.bad_evaluations = numbers["bad_evaluations"]
        self.stopped_early = numbers["stopped_early"]
        self.window = [StepStats(**stats) for stats in numbers["window"]]
        self.saved_step = manifest.step
        if self.scaler and numbers.get("loss_scale"):
            self.scaler.restore(numbers["loss_scale"])

    def _folder(self, step: int) -> Path:
        return checkpoint.step_folder(self.plan.output_dir / "checkpoints", step)

    def best_folder(self) -> Path | None:
        """The best checkpoint, if the recipe wants it at the end and it is not the last step's weights."""
        if not self.plan.recipe.train.load_best_model_at_end or self.best_step is None:
            return None
        return self._folder(self.best_step)

    def tell(self, event: Event) -> None:
        """Let observers watch; what they raise is reported and changes nothing."""
        if not self.plan.ranks.first:
            return
        for observer in self.observers:
            try:
                observer(event)
            except Exception as error:
                import sys

                print(f"llmtune: an observer failed on {event.kind}: {type(error).__name__}: {error}", file=sys.stderr)
