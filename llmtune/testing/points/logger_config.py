"""Laws of loggers: they receive every metric of a run, take any number, and never stand in a run's way."""

from __future__ import annotations

import base64
import contextlib
import io
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llmtune.contract.loggers import FollowsStatus, LoggerStart, RunStatus, SampleAnswer, TakesPictures, TakesSamples
from llmtune.testing import running
from llmtune.testing.contract import Broken, Check, Subject
from llmtune.training.log import Loggers, begin, read_metrics

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAIAAAACCAIAAAD91JpzAAAAEElEQVR4nGNQSFgARAwQCgAdjgSBQe+XXgAAAABJRU5ErkJggg=="
)
"""A picture of two by two pixels."""


def laws(subject: Subject) -> list[Check]:
    """All of them."""
    return [
        follows_a_run, takes_any_number, goes_on_where_the_run_does, keeps_to_its_folder,
        survives_a_run_that_never_started, cannot_stop_a_run, knows_every_end, takes_any_answer, takes_a_picture_again,
    ]  # fmt: skip


def start_of(folder: Path, first_step: int = 0, recipe: Mapping[str, Any] | None = None) -> LoggerStart:
    """What a logger is told of a run in `folder`."""
    return LoggerStart(
        folder=folder / "loggers" / "own", run_folder=folder, recipe=recipe or {"model": "m"}, first_step=first_step
    )


def follows_a_run(subject: Subject, folder: Path) -> None:
    """A run with evaluations and a checkpoint goes through, with nothing said against the logger."""
    keys = subject.keys(folder, val_size=0.2, eval_strategy="steps", eval_steps=2, save_steps=2)
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        running.train(keys)
    complaints = [line for line in errors.getvalue().splitlines() if "logger" in line and "failed" in line]
    if complaints:
        raise Broken(complaints[0], "Mend what raises; the run went on without the logger")


def takes_any_number(subject: Subject, folder: Path) -> None:
    """Whole numbers, infinity, NaN, and metrics that were not there before are logged without an error."""
    logger = subject.built()
    begin(logger, start_of(folder, recipe={"model": "some/model", "peft_config": {"name": "x", "r": 8}, "notes": None}))
    logger.log(1, {"loss": 1.5, "tokens": 128, "learning_rate": 1e-4})
    logger.log(2, {"loss": math.inf, "grad_norm": math.nan})
    logger.log(2, {"eval_loss": 1.25, "eval_accuracy": 0.5})
    logger.finish()


def goes_on_where_the_run_does(subject: Subject, folder: Path) -> None:
    """A run that was interrupted at step 4 and goes on after step 2 has each step once, with its last value.

    The steps of `loss` are read with `reader(folder of the logger, folder of the run)`, where the test gives one.
    """
    for first_step, last in ((0, 4), (2, 5)):
        logger = subject.built()
        begin(logger, start_of(folder, first_step))
        for step in range(first_step + 1, last + 1):
            logger.log(step, {"loss": float(step)})
        logger.finish()
        time.sleep(1.1)  # many formats tell files apart by the second of their names
    if subject.reader is None:
        return
    steps = list(subject.reader(start_of(folder).folder, folder))
    if steps != [1, 2, 3, 4, 5]:
        fix = "Write `begin(start)` instead of `start`, and drop what was logged after `start.first_step`"
        raise Broken(f"the steps of a continued run are {steps}", fix)


def keeps_to_its_folder(subject: Subject, folder: Path) -> None:
    """What it writes in the run's folder lies in the folder of its own, which goes where the run starts over."""
    logger = subject.built()
    begin(logger, start_of(folder))
    logger.log(1, {"loss": 1.0})
    logger.finish()
    own = start_of(folder).folder
    if other := [path for path in sorted(folder.rglob("*")) if path.is_file() and own not in path.parents]:
        raise Broken(f"it wrote {other[0].relative_to(folder)}", "Write `begin(start)`, and files into `start.folder`")


def survives_a_run_that_never_started(subject: Subject, folder: Path) -> None:
    """`build` writes nothing, and `finish` without `begin` raises nothing: a run may fail in between."""
    logger = subject.built()
    if found := sorted(folder.iterdir()):
        raise Broken(f"`build` wrote {found[0].name}", "Write in `begin`: building happens in `llmtune plan`, too")
    logger.finish()


def knows_every_end(subject: Subject, folder: Path) -> None:
    """A logger that `FollowsStatus` takes it that a run is done, interrupted or failed, and finishes as usual."""
    status: RunStatus
    for status in ("interrupted", "failed", "done") if isinstance(subject.built(), FollowsStatus) else ():
        with _begun(subject, folder) as logger:
            logger.log(1, {"loss": 1.0})
            logger.ended(status)


def takes_any_answer(subject: Subject, folder: Path) -> None:
    """A logger that `TakesSamples` takes empty ones, several lines, any script, before the first step and later."""
    texts = ["", "one | two\n```three```", "你好 \N{PARTY POPPER} \x00\u200f", " " * 3]
    samples = [SampleAnswer(question=text, answer=text[::-1]) for text in texts]
    if isinstance(subject.built(), TakesSamples):
        with _begun(subject, folder) as logger:
            logger.log_samples(0, samples)
            logger.log(1, {"loss": 1.0})
            logger.log_samples(1, samples)


def takes_a_picture_again(subject: Subject, folder: Path) -> None:
    """A logger that `TakesPictures` takes one of the same name again, at its step, later, and in a continued run."""
    for first_step in (0, 1) if isinstance(subject.built(), TakesPictures) else ():
        with _begun(subject, folder, first_step) as logger:
            for step in (first_step, first_step, first_step + 1):
                logger.log_picture(step, "curves", PNG)


@contextlib.contextmanager
def _begun(subject: Subject, folder: Path, first_step: int = 0) -> Iterator[Any]:
    logger = subject.built()
    begin(logger, start_of(folder, first_step))
    yield logger
    logger.finish()


def cannot_stop_a_run(subject: Subject, folder: Path) -> None:
    """A logger that breaks in the middle is reported once and dropped; metrics.jsonl has every step."""
    logger = subject.built()

    class Breaks:
        """The logger until the second step."""

        def begin(self, start: LoggerStart) -> None:
            begin(logger, start)

        def log(self, step: int, metrics: Mapping[str, float]) -> None:
            if step == 2:
                raise OSError("its disk is full")
            logger.log(step, metrics)

        def finish(self) -> None:
            logger.finish()

    errors = io.StringIO()
    loggers = Loggers(folder, [Breaks()], total_steps=3, stream=io.StringIO())
    with contextlib.redirect_stderr(errors):
        loggers.start({"model": "some/model"})
        for step in (1, 2, 3):
            loggers.log(step, {"loss": 1.0 / step})
        loggers.finish()
    if errors.getvalue().count("failed and is off") != 1:
        raise Broken(f"it was reported {errors.getvalue().count('failed')} times", "Raise errors, do not exit")

    if [row["step"] for row in read_metrics(folder)] != [1, 2, 3]:
        raise Broken("metrics.jsonl in the run's folder is damaged", "Write to files of your own")
