"""Whose file it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmtune.conversion.source import ForeignSource
from llmtune.recipe.keys import top_level_keys

_SIGNS = {
    "Axolotl": {"base_model", "micro_batch_size", "num_epochs", "sequence_len", "val_set_size", "adapter", "datasets",
                "pretraining_dataset", "lora_target_linear", "sample_packing", "base_model_config"},
    "LLaMA-Factory": {"finetuning_type", "template", "dataset_dir", "cutoff_len", "lora_rank", "lora_target", "stage",
                      "infer_backend", "export_dir", "task", "quantization_bit", "adapter_name_or_path"},
    "TRL": {"dataset_name", "dataset_train_split", "dataset_test_split", "use_peft", "lora_r", "datasets", "max_length",
            "lora_target_modules", "loss_type", "beta", "load_in_4bit", "assistant_only_loss", "num_generations"},
}  # fmt: skip
"""Keys that tell trainers apart whose other keys are alike."""
_V1 = {"train_dataset", "micro_batch_size", "global_batch_size", "cp_mode", "sample_backend", "batching_strategy",
       "batching_workers", "enable_activation_checkpointing", "save_epochs", "save_ckpt_as_hf", "custom_chat_template",
       "train_on_last_turn_only"}  # fmt: skip
"""Keys of LLaMA-Factory's v1, whose blocks are called as here."""


def trainer_of(source: ForeignSource) -> str | None:
    """The trainer whose file or command it is; None where it is a recipe of llmtune, or nothing known."""
    tree = source.tree
    if _components(tree):
        return "torchtune"
    if source.trainer:
        return source.trainer if source.trainer != "LLaMA-Factory" or not _is_v1(tree) else "LLaMA-Factory v1"
    if {"compute_environment", "distributed_type"} <= set(tree):
        return "accelerate"
    if "base_model" in tree:
        return "Axolotl"
    if _is_v1(tree):
        return "LLaMA-Factory v1"
    if "model_name_or_path" not in tree and not {"task", "task_dir"} & set(tree):
        return None
    return max(("LLaMA-Factory", "TRL"), key=lambda name: len(_SIGNS[name] & set(tree)))


def _is_v1(tree: Mapping[str, Any]) -> bool:
    strange = set(tree) - set(top_level_keys())
    blocks = any(
        isinstance(tree.get(key), dict) and tree[key].get("name") in names for key, names in _V1_PLUGINS.items()
    )
    return "model" in tree and "model_name_or_path" not in tree and (bool(strange & _V1) or blocks)


_V1_PLUGINS = {"dist_config": ("deepspeed", "fsdpturbo", "mindspeed"), "kernel_config": ("liger_kernel",)}
"""Plugins that only v1 has."""


def _components(tree: Any) -> bool:
    """Whether the mapping or one inside it names a class of torchtune's kind."""
    if isinstance(tree, dict):
        return "_component_" in tree or any(map(_components, tree.values()))
    return False
