"""Merge what was trained into its base and write a plain model, then prove that it answers alike."""

from __future__ import annotations

import gc
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import save_torch_state_dict

from llmtune.contract.errors import PlanError, blaming
from llmtune.contract.records import Merges
from llmtune.distributed.ranks import Ranks, pick_device
from llmtune.folders import make_readable
from llmtune.inference.reopen import fill, open_plan, recipe_of, saved_at
from llmtune.model.generation import encode, has_template, plain_ids
from llmtune.model.huggingface import HuggingFace
from llmtune.model.skeleton import cast
from llmtune.model.source import load_model_config, resolve_model
from llmtune.model.weight_files import read_index, stored_dtype
from llmtune.planning.make import make_model_plan
from llmtune.recipe.parts import hub_of
from llmtune.recipe.registry import Registry
from llmtune.training.building import build_objective
from llmtune.training.save import untied

if TYPE_CHECKING:
    from torch import Tensor

    from llmtune.planning.model_plan import ModelPlan
    from llmtune.recipe.export_config import ExportConfig
    from llmtune.recipe.recipe import Recipe

PROBE = "Who are you? Answer in one sentence."


def export(path: str | Path, /, **overrides: Any) -> Path:
    """Write a model with what was trained merged in as a plain transformers folder; returns it.

    `path` is a run, one of its checkpoints, or a base (a model, a recipe) with a `peft_config` that names adapters.
    The merge happens on `export_device`, onto the unquantised base, in float32; the result is stored as `infer_dtype`.
    Raises PlanError if the merged model does not answer like base plus adapter, or answers exactly like the base.
    """
    recipe = recipe_of(path, **overrides)
    target = _target(recipe.export.export_dir)
    if recipe.export.export_hub_model_id and not isinstance(hub := hub_of(recipe), HuggingFace):
        raise PlanError(
            f"export_hub_model_id: llmtune uploads to Hugging Face alone, and hub_config is {hub.title}; remove the "
            f"key and upload {target} with that hub's own command, or set hub_config: huggingface"
        )
    if saved_at(path) is None and not recipe.blocks.get("peft_config"):
        raise PlanError(
            f"{path}: there is nothing to merge; name a run of llmtune or one of its checkpoints, or add to a base the "
            'adapter that is to be merged: "peft_config={name: lora, adapter_name_or_path: FOLDER}"'
        )

    overrides = {**overrides, "quant_config": None, "kernel_config": None}
    alone = recipe_of(path, **{key: value for key, value in overrides.items() if not key.startswith("peft_config")})
    device = recipe.export.export_device
    base = base_logits(replace(alone, blocks={**alone.blocks, "peft_config": []}), device)
    plan = open_plan(path, dtype=torch.float32, device=device, **overrides)
    if recipe.blocks.get("quant_config"):
        print("The adapter was trained on a quantised base; it is merged onto the unquantised one.", file=sys.stderr)
    dtype = export_dtype(recipe.export.infer_dtype, alone)
    fill(plan, path)
    ids = probe_ids(plan.tokenizer)
    trained = logits(plan.module, ids)
    for part in plan.parts.at("peft_config"):
        if isinstance(part.built, Merges):
            with blaming(part.full_label, "merge"):
                part.built.merge(plan.module)
    compare(logits(plan.module, ids), trained, base)
    write(plan, target, dtype, recipe.export)
    return target


def export_dtype(name: str, recipe: Recipe) -> torch.dtype:
    """`infer_dtype` of an export: `auto` is the type that the files of the recipe's model have."""
    if name != "auto":
        return {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}[name]
    files = resolve_model(recipe.model, hub_of(recipe), weights=True)
    declared = load_model_config(files, recipe.model).dtype
    return stored_dtype(read_index(files.folder), declared if isinstance(declared, torch.dtype) else None)


def _target(export_dir: str | None) -> Path:
    if not export_dir:
        raise PlanError("export_dir: not given; name the folder to write, for example export_dir=merged")
    target = Path(export_dir)
    if target.exists() and any(target.iterdir()):
        raise PlanError(f"export_dir: {target} is not empty; name a new folder")
    return target


def probe_ids(tokenizer: Any) -> Tensor:
    """A short prompt, (1, T): as the chat template renders it, or as it is where there is none."""
    if not has_template(tokenizer, {}):
        return plain_ids(tokenizer, PROBE)
    return encode(tokenizer, [{"role": "user", "content": PROBE}], {})


def logits(model: Any, ids: Tensor) -> Tensor:
    """Float32 logits (1, T, V) of the model in eval mode."""
    model.eval()
    with torch.no_grad():
        return model(input_ids=ids.to(model.device), use_cache=False).logits.float()


def base_logits(recipe: Recipe, device: str) -> Tensor:
    """What the base model says, before any training. It is gone on return, so that one model at a time is held."""
    plan = make_model_plan(recipe, Registry(), Ranks(), pick_device(device), "infer", torch.float32)
    build_objective(plan)
    said = logits(plan.module, probe_ids(plan.tokenizer))
    del plan
    gc.collect()  # modules refer to each other in circles
    return said


def compare(merged: Tensor, trained: Tensor, base: Tensor) -> None:
    """Fail loudly on the two silent ways a merge goes wrong: it changed the answers, or it changed nothing."""
    scale = trained.abs().max()
    error = ((merged - trained).abs().max() / scale).item()
    if error > 1e-3:
        raise PlanError(
            f"the merged model does not answer like base plus adapter: logits differ by {error:.1e} of their size"
        )
    if bool((merged == base).all()):
        raise PlanError(
            "the merged model answers exactly like the base model: nothing was trained, or the wrong files were merged"
        )


def write(plan: ModelPlan, target: Path, dtype: torch.dtype, keys: ExportConfig) -> None:
    """Files of at most `export_size` GB (safetensors, or pickles), config, tokenizer; optionally to the hub."""
    model, size = plan.module, f"{keys.export_size}GB"
    cast(model, dtype)
    model.config.dtype = dtype
    target.mkdir(parents=True, exist_ok=True)
    if keys.export_legacy_format:
        save_torch_state_dict(
            untied(model, model.state_dict()),
            target,
            filename_pattern="pytorch_model{suffix}.bin",
            max_shard_size=size,
            safe_serialization=False,
        )
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(target)
        model.generation_config.save_pretrained(target)
    else:
        model.save_pretrained(target, max_shard_size=size)
    plan.tokenizer.save_pretrained(target)
    make_readable(target)
    if keys.export_hub_model_id:
        model.push_to_hub(keys.export_hub_model_id, token=plan.keys.token)
        plan.tokenizer.push_to_hub(keys.export_hub_model_id, token=plan.keys.token)
