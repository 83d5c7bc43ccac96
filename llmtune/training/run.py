"""One process of a training run, from the recipe to the saved model. With `loop.py` this is the whole story."""

from __future__ import annotations

from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.contract.errors import LlmtuneError, PlanError
from llmtune.data.stream_loader import StreamLoader
from llmtune.distributed.context_parallel import check_split
from llmtune.distributed.fsdp2 import reshard
from llmtune.distributed.ranks import (
    check_agreement,
    fail_together,
    first_does,
    from_all,
    join,
    pick_device,
    ranks_from_environment,
    tell_the_others,
    wait_for_all,
)
from llmtune.inference.chat import GenerateConfig, answer
from llmtune.planning.plan import Plan, make_plan
from llmtune.training import checkpoint
from llmtune.training import run_folder as rundir
from llmtune.training.building import build_objective
from llmtune.training.callbacks import StopRequest, TrainingCallbacks
from llmtune.training.isolation import check_isolation
from llmtune.training.lock import LAG_S, FolderLock, launcher, require_shared
from llmtune.training.log import Loggers, read_metrics
from llmtune.training.loop import LossScale, Training, train
from llmtune.training.optim import make_optimizer
from llmtune.training.out_of_memory import explain_out_of_memory
from llmtune.training.save import write_result

if TYPE_CHECKING:
    from llmtune.recipe.recipe import Recipe
    from llmtune.recipe.registry import Registry
    from llmtune.training.objective import Objective


@dataclass
class Outcome:
    """What a process knows at the end."""

    plan: Plan
    status: str
    """`done`, or `interrupted` (saved; run the same command again)."""
    objective: Objective
    answers: list[tuple[str, str, str]] = field(default_factory=list)
    """(question, answer before, answer after) of the recipe's `sample_prompts`."""


def train_here(recipe: Recipe, registry: Registry, show: Any = print) -> Outcome:
    """Plan, build, train and save in this process, as one of the ranks that the environment names.

    Data are tokenised before any process group exists, so that no collective can time out on it.
    """
    ranks = ranks_from_environment()
    try:
        device = pick_device(recipe.train.device, ranks.local_rank)
        plan = make_plan(recipe, registry, ranks, device)
    except (LlmtuneError, OSError) as error:
        tell_the_others(error, recipe.train.ddp_timeout)
        raise
    with closing(plan.feed) if isinstance(plan.feed, StreamLoader) else nullcontext() as stream:
        if stream is not None:
            stream.hire()
        join(ranks, device, recipe.train.ddp_timeout)
        fail_together(None)
        check_agreement(plan.facts())
        return _train(plan, registry, show if ranks.first else _nothing)


def _nothing(*_: object) -> None:
    """Ranks other than the first say nothing."""


def _train(plan: Plan, registry: Registry, show: Any) -> Outcome:
    lock = FolderLock(plan.output_dir)
    try:
        start = _prepare(plan, lock)
        show(f"{plan}\n\nLoading weights")
        try:
            outcome = _run(plan, registry, start, show)
        except BaseException as error:
            if plan.ranks.first:
                rundir.write_status(plan.output_dir, "failed", error=f"{type(error).__name__}: {error}")
            raise
        if plan.ranks.first:
            rundir.write_status(plan.output_dir, outcome.status, answers=outcome.answers)
        return outcome
    finally:
        lock.release()


def _prepare(plan: Plan, lock: FolderLock) -> tuple[Path, checkpoint.Manifest] | None:
    """Claim the output folder for this run, on every machine; the checkpoint to continue from, if there is one."""
    launchers = {name for name in from_all(launcher()) if name}

    def prepare() -> rundir.Start:
        rundir.check_folder(plan, launchers)
        lock.take(LAG_S if launchers else 0.0)
        return rundir.prepare_folder(plan, launchers)

    start = _shared(prepare, plan)
    if plan.ranks.size > 1:
        require_shared(plan.output_dir, plan.ranks.first)
    if start.rows:
        rundir.keep_rows(plan, start.rows)
    return start.found


