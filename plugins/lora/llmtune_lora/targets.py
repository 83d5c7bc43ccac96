"""From the names in a recipe to modules of the model."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from llmtune import PlanError, linear_layers, output_heads, split_names

if TYPE_CHECKING:
    from . import LoraRecipe

ADAPTABLE = (nn.Linear, Conv1D, nn.Embedding)
"""Kinds of layers that can get an adapter; quantised layers are subclasses of nn.Linear."""

_FROZEN = (
    "freeze_language_model, freeze_vision_tower or freeze_multi_modal_projector keeps as they are; set false what is "
    "to be adapted"
)


def adaptable(module: nn.Module) -> bool:
    """Whether the layer computes what PEFT adds to: Llama 4's router is an nn.Linear whose result is a pair."""
    own_code = isinstance(module, nn.Linear) and type(module).__module__.startswith("transformers.models.")
    return isinstance(module, ADAPTABLE) and not own_code


def named(names: Iterable[str], wanted: str) -> list[str]:
    """Those of `names` that are `wanted` or end with it as whole path components."""
    return [name for name in names if name == wanted or name.endswith(f".{wanted}")]


def short(names: Iterable[str]) -> list[str]:
    """Last path components, each once, in order."""
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))


def adapted_layers(
    model: nn.Module, target_modules: str | Sequence[str], saved: Sequence[str], frozen: Collection[str] = ()
) -> list[str]:
    """Full names of the layers that get an adapter, in model order; none of the `frozen` ones.

    `saved` are full names of modules trained in full, which `all` leaves out. Raises PlanError for a name that matches
    nothing, or a layer that is named for both.
    """
    wanted = split_names(target_modules)
    layers = [name for name, module in model.named_modules() if adaptable(module)]
    possible = [name for name in layers if name not in frozen]
    chosen: set[str] = set()
    for name in wanted:
        if name == "all":
            chosen |= {layer for layer, _ in linear_layers(model) if layer in possible and not _within(layer, saved)}
            continue
        hits = named(possible, name)
        if not hits and named(layers, name):
            raise PlanError(f'peft_config.target_modules: "{name}" names layers that {_FROZEN}, or name others')
        if not hits:
            raise PlanError(_nothing_named(model, name, possible))
        if both := [hit for hit in hits if _within(hit, saved)]:
            raise PlanError(
                f"peft_config: {both[0]} is named by both target_modules and modules_to_save; a module has either an "
                "adapter or a trained copy, so take it out of one"
            )
        chosen |= set(hits)
    if not chosen and any(name in frozen for name in layers):
        raise PlanError(f"peft_config: there is nothing to adapt but layers that {_FROZEN}")
    if not chosen:
        raise PlanError(
            f'peft_config.target_modules: found nothing to adapt in {type(model).__name__}; name layers, or "all"'
        )
    return [name for name in possible if name in chosen]


def narrow(model: nn.Module, layers: Sequence[str], recipe: LoraRecipe, said: LoraConfig) -> list[str]:
    """Those of `layers` that exclude_modules, layers_to_transform and layers_pattern leave; `said` gets the keys, and
    target_modules that mean exactly the result to PEFT.

    Raises PlanError where nothing is left, or a name excludes nothing.
    """
    indices = recipe.layers_to_transform
    said.exclude_modules = sorted(split_names(recipe.exclude_modules)) or None
    said.layers_to_transform = list(indices) if isinstance(indices, tuple) else indices
    said.layers_pattern = list(split_names(recipe.layers_pattern)) or None
    for name in said.exclude_modules or ():
        if not named(layers, name):
            raise PlanError(f"peft_config.exclude_modules: {_unknown(name, short(layers))}")
    said.target_modules = names = sorted(short(layers))
    meant = [name for name, _ in model.named_modules() if check_target_module_exists(said, name)]
    kept = [name for name in layers if name in meant]
    if not kept:
        given = {"exclude_modules": said.exclude_modules, "layers_to_transform": said.layers_to_transform}
        found = ", ".join(f"{key} {value}" for key, value in given.items() if value is not None)
        numbers = sorted({int(part) for name in layers for part in name.split(".") if part.isdigit()})
        there = f", layers that there are: {numbers[0]} to {numbers[-1]}" if numbers else ""
        raise PlanError(
            f"peft_config: found {found}, which leave no layer of target_modules; name fewer to exclude{there}"
        )
    # A list, so that the file's order does not change from run to run.
    said.target_modules = names if meant == kept else sorted(kept)
    return kept


def require_patterns(recipe: LoraRecipe, adapted: Sequence[str]) -> None:
    """Raise PlanError for a key of rank_pattern or alpha_pattern that means no adapted layer."""
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern, value in (getattr(recipe, key) or {}).items():
            if not any(get_pattern_key([pattern], name) == pattern for name in adapted):
                raise PlanError(f"peft_config.{key}: {_unknown(pattern, short(adapted))}")
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise PlanError(f"peft_config.{key}.{pattern}: found {value!r}, allowed is a whole number from 1")


