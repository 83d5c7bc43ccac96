"""Which adapters vLLM takes: those it would read otherwise than PEFT does are refused."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmtune import PlanError

_MORE = (
    "use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "trainable_token_indices", "layer_replication",
    "lora_bias", "use_qalora", "use_bdlora", "alora_invocation_tokens", "target_parameters",
)  # fmt: skip
"""Settings under which an adapter is more than two matrices with one rank and one scale, which is what vLLM reads."""
_FACTOR = re.compile(r"\.lora_[AB]\.")
_ADAPTED = re.compile(r"\.(lora_|modules_to_save\.)")
EXPORT = "engine_config transformers answers with it, or merge it: llmtune export"


def require_readable(folder: str, max_rank: int) -> None:
    """PlanError where vLLM would not read the adapter of a folder, or read it otherwise."""
    told = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
    if told.get("peft_type", "LORA") != "LORA":
        raise PlanError(f"engine_config: vllm reads adapters of LoRA, {folder} holds {told['peft_type']}; {EXPORT}")
    if told.get("bias", "none") != "none":
        raise PlanError(f"engine_config: vllm reads no biases of adapters, as {folder} has (bias); {EXPORT}")
    for key in _MORE:
        if told.get(key):
            raise PlanError(
                f"engine_config: vllm reads two matrices of one rank and one scale from an adapter, and {folder} has "
                f"{key}; {EXPORT}"
            )
    if told["r"] > max_rank:
        raise PlanError(
            f"engine_config.vllm_max_lora_rank: found {max_rank}, but {folder} has rank {told['r']}; raise it"
        )


def objections(model: Any, max_rank: int) -> Iterator[str]:
    """What of a model that trains vLLM cannot read from an adapter, before there is a weight."""
    trained = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    # What a stage adds beside the model, such as a value head, is asked for no answers.
    own = [name for name in trained if name.startswith(f"{model.base_model_prefix}.") or _ADAPTED.search(name)]
    if other := [name for name in own if not _FACTOR.search(name)]:
        yield (
            f"vllm reads the two matrices of LoRA from an adapter, and {other[0]} trains, too; use a plain "
            "peft_config: lora (no DoRA, no modules_to_save), or leave engine_config out"
        )
    ranks = {tensor.shape[0] for name, tensor in trained.items() if ".lora_A." in name}
    if len(ranks) > 1:
        yield "vllm reads adapters of one rank; leave rank_pattern out, or engine_config"
    if ranks and max(ranks) > max_rank:
        yield f"vllm_max_lora_rank: found {max_rank}, but peft_config trains rank {max(ranks)}; raise it"
