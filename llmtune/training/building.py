"""From a plan to what is trained: the model spread over the ranks and filled with weights, and the `Training` of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmtune.contract.errors import blaming
from llmtune.contract.optimizers import StepsEach, UpdatesInBackward
from llmtune.contract.records import SwitchesOff
from llmtune.contract.stages import further_models, precomputing
from llmtune.contract.structure import transformer_layers
from llmtune.distributed.activation_checkpointing import checkpoint_activations, offload_inputs
from llmtune.distributed.context_parallel import attend_over_ranks
from llmtune.distributed.fsdp2 import compile_layers, reshard
from llmtune.distributed.mesh import parameter_mesh
from llmtune.distributed.ranks import first_does, join
from llmtune.distributed.tensor_parallel import split
from llmtune.model.loading import WeightLoader, only_first_reads
from llmtune.model.media_types import cast_media
from llmtune.model.picture_masks import mask_pictures_by_document
from llmtune.model.positions import count_positions_by_document
from llmtune.model.source import resolve_model
from llmtune.model.tying import require_tied
from llmtune.model.weight_files import StoredTensor, read_index
from llmtune.planning.further_models import askers
from llmtune.training.isolation import check_isolation
from llmtune.training.layerwise import LayerwiseUpdates
from llmtune.training.loop import LossScale, Training
from llmtune.training.objective import BeforeTraining, Context, FrozenModel, Objective, OwnModel
from llmtune.training.precomputed import kept_numbers, precomputed, with_numbers
from llmtune.training.rollouts import KEPT_BYTES, Rollouts
from llmtune.training.router_balance import RouterBalance
from llmtune.training.schedule import WarmedSchedule

if TYPE_CHECKING:
    from llmtune.contract.records import Distribute, Init
    from llmtune.planning.model_plan import ModelPlan
    from llmtune.planning.plan import Plan


def build_run(plan: Plan) -> tuple[Plan, Objective]:
    """The model that trains inside its stage, and the stage's further models, all spread and filled. Collective.

    Where the stage `Precomputes`, its further models are asked here and let go; the plan's samples get the numbers.
    """
    stage = plan.parts.one("stage_config").built
    if precomputing(stage) is None:
        objective = build_objective(plan.model)
        objective.context = make_context(plan, objective.context.ops)
        return plan, objective
    numbers = kept_numbers(plan)
    if numbers is None and set(plan.further) == set(further_models(stage)):  # they come and go before the trained one
        numbers = precomputed(plan, make_context(plan, {}), lambda work: work())
    objective = build_objective(plan.model)
    if numbers is None:
        numbers = precomputed(plan, make_context(plan, objective.context.ops), objective.eval())
        reshard(objective)
    return with_numbers(plan, numbers), objective


def make_context(plan: Plan, ops: Mapping[str, Callable[..., Any]]) -> Context:
    """What the plan's stage may call besides the trained model and its `ops`. Collective: builds its further models."""
    own = {name: build_objective(further).eval() for name, further in plan.further.items()}
    for each in own.values() if plan.data.batches.flat else ():
        check_isolation(each, plan.device, plan.recipe.data.isolates)
        reshard(each)
    stage, *rewards = asked(plan, {name: OwnModel(each) for name, each in own.items()})
    rollouts = make_rollouts(plan, rewards)
    for name, each in own.items():
        each.context = Context(each.context.ops, rollouts=rollouts.asked_by(plan.further[name].media))
    return Context(ops, further=stage, tensor_ranks=plan.ranks.dims.tensor, rollouts=rollouts)


def asked(plan: Plan, own: Mapping[str, FrozenModel]) -> list[dict[str, FrozenModel]]:
    """All further models of the plan's stage and of each reward: their `own` ones, and for the others the trained
    model, adapters off."""
    switches = [part.built for part in plan.parts.at("peft_config") if isinstance(part.built, SwitchesOff)]

    def model(name: str) -> FrozenModel:
        return own[name] if name in own else BeforeTraining(plan.model.module, switches[0])

    return [{name: model(prefix + name) for name in further_models(part.built)} for prefix, part in askers(plan.parts)]


def make_rollouts(plan: Plan, further: Sequence[Mapping[str, FrozenModel]]) -> Rollouts:
    """What the plan's stage needs to let its model answer; `further` are the models that each reward asks."""
    batches, media = plan.data.batches, plan.model.media
    media = None if media is None else replace(media, keeps_bytes=KEPT_BYTES)
    return Rollouts(
        tokenizer=plan.model.tokenizer, engine=plan.parts.one("engine_config"), rewards=plan.parts.at("reward_config"),
        further=further, flat=batches.flat, pad_id=batches.pad_id, device=plan.device, ranks=plan.ranks,
        seed=plan.recipe.train.seed, media=media,
    )  # fmt: skip


