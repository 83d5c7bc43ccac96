"""Which keys of a recipe may differ between a run and its continuation, and between the ranks of a run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from llmtune.contract.extension_points import POINTS
from llmtune.contract.generation import GenerationKeys
from llmtune.contract.schema import field_types
from llmtune.recipe.secrets import blank

FREE = {
    "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "logging_steps", "save_strategy", "save_steps",
    "save_total_limit", "eval_strategy", "eval_steps", "per_device_eval_batch_size", "eval_dataset",
    "eval_on_each_dataset", "plot_loss",
    "early_stopping_patience", "early_stopping_threshold", "load_best_model_at_end", "metric_for_best_model",
    "greater_is_better", "sample_prompts", "token", "cache_dir", "export_dir", "export_size", "export_hub_model_id",
    "export_format", "export_gguf_type", "export_quantization_bit", "export_quantization_dataset",
    "export_quantization_nsamples", "export_quantization_maxlen",
    "export_legacy_format", "export_device", "infer_dtype", "disable_gradient_checkpointing",
    "activation_checkpointing", "offload_activations", "use_reentrant_gc",
    "upcast_lmhead_output", "print_param_status",
    "torch_compile", "ddp_timeout", "preprocessing_num_workers",
    "preprocessing_batch_size", "overwrite_cache", "tokenized_path", "data_shared_file_system", "media_dir",
    "do_predict",
    *field_types(GenerationKeys),
    *(name for name, point in POINTS.items() if not point.changes_training),
}  # fmt: skip
"""They change what is reported or kept, or how the same numbers are computed, not what is learnt."""
SPLIT = {"per_device_train_batch_size", "gradient_accumulation_steps"}
"""May differ as long as a step has the same rows; left as they were, they are fitted to the number of ranks."""
BY_CONTENT = {"model", "dataset", "dataset_dir", "eval_dataset"}
"""What they lead to is compared, so that the places may have other names on other machines."""


def environment(tree: Mapping[str, Any], resolved: Mapping[str, Any]) -> dict[str, str]:
    """A hash of what each key stands for that is written with `${...}`, where anything is read from the environment."""
    if "${oc.env:" not in str(tree):
        return {}
    keys = [key for key, value in tree.items() if "${" in str(value) and key not in FREE | BY_CONTENT]
    values = {key: blank({key: resolved[key]}) for key in keys}
    return {key: hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest() for key, value in values.items()}