def _run(plan: Plan, registry: Registry, found: tuple[Path, checkpoint.Manifest] | None, show: Any) -> Outcome:
    recipe = plan.recipe.train
    assert plan.feed is not None
    first_step = found[1].step if found else 0
    if isinstance(plan.feed, StreamLoader):  # reads and tokenises while the weights are loaded
        once = plan.ranks.rank == plan.ranks.batch_rank * plan.ranks.size // plan.ranks.batch_ranks
        plan.feed.quarantine = plan.output_dir / rundir.QUARANTINE if once else None
        plan.feed.start(first_step, found[1].numbers["stream"] if found else None)
    with explain_out_of_memory(plan, lambda: "while weights were loaded"):
        objective = build_objective(plan)
    optimizer = make_optimizer(plan.parts.one("optim_config").built, plan.model, recipe.learning_rate)
    scaler = LossScale() if plan.precision.scaled else None
    if plan.flat:
        check_isolation(objective, plan.device, plan.recipe.data.isolates)
    if plan.ranks.layout.context > 1:
        check_split(objective, plan.ranks, plan.device)
    before = sample_answers(plan, objective)
    with StopRequest() as stop:
        loggers = start_loggers(plan, first_step)
        keeper = TrainingCallbacks(plan, objective, optimizer, loggers, registry.observers(), stop, scaler)
        if found:
            reshard(objective)
            checkpoint.restore(found[0], found[1], plan.model, optimizer, plan.ranks)
            keeper.restore(found[1])
            show(f"Continuing after step {first_step} from {found[0]}")
        training = Training(
            objective=objective, optimizer=optimizer, feed=plan.feed,
            schedule=plan.parts.one("lr_scheduler_config").built,
            distribute=plan.parts.one("dist_config").built, ranks=plan.ranks, device=plan.device,
            total_steps=plan.steps, warmup_steps=plan.warmup_steps,
            max_grad_norm=recipe.max_grad_norm or 0.0, seed=recipe.seed, scaler=scaler, first_step=first_step,
        )  # fmt: skip
        try:
            if not keeper.stopped_early:
                with explain_out_of_memory(plan, lambda: f"step {training.at}"):
                    train(training, keeper)
        finally:
            if loggers is not None:
                loggers.finish()
    if keeper.interrupted:
        return Outcome(plan, "interrupted", objective)
    if isinstance(plan.feed, StreamLoader):
        show(plan.feed.summary())
    reshard(objective)
    if best := keeper.best_folder():
        checkpoint.restore(best, checkpoint.verify(best), plan.model, None, plan.ranks)
        show(f"The best weights are those of step {keeper.best_step}")
    after = sample_answers(plan, objective)
    reshard(objective)
    write_result(plan, plan.output_dir / "model")
    if plan.ranks.first and recipe.plot_loss:
        from llmtune.training.plot import plot_metrics

        plot_metrics(read_metrics(plan.output_dir), plan.output_dir / "loss.png")
    wait_for_all()
    answers = [(question, old, new) for question, old, new in zip(recipe.sample_prompts, before, after, strict=True)]
    return Outcome(plan, "done", objective, answers)


def _shared(work: Any, plan: Plan) -> Any:
    """Do something on rank 0; every rank gets the result, or raises the same error."""

    def guarded() -> Any:
        try:
            return work()
        except OSError as error:
            raise PlanError(f"output_dir: {plan.output_dir} cannot be used ({error}); name another folder") from error

    return first_does(guarded)


def start_loggers(plan: Plan, first_step: int) -> Loggers | None:
    """metrics.jsonl, the console and the recipe's loggers, on rank 0."""
    if not plan.ranks.first:
        return None
    loggers = Loggers(
        plan.output_dir,
        [part.built for part in plan.parts.at("logger_config")],
        total_steps=plan.steps,
        resume_step=first_step,
    )
    loggers.start(rundir.plain(plan.recipe.resolved))
    return loggers


def sample_answers(plan: Plan, objective: Objective) -> list[str]:
    """Greedy answers to the recipe's `sample_prompts`. Collective: every rank generates the same."""
    data = plan.recipe.data
    config = GenerateConfig(do_sample=False, max_new_tokens=64, default_system=data.default_system)
    objective.eval()
    answers = [
        objective(
            lambda question=question: answer(plan.model, plan.tokenizer, question, config, dict(data.template_kwargs))
        )
        for question in plan.recipe.train.sample_prompts
    ]
    objective.train()
    return answers
