"""From a plan to a model with weights: spread, load, settle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.loading import Loader
from llmtune.objective import Objective
from llmtune.parallel import checkpoint_activations
from llmtune.source import resolve_model
from llmtune.structure import transformer_layers

if TYPE_CHECKING:
    from llmtune.planning import Plan


def build_objective(plan: Plan) -> Objective:
    """The plan's model inside its stage, spread over the ranks and filled with weights.

    Collective where there are several ranks. Raises LoadError or EditError; nothing is trained on half a model.
    """
    ops = {name: op for _, change in plan.ledger.changes for name, op in change.ops.items()}
    stages = plan.parts.at("stage_config")
    objective = Objective(
        plan.model,
        stages[0].built if stages else None,
        ops,
        plan.precision.compute if plan.precision.autocast else None,
    )
    files = resolve_model(plan.recipe.model, weights=True)
    plan.model.generation_config = generation_config(files.folder, plan.model)
    if plan.mode == "train" and not plan.recipe.train.disable_gradient_checkpointing:
        checkpoint_activations(plan.model)
    if plan.ranks.size > 1:
        from torch.distributed.device_mesh import init_device_mesh

        mesh = init_device_mesh(plan.device.type, (plan.ranks.size,), mesh_dim_names=("shard",))
        layers = [layer for _, layer in transformer_layers(plan.model)]
        plan.parts.one("dist_config").built.apply(objective, layers, mesh, plan.situation)
    Loader(
        model=plan.model,
        ledger=plan.ledger,
        folder=files.folder,
        init=plan.parts.one("init_config").built,
        device=plan.device,
        seed=plan.recipe.train.seed,
        new_heads=plan.recipe.model.model_class == "cls",
    ).run()
    return objective


def generation_config(folder: Path, model: Any) -> Any:
    """The checkpoint's generation_config.json, as `from_pretrained` reads it; else one made from the model's config."""
    from transformers import GenerationConfig

    if (folder / "generation_config.json").exists():
        return GenerationConfig.from_pretrained(folder)
    return model.generation_config
