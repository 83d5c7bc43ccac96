"""What stands against single keys of the model and of training, given its structure, and what is to be said of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from llmtune.contract.stages import RollsOut, further_models
from llmtune.model.routers import routers
from llmtune.model.skeleton import config_value
from llmtune.model.source import scaled_rope

if TYPE_CHECKING:
    from llmtune.contract.records import ParallelDims
    from llmtune.model.precision import Precision
    from llmtune.recipe.parts import Parts
    from llmtune.recipe.recipe import Recipe


_ROPE_NOTE = (
    "rope_scaling is no part of an adapter: read by PEFT, model/ answers otherwise unless its base's config.json gets "
    "the same rope_parameters; llmtune chat and llmtune export apply them"
)


def option_objections(
    recipe: Recipe, parts: Parts, module: Any, precision: Precision, dims: ParallelDims
) -> Iterator[str]:
    """Sentences on keys that the model of a run cannot have."""
    if recipe.train.sample_prompts and module.get_output_embeddings() is None:
        what = f"{type(module).__name__} has no head over a vocabulary and answers nothing"
        yield f"sample_prompts: {what}; remove them"
    if recipe.train.moe_aux_loss_coef:
        yield from _against_balance(recipe, module)
    if recipe.model.shift_attn:
        yield from (f"shift_attn: {sentence}" for sentence in _against_shifting(recipe, parts, module, dims))
    if recipe.model.upcast_layernorm and not precision.autocast and precision.compute.itemsize < 4:
        yield "upcast_layernorm: pure_bf16 computes all in one type; set bf16: true, or remove the key"


def option_notes(recipe: Recipe, parts: Parts, module: Any, dims: ParallelDims) -> Iterator[str]:
    """Sentences on keys that mean less than one might think."""
    if recipe.model.rope_scaling and scaled_rope(module.config):
        if any(part.built.kind == "adapter" for part in parts.at("peft_config")):
            yield _ROPE_NOTE
    elif recipe.model.rope_scaling:
        yield (
            f"rope_scaling: nothing is stretched, as cutoff_len {recipe.data.cutoff_len:,} is within the positions "
            "that the model was made for; for more later, name the length: {rope_type: ..., length: ...}"
        )
    if recipe.model.train_from_scratch is not False and any(
        part.built.kind == "adapter" for part in parts.at("peft_config")
    ):
        yield "train_from_scratch: the random weights stay as they are, as peft_config trains an adapter of them alone"
    if recipe.model.upcast_layernorm and dims.ranks > 1:
        yield "upcast_layernorm: norms are kept in float32, and travel between ranks in the type that all weights do"


def _against_balance(recipe: Recipe, module: Any) -> Iterator[str]:
    if not routers(module):
        yield (
            f"moe_aux_loss_coef: found {recipe.train.moe_aux_loss_coef}, but {type(module).__name__} has no routers "
            "whose balance transformers measures; remove the key"
        )
    elif recipe.train.torch_compile:
        yield "moe_aux_loss_coef: routers cannot be read inside compiled layers; set torch_compile: false"


def _against_shifting(recipe: Recipe, parts: Parts, module: Any, dims: ParallelDims) -> Iterator[str]:
    if recipe.data.packing:
        yield "groups would run across the samples of a packed row; set packing: false"
    if dims.tensor > 1 or dims.context > 1:
        yield "heads and rows have to be whole on each rank; remove tp_size and cp_size"
    stages = [part.built for part in parts.at("stage_config")]
    if any(isinstance(stage, RollsOut) or further_models(stage) for stage in stages):
        yield "references and answers attend to everything, so the model would be compared with another one; train sft"
    config = module.config.get_text_config()
    ways = set(config_value(config, "layer_types") or ()) - {"full_attention"}
    ways |= {name for name in ("attn_logit_softcapping", "sliding_window") if config_value(config, name)}
    ways |= {"sinks" for name, _ in module.named_parameters() if name.endswith(".sinks")}
    if ways or not module._supports_sdpa:
        own = ", ".join(sorted(ways)) or "without torch's fused attention"
        yield f"{type(module).__name__} attends in a way of its own ({own}); remove the key"
