"""One process of a training run, from the recipe to the saved model. With `loop.py` this is the whole story."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from llmtune.contract.errors import DataError, LlmtuneError, PlanError, RewardError, blaming, counted, raise_all
from llmtune.contract.generation import GenerateConfig, ReadsFiles
from llmtune.distributed.fsdp2 import reshard
from llmtune.distributed.ranks import (
    check_agreement,
    fail_together,
    first_does,
    from_all,
    from_first,
    join,
    pick_device,
    ranks_from_environment,
    tell_the_others,
    wait_for_all,
)
from llmtune.distributed.stopping import StopRequest
from llmtune.planning.decisions import as_decided, decided
from llmtune.planning.engine import asks_engine, close_engine, served_model
from llmtune.planning.make import make_plan
from llmtune.planning.memory_formulas import estimate_memory
from llmtune.planning.micro_batch import largest
from llmtune.recipe.parts import collect
from llmtune.terminal import doing, say
from llmtune.training import checkpoint, resume, run_folder
from llmtune.training.building import build_run, make_training
from llmtune.training.callbacks import TrainingCallbacks, eval_interval, save_interval
from llmtune.training.file_names import PREDICTIONS, QUARANTINE
from llmtune.training.isolation import (
    check_isolation,
    check_media_isolation,
    check_media_reading,
    check_media_split,
    check_split,
)
from llmtune.training.lock import LAG_S, FolderLock, launcher, require_shared
from llmtune.training.log import Loggers, read_metrics
from llmtune.training.loop import train
from llmtune.training.measure import of_answers
from llmtune.training.measured import peak_memory_bytes
from llmtune.training.optim import make_optimizer
from llmtune.training.origins import WEIGHTS, base_weights, origins
from llmtune.training.out_of_memory import explain_out_of_memory
from llmtune.training.outcome import Outcome
from llmtune.training.plot import plot_metrics
from llmtune.training.predict import predict_to, predictor_of, write_results
from llmtune.training.samples import as_samples, sample_answers
from llmtune.training.save import write_adapter, write_result
from llmtune.training.status import Milestones

if TYPE_CHECKING:
    from llmtune.contract.loggers import RunStatus
    from llmtune.distributed.ranks import Ranks
    from llmtune.planning.plan import Plan
    from llmtune.recipe.recipe import Recipe
    from llmtune.recipe.registry import Registry
    from llmtune.training.loop import Training
    from llmtune.training.manifest import Manifest
    from llmtune.training.objective import Objective


class StepCost(Protocol):
    """What a run asks about the cost of its steps. `llmtune.cost` answers; it traces this room's loop and so stands
    after it, and whoever starts a run hands it in."""

    def mfu(self, tokens_per_second: float) -> float | None:
        """Model FLOPs utilisation at a speed of all ranks together; None where the device's peak is not known."""
        ...

    def remedies(self) -> list[str]:
        """What a step takes and what would help, in lines, for a run whose memory is exhausted."""
        ...


def train_here(
    recipe: Recipe, registry: Registry, estimate: Callable[[Plan], StepCost], show: Callable[..., Any] = say
) -> Outcome:
    """Plan, build, train and save in this process, as one of the ranks that the environment names.

    Data are tokenised before any process group exists, so that no collective can time out on it. Raises Stopped where
    SIGTERM or Ctrl-C ask for it and nothing has to be saved first.
    """
    with StopRequest() as stop:
        try:
            return _train_here(recipe, registry, estimate, show, stop)
        except BaseException:
            if stop.ordered:  # on its way to here, libraries may have made another error of it
                raise KeyboardInterrupt from None
            raise


