"""Load what was trained: from a run, from one of its checkpoints, or a plain model by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors.torch import load_file

from llmtune.contract.errors import CheckpointError, LlmtuneError, LoadError, PlanError, RecipeError
from llmtune.contract.generation import ReadsFiles, ServedModel
from llmtune.contract.records import Reopens
from llmtune.conversion.convert import offer
from llmtune.distributed.placement import put
from llmtune.distributed.ranks import Ranks, pick_device
from llmtune.folders import size_and_hash
from llmtune.model.fingerprint import base_fingerprint
from llmtune.model.precision import torch_dtype
from llmtune.model.source import load_model_config, resolve_model
from llmtune.planning.engine import Load, served_model
from llmtune.planning.make import make_model_plan
from llmtune.recipe.parts import find_parts, hub_of
from llmtune.recipe.recipe import load_recipe
from llmtune.recipe.registry import Registry
from llmtune.terminal import doing
from llmtune.training import checkpoint, run_folder, step_folders
from llmtune.training.building import build_objective, make_objective
from llmtune.training.manifest import verify

if TYPE_CHECKING:
    import torch

    from llmtune.planning.model_plan import ModelPlan
    from llmtune.recipe.parts import BuiltPlugin
    from llmtune.recipe.recipe import Recipe
    from llmtune.training.objective import Objective


class SavedRun(NamedTuple):
    """Where a trained model lies."""

    run: Path
    checkpoint: Path | None = None
    """One of the run's checkpoints; None is what the run ended with, or its newest checkpoint."""

    @property
    def whole(self) -> bool:
        """Whether it is a finished run that saved a whole model rather than an adapter."""
        saved = (self.run / "model" / "config.json").exists() and not (self.run / "trained.safetensors").exists()
        return self.checkpoint is None and saved


def saved_at(path: str | Path) -> SavedRun | None:
    """The run that `path` is, is a checkpoint of, or is the adapter of; None for anything else."""
    folder = Path(path).resolve()
    if _is_run(folder):
        return SavedRun(folder)
    if folder.parent.name == "checkpoints" and _is_run(folder.parent.parent):
        return SavedRun(folder.parent.parent, folder)
    if folder.name == "model" and _is_run(folder.parent) and (folder.parent / "trained.safetensors").exists():
        return SavedRun(folder.parent)
    return None


def _is_run(folder: Path) -> bool:
    return (folder / "run.json").exists()


def recipe_of(path: str | Path, /, **overrides: Any) -> Recipe:
    """The resolved recipe of a run (or of a checkpoint's run), a recipe file, or a minimal recipe for a plain model or
    for an adapter's folder and the base that it names.

    A run keeps what it was trained with: the commit of its base on the hub, and its chat template, whatever has become
    of the file or the base that it came from. `overrides` go before both.
    """
    saved = saved_at(path)
    if saved is None:
        file = Path(path).suffix.lower() in (".yaml", ".yml", ".json") and Path(path).is_file()
        try:
            return load_recipe(path if file else base_and_adapter(Path(path), overrides), overrides, for_use=True)
        except LlmtuneError as error:
            if file and (said := offer(path, for_use=True)):
                raise RecipeError(said) from error
            raise
    recipe, record = load_recipe(saved.run / "resolved.yaml", overrides), run_folder.read_record(saved.run)
    if record.get("model_origin") == "hub" and not {"model", "revision"} & overrides.keys():
        recipe = replace(recipe, model=replace(recipe.model, revision=record["model_revision"]))
    template = next((file for file in _templates(saved.run) if file.exists()), None)
    if template is not None and "template" not in overrides:
        recipe = replace(recipe, data=replace(recipe.data, template=str(template)))
    return recipe


