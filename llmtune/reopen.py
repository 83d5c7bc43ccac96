"""Load what was trained: from a run, from one of its checkpoints, or a plain model by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune import checkpoint, rundir
from llmtune.building import build_objective
from llmtune.errors import CheckpointError
from llmtune.placement import put
from llmtune.planning import Plan, make_plan
from llmtune.precision import torch_dtype
from llmtune.ranks import Ranks, pick_device
from llmtune.recipe import load_recipe
from llmtune.registry import Registry

if TYPE_CHECKING:
    import torch

    from llmtune.recipe import Recipe


def run_of(path: Path) -> Path | None:
    """The run folder that `path` is, or is a checkpoint of; None for anything else."""
    for folder in (path, path.parent.parent):
        if (folder / "run.json").exists():
            return folder
    return None


def recipe_of(path: str | Path, **overrides: Any) -> Recipe:
    """The resolved recipe of a run (or of a checkpoint's run), or a minimal one for a plain model."""
    run = run_of(Path(path))
    if run is None:
        return load_recipe({"model": str(path)}, overrides)
    return load_recipe(run / "resolved.yaml", overrides)


def open_plan(path: str | Path, *, dtype: torch.dtype | None = None, device: str = "auto", **overrides: Any) -> Plan:
    """A plan whose model has the structure it was trained with; weights come with `fill`."""
    recipe = recipe_of(path, **overrides)
    place = pick_device(device)
    trained = run_of(Path(path)) is not None
    if trained and is_whole_model(Path(path)):
        recipe = whole_model(recipe, Path(path) / "model")
    made = make_plan(recipe, Registry(), Ranks(), place, "build" if trained else "infer", dtype or _usual_dtype(recipe))
    made.model.requires_grad_(False)
    return made


def _usual_dtype(recipe: Recipe) -> torch.dtype:
    from llmtune.source import load_model_config, resolve_model

    return torch_dtype(
        recipe.train.infer_dtype, load_model_config(resolve_model(recipe.model, weights=False), recipe.model)
    )


def is_whole_model(path: Path) -> bool:
    """Whether `path` is a finished run that saved a whole model rather than an adapter."""
    return (path / "model" / "config.json").exists() and not (path / "trained.safetensors").exists()


def whole_model(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe of the saved model itself: nothing is adapted or quantised any more."""
    blocks = {point: blocks for point, blocks in recipe.blocks.items() if point not in ("peft_config", "quant_config")}
    return replace(recipe, model=replace(recipe.model, model=str(folder), revision=None), blocks=blocks)


def open_model(
    path: str | Path, *, dtype: torch.dtype | None = None, device: str = "auto", **overrides: Any
) -> tuple[Any, Any]:
    """(model in eval mode, tokenizer) of a run, a checkpoint, a model folder or a hub id."""
    plan = open_plan(path, dtype=dtype, device=device, **overrides)
    fill(plan, Path(path))
    return plan.model, plan.tokenizer


def fill(plan: Plan, path: Path) -> None:
    """Load base weights, then what was trained on top of them."""
    objective = build_objective(plan)
    run = run_of(path)
    if run is not None and path != run:
        plan.model.requires_grad_(False)
        restore_trained(plan, checkpoint_tensors(plan, path))
    elif run is not None and not is_whole_model(path):
        restore_trained(plan, saved_tensors(plan, run))
    objective.eval()


def saved_tensors(plan: Plan, run: Path) -> Mapping[str, Any]:
    """The trained tensors of a finished run, else of its newest checkpoint."""
    from safetensors.torch import load_file

    if (run / "trained.safetensors").exists():
        return load_file(run / "trained.safetensors")
    found = checkpoint.newest(run / "checkpoints")
    if found is None:
        raise CheckpointError(f"{run}: the run has saved nothing yet (status {rundir.read_record(run).get('status')})")
    return checkpoint_tensors(plan, found[0])


def checkpoint_tensors(plan: Plan, folder: Path) -> Mapping[str, Any]:
    """The trained tensors of one checkpoint, checked against its manifest."""
    checkpoint.verify(folder)
    return checkpoint.read_trained(folder)


def restore_trained(plan: Plan, tensors: Mapping[str, Any]) -> None:
    """Put trained tensors in place. Raises CheckpointError unless they are exactly those the recipe trains."""
    here = dict(plan.model.named_parameters())
    if odd := sorted(set(tensors) ^ set(plan.trainable)):
        raise CheckpointError(f"the saved tensors are not those the recipe trains: {odd[:6]}")
    for name, tensor in tensors.items():
        put(here[name], tensor)