def _train_here(
    recipe: Recipe, registry: Registry, estimate: Callable[[Plan], StepCost], show: Callable[..., Any],
    stop: StopRequest,
) -> Outcome:  # fmt: skip
    started, ranks = time.monotonic(), ranks_from_environment()
    try:
        plan = plan_run(recipe, registry, ranks)
    except (LlmtuneError, OSError) as error:
        tell_the_others(error, recipe.train.ddp_timeout)
        raise
    batches = plan.data.batches
    with closing(batches):
        batches.start_workers()
        join(ranks, plan.device, recipe.train.ddp_timeout)
        fail_together(None)
        check_agreement(plan.facts())
        if (first := from_first(decided(plan))) != decided(plan):  # this machine is another one than the first rank's
            plan = replace(plan_run(recipe, registry, ranks, first), data=plan.data)
        return _train(plan, registry, estimate, show if ranks.first else _nothing, stop, started)


def plan_run(recipe: Recipe, registry: Registry, ranks: Ranks, before: Mapping[str, Any] | None = None) -> Plan:
    """The plan of a run that is about to start. Raises all problems, those of its folder among them, at once.

    What was decided `before` stays: by default when a run was started that this one continues.
    """
    recipe = as_decided(recipe, resume.decided_before(recipe) if before is None else before)
    problems: list[LlmtuneError] = []
    plan: Plan | None = None
    with collect(problems):
        plan = make_plan(recipe, registry, ranks, pick_device(recipe.train.device, ranks.local_rank), writes=True)
    problems += [PlanError(sentence) for sentence in run_folder.output_problems(recipe)]
    problems += [PlanError(sentence) for sentence in [run_folder.occupied(recipe)] if sentence]
    raise_all(problems)
    assert plan is not None
    return plan


def _nothing(*_: object) -> None:
    """Ranks other than the first say nothing."""


def _train(
    plan: Plan, registry: Registry, estimate: Callable[[Plan], StepCost], show: Callable[..., Any], stop: StopRequest,
    started: float,
) -> Outcome:  # fmt: skip
    lock = FolderLock(plan.output_dir)
    try:
        start = _prepare(plan, lock)
        plan = resume.continued(plan, start)
        show(str(plan))
        planned = estimate_memory(plan, largest(plan)).at_peak.total  # of the structure, before it is filled
        if plan.ranks.first:
            run_folder.write_status(plan.output_dir, "running", planned_memory_bytes=planned)
        try:
            outcome = _run(plan, registry, start.found, estimate(plan), show, stop, planned)
            peak = max(from_all(peak_memory_bytes(plan.device)))
            outcome = replace(
                outcome, peak_memory_bytes=peak, planned_memory_bytes=planned, seconds=time.monotonic() - started
            )
        except BaseException as error:
            if plan.ranks.first:
                status, told = _ended_by(error, stop), "; ".join([str(error), *getattr(error, "__notes__", ())])
                said = {} if status == "interrupted" else {"error": f"{type(error).__name__}: {told}"}
                run_folder.write_status(plan.output_dir, status, **said)
            raise
        if plan.ranks.first:
            facts = {"seconds": round(outcome.seconds, 1), "peak_memory_bytes": peak, **outcome.result}
            run_folder.write_status(plan.output_dir, outcome.status, answers=outcome.answers, **facts)
        return outcome
    finally:
        lock.release()


def _prepare(plan: Plan, lock: FolderLock) -> resume.Start:
    """Lock the output folder for this run, on every machine; how the run begins."""
    launchers = {name for name in from_all(launcher()) if name}

    def prepare() -> resume.Start:
        run_folder.check_folder(plan.recipe, launchers)
        lock.take(LAG_S if launchers else 0.0)
        return resume.prepare_folder(plan, launchers)

    start = _shared(prepare, plan)
    if plan.ranks.size > 1:
        require_shared(plan.output_dir, plan.ranks.first)
    return start


