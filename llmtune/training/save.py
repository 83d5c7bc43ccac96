"""What users take away: PEFT adapters, safetensors with index, tokenizer and chat template."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file

from llmtune.contract.errors import blaming
from llmtune.distributed.placement import full
from llmtune.folders import publish, size_and_hash
from llmtune.media.processor import copy_processor
from llmtune.model.edits import named_tensors
from llmtune.training.file_names import TRAINED

if TYPE_CHECKING:
    from torch import Tensor

    from llmtune.planning.model_plan import ModelPlan


def trained_tensors(plan: ModelPlan) -> dict[str, Tensor]:
    """Every trained tensor of the result whole, on the CPU of rank 0 (empty elsewhere). Collective."""
    chosen = {}
    for name, parameter in plan.module.named_parameters():
        if parameter.requires_grad and name not in plan.ledger.aside:
            tensor = full(parameter)
            if plan.ranks.first:
                chosen[name] = tensor
    return chosen


def original_tensors(plan: ModelPlan) -> dict[str, Tensor]:
    """The whole model under its original names, on the CPU of rank 0, with load rules undone. Collective. What is whole
    and of its type already is the memory of the model itself."""
    tensors = named_tensors(plan.module)
    found = {}
    for name, now in plan.ledger.direct.items():
        tensor, trains = full(tensors[now], copy=False), tensors[now].requires_grad
        if plan.ranks.first:
            # What does not train is in the type it is used in, which may be float32 for a few (router biases).
            cast = trains or name in plan.ledger.upcast
            found[name] = tensor.to(plan.precision.compute) if cast else tensor
    for name, placed in plan.ledger.rules.items():
        parts = {target: full(tensors[now]) for target, now in placed.where.items()}
        if plan.ranks.first:
            with blaming(f"plugin {placed.plugin}", f"its load rule for {placed.rule.source}"):
                found[name] = placed.rule.restore(parts)
    return found


def write_adapter(plan: ModelPlan, folder: Path) -> dict[str, Tensor]:
    """The adapter in the format others read. Collective; returns the trained tensors (rank 0)."""
    tensors = trained_tensors(plan)
    if plan.ranks.first:
        folder.mkdir(parents=True, exist_ok=True)
        (part,) = plan.parts.at("peft_config")
        with blaming(part.full_label, "save"):
            part.built.save(plan.module, tensors, folder, plan.context)
    return tensors


def write_result(plan: ModelPlan, folder: Path) -> dict[str, Any]:
    """`model/` of a finished run, and `trained.safetensors` beside it for an adapter. Collective.

    Both appear whole, flushed to disk. Returns, on rank 0, what run.json says of them: the files by their paths in the
    run's folder, and the SHA-256 of `trained.safetensors`.
    """
    run, partial, model = folder.parent, folder.with_name(f".{folder.name}.partial"), plan.module
    facts: dict[str, Any] = {}
    if plan.ranks.first:
        shutil.rmtree(partial, ignore_errors=True)
    if plan.is_adapter:
        tensors = write_adapter(plan, partial)
        if plan.ranks.first:
            beside = run / f".{TRAINED}.partial"
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, beside)
            facts["trained_sha256"] = size_and_hash(beside)[1]
            publish(beside, run / TRAINED)
    else:
        state = original_tensors(plan)
        if plan.ranks.first:
            model.save_pretrained(partial, state_dict=untied(model, state))
            # transformers writes down the type of the weights in memory, which is float32 in mixed precision.
            model.config.dtype = plan.precision.compute
            model.config.save_pretrained(partial)
    if not plan.ranks.first:
        return facts
    plan.tokenizer.save_pretrained(partial)  # with the chat template that the run was trained with
    copy_processor(plan.files.folder, partial)
    publish(partial, folder)
    written = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {**facts, "result": [str(path.relative_to(run)) for path in written]}


def untied(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the second names of tied weights, as checkpoints are written."""
    return {name: tensor for name, tensor in state.items() if name not in (model.all_tied_weights_keys or {})}
