"""A model answers the questions of a data set, on all ranks; the answers go to a file that can be continued."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from llmtune.contract.errors import PlanError, listed, noting
from llmtune.contract.evaluation import Prediction
from llmtune.contract.generation import asking
from llmtune.data.hashes import file_hash
from llmtune.data.workers import progress
from llmtune.distributed.fsdp2 import reshard
from llmtune.distributed.ranks import first_does, from_all
from llmtune.folders import write_durably
from llmtune.model.generate import stop_tokens
from llmtune.training.file_names import PREDICT_RESULTS, PREDICT_SETTINGS, PREDICTIONS
from llmtune.training.measure import measured_answers

if TYPE_CHECKING:
    from llmtune.contract.generation import GenerateConfig, MediaReader
    from llmtune.data.questions import Question
    from llmtune.distributed.ranks import Ranks
    from llmtune.planning.model_plan import ModelPlan
    from llmtune.recipe.parts import BuiltPlugin
    from llmtune.recipe.recipe import Recipe
    from llmtune.training.objective import Objective


@dataclass(frozen=True, kw_only=True)
class Predictor:
    """A model on all ranks that answers questions."""

    objective: Objective
    tokenizer: Any
    engine: BuiltPlugin
    config: GenerateConfig
    ranks: Ranks
    batch_size: int
    """Questions that a rank answers at a time."""
    seed: int
    template_variables: Mapping[str, Any] = field(default_factory=dict)
    media: MediaReader | None = None
    """What reads what questions show; None where the model reads text only."""

    def answers(self, questions: Sequence[Question], first: int = 0) -> Generator[list[Prediction]]:
        """Predictions of the questions from number `first` on, in their order, some at a time, the same on every rank.

        The answer to a question depends on its number and the seed, not on how many ranks there are or where the
        answers began: the batches are the same, too, so that not even rounding differs. Collective.
        """
        size, shares = self.batch_size, self.ranks.batch_ranks
        stop = stop_tokens(cast("Any", self.objective.model), self.tokenizer, self.template_variables)
        self.objective.eval()
        try:
            for begin in range(first - first % (size * shares), len(questions), size * shares):
                start = begin + size * self.ranks.batch_rank
                own = range(start, min(start + size, len(questions)))
                with torch.no_grad(), noting(self.engine.full_label, "generate"):
                    said = self.objective(lambda own=own: self._generate(questions, own, stop))
                # Ranks that share a batch have said the same.
                found = {number: each for part in from_all(said) for number, each in part}
                yield [found[number] for number in sorted(found) if number >= first]
        finally:
            reshard(self.objective)

    def _generate(
        self, questions: Sequence[Question], numbers: Sequence[int], stop: Sequence[int]
    ) -> list[tuple[int, Prediction]]:
        asked = [questions[number] for number in numbers]
        said = asking(self.engine.built, self.engine.full_label, self.media)(
            self.objective.model, self.tokenizer, [each.asked for each in asked], self.config,
            seeds=[seed_of(self.seed, number) for number in numbers], stop=stop,
        )  # fmt: skip
        return [
            (number, Prediction(
                row=question.row, prompt=self._written(question), predict=answer.text, label=question.label,
                cut=answer.cut,
            ))
            for number, question, answer in zip(numbers, asked, said, strict=True)
        ]  # fmt: skip

    def _written(self, question: Question) -> str:
        """The prompt as the template writes it: with one place for each picture."""
        return str(self.tokenizer.decode(question.ids)) if question.shown is None else question.shown.text


def predictor_of(
    recipe: Recipe, plan: ModelPlan, engine: BuiltPlugin, objective: Objective, config: GenerateConfig
) -> Predictor:
    """What answers as the recipe says."""
    return Predictor(
        objective=objective, tokenizer=plan.tokenizer, engine=engine, config=config, ranks=plan.ranks,
        seed=recipe.train.seed,
        batch_size=recipe.train.per_device_eval_batch_size, template_variables=recipe.data.template_variables,
        media=plan.media,
    )  # fmt: skip


def seed_of(seed: int, number: int) -> int:
    """The seed of the answer to question `number`."""
    return int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()[:7])


def predict_to(
    folder: Path, predictor: Predictor, questions: Sequence[Question], facts: Mapping[str, Any], *,
    replaces: bool = False,
) -> list[Prediction]:  # fmt: skip
    """Answer all questions into `generated_predictions.jsonl` in `folder`; what is there already is kept. Collective.

    `facts` tell the model from others. Returns the predictions, on every rank. Raises PlanError where the folder holds
    predictions that were made otherwise, unless it `replaces` those.
    """
    settings = {
        **facts, **asdict(predictor.config), "seed": predictor.seed, "engine_config": predictor.engine.plugin.name,
        "questions": digest_of(questions),
    }  # fmt: skip
    file = PredictionFile(folder)
    found: list[Prediction] = first_does(lambda: file.begin(settings, replaces))
    with progress("Predicting", " rows", shown=predictor.ranks.first) as bar:
        bar.update(len(found))
        for some in predictor.answers(questions, len(found)):
            first_does(lambda some=some: file.append(some))
            found += some
            bar.update(len(some))
    return found


def digest_of(questions: Sequence[Question]) -> str:
    """SHA-256 of prompts, with the files that they show, and labels."""
    digest, hashed = hashlib.sha256(), cache(file_hash)
    for each in questions:
        shown = [] if each.shown is None else [path for medium in each.shown.media for path in medium.paths]
        digest.update(json.dumps([each.ids, each.label, *(hashed(Path(path)) for path in shown)]).encode())
    return digest.hexdigest()


class PredictionFile:
    """`generated_predictions.jsonl` of a folder, and how it was made."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / PREDICTIONS

    def begin(self, settings: Mapping[str, Any], replaces: bool) -> list[Prediction]:
        """What is written already, with these settings. A line that a kill left unfinished is cut off.

        Raises PlanError where the file was made with others, unless it `replaces` those.
        """
        settings = json.loads(json.dumps(settings, default=str))
        try:
            if replaces and self._differing(settings):
                self.path.unlink(missing_ok=True)
            if differing := self._differing(settings):
                raise PlanError(
                    f"output_dir: {self.path} was made with other settings ({listed(differing)}); name another "
                    "output_dir, or set overwrite_output_dir=true to replace it"
                )
            self.folder.mkdir(parents=True, exist_ok=True)
            if not self.path.exists():
                (self.folder / PREDICT_RESULTS).unlink(missing_ok=True)
                write_durably(self.folder / PREDICT_SETTINGS, json.dumps(settings, indent=1))
                self.path.touch()
            return self._healed()
        except OSError as error:
            raise self._unusable(error) from error

    def append(self, predictions: Sequence[Prediction]) -> None:
        """Write some more lines, flushed to disk."""
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(asdict(each), ensure_ascii=False) + "\n" for each in predictions)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise self._unusable(error) from error

    def _differing(self, settings: Mapping[str, Any]) -> list[str]:
        """What the file that is there was made with and is not made with now."""
        if not self.path.exists():
            return []
        try:
            before = json.loads((self.folder / PREDICT_SETTINGS).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return [f"{PREDICT_SETTINGS} beside it, which says how, is missing or damaged"]
        keys = [key for key in {**before, **settings} if before.get(key) != settings.get(key)]
        return [f"{key} was {_short(before.get(key))}, now {_short(settings.get(key))}" for key in keys]

    def _healed(self) -> list[Prediction]:
        found: list[Prediction] = []
        with self.path.open("r+b") as file:
            whole = 0
            for line in file:
                try:
                    row = Prediction(**json.loads(line))
                except (ValueError, TypeError):
                    break
                if not line.endswith(b"\n"):
                    break
                found.append(row)
                whole += len(line)
            file.truncate(whole)
        return found

    def _unusable(self, error: OSError) -> PlanError:
        return PlanError(
            f"output_dir: {self.folder} cannot be used ({error.strerror or error}); name another folder, or mend this "
            "and run the same command again"
        )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def answered_and_measured(
    evaluators: Sequence[BuiltPlugin], predictor: Predictor, questions: Sequence[Question], leave: Callable[[], bool]
) -> dict[str, float] | None:
    """Answer the questions as evaluators want them answered, and measure. None if `leave`, asked before each batch,
    says to end early. Collective."""
    found: dict[str, float] = {}
    ways: list[Mapping[str, Any]] = []
    for part in evaluators:
        if part.built.generation not in ways:
            ways.append(part.built.generation)
    for way in ways:
        asked, predictions = replace(predictor, config=replace(predictor.config, **way)), []
        with closing(asked.answers(questions)) as batches:
            for batch in batches:
                predictions += batch
                if leave():
                    return None
        own = [part for part in evaluators if part.built.generation == way]
        found |= measured_answers(own, predictions, "eval_")
    return found


def write_results(folder: Path, evaluators: Sequence[BuiltPlugin], predictions: Sequence[Prediction]) -> str:
    """Measure predictions into `predict_results.json` beside them; what was found, in lines. Collective.

    Without evaluators nothing is written.
    """
    if not evaluators:
        return ""
    found = measured_answers(evaluators, predictions, "predict_")

    def write() -> None:
        counts = {"predict_rows": len(predictions), "predict_cut": sum(each.cut for each in predictions)}
        write_durably(folder / PREDICT_RESULTS, json.dumps({**found, **counts}, indent=1))

    first_does(write)
    return "".join(f"\n{name} {value:.4f}" for name, value in found.items())


def read_predictions(folder: str | Path) -> list[dict[str, Any]]:
    """The lines of `generated_predictions.jsonl` in a folder."""
    with (Path(folder) / PREDICTIONS).open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]