def base_and_adapter(path: Path, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a model: its folder or hub id, or what PEFT's file in an adapter's folder says.

    Raises PlanError where that names no base.
    """
    file = path / "adapter_config.json"
    if not file.exists():
        return {"model": str(path)}
    told = json.loads(file.read_text(encoding="utf-8"))
    base = overrides.get("model", told.get("base_model_name_or_path"))
    if not base:
        raise PlanError(f"{file}: names no base model; name it: llmtune chat {path} model=FOLDER_OR_HUB_ID")
    revision = None if "model" in overrides or Path(base).exists() else told.get("revision")
    return {"model": base, "revision": revision, "adapter_name_or_path": str(path)}


def _templates(run: Path) -> list[Path]:
    """Where the template that a run was trained with lies; nowhere where the tokenizer has several, by purpose."""
    if (run / "model" / "additional_chat_templates").exists():
        return []
    return [run / "model" / "chat_template.jinja", run / "chat_template.jinja"]


def open_plan(
    path: str | Path, /, *, dtype: torch.dtype | None = None, device: str = "auto",
    ranks: Ranks | None = None, **overrides: Any,
) -> ModelPlan:  # fmt: skip
    """A plan whose model has the structure it was trained with, spread over `ranks`; weights come with `fill`.

    Raises PlanError where the recipe would add something untrained, as an adapter without files.
    """
    recipe, registry, saved = recipe_of(path, **overrides), Registry(), saved_at(path)
    ranks = ranks or Ranks()
    place = pick_device(device, ranks.local_rank)
    if saved is not None and saved.whole:
        recipe = whole_model(recipe, saved.run / "model", overrides)
    elif saved is not None:
        recipe = with_saved_adapter(recipe, registry, saved, overrides)
    mode = "infer" if saved is None or saved.whole else "reopen"
    made = make_model_plan(recipe, registry, ranks, place, mode, dtype or _usual_dtype(recipe, place))
    if mode == "infer" and made.ledger.untrained():
        names = ", ".join(part.plugin.name for part in made.parts.at("peft_config"))
        raise PlanError(
            f"peft_config: {names} names no files of an adapter, so that it would be an untrained one; name them, or "
            f"the folder of the run that trained it, such as {recipe.train.output_dir}"
        )
    made.module.requires_grad_(False)
    return made


def _usual_dtype(recipe: Recipe, device: torch.device) -> torch.dtype:
    config = load_model_config(resolve_model(recipe.model, hub_of(recipe), weights=False), recipe.model)
    return torch_dtype(recipe.export.infer_dtype, config, device)


def whole_model(recipe: Recipe, folder: Path, overrides: Mapping[str, Any]) -> Recipe:
    """The recipe of the saved model itself: nothing is adapted any more, and quantised only if the caller asks. Its
    files have its weights, and say how its positions are stretched."""
    dropped = (
        {"peft_config"} if any(key.startswith("quant_config") for key in overrides) else {"peft_config", "quant_config"}
    )
    blocks = {point: blocks for point, blocks in recipe.blocks.items() if point not in dropped}
    model = replace(recipe.model, model=str(folder), revision=None, rope_scaling=None, train_from_scratch=False)
    return replace(recipe, model=model, blocks=blocks)


def with_saved_adapter(recipe: Recipe, registry: Registry, saved: SavedRun, overrides: Mapping[str, Any]) -> Recipe:
    """The recipe with the run's own adapter in place of the one it went on from, where the plugin knows how.

    Raises PlanError where `overrides` name other adapters.
    """
    parts = find_parts(recipe, registry, [], ("peft_config",))  # what is wrong, `make_model_plan` finds again
    for part in parts.at("peft_config"):
        if not isinstance(part.built, Reopens) or (folder := adapter_folder(saved)) is None:
            continue
        if (parameters := part.built.reopened(folder)) is None:
            continue
        if any(key.startswith(part.point) for key in overrides) and recipe.blocks != _own_blocks(saved, overrides):
            raise PlanError(
                f"{part.point}: {saved.run} is used with the adapter that it trained; for others, name their base: "
                f'{recipe.model.model} "{part.point}={{name: {part.plugin.name}, ...}}"'
            )
        blocks = {**recipe.blocks, part.point: [(part.plugin.name, dict(parameters))]}
        recipe = replace(recipe, blocks=blocks)
    return recipe


def _own_blocks(saved: SavedRun, overrides: Mapping[str, Any]) -> Mapping[str, Any]:
    others = {key: value for key, value in overrides.items() if not key.startswith("peft_config")}
    return load_recipe(saved.run / "resolved.yaml", others).blocks


def adapter_folder(saved: SavedRun) -> Path | None:
    """Where the run wrote its adapter in the format others read."""
    if saved.checkpoint is not None:
        return saved.checkpoint / "adapter"
    if (saved.run / "model").exists():
        return saved.run / "model"
    newest = step_folders.newest(saved.run / "checkpoints")
    return newest[0] / "adapter" if newest else None


def open_model(
    path: str | Path, /, *, dtype: torch.dtype | None = None, device: str = "auto", **overrides: Any
) -> tuple[Any, Any]:
    """(model in eval mode, tokenizer) of a run, a checkpoint, a model folder or a hub id."""
    plan = open_plan(path, dtype=dtype, device=device, **overrides)
    fill(plan, path)
    return plan.module, plan.tokenizer


def fill(plan: ModelPlan, path: str | Path) -> Objective:
    """Load base weights, then what was trained on top of them; the model's root, in eval mode. Collective.

    Raises LoadError if the base is another one now.
    """
    saved = saved_at(path) if plan.mode == "reopen" else None
    if saved is not None:
        check_base(plan, saved)
    objective = build_objective(plan)
    if saved is not None:
        restore_trained(plan, saved_tensors(saved))
    return objective.eval()


def filled_for(plan: ModelPlan, path: str | Path, engine: BuiltPlugin) -> Objective:
    """The model as `fill` has it, or without weights where the engine reads them itself. Collective."""
    if not isinstance(engine.built, ReadsFiles):
        return fill(plan, path)
    saved = saved_at(path) if plan.mode == "reopen" else None
    if saved is not None:
        check_base(plan, saved)
    doing.info("Waiting for engine_config %s", engine.plugin.name)
    engine.built.open(on_disk(plan, path, "model", lambda: (plan.module, nullcontext)))
    return make_objective(plan).eval()


def on_disk(plan: ModelPlan, path: str | Path, name: str, load: Load) -> ServedModel:
    """What is at `path`, as its files have it."""
    saved, adapter = saved_at(path) if plan.mode == "reopen" else None, None
    if saved is not None:
        adapter = adapter_folder(saved)
    elif (Path(path) / "adapter_config.json").exists():
        adapter = Path(path)
    found = adapter is not None and (adapter / "adapter_config.json").exists()
    return served_model(plan, name, str(adapter) if found else None, load)


def check_base(plan: ModelPlan, saved: SavedRun) -> None:
    """LoadError if the files of the run's base have been replaced since it was trained; not where another is named."""
    trained_on = run_folder.read_record(saved.run).get("model_fingerprint")
    own = load_recipe(saved.run / "resolved.yaml", {"trust_remote_code": plan.keys.trust_remote_code}).model.model
    if not trained_on or plan.keys.model != own:
        return
    folder = resolve_model(plan.keys, plan.hub, weights=True).folder
    if base_fingerprint(folder, plan.ledger) != trained_on:
        merged = "".join(f", or {path.parent}," for path in sorted(plan.ledger.beneath()))
        raise LoadError(
            f"model: the files in {folder}{merged} are not those that {saved.run} was trained on; put those back, or "
            "name another folder with model=, if what was trained is meant for it"
        )


def saved_tensors(saved: SavedRun) -> Mapping[str, Any]:
    """The trained tensors of a checkpoint, checked against its manifest, or of a run: the finished, else its newest;
    without those that only training needs, such as a value head.

    Raises CheckpointError where nothing was saved, or the file is damaged.
    """
    run, folder = saved
    if folder is None and (file := run / "trained.safetensors").exists():
        written = run_folder.read_record(run).get("trained_sha256")
        if written and size_and_hash(file)[1] != written:
            raise CheckpointError(
                f"{file}: damaged, its content is not what the run wrote (SHA-256 {written[:12]}...); restore it, or "
                f"use one of the run's checkpoints instead: {run / 'checkpoints'}/step-..."
            )
        return load_file(file)
    if folder is None:
        newest = step_folders.newest(run / "checkpoints")
        if newest is None:
            status = run_folder.read_record(run).get("status")
            raise CheckpointError(f"{run}: the run has saved nothing yet (status {status})")
        folder = newest[0]
    aside = verify(folder).numbers.get("aside", ())
    return {name: tensor for name, tensor in checkpoint.read_trained(folder).items() if name not in aside}


def restore_trained(plan: ModelPlan, tensors: Mapping[str, Any]) -> None:
    """Put trained tensors in place. Raises CheckpointError unless they are exactly those the recipe trains."""
    here = dict(plan.module.named_parameters())
    if odd := sorted(set(tensors) ^ set(plan.trainable)):
        raise CheckpointError(f"the saved tensors are not those the recipe trains: {odd[:6]}")
    for name, tensor in tensors.items():
        put(here[name], tensor)