def build_objective(plan: ModelPlan) -> Objective:
    """The plan's model inside its stage, spread over the ranks and filled with weights.

    Collective where there are several ranks. Raises LoadError or EditError; nothing is trained on half a model.
    """
    objective = make_objective(plan)
    part = plan.parts.one("init_config")
    init: Init = part.built
    files = first_does(lambda: WeightFiles.find(plan)) if only_first_reads(init) else WeightFiles.find(plan)
    spread(plan, objective)
    distribute: Distribute = plan.parts.one("dist_config").built
    WeightLoader(
        model=plan.module,
        ledger=plan.ledger,
        folder=files.folder,
        index=files.index,
        shards=torch.device("cpu") if distribute.in_host_memory else None,
        init=init,
        init_label=part.full_label,
        device=plan.device,
        seed=plan.seed,
        new_heads=plan.head_elsewhere,
        vocabulary=plan.vocabulary,
    ).run()
    return objective


def make_objective(plan: ModelPlan) -> Objective:
    """The plan's model inside its stage, as it is: on the meta device, on no rank."""
    count_positions_by_document(plan.module)
    mask_pictures_by_document(plan.module)
    cast_media(plan.module)
    ops = {name: op for _, change in plan.ledger.changes for name, op in change.ops.items()}
    autocast = plan.precision.compute if plan.precision.autocast else None
    if not (stages := plan.parts.at("stage_config")):
        return Objective(plan.module, None, ops, autocast)
    return Objective(plan.module, stages[0].built, ops, autocast, stages[0].full_label)


def make_training(plan: Plan, objective: Objective, optimizer: torch.optim.Optimizer, first_step: int = 0) -> Training:
    """All that the plan's steps need, beginning after `first_step`."""
    train, factory = plan.recipe.train, plan.parts.one("optim_config").built
    layerwise = balance = None
    if coefficient := train.moe_aux_loss_coef:
        balance = RouterBalance(plan.model.module, coefficient, plan.ranks.dims.tensor)
    if isinstance(factory, UpdatesInBackward) and factory.layerwise and isinstance(optimizer, StepsEach):
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        layerwise = LayerwiseUpdates(optimizer, trained)
    return Training(
        objective=objective, optimizer=optimizer, optimizer_label=plan.parts.one("optim_config").full_label,
        batches=plan.data.batches,
        schedule=WarmedSchedule(plan.parts.one("lr_scheduler_config"), train.warmup_type, train.warmup_start),
        distribute=plan.parts.one("dist_config").built, ranks=plan.ranks, device=plan.device, total_steps=plan.steps,
        warmup_steps=plan.warmup_steps, max_grad_norm=train.max_grad_norm or 0.0, seed=train.seed,
        scaler=LossScale() if plan.model.precision.scaled else None, first_step=first_step,
        layerwise=layerwise, balance=balance,
    )  # fmt: skip


@dataclass(frozen=True)
class WeightFiles:
    """What a load has to know of the model's files. Plain values: one rank can look and tell the others."""

    folder: Path
    index: Mapping[str, StoredTensor]

    @classmethod
    def find(cls, plan: ModelPlan) -> WeightFiles:
        """Look on this machine's disk, fetching what is not there yet."""
        folder = resolve_model(plan.keys, plan.hub, weights=True).folder
        index = read_index(folder)
        require_tied(plan.module, plan.ledger, folder, index)
        return cls(folder, index)


def spread(plan: ModelPlan, objective: Objective) -> None:
    """What happens to the structure after the last edit: activation checkpointing, compilation, the ranks."""
    layers = [layer for _, layer in transformer_layers(plan.module)]
    if plan.ranks.dims.context > 1:
        attend_over_ranks(plan.module, plan.ranks.dims, plan.device)
    if plan.checkpointing != "none":
        checkpoint_activations(plan.module, plan.checkpointing)
    if plan.offloads:
        offload_inputs(plan.module)
    if plan.compiled:
        compile_layers(layers)
    part = plan.parts.one("dist_config")
    distribute: Distribute = part.built
    if plan.ranks.size > 1 or (plan.mode == "train" and distribute.in_host_memory):
        join(plan.ranks, plan.device, alone=True)
        mesh = parameter_mesh(plan.ranks.dims, plan.device)
        if plan.ranks.dims.tensor > 1:
            split(plan.module, plan.ledger.direct, plan.ledger.tp_follow, mesh["tensor"])
        with blaming(part.full_label, "apply"):
            distribute.apply(objective, layers, mesh, plan.context)
