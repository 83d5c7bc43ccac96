"""What a config names as its reward model: a run, a whole model, or an adapter; as keys of a recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from llmtune import PlanError

if TYPE_CHECKING:
    from . import RewardModelConfig

PLAIN = {"revision": None, "rope_scaling": None, "quant_config": None, "peft_config": None}
"""Keys of the trained model that are not those of another one."""


def keys_of(config: RewardModelConfig) -> dict[str, Any]:
    """The keys in which the reward model differs from the trained one. Raises PlanError where there is none, or where
    it is not of the type that the config names."""
    place = Path(config.reward_model).expanduser()
    run = (place / "run.json").exists()
    folder = place / "model" if run else place
    adapter = (folder / "adapter_config.json").exists()
    if run and not adapter and not (folder / "config.json").exists():
        raise PlanError(
            f"reward_config model: reward_model: the run {place} has saved no model yet; let it end, or export one of "
            f"its checkpoints (llmtune export {place}/checkpoints/step-... export_dir=...) and name that folder"
        )
    if place.exists() and config.reward_model_type not in (None, "lora" if adapter else "full"):
        raise PlanError(
            f"reward_config model: reward_model_type: found {config.reward_model_type}, but {place} is "
            f"{'an adapter' if adapter else 'no adapter'}; leave the key out, which looks into the folder"
        )
    if adapter:
        keys = adapted(place, folder, run)
    elif config.reward_model_type == "lora":
        keys = {"quant_config": None, "peft_config": lora(config.reward_model)}  # on the trained model's base
    else:
        keys = {**PLAIN, "model": str(folder) if run else config.reward_model}
    if config.reward_model_adapters is not None:
        if keys.get("peft_config"):
            raise PlanError(
                f"reward_config model: reward_model_adapters: {config.reward_model} is an adapter already; name its "
                "base as reward_model, and all adapters here"
            )
        keys["peft_config"] = lora(config.reward_model_adapters)
    if config.reward_model_quantization_bit is not None:
        keys["quant_config"] = {"name": "auto", "quantization_bit": config.reward_model_quantization_bit}
    return keys


def adapted(place: Path, folder: Path, run: bool) -> dict[str, Any]:
    """The keys of an adapter on the base that it names; of a run's, the base is stored as in that run."""
    about = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    recipe = yaml.safe_load((place / "resolved.yaml").read_text(encoding="utf-8")) if run else {}
    base = {"model": about.get("base_model_name_or_path"), "revision": about.get("revision")}
    keys = {**PLAIN, **base} if base["model"] else {"quant_config": None}
    kept = {key: recipe[key] for key in ("rope_scaling", "quant_config") if recipe.get(key) is not None}
    return {**keys, **kept, "peft_config": lora(str(folder))}


def lora(places: str | tuple[str, ...]) -> dict[str, Any]:
    """The block of adapters in PEFT's format."""
    return {"name": "lora", "adapter_name_or_path": places}
