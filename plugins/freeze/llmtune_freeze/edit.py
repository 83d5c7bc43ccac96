"""Choose the parameters that train, by layer and by name; the structure stays as it is."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING

from torch import nn

from llmtune import ModelEdit, PlanError, RunContext, split_names, text_layers

if TYPE_CHECKING:
    from . import FreezeConfig


class Freeze:
    """The peft edit. What it trains belongs to the model itself, so the core saves whole models (`weights`)."""

    kind = "weights"
    whole_modules_key = "freeze_extra_modules"

    def __init__(self, config: FreezeConfig) -> None:
        self.config = config

    def apply(self, model: nn.Module, context: RunContext) -> ModelEdit:
        """Pick names. Raises PlanError where a number or name of the recipe does not fit the model."""
        layers = text_layers(model)
        chosen = self._choose_layers(model, layers)
        inside = {name: layer for name, layer in layers if name in chosen}
        trained = self._inside(inside) | self._outside(model, layers)
        names, ties = with_ties(model, trained)
        cast = "float32" if self.config.cast_trainable_params_to_fp32 else "compute"
        return ModelEdit(
            trainable=names.__contains__, store_trainable=cast, report=self._report(model, chosen, trained, ties)
        )

    def _choose_layers(self, model: nn.Module, layers: list[tuple[str, nn.Module]]) -> list[str]:
        count = self.config.freeze_trainable_layers
        if abs(count) > len(layers):
            raise PlanError(
                f"peft_config.freeze_trainable_layers: found {count}, but {type(model).__name__} has {len(layers)} "
                f"layers; give at most {len(layers)} (the last) or at least -{len(layers)} (the first)"
            )
        names = [name for name, _ in layers]
        return names[-count:] if count > 0 else names[:-count]

    def _inside(self, layers: Mapping[str, nn.Module]) -> set[str]:
        """Full names of the parameters that train in the chosen layers."""
        wanted = split_names(self.config.freeze_trainable_modules)
        own = {f"{name}.{inner}": inner for name, layer in layers.items() for inner, _ in layer.named_parameters()}
        if "all" in wanted:
            return set(own)
        if not wanted:
            raise PlanError('peft_config.freeze_trainable_modules: found nothing; name parts of a layer, or "all"')
        return match(wanted, own, "peft_config.freeze_trainable_modules", "the trained layers")

    def _outside(self, model: nn.Module, layers: list[tuple[str, nn.Module]]) -> set[str]:
        """Full names of the parameters that train outside all layers."""
        prefixes = tuple(f"{name}." for name, _ in layers)
        everything = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        own = {name: name for name in everything if not name.startswith(prefixes)}
        wanted = split_names(self.config.freeze_extra_modules)
        return match(wanted, own, "peft_config.freeze_extra_modules", "the model outside its layers")

    def _report(self, model: nn.Module, chosen: list[str], trained: set[str], ties: list[str]) -> list[str]:
        modules = split_names(self.config.freeze_trainable_modules)
        part = "" if "all" in modules else f" ({', '.join(modules)})"
        lines = [f"{len(chosen)} of {len(text_layers(model))} layers train{part}: {chosen[0]} to {chosen[-1]}"]
        if extra := sorted(name for name in trained if not name.startswith(tuple(f"{layer}." for layer in chosen))):
            lines.append(f"outside the layers train {', '.join(extra)}")
        return lines + ties


def match(wanted: tuple[str, ...], own: Mapping[str, str], key: str, place: str) -> set[str]:
    """Full names (keys of `own`) whose path (values of `own`) holds a wanted name as whole components.

    Raises PlanError for a name that matches nothing, with the names there are.
    """
    chosen: set[str] = set()
    for name in wanted:
        hits = {full for full, path in own.items() if f".{name}." in f".{path}."}
        if not hits:
            # Every name that would match: the modules that hold parameters, and the modules around them.
            parents = {path.rpartition(".")[0] for path in own.values()}
            known = sorted(parents | {parent.rpartition(".")[2] for parent in parents} | around(parents))
            near = get_close_matches(name, known, n=1, cutoff=0.6)
            hint = f' Did you mean "{near[0]}"?' if near else ""
            leaves = sorted({parent for parent in parents if parent})
            shown = ", ".join(leaves[:20]) + (f" and {len(leaves) - 20} more" if len(leaves) > 20 else "")
            raise PlanError(f'{key}: found "{name}", which names nothing in {place}.{hint} There are: {shown}')
        chosen |= hits
    return chosen


def around(paths: set[str]) -> set[str]:
    """First components of dotted paths: `self_attn` of `self_attn.q_proj`."""
    return {path.partition(".")[0] for path in paths if "." in path}


def with_ties(model: nn.Module, trained: set[str]) -> tuple[set[str], list[str]]:
    """All names of the trained tensors, and a line for each tensor that has a name nobody asked for."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    every, lines = set(trained), []
    for same in names.values():
        asked = [name for name in same if name in trained]
        if asked and len(asked) < len(same):
            every |= set(same)
            rest = [name for name in same if name not in trained]
            lines.append(f"{', '.join(rest)} trains too: it is the same tensor as {', '.join(asked)}")
    return every, lines
