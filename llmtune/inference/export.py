"""Merge what was trained into its base and write a plain model, then prove that it answers alike."""

from __future__ import annotations

import gc
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import save_torch_state_dict

from llmtune.contract.errors import PlanError, blaming
from llmtune.contract.records import Merges
from llmtune.distributed.ranks import Ranks, pick_device
from llmtune.folders import publish
from llmtune.inference.gguf_export import architecture_of, write_gguf
from llmtune.inference.model_card import license_of, model_card
from llmtune.inference.modelfile import modelfile
from llmtune.inference.quantised_export import calibration, gptq_python, quantise
from llmtune.inference.reopen import adapter_folder, fill, open_plan, recipe_of, saved_at
from llmtune.inference.upload import Upload
from llmtune.media.processor import copy_processor
from llmtune.model.generate import stop_tokens, turn_ends
from llmtune.model.generation import encode, has_template, plain_ids
from llmtune.model.skeleton import cast
from llmtune.model.source import load_model_config, resolve_model
from llmtune.model.weight_files import read_index, stored_dtype
from llmtune.planning.make import make_model_plan
from llmtune.recipe.parts import hub_of
from llmtune.recipe.registry import Registry
from llmtune.terminal import doing
from llmtune.training.building import build_objective
from llmtune.training.save import untied

if TYPE_CHECKING:
    from torch import Tensor

    from llmtune.planning.model_plan import ModelPlan
    from llmtune.recipe.export_config import ExportConfig
    from llmtune.recipe.recipe import Recipe

PROBE = "Who are you? Answer in one sentence."


def export(path: str | Path, /, **overrides: Any) -> Path:
    """Write a model with what was trained merged in, or its adapter alone, to `export_dir`; returns the folder.

    `path` is a run, one of its checkpoints, or a base (a model, a recipe) with a `peft_config` that names adapters.
    The merge happens on `export_device`, onto the unquantised base, in float32; the result is stored as `infer_dtype`,
    or as the keys of its format say.
    Raises PlanError if the merged model does not answer like base plus adapter, or answers exactly like the base.
    """
    recipe = recipe_of(path, **overrides)
    keys, saved, target = recipe.export, saved_at(path), _named(recipe.export.export_dir)
    upload = Upload.of(path, recipe, target, overrides)
    if upload is not None and upload.waits:
        upload.send()
        return target
    _require_new(target)
    if "export_gguf_type" in overrides and keys.export_format != "gguf":
        raise PlanError(
            f"export_gguf_type: found {keys.export_gguf_type}, which counts with export_format: gguf, and not "
            f"{keys.export_format}; set that, or remove the key"
        )
    rows: list[list[int]] = []
    if keys.export_quantization_bit:  # what it lacks is said before weights are read
        gptq_python()
        rows = list(calibration(recipe, open_plan(path, **overrides).tokenizer))
    with appearing(target) as folder:
        if keys.export_format == "adapter":
            base, library = copy_adapter(path, recipe, folder, overrides), "peft"
        else:
            plan = merged_plan(path, recipe, overrides)
            base, library = plan.files.folder, write_as(plan, recipe, folder, target.name, rows)
        card = model_card(recipe, saved.run if saved else None, base, library, target.name)
        (folder / "README.md").write_text(card, encoding="utf-8")
    if upload is not None:
        upload.send()
    return target


def merged_plan(path: str | Path, recipe: Recipe, overrides: Mapping[str, Any]) -> ModelPlan:
    """The plan of a model whose module is filled, merged and compared, in float32."""
    device, adapted = recipe.export.export_device, saved_at(path) is not None or bool(recipe.blocks.get("peft_config"))
    rounds = recipe.export.export_format == "gguf" or recipe.export.export_quantization_bit
    if not adapted and not rounds:
        raise PlanError(
            f"{path}: there is nothing to merge; name a run of llmtune or one of its checkpoints, or add to a base the "
            'adapter that is to be merged: "peft_config={name: lora, adapter_name_or_path: FOLDER}"'
        )
    overrides = {**overrides, "quant_config": None, "kernel_config": None}
    alone = recipe_of(path, **{key: value for key, value in overrides.items() if not key.startswith("peft_config")})
    if recipe.export.export_format == "gguf":
        architecture_of(load_model_config(resolve_model(alone.model, hub_of(alone), weights=False), alone.model))
    base = base_logits(replace(alone, blocks={**alone.blocks, "peft_config": []}), device) if adapted else None
    plan = open_plan(path, dtype=torch.float32, device=device, **overrides)
    if recipe.blocks.get("quant_config"):
        print("The adapter was trained on a quantised base; it is merged onto the unquantised one.", file=sys.stderr)
    fill(plan, path)
    if base is None:
        return plan
    ids = probe_ids(plan.tokenizer)
    trained = logits(plan.module, ids)
    for part in plan.parts.at("peft_config"):
        if isinstance(part.built, Merges):
            with blaming(part.full_label, "merge"):
                part.built.merge(plan.module)
    compare(logits(plan.module, ids), trained, base)
    return plan