def _run(
    plan: Plan, registry: Registry, found: tuple[Path, Manifest] | None, cost: StepCost, show: Callable[..., Any],
    stop: StopRequest, planned_memory_bytes: int,
) -> Outcome:  # fmt: skip
    first_step = found[1].step if found else 0
    stop.doing = "while weights were loaded, before this start has learnt anything"
    plan, objective, read = _build(plan, found, cost)
    open_engine(plan)
    with blaming(plan.parts.one("optim_config").full_label, "create"):
        optimizer = make_optimizer(plan)
    training = make_training(plan, objective, optimizer, first_step)
    check_media_reading(objective, plan.device, plan.data.batches, plan.model.media)
    if plan.data.batches.flat:
        check_isolation(objective, plan.device, plan.recipe.data.isolates)
        check_media_isolation(objective, plan.device, plan.data.batches)
    if plan.ranks.dims.context > 1:
        check_split(objective, plan.ranks, plan.device)
        check_media_split(objective, plan.ranks, plan.device, plan.data.batches)
    before = sample_answers(plan, objective, "before")
    loggers = start_loggers(plan, first_step, planned_memory_bytes, before)
    keeper = TrainingCallbacks(
        plan, objective, optimizer, loggers, registry.observers(), stop, cost.mfu, training.scaler,
        {**origins(plan), **read}, training.schedule,
    )  # fmt: skip
    status: RunStatus = "failed"
    try:
        outcome = _learn(training, keeper, found, before, cost, show)
        status = outcome.status
        return outcome
    except BaseException as error:
        status = _ended_by(error, stop)
        raise
    finally:
        close_engine(plan.parts)
        if loggers is not None:
            with stop.finishing(lambda: "closing the loggers"):
                loggers.finish(status)


def _ended_by(error: BaseException, stop: StopRequest) -> RunStatus:
    """Whether somebody asked for an end that looks like this, or something failed."""
    return "interrupted" if isinstance(error, KeyboardInterrupt) or stop.ordered else "failed"


def _learn(
    training: Training, keeper: TrainingCallbacks, found: tuple[Path, Manifest] | None, before: list[str],
    cost: StepCost, show: Callable[..., Any],
) -> Outcome:  # fmt: skip
    """The steps that are left, and the result. Collective."""
    plan, objective, stop, first_step = keeper.plan, keeper.objective, keeper.stop, training.first_step
    try:
        with stop.finishing(lambda: f"finishing step {training.at or first_step + 1}, then saving"):
            if found:
                reshard(objective)
                checkpoint.restore(found[0], found[1], plan.model.module, keeper.optimizer, plan.ranks)
                keeper.restore(*found)
                show(f"Continuing after step {first_step} from {found[0]}")
                if isinstance(lost := keeper.best(), str):
                    show(f"{lost}; from here on the best of the evaluations to come counts")
            with explain_out_of_memory(plan.device, lambda: f"step {training.at}", cost.remedies):
                last = first_step if keeper.catch_up(first_step) else train(training, keeper)
    except (RewardError, DataError) as error:  # before an update: the weights are those of the last step
        if plan.ranks.size == 1 or error.everywhere:
            keeper.save_despite(error, training.done)
        raise
    if keeper.loggers is not None:
        keeper.loggers.end_display()
    if keeper.interrupted:
        return Outcome(plan, "interrupted", objective)
    if plan.recipe.train.do_predict:
        keeper.save(last)  # so that predictions that are killed go on from here
    stop.doing = "while the result was written; the last step is saved"
    with nullcontext() if keeper.saved_step == last else stop.finishing(lambda: "finishing the run"):
        return _finish(plan, keeper, before, show)


def _build(
    plan: Plan, found: tuple[Path, Manifest] | None, cost: StepCost
) -> tuple[Plan, Objective, Mapping[str, str]]:
    """The model with its weights, the plan that may have got numbers meanwhile, and what tells the files that the
    weights come from from others. Collective."""
    # A stream reads and tokenises while the weights are loaded.
    quarantine = plan.output_dir / QUARANTINE if plan.ranks.first else None
    cursor = (found[1].step, found[1].numbers["stream"]) if found else (0, None)
    plan.data.batches.start(*cursor, quarantine)
    doing.info("Loading the weights")
    with explain_out_of_memory(plan.device, lambda: "while weights were loaded", cost.remedies):
        plan, objective = build_run(plan)
    read = base_weights(plan, found[1].origins if found else {})
    if plan.ranks.first:
        run_folder.write_status(plan.output_dir, "running", model_fingerprint=read[WEIGHTS])
    return plan, objective, read


