"""Questions of an evaluator's own, asked of what was trained or of any model: `llmtune eval`."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.contract.errors import KEYWORDS, LlmtuneError, PlanError, RecipeError, did_you_mean, listed, raise_all
from llmtune.contract.generation import GenerateConfig, ReadsFiles
from llmtune.contract.schema import field_types
from llmtune.conversion.convert import Conversion, asked_by, typed_keys
from llmtune.distributed.ranks import Ranks, fail_together, first_does, join, ranks_from_environment, tell_the_others
from llmtune.folders import write_durably
from llmtune.inference.chat import parts_of
from llmtune.inference.reopen import fill, filled_for, open_plan, recipe_of, saved_at
from llmtune.model.generate import require_head
from llmtune.planning.engine import close_engine
from llmtune.planning.objections import plugin_objections
from llmtune.recipe.keys import top_level_keys
from llmtune.recipe.registry import Registry
from llmtune.recipe.train_config import TrainConfig
from llmtune.training.asked_model import SpreadModel
from llmtune.training.measure import measured_model, of_models
from llmtune.training.predict import predictor_of

if TYPE_CHECKING:
    from llmtune.recipe.parts import BuiltPlugin

POINT = "eval_config"
_DOTTED = f"{POINT}."


def evaluate(path: str | Path, /, **given: Any) -> dict[Path, dict[str, float]]:
    """Ask the model of `path` a benchmark, in this process, as one of the ranks that the environment names.

    `given` are keys of the evaluator's block (`task=mmlu`) and of a recipe; `path` may be an evaluation file of
    LLaMA-Factory. Writes a JSON file for each benchmark into `save_dir`, else into `benchmarks` of the run's folder.
    Returns the metrics by the files that have them.
    """
    ranks = ranks_from_environment()
    try:
        if other := asked_by(path):
            path, given = other.recipe["model"], {**typed_keys(other.recipe), **given}
            _tell(other, ranks)
        keys = with_block(given)
        device = keys.pop("device", "auto")
        recipe = recipe_of(path, **keys)
        parts = parts_of(recipe, ("engine_config", POINT))
        evaluators = of_models(parts)
        if not evaluators:
            raise PlanError("task: not given, and the recipe names no benchmark; write for example task=mmlu")
        plan = open_plan(path, device=device, ranks=ranks, **keys)
        require_head(plan.module)
        raise_all([error for part in evaluators for error in plugin_objections(part, plan.context, plan.module)])
    except (LlmtuneError, OSError) as error:
        tell_the_others(error, TrainConfig.ddp_timeout)
        raise
    join(plan.ranks, plan.device, recipe.train.ddp_timeout)
    fail_together(None)
    config = GenerateConfig(**vars(recipe.generation))
    engine = parts.one("engine_config")
    if isinstance(engine.built, ReadsFiles):  # completes texts; how likely they are, the model in memory tells
        filled_for(plan, path, engine)
    predictor = predictor_of(recipe, plan, engine, fill(plan, path), config)
    found: dict[Path, dict[str, float]] = {}
    for part in evaluators:
        results = measured_model(part, SpreadModel(predictor, plan.module.config))
        target = _file(path, part, next(iter(results)))
        first_does(lambda results=results, target=target, part=part: _write(target, results, part.built.settings))
        found[target] = dict(next(iter(results.values())))
    close_engine(parts)
    return found


def _tell(other: Conversion, ranks: Ranks) -> None:
    """Say what of another trainer's file is not done, and what is done otherwise."""
    if ranks.first:
        for line in (*(f"{key}: {why}" for key, why in other.lost.items()), *other.check):
            print(f"llmtune: {line}", file=sys.stderr)


def with_block(given: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of a recipe for those of a command: what is no key at the top level goes into the block of the evaluator
    that has it. Raises RecipeError for a key that neither has."""
    known = top_level_keys()
    own = {key: value for key, value in given.items() if key.partition(".")[0] not in known}
    if not own:
        return dict(given)
    rest = {key: value for key, value in given.items() if key not in own}
    own |= {key.removeprefix(_DOTTED): rest.pop(key) for key in list(rest) if key.startswith(_DOTTED)}
    rows = [row.plugin for row in Registry().listing() if row.plugin and row.point == POINT]
    fits = [plugin for plugin in rows if own.keys() <= field_types(plugin.config).keys()]
    if not fits:
        fields = [field for plugin in rows for field in field_types(plugin.config)]
        strange = next(key for key in own if key not in fields) if set(own) - set(fields) else next(iter(own))
        others = f" Known: {listed(sorted({*fields}), 40)}, and what `llmtune schema` lists"
        near = did_you_mean(strange, [*fields, *known]) or others
        raise RecipeError(f"{KEYWORDS.get()} {strange}: no such key.{near}")
    if len(fits) > 1:
        raise RecipeError(f"eval_config: {listed([plugin.name for plugin in fits])} have such keys; name one of them")
    return {**rest, POINT: {"name": fits[0].name, **own}}


def _file(path: str | Path, part: BuiltPlugin, benchmark: str) -> Path:
    """Where the results of a benchmark go: into its own folder, else beside the run, and of a checkpoint in a folder of
    its name."""
    name, saved = _as_name(benchmark) + ".json", saved_at(path)
    if folder := getattr(part.config, "save_dir", None):
        return Path(folder).expanduser() / name
    if saved is None:
        return Path("benchmarks") / _as_name(Path(path).name) / name
    return saved.run / "benchmarks" / (saved.checkpoint.name if saved.checkpoint else "") / name


def _as_name(text: str) -> str:
    return re.sub(r"[^\w.+-]+", "-", text).strip("-.") or "model"


def _write(file: Path, results: Mapping[str, Mapping[str, float]], settings: Mapping[str, Any]) -> None:
    (task, metrics), *others = results.items()
    file.parent.mkdir(parents=True, exist_ok=True)
    told = {
        "task": task, "metrics": dict(metrics), "subtasks": {name: dict(each) for name, each in others},
        "settings": dict(settings), "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    write_durably(file, json.dumps(told, indent=1))
