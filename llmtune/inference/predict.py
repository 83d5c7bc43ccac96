"""Answers to a data set by what was trained, or by any model: `llmtune predict`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.contract.errors import LlmtuneError, PlanError, RecipeError, counted, raise_all
from llmtune.contract.generation import GenerateConfig
from llmtune.contract.schema import decode
from llmtune.data.config import DataConfig, sources
from llmtune.distributed.ranks import (
    check_agreement,
    fail_together,
    first_does,
    join,
    ranks_from_environment,
    tell_the_others,
)
from llmtune.folders import size_and_hash
from llmtune.inference.chat import generate_config, parts_of
from llmtune.inference.reopen import adapter_folder, filled_for, open_plan, recipe_of, saved_at
from llmtune.model.fingerprint import fingerprint
from llmtune.model.generate import require_head
from llmtune.model.source import resolve_model
from llmtune.planning.data_plan import questions_of
from llmtune.planning.engine import close_engine
from llmtune.planning.objections import label_objections
from llmtune.recipe.keys import top_level_keys
from llmtune.recipe.parts import known_formats
from llmtune.recipe.text import plain
from llmtune.recipe.train_config import TrainConfig
from llmtune.terminal import Shown, doing
from llmtune.training.file_names import PREDICT_RESULTS, PREDICTIONS, TRAINED
from llmtune.training.lock import FolderLock
from llmtune.training.measure import of_answers
from llmtune.training.predict import digest_of, predict_to, predictor_of, read_predictions, write_results

if TYPE_CHECKING:
    from llmtune.planning.model_plan import ModelPlan
    from llmtune.recipe.recipe import Recipe

OWN = ("dataset", "output_dir", "overwrite_output_dir", "device")
"""Keys that are said of the prediction, whatever the recipe of the model says of its training."""
GENERATION = frozenset(field.name for field in fields(GenerateConfig)) - set(top_level_keys())
"""Keys of generation that a recipe does not have."""


@dataclass(frozen=True, repr=False)
class Predictions(Shown):
    """Predictions on disk."""

    folder: Path
    """The folder that holds `generated_predictions.jsonl`."""

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One dict per row, in the order of the data: row, prompt, predict, label, cut."""
        return read_predictions(self.folder)

    @property
    def metrics(self) -> dict[str, float]:
        """What `predict_results.json` says: what the recipe's evaluators have measured, by name."""
        path = self.folder / PREDICT_RESULTS
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def __str__(self) -> str:
        said = [f"Wrote {counted(len(self.rows), 'prediction')} to {self.folder / PREDICTIONS}"]
        return "\n".join([*said, *(f"{name} {value:.4g}" for name, value in self.metrics.items())])


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be predicted, as the keys of a command say it."""

    recipe: Recipe
    """That of the model, with the data set that is to be answered."""
    folder: Path
    """Where the predictions go."""
    config: GenerateConfig
    device: str
    replaces: bool
    """Whether other predictions in the folder are replaced."""
    overrides: Mapping[str, Any]
    """The keys that go before the model's own."""

    @classmethod
    def of(cls, path: str | Path, given: Mapping[str, Any]) -> Request:
        """Raises the errors of the keys."""
        overrides = {key: value for key, value in given.items() if key not in {*OWN, *GENERATION}}
        recipe = recipe_of(path, **overrides)
        recipe = replace(recipe, data=_data(recipe.data, given.get("dataset"), overrides))
        own = _decoded(TrainConfig, {key: plain(given[key], key) for key in OWN if key != "dataset" and key in given})
        return cls(
            recipe=recipe, folder=Path(own.output_dir or _folder(path, recipe)).expanduser(),
            config=generate_config(recipe, {key: given[key] for key in GENERATION & given.keys()}),
            device=own.device, replaces=own.overwrite_output_dir, overrides=overrides,
        )  # fmt: skip


