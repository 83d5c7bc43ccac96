"""Recipes of a few steps on a tiny model, run in this process or in several."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from llmtune.testing.tiny import tiny_chats, tiny_labelled, tiny_model_folder, tiny_preferences, tiny_prompts

if TYPE_CHECKING:
    from torch import Tensor

    from llmtune.planning.model_plan import Mode, ModelPlan
    from llmtune.planning.plan import Plan
    from llmtune.recipe.registry import Registry
    from llmtune.training.objective import Objective


def read_keys(config: type, keys: Mapping[str, Any]) -> tuple[Any, list[str]]:
    """A plugin's config from the keys of a recipe's block: (config, []), or (None, what is wrong with the keys)."""
    from llmtune.contract.schema import decode

    made, problems = decode(config, keys)
    return made, [f"{problem.key}: {problem.message}" for problem in problems]


def tiny_recipe(
    folder: Path, family: str = "llama", sizes: Mapping[str, Any] | None = None, kind: str = "conversation", **keys: Any
) -> dict[str, Any]:
    """A recipe of 4 steps of 8 rows on a random model of 2 layers, made in `folder` if it is not there yet, in float32
    and without kernels.

    `sizes` are values of the model's config, `kind` what the rows are, `keys` recipe keys. Weights are large enough
    that changes show.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    name, write = ROWS[kind]
    model, rows = folder / f"tiny-{family}", folder / name
    if not model.exists():
        values: dict[str, Any] = {"initializer_range": 0.2, **(sizes or {})}
        tiny_model_folder(folder, family, **values)
    if not rows.exists():
        write(folder)
    return {
        "model": str(model),
        "dataset": str(rows),
        "output_dir": str(folder / "run"),
        "device": "cpu",
        "bf16": False,
        "kernel_config": None,
        "learning_rate": 0.05,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "logging_steps": 1,
        "save_steps": None,
        "cutoff_len": 128,
    } | keys


ROWS = {
    "conversation": ("chats.jsonl", tiny_chats), "preference": ("preferences.jsonl", tiny_preferences),
    "labelled": ("labelled.jsonl", tiny_labelled), "prompt": ("prompts.jsonl", tiny_prompts),
}  # fmt: skip
"""By what the rows are: the file that holds some, and what writes it."""

REFERENCES = {point: "reference" for point in ("init_config", "stage_config", "optim_config", "lr_scheduler_config")}
"""Blocks that a recipe cannot do without."""


class Trained(NamedTuple):
    """What a run leaves behind, as one rank knows it."""

    metrics: list[dict[str, Any]]
    tensors: dict[str, Tensor]
    """Trained tensors, whole; on the first rank only."""


def registry() -> Registry:
    """Every installed plugin and the references."""
    from llmtune.recipe.packages import installed
    from llmtune.recipe.registry import Registry
    from llmtune.testing.reference import REFERENCE

    return Registry([*installed(), REFERENCE])


def plan(keys: Mapping[str, Any]) -> Plan:
    """The plan of a recipe, for the ranks that the environment names."""
    from llmtune.distributed.ranks import pick_device, ranks_from_environment
    from llmtune.planning.make import make_plan
    from llmtune.recipe.recipe import load_recipe

    recipe, ranks = load_recipe(keys), ranks_from_environment()
    return make_plan(recipe, registry(), ranks, pick_device(recipe.train.device, ranks.local_rank))


def plan_model(keys: Mapping[str, Any], mode: Mode = "train") -> ModelPlan:
    """The plan of a recipe's model, for the ranks that the environment names."""
    from llmtune.distributed.ranks import pick_device, ranks_from_environment
    from llmtune.planning.make import make_model_plan
    from llmtune.recipe.recipe import load_recipe

    if mode == "train":
        return plan(keys).model
    recipe, ranks = load_recipe(keys), ranks_from_environment()
    return make_model_plan(recipe, registry(), ranks, pick_device(recipe.train.device, ranks.local_rank), mode)


def start(keys: Mapping[str, Any]) -> tuple[Plan, Objective]:
    """The plan of a recipe, and its model with weights inside its stage."""
    from llmtune.distributed.ranks import join
    from llmtune.training.building import build_run

    made = plan(keys)
    join(made.ranks, made.device)
    return build_run(made)


def build(keys: Mapping[str, Any], mode: Mode = "train") -> tuple[ModelPlan, Objective]:
    """The plan of a recipe's model, and that model with weights inside its stage."""
    from llmtune.distributed.ranks import join
    from llmtune.training.building import build_objective

    made = plan_model(keys, mode)
    join(made.ranks, made.device)
    return made, build_objective(made)


def train(keys: Mapping[str, Any]) -> Trained:
    """Run a recipe quietly in this process, as one of the ranks that the environment names."""
    return train_and_keep(keys)[0]


def train_and_keep(keys: Mapping[str, Any]) -> tuple[Trained, Plan]:
    """The same, with the plan whose model was trained."""
    from llmtune.cost import estimate
    from llmtune.recipe.recipe import load_recipe
    from llmtune.training.log import read_metrics
    from llmtune.training.run import train_here
    from llmtune.training.save import trained_tensors

    with contextlib.redirect_stdout(io.StringIO()):
        outcome = train_here(load_recipe(keys), registry(), estimate, show=lambda *_: None)
    tensors = trained_tensors(outcome.plan.model)
    rows = [row for row in read_metrics(outcome.plan.output_dir) if "loss" in row]
    return Trained(rows, tensors), outcome.plan


def whole_state(keys: Mapping[str, Any]) -> dict[str, Tensor]:
    """Every tensor of a recipe's model once its weights are loaded, whole. Collective."""
    from llmtune.distributed.placement import full
    from llmtune.model.edits import named_tensors

    made, _ = build(keys)
    return {name: full(tensor) for name, tensor in named_tensors(made.module).items()}