def write_as(plan: ModelPlan, recipe: Recipe, folder: Path, name: str, rows: Sequence[list[int]] = ()) -> str:
    """Write a merged model in the format that is asked for, with a Modelfile; the library that reads it. Rounding to
    `export_quantization_bit` is fitted to `rows`."""
    keys, model, tokenizer, variables = recipe.export, plan.module, plan.tokenizer, recipe.data.template_variables
    answers = model.get_output_embeddings() is not None
    stops = stop_tokens(model, tokenizer, variables) if answers else []
    if answers and model.generation_config is not None:
        model.generation_config.eos_token_id = stops
    if keys.export_format == "gguf":
        about = {"name": name, "license": license_of(plan.files.folder) or ""}
        file = folder / f"model-{keys.export_gguf_type}.gguf"
        write_gguf(model, tokenizer, file, keys.export_gguf_type, turn_ends(tokenizer, variables), about)
    elif keys.export_quantization_bit:
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".merged-") as scratch:
            write(plan, Path(scratch), export_dtype(keys.infer_dtype, recipe), keys)
            quantise(Path(scratch), folder, keys.export_quantization_bit, rows)
    else:
        write(plan, folder, export_dtype(keys.infer_dtype, recipe), keys)
    if answers and not keys.export_quantization_bit and not keys.export_legacy_format:
        length = getattr(model.config, "max_position_embeddings", 4096)
        source = f"./model-{keys.export_gguf_type}.gguf" if keys.export_format == "gguf" else "."
        said = modelfile(source, tokenizer, variables, stops, length)
        (folder / "Modelfile").write_text(said, encoding="utf-8")
    return "gguf" if keys.export_format == "gguf" else "transformers"


def copy_adapter(path: str | Path, recipe: Recipe, folder: Path, overrides: Mapping[str, Any]) -> Path:
    """Write the adapter of a run or a checkpoint with the tokenizer; the folder of its base. Raises PlanError where
    there is none."""
    saved = saved_at(path)
    found = adapter_folder(saved) if saved and not saved.whole else None
    if found is None or not (found / "adapter_config.json").exists():
        raise PlanError(f"export_format: {path} has no adapter that PEFT reads; leave the key out for a whole model")
    shutil.copytree(found, folder, dirs_exist_ok=True)
    files = resolve_model(recipe.model, hub_of(recipe), weights=False)
    open_plan(path, **overrides).tokenizer.save_pretrained(folder)
    copy_processor(files.folder, folder)
    return files.folder


@contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """A folder beside `target` that becomes it at the end, so that a half of an export is never there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        folder = Path(scratch) / target.name
        folder.mkdir()
        yield folder
        if target.exists():
            target.rmdir()  # it is empty, or what came meanwhile is not written over
        publish(folder, target)


def export_dtype(name: str, recipe: Recipe) -> torch.dtype:
    """`infer_dtype` of an export: `auto` is the type that the files of the recipe's model have."""
    if name != "auto":
        return {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}[name]
    files = resolve_model(recipe.model, hub_of(recipe), weights=True)
    declared = load_model_config(files, recipe.model).dtype
    return stored_dtype(read_index(files.folder), declared if isinstance(declared, torch.dtype) else None)


def _named(export_dir: str | None) -> Path:
    if not export_dir:
        raise PlanError("export_dir: not given; name the folder to write, for example export_dir=merged")
    return Path(export_dir)


def _require_new(target: Path) -> None:
    """PlanError where something is there, or nothing can be: found before the merge."""
    try:
        if target.exists() and any(target.iterdir()):
            raise PlanError(f"export_dir: {target} is not empty; name a new folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        said = error.strerror or str(error)
        raise PlanError(f"export_dir: {target} cannot be written ({said}); name a folder elsewhere") from None


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
    """Fail loudly on the two silent ways a merge goes wrong: it changed the answers, or it changed nothing. Else say by
    how much logits differ, as shares of their largest."""
    scale = trained.abs().max()
    error = ((merged - trained).abs().max() / scale).item()
    if not error <= 1e-3:  # nor if it is no number
        raise PlanError(
            f"the merged model does not answer like base plus adapter: logits differ by {error:.1e} of their size"
        )
    if bool((merged == base).all()):
        raise PlanError(
            "the merged model answers exactly like the base model: nothing was trained, or the wrong files were merged"
        )
    changed = ((merged - base).abs().max() / scale).item()
    doing.info(f"Merged, it answers as it was trained: logits within {error:.0e}, the base's are {changed:.0e} off")


def write(plan: ModelPlan, target: Path, dtype: torch.dtype, keys: ExportConfig) -> None:
    """Files of at most `export_size` GB (safetensors, or pickles), config, tokenizer."""
    model, size = plan.module, f"{keys.export_size}GB"
    cast(model, dtype)
    model.config.dtype = dtype
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
    copy_processor(plan.files.folder, target)