def predict(path: str | Path, /, **given: Any) -> Predictions:
    """Answer the rows of `dataset` with the model of `path`, in this process, as one of the ranks that the environment
    names.

    `given` are keys of a recipe: `dataset` (left out, the `eval_dataset` of the recipe), `output_dir` (where the
    answers are written to), generation keys. What an earlier call with the same keys has written is kept.
    """
    ranks = ranks_from_environment()
    try:
        request = Request.of(path, given)
        recipe, parts = request.recipe, parts_of(request.recipe, ("engine_config", "eval_config"))
        plan = open_plan(path, device=request.device, ranks=ranks, **request.overrides)
        require_head(plan.module)
        doing.info("Reading the questions")
        questions = questions_of(recipe, known_formats(recipe), plan, request.config)
        if any(key.startswith("eval_config") for key in request.overrides):  # else it was meant for other rows
            raise_all([PlanError(sentence) for sentence in label_objections(parts, questions, True)])
    except (LlmtuneError, OSError) as error:
        tell_the_others(error, TrainConfig.ddp_timeout)
        raise
    join(plan.ranks, plan.device, recipe.train.ddp_timeout)
    fail_together(None)
    check_agreement({"questions": digest_of(questions), "recipe": recipe.to_yaml()})
    lock = FolderLock(request.folder)
    try:
        first_does(lock.take)
        doing.info("Loading the weights")
        engine = parts.one("engine_config")
        predictor = predictor_of(recipe, plan, engine, filled_for(plan, path, engine), request.config)
        facts = first_does(lambda: _facts(path, plan, recipe))
        doing.info("Answering %s", counted(len(questions), "row"))
        found = predict_to(request.folder, predictor, questions, facts, replaces=request.replaces)
        write_results(request.folder, of_answers(parts), found)
    finally:
        lock.release()
        close_engine(parts)
    return Predictions(request.folder)


def _data(data: DataConfig, dataset: Any, overrides: Mapping[str, Any]) -> DataConfig:
    """The data keys of the recipe for another data set, which is read from its beginning to its end."""
    made = _decoded(DataConfig, {"dataset": data.eval_dataset if dataset is None else plain(dataset, "dataset")})
    if made.dataset is None:
        raise RecipeError("dataset: not given, needed is what to answer: dataset=FILE")
    return replace(
        data, dataset=made.dataset, eval_dataset=None, val_size=0, tokenized_path=None,
        max_samples=overrides.get("max_samples"), streaming=overrides.get("streaming", False),
    )  # fmt: skip


def _decoded(config: type, keys: Mapping[str, Any]) -> Any:
    made, problems = decode(config, keys)
    raise_all([RecipeError(f"{problem.key}: {problem.message}".removeprefix(": ")) for problem in problems])
    return made


def _folder(path: str | Path, recipe: Recipe) -> Path:
    """Where predictions go that are given no folder: into the run's own, else below `predictions`."""
    names = [each.name or Path(each.path.rstrip("/")).name for each in sources(recipe.data.dataset)]
    data, saved = _as_name("+".join(names).split(".")[0]), saved_at(path)
    if saved is None:
        return Path("predictions") / _as_name(Path(str(path).rstrip("/")).name) / data
    return saved.run / "predictions" / (saved.checkpoint.name if saved.checkpoint else "") / data


def _as_name(text: str) -> str:
    return re.sub(r"[^\w.+-]+", "-", text).strip("-.") or "data"


def _facts(path: str | Path, plan: ModelPlan, recipe: Recipe) -> dict[str, Any]:
    """What tells the model from others."""
    saved = saved_at(path) if plan.mode == "reopen" else None
    told = fingerprint(resolve_model(plan.keys, plan.hub, weights=True).folder)
    if saved is None:
        told = " ".join([told, *(size_and_hash(file)[1] for file in sorted(plan.ledger.read_files()))])
    if saved is not None:
        file = saved.run / TRAINED
        if saved.checkpoint is not None or not file.exists():
            found = saved.checkpoint or adapter_folder(saved)
            assert found is not None  # it has just been loaded
            file = (found if saved.checkpoint else found.parent) / "manifest.json"
        told += f" {size_and_hash(file)[1]}"
    blocks = {point: recipe.blocks.get(point) for point in ("peft_config", "quant_config")}
    return {"model": told, "dtype": str(plan.precision.compute), **blocks}
