"""Merge what was trained into its base and write a plain model, then prove that it answers alike."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.contract.errors import PlanError
from llmtune.contract.records import Merges
from llmtune.distributed.ranks import Ranks, pick_device
from llmtune.inference.reopen import fill, open_plan, recipe_of, saved_at
from llmtune.model.precision import torch_dtype
from llmtune.planning.make import make_model_plan
from llmtune.recipe.registry import Registry
from llmtune.training.building import build_objective
from llmtune.training.save import untied

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from llmtune.planning.model_plan import ModelPlan
    from llmtune.recipe.export_config import ExportConfig
    from llmtune.recipe.recipe import Recipe

PROBE = "Who are you? Answer in one sentence."


def export(path: str | Path, /, **overrides: Any) -> Path:
    """Write the trained model of a run or checkpoint as a plain transformers folder; returns it.

    The merge happens on the CPU, onto the unquantised base, in float32; the result is stored as `infer_dtype`. Raises
    PlanError if the merged model does not answer like base plus adapter, or answers exactly like the base.
    """
    recipe = recipe_of(path, **overrides)
    target = _target(recipe.export.export_dir)
    if saved_at(path) is None:
        raise PlanError(f"{path}: export takes a run of llmtune or one of its checkpoints; this is neither")
    import torch

    overrides = {**overrides, "quant_config": None, "kernel_config": None}
    base = base_logits(recipe_of(path, **{**overrides, "peft_config": None}))
    plan = open_plan(path, dtype=torch.float32, device="cpu", **overrides)
    if recipe.blocks.get("quant_config"):
        print("The adapter was trained on a quantised base; it is merged onto the unquantised one.", file=sys.stderr)
    dtype = torch_dtype(recipe.export.infer_dtype, plan.module.config)
    fill(plan, path)
    ids = probe_ids(plan.tokenizer)
    trained = logits(plan.module, ids)
    for part in plan.parts.at("peft_config"):
        if isinstance(part.built, Merges):
            part.built.merge(plan.module)
    compare(logits(plan.module, ids), trained, base)
    write(plan, target, dtype, recipe.export)
    return target


def _target(export_dir: str | None) -> Path:
    if not export_dir:
        raise PlanError("export_dir: not given; name the folder to write, for example export_dir=merged")
    target = Path(export_dir)
    if target.exists() and any(target.iterdir()):
        raise PlanError(f"export_dir: {target} is not empty; name a new folder")
    return target


def probe_ids(tokenizer: Any) -> Tensor:
    """A short prompt as the template renders it, (1, T)."""
    import torch

    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROBE}], tokenize=False, add_generation_prompt=True
    )
    return torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])


def logits(model: Any, ids: Tensor) -> Tensor:
    """Float32 logits (1, T, V) of the model in eval mode."""
    import torch

    model.eval()
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits.float()


def base_logits(recipe: Recipe) -> Tensor:
    """What the base model says, before any training. It is gone on return, so that one model at a time is held."""
    import torch

    plan = make_model_plan(recipe, Registry(), Ranks(), pick_device("cpu"), "infer", torch.float32)
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
    """Safetensors of at most `export_size` GB (or one pickled .bin), config, tokenizer; optionally to the hub."""
    import torch

    model = plan.module
    model.to(dtype)
    model.config.dtype = dtype
    target.mkdir(parents=True, exist_ok=True)
    if keys.export_legacy_format:
        torch.save(
            untied(model, {name: t.contiguous() for name, t in model.state_dict().items()}),
            target / "pytorch_model.bin",
        )
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(target)
        model.generation_config.save_pretrained(target)
    else:
        model.save_pretrained(target, max_shard_size=f"{keys.export_size}GB")
    plan.tokenizer.save_pretrained(target)
    if keys.export_hub_model_id:
        model.push_to_hub(keys.export_hub_model_id, token=plan.keys.token)
        plan.tokenizer.push_to_hub(keys.export_hub_model_id, token=plan.keys.token)