def expressible(model: nn.Module, layers: Sequence[str], asked_for_all: bool) -> tuple[list[str], list[str]]:
    """`layers` that PEFT adapts under their own names, and those it does not.

    Models whose experts were linear layers once (Qwen3-MoE, DeepSeek-V3, Mixtral) have names that PEFT takes to mean
    the stacks of experts, so that old adapters still load: `gate_proj` of a shared expert, too. An adapter on such a
    layer could be neither put in nor read by others. Raises PlanError if the recipe names one.
    """
    config = LoraConfig(target_modules=list(layers))
    try:
        convert_peft_config_for_transformers(config, model=model, conversions=None)
        kept = set(config.target_modules or ())
    except ValueError:  # half of a fused pair
        kept = set()
    left_out = [layer for layer in layers if layer not in kept]
    if left_out and not asked_for_all:
        raise PlanError(
            f'peft_config.target_modules: PEFT takes "{short(left_out)[0]}" in {type(model).__name__} to mean its '
            f"stacks of experts, not {left_out[0]}; leave it out, or name the stacks in target_parameters"
        )
    return [layer for layer in layers if layer in kept], left_out


def adapted_parameters(model: nn.Module, target_parameters: str | Sequence[str] | None) -> list[str]:
    """Full names of the weights outside linear layers that get an adapter. Raises PlanError for a name that matches
    nothing."""
    stacks = stacked_weights(model)
    chosen: list[str] = []
    for name in split_names(target_parameters):
        hits = named(stacks, name)
        if not hits:
            raise PlanError(f"peft_config.target_parameters: {_unknown(name, short(stacks))}")
        chosen += [hit for hit in hits if hit not in chosen]
    return chosen


def stacked_weights(model: nn.Module) -> list[str]:
    """Full names of weights (experts, inputs, outputs) or (experts, outputs, inputs), in model order."""
    return [
        f"{path}.{name}"
        for path, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3 and min(parameter.shape) > 1 and not isinstance(module, nn.Conv1d)
    ]


def saved_modules(model: nn.Module, modules_to_save: str | Sequence[str] | None) -> list[str]:
    """Full names of the modules to train in full. Raises PlanError for a name that matches nothing usable."""
    modules = dict(model.named_modules())
    chosen: list[str] = []
    for name in split_names(modules_to_save):
        hits = named(modules, name)
        if not hits:
            holders = [
                path for path, module in modules.items() if path and next(module.parameters(False), None) is not None
            ]
            raise PlanError(f"peft_config.modules_to_save: {_unknown(name, short(holders))}")
        for hit in hits:
            _check_copyable(hit, modules[hit])
        chosen += [hit for hit in hits if hit not in chosen]
    return chosen


def classification_heads(model: nn.Module) -> list[str]:
    """Full names of heads that a pre-trained checkpoint does not hold, and that therefore have to be trained."""
    return sorted(output_heads(model)) if task_of(model) != "CAUSAL_LM" else []


def task_of(model: nn.Module) -> str:
    """PEFT's name for what the model does."""
    kind = type(model).__name__
    if "ForSequenceClassification" in kind:
        return "SEQ_CLS"
    return "TOKEN_CLS" if "ForTokenClassification" in kind else "CAUSAL_LM"


def compact(model: nn.Module, chosen: Sequence[str]) -> list[str]:
    """The shortest list of names that means exactly `chosen` to PEFT, to which a name means every module whose own ends
    with its letters: last components, or full names where these would mean more."""
    last = short(chosen)
    meant = {name for name, _ in model.named_modules(remove_duplicate=False) if name.endswith(tuple(last))}
    return sorted(last) if meant == set(chosen) else sorted(chosen)


def _within(name: str, modules: Sequence[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _check_copyable(name: str, module: Any) -> None:
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        raise PlanError(f"peft_config.modules_to_save: {name} is a list of modules; name the modules in it")
    if any(hasattr(part, "dequantize") for part in module.modules()):
        raise PlanError(
            f"peft_config.modules_to_save: {name} is stored quantised and cannot be trained in full; give it an "
            "adapter by target_modules, or remove quant_config"
        )


def _nothing_named(model: nn.Module, name: str, possible: Sequence[str]) -> str:
    inside = [layer for layer in possible if f".{name}." in f".{layer}."]
    if inside and named((path for path, _ in model.named_modules()), name):
        return (
            f'peft_config.target_modules: found "{name}", which is not a linear layer but holds some; name these: '
            f"{', '.join(short(inside))}"
        )
    return f"peft_config.target_modules: {_unknown(name, short(possible))}"


def _unknown(name: str, known: Sequence[str]) -> str:
    near = get_close_matches(name, known, n=1, cutoff=0.6)
    hint = f' Did you mean "{near[0]}"?' if near else ""
    more = f" and {len(known) - 20} more" if len(known) > 20 else ""
    return f'found "{name}", which names nothing in this model.{hint} There are: {", ".join(known[:20])}{more}'