def open_engine(plan: Plan) -> None:
    """Let an engine that reads files answer as the model that trains. Collective."""
    part = plan.parts.one("engine_config")
    if isinstance(part.built, ReadsFiles) and asks_engine(plan.recipe.train, plan.parts):
        doing.info("Waiting for engine_config %s", part.plugin.name)
        served = served_model(plan.model, "trained", None, lambda: (plan.model.module, nullcontext))
        part.built.open(served, partial(write_adapter, plan.model))


def _finish(plan: Plan, keeper: TrainingCallbacks, before: list[str], show: Callable[..., Any]) -> Outcome:
    """Answer the sample prompts again and write the result. Collective."""
    objective, recipe, module = keeper.objective, plan.recipe.train, plan.model.module
    if told := plan.data.batches.summary():
        show(told)
    reshard(objective)
    best = keeper.best()
    if isinstance(best, tuple):
        checkpoint.restore(*best, module, None, plan.ranks)
        show(f"The best weights are those of step {keeper.best_step}")
    elif best is not None:
        show(f"{best}; the result has the weights of the last step")
    checkpoint.require_finite(checkpoint.training_state(module, None)[0], plan.steps)
    after = sample_answers(plan, objective, "after")
    if keeper.loggers is not None:
        keeper.loggers.samples(keeper.loggers.last, as_samples(plan, after))
    reshard(objective)
    doing.info("Writing the result")
    result = write_result(plan.model, plan.output_dir / "model")
    if plan.ranks.first and recipe.plot_loss:
        plot_metrics(read_metrics(plan.output_dir), plan.output_dir / "loss.png")
    wait_for_all()
    if recipe.do_predict:
        show(predict(plan, objective, result))
    answers = [(question, old, new) for question, old, new in zip(recipe.sample_prompts, before, after, strict=True)]
    return Outcome(plan, "done", objective, answers, result)


def predict(plan: Plan, objective: Objective, result: Mapping[str, Any]) -> str:
    """Answer the rows that are evaluated on into the run's folder; what became of it, in a sentence. Collective."""
    doing.info("Answering the rows that are evaluated on")
    engine, config = plan.parts.one("engine_config"), GenerateConfig(**vars(plan.recipe.generation))
    predictor = predictor_of(plan.recipe, plan.model, engine, objective, config)
    facts = {"model": from_first(result.get("trained_sha256", ""))}
    found = predict_to(plan.output_dir, predictor, plan.data.questions, facts, replaces=True)
    said = f"Wrote {counted(len(found), 'prediction')} to {plan.output_dir / PREDICTIONS}"
    return said + write_results(plan.output_dir, of_answers(plan.parts), found)


def _shared(work: Any, plan: Plan) -> Any:
    """Do something on rank 0; every rank gets the result, or raises the same error."""

    def guarded() -> Any:
        try:
            return work()
        except OSError as error:
            raise PlanError(f"output_dir: {plan.output_dir} cannot be used ({error}); name another folder") from error

    return first_does(guarded)


def start_loggers(
    plan: Plan, first_step: int, planned_memory_bytes: int, answers: Sequence[str] = ()
) -> Loggers | None:
    """metrics.jsonl, the console and the recipe's loggers, on rank 0; a new run's get the answers of the base."""
    if not plan.ranks.first:
        return None
    milestones = Milestones(
        planned_memory_bytes=planned_memory_bytes,
        eval_every=eval_interval(plan),
        save_every=save_interval(plan),
    )
    parts = plan.parts.at("logger_config")
    loggers = Loggers(
        plan.output_dir,
        [part.built for part in parts],
        names=[part.plugin.name for part in parts],
        total_steps=plan.steps,
        resume_step=first_step,
        milestones=milestones,
    )
    loggers.start(run_folder.plain(plan.recipe.resolved))
    if not first_step:
        loggers.samples(0, as_samples(plan, answers))
    return loggers
