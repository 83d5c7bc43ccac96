"""From a plan to a model with weights: spread, load, settle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmtune.contract.structure import transformer_layers
from llmtune.distributed.activation_checkpointing import checkpoint_activations
from llmtune.distributed.context_parallel import attend_over_ranks
from llmtune.distributed.fsdp2 import compile_layers
from llmtune.distributed.mesh import parameter_mesh
from llmtune.distributed.ranks import first_does, join
from llmtune.distributed.tensor_parallel import split
from llmtune.model.loading import WeightLoader, only_first_reads
from llmtune.model.source import resolve_model
from llmtune.model.tying import require_tied
from llmtune.model.weight_files import StoredTensor, read_index
from llmtune.training.objective import Objective

if TYPE_CHECKING:
    from llmtune.contract.records import Distribute, Init
    from llmtune.planning.plan import Plan


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
    init: Init = plan.parts.one("init_config").built
    files = first_does(lambda: Files.find(plan)) if only_first_reads(init) else Files.find(plan)
    plan.model.generation_config = files.generation
    spread(plan, objective)
    distribute: Distribute = plan.parts.one("dist_config").built
    WeightLoader(
        model=plan.model,
        ledger=plan.ledger,
        folder=files.folder,
        index=files.index,
        shards=torch.device("cpu") if distribute.in_host_memory else None,
        init=init,
        device=plan.device,
        seed=plan.recipe.train.seed,
        new_heads=plan.recipe.model.model_class == "cls",
        vocabulary=plan.vocabulary,
    ).run()
    return objective


@dataclass(frozen=True)
class Files:
    """What a load has to know of the model's files. Plain values: one rank can look and tell the others."""

    folder: Path
    index: Mapping[str, StoredTensor]
    generation: Any

    @classmethod
    def find(cls, plan: Plan) -> Files:
        """Look on this machine's disk, fetching what is not there yet."""
        folder = resolve_model(plan.recipe.model, weights=True).folder
        index = read_index(folder)
        require_tied(plan.model, plan.ledger, folder, index)
        return cls(folder, index, generation_config(folder, plan.model))


def spread(plan: Plan, objective: Objective) -> None:
    """What happens to the structure after the last edit: activation checkpointing, compilation, the ranks."""
    train, layers = plan.recipe.train, [layer for _, layer in transformer_layers(plan.model)]
    if plan.ranks.layout.context > 1:
        attend_over_ranks(plan.model, plan.ranks.layout, plan.device)
    if plan.mode == "train" and train.checkpointing != "none":
        checkpoint_activations(plan.model, train.checkpointing)
    if plan.mode == "train" and train.torch_compile:
        compile_layers(layers)
    distribute: Distribute = plan.parts.one("dist_config").built
    if plan.ranks.size > 1 or (plan.mode == "train" and distribute.in_host_memory):
        join(plan.ranks, plan.device, train.ddp_timeout, alone=True)
        mesh = parameter_mesh(plan.ranks.layout, plan.device)
        if plan.ranks.layout.tensor > 1:
            split(plan.model, plan.ledger, mesh["tensor"])
        distribute.apply(objective, layers, mesh, plan.context)


def generation_config(folder: Path, model: Any) -> Any:
    """The checkpoint's generation_config.json, as `from_pretrained` reads it; else one made from the model's config."""
    from transformers import GenerationConfig

    if (folder / "generation_config.json").exists():
        return GenerationConfig.from_pretrained(folder)
    return model.generation_config
