"""The peft edit: the config gets more layers before the skeleton is built; the new ones train."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llmtune import Amendment, ModelEdit, PlanError, RunContext, text_layers

if TYPE_CHECKING:
    from . import LlamaProConfig

KEY = "peft_config.num_expanded_layers"
ATTENTION, MLP = ("o_proj", "out_proj", "dense"), ("down_proj", "down_proj_bias", "dense_4h_to_h")
"""What models call the last products of the two parts of a layer, whose results are added to the layer's input."""
PARTS = ("self_attn", "attention", "self_attention", "linear_attn", "mlp", "feed_forward", "block_sparse_moe", "mamba")
"""Modules of a layer, besides norms and dropout, whose results go through these products alone."""
NUMBERS_OF_LAYERS = ("mlp_only_layers",)
"""Lists in configs that hold numbers of layers. Others, whose name has `layer`, hold a value for each layer."""


class LlamaPro:
    """New layers between the old ones. They belong to the model itself, so the core saves whole models (`weights`)."""

    kind = "weights"

    def __init__(self, config: LlamaProConfig) -> None:
        self.config = config
        self.layers: list[int] = []
        """For each layer of the expanded model, the layer of the base it starts from."""
        self.base_config: Any = None

    def amend(self, config: Any, tokenizer: Any) -> Amendment:
        """More layers, each with the settings of the one it copies. Raises PlanError for more than there are."""
        self.base_config = copy.deepcopy(config)
        text, added = config.get_text_config(), self.config.num_expanded_layers
        count = text.num_hidden_layers
        if added > count:
            raise PlanError(f"{KEY}: found {added}, but the model has {count} layers; give at most {count}")
        self.layers = expanded(count, added)
        for name, value in list(vars(text).items()):
            if not isinstance(value, (list, tuple)):
                continue
            if name in NUMBERS_OF_LAYERS:
                setattr(text, name, [new for new, old in enumerate(self.layers) if old in value])
            elif "layer" in name and len(value) == count:
                setattr(text, name, type(value)(value[old] for old in self.layers))
        text.num_hidden_layers = len(self.layers)
        return Amendment(layers=self.layers)

    def apply(self, model: nn.Module, context: RunContext) -> ModelEdit:
        """Let the new layers train. Raises PlanError where a layer would compute something else than what it copies, or
        what makes a layer add nothing is not known."""
        layers = text_layers(model)
        self._require_alike(model, layers)
        added = [layers[place] for place in new_places(self.layers)]
        silent = [name for path, layer in added for name in outputs(path, layer)]
        inside = tuple(f"{path}." for path, _ in added)
        return ModelEdit(
            trainable=lambda name: name.startswith(inside),
            after_load=[partial(silence, names=frozenset(silent))],
            store_trainable="float32" if self.config.cast_trainable_params_to_fp32 else "compute",
            report=[
                f"{len(added)} layers added to {len(layers) - len(added)}, copies of those before them that add "
                f"nothing yet; only they train: {', '.join(path for path, _ in added)}"
            ],
        )

    def _require_alike(self, model: Any, layers: Sequence[tuple[str, nn.Module]]) -> None:
        """PlanError if a layer's structure or settings depend on its number in ways that the config does not list."""
        with torch.device("meta"):
            base = [layer for _, layer in text_layers(type(model)(self.base_config))]
        for (path, layer), start in zip(layers, self.layers, strict=True):
            if description(layer) != description(base[start]):
                raise PlanError(
                    f"{KEY}: {type(model).__name__} builds {path} otherwise than layer {start} of the base, which it "
                    "starts from, as its settings depend on the number of a layer; choose a number of layers that "
                    "keeps its pattern, or another peft_config"
                )
        if getattr(model.config.get_text_config(), "scale_attn_by_inverse_layer_idx", False):  # GPT-2 alone has it
            raise PlanError(f"{KEY}: {type(model).__name__} scales attention by the number of a layer; use freeze")


def expanded(count: int, added: int) -> list[int]:
    """Which of `count` layers each layer of the expanded model is or copies: the model is cut into `added` groups as
    equal as possible, and the last layer of each comes twice (section 3.1 of the paper, with P = 1)."""
    ends = {(group + 1) * count // added - 1 for group in range(added)}
    return [layer for layer in range(count) for _ in range(2 if layer in ends else 1)]


def new_places(layers: Sequence[int]) -> list[int]:
    """Places of the copies, each right behind what it copies."""
    return [place for place in range(1, len(layers)) if layers[place] == layers[place - 1]]


def outputs(path: str, layer: nn.Module) -> list[str]:
    """Names of all parameters of a layer's last products. Raises PlanError where one part of it has none known."""
    names = [name for name, _ in layer.named_parameters()]
    if odd := [child for child, _ in layer.named_children() if not known(child)]:
        raise PlanError(
            f"{KEY}: {path} ({type(layer).__name__}) holds {odd[0]}, which may add to its input whatever is zero; use "
            "freeze"
        )
    own = [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]
    if own:
        raise PlanError(
            f"{KEY}: {path} ({type(layer).__name__}) has {own[0][0]}, by which it changes its input whatever is zero; "
            "use freeze"
        )
    found = {kind: [name for name in names if set(kind) & set(name.split("."))] for kind in (ATTENTION, MLP)}
    if missing := [kind for kind, hits in found.items() if not hits]:
        raise PlanError(
            f"{KEY}: {path} ({type(layer).__name__}) has no {' or '.join(missing[0])}, so that it is not known what "
            "makes it add nothing; use freeze"
        )
    return [f"{path}.{name}" for hits in found.values() for name in hits]


def known(child: str) -> bool:
    """Whether a module of a layer adds nothing to the layer's input once the last products are zero."""
    return child in PARTS or "norm" in child or "dropout" in child


def silence(model: nn.Module, names: frozenset[str]) -> None:
    """Set parameters to zero, on each rank its piece."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in names:
                parameter.zero_()


def description(layer: nn.Module) -> list[Any]:
    """What a layer is made of: kinds of modules, their plain settings but the number of the layer, shapes."""
    return [
        (name, type(module).__name__, list(settings(module)), [tuple(p.shape) for p in module.parameters(False)])
        for name, module in layer.named_modules()
    ]


def settings(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Numbers, texts and switches that a module holds."""
    for name, value in sorted(vars(module).items()):
        public = not name.startswith("_") and name not in ("layer_idx", "training")
        if public and isinstance(value, (bool, int, float, str, type(None))):
            yield name, value
