"""From the names in a recipe to modules of the model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from llmtune import PlanError, linear_layers, output_heads, split_names

ADAPTABLE = (nn.Linear, Conv1D, nn.Embedding)
"""Kinds of layers that can get an adapter; quantised layers are subclasses of nn.Linear."""


def named(names: Iterable[str], wanted: str) -> list[str]:
    """Those of `names` that are `wanted` or end with it as whole path components."""
    return [name for name in names if name == wanted or name.endswith(f".{wanted}")]


def short(names: Iterable[str]) -> list[str]:
    """Last path components, each once, in order."""
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))


def adapted_layers(model: nn.Module, target_modules: str | Sequence[str], saved: Sequence[str]) -> list[str]:
    """Full names of the layers that get an adapter, in model order.

    `saved` are full names of modules trained in full, which `all` leaves out. Raises PlanError for a name that matches
    nothing, or a layer that is named for both.
    """
    wanted = split_names(target_modules)
    adaptable = [name for name, module in model.named_modules() if isinstance(module, ADAPTABLE)]
    found: set[str] = set()
    for name in wanted:
        if name == "all":
            found |= {layer for layer, _ in linear_layers(model) if not _within(layer, saved)}
            continue
        hits = named(adaptable, name)
        if not hits:
            raise PlanError(_nothing_named(model, name, adaptable))
        if both := [hit for hit in hits if _within(hit, saved)]:
            raise PlanError(
                f"peft_config: {both[0]} is named by both target_modules and modules_to_save; a module has either an "
                "adapter or a trained copy, so take it out of one"
            )
        found |= set(hits)
    if not found:
        raise PlanError(
            f'peft_config.target_modules: found nothing to adapt in {type(model).__name__}; name layers, or "all"'
        )
    return [name for name in adaptable if name in found]


def saved_modules(model: nn.Module, modules_to_save: str | Sequence[str] | None) -> list[str]:
    """Full names of the modules to train in full. Raises PlanError for a name that matches nothing usable."""
    modules = dict(model.named_modules())
    found: list[str] = []
    for name in split_names(modules_to_save):
        hits = named(modules, name)
        if not hits:
            holders = [
                path for path, module in modules.items() if path and next(module.parameters(False), None) is not None
            ]
            raise PlanError(f"peft_config.modules_to_save: {_unknown(name, short(holders))}")
        for hit in hits:
            _check_copyable(hit, modules[hit])
        found += [hit for hit in hits if hit not in found]
    return found


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
    """The shortest list of names that means exactly `chosen` to PEFT: last components if no other module has them."""
    last = set(short(chosen))
    meant = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in last}
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


def _nothing_named(model: nn.Module, name: str, adaptable: Sequence[str]) -> str:
    inside = [layer for layer in adaptable if f".{name}." in f".{layer}."]
    if inside and named((path for path, _ in model.named_modules()), name):
        return (
            f'peft_config.target_modules: found "{name}", which is not a linear layer but holds some; name these: '
            f"{', '.join(short(inside))}"
        )
    return f"peft_config.target_modules: {_unknown(name, short(adaptable))}"


def _unknown(name: str, known: Sequence[str]) -> str:
    near = get_close_matches(name, known, n=1, cutoff=0.6)
    hint = f' Did you mean "{near[0]}"?' if near else ""
    more = f" and {len(known) - 20} more" if len(known) > 20 else ""
    return f'found "{name}", which names nothing in this model.{hint} There are: {", ".join(known[:20])}{more}'
