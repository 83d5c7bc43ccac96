"""The parts of a model that reads pictures or sound: towers, projector, language model; and which of them train."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from transformers import PreTrainedConfig, PreTrainedModel

from llmtune.contract.examples import MEDIA_KINDS
from llmtune.contract.structure import language_model, output_heads
from llmtune.model.skeleton import config_value

if TYPE_CHECKING:
    from llmtune.model.config import ModelConfig

Part = Literal["vision_tower", "multi_modal_projector", "language_model"]
_PROJECTORS = ("merger", "deepstack_merger_list", "merger_list", "connector", "patch_merger")
"""What models whose projector is a part of the tower call it: Qwen's, Granite Docling's, HunYuan's."""


def parts_of(model: Any) -> dict[str, Part]:
    """The part of a transformers model that each of its parameters is in, by the parameter's name.

    Towers and the language model are where transformers' own `get_encoder` and `get_decoder` find them; what lies
    between them is the projector. A model that reads text alone is a language model.
    """
    decoder = language_model(model)
    inside = {id(module) for module in decoder.modules()}
    towers = [tower for modality in ("image", "audio") if (tower := _tower(model, modality, inside)) is not None]
    towers = [*towers, *_further_towers(model, decoder)] if towers else _towers_by_config(model)
    if not towers and not placeholders_of(config_value(model, "config")):
        return dict.fromkeys((name for name, _ in model.named_parameters(remove_duplicate=False)), "language_model")
    heads = output_heads(model)
    in_towers = {id(module) for tower in towers for module in tower.modules()}
    for child in decoder.children():  # of some the towers and what lies between stand in the decoder (Phi-4)
        branch = {id(module) for module in child.modules()}
        inside -= branch if branch & in_towers else set()
    found: dict[str, Part] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, _ in model.named_parameters(remove_duplicate=False):
        owner = name.rpartition(".")[0]
        if id(modules[owner]) in inside or owner in heads:
            found[name] = "language_model"
        elif id(modules[owner]) in in_towers and not set(owner.split(".")) & set(_PROJECTORS):
            found[name] = "vision_tower"
        else:
            found[name] = "multi_modal_projector"
    return found


def placeholders_of(config: Any) -> list[int]:
    """The tokens that stand for pictures, video and sound in a model's prompts, or by which it counts them (Qwen-Omni
    those before each), and that no answer may hold."""
    names = [f"{kind}_token_{end}" for kind in MEDIA_KINDS for end in ("id", "index")]
    if config_value(config, "audio_start_token_id") is not None:
        names += ["audio_start_token_id", "vision_start_token_id"]
    return sorted({int(token) for name in names if (token := config_value(config, name)) is not None})


def _tower(model: Any, modality: str, inside: set[int]) -> Any:
    """The encoder of a modality; None where the model has none: transformers then gives the model itself."""
    try:
        found = model.get_encoder(modality=modality)
    except (AttributeError, TypeError, ValueError):
        return None
    # There is none in a model whose kind has one in other sizes (Gemma 4's without sound).
    return None if found is None or any(id(module) in inside for module in found.modules()) else found


def _further_towers(model: Any, decoder: Any) -> list[Any]:
    """Models in the model that read something else than text, of which transformers tells one of a modality: Video
    LLaVA has another one for video, and DeepSeek-VL's larger sizes see each picture with two."""
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    sees = [module for module in models if module.main_input_name not in ("input_ids", "inputs_embeds")]
    return [module for module in sees if not any(part is decoder for part in module.modules())]


def _towers_by_config(model: Any) -> list[Any]:
    """Encoders that transformers has no usual name for, as of Phi-4, Granite Speech and VibeVoice: models in the model
    that are made from parts of its config for other things than text and what projects to it."""
    config = getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig):
        return []
    parts = {name: part for name, part in vars(config).items() if isinstance(part, PreTrainedConfig)}
    kinds = {type(part) for name, part in parts.items() if "projector" not in name} - {type(config.get_text_config())}
    return [module for module in model.modules() if type(getattr(module, "config", None)) in kinds]


def frozen_parameters(model: Any, keys: ModelConfig) -> frozenset[str]:
    """Names of the parameters that the recipe's keys keep as they are, and those that the model's own class does, such
    as the sinusoids of towers that hear."""
    frozen = _frozen(keys)
    own = {name for name, each in model.named_parameters(remove_duplicate=False) if not each.requires_grad}
    return frozenset(own | {name for name, part in parts_of(model).items() if part in frozen})


def _frozen(keys: ModelConfig) -> set[Part]:
    if keys.train_mm_proj_only:
        return {"vision_tower", "language_model"}
    frozen: dict[Part, bool] = {
        "vision_tower": keys.freeze_vision_tower, "multi_modal_projector": keys.freeze_multi_modal_projector,
        "language_model": keys.freeze_language_model,
    }  # fmt: skip
    return {part for part, kept in frozen.items() if kept}
