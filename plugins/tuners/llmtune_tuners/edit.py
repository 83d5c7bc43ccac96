"""The peft edit: a tuner of PEFT puts its parts into the meta skeleton; PEFT's own initialisation is drawn later."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from llmtune import (
    ModelEdit,
    ParameterRole,
    PlanError,
    RunContext,
    linear_layers,
    output_heads,
    peft_folder,
    split_names,
)

from . import files
from .kinds import ON_QUANTISED, config_class, named_type, require_trainable

if TYPE_CHECKING:
    from . import OftConfig, PeftTunerConfig

ADAPTER = "default"
"""PEFT's name of the one adapter."""
COPY, ORIGINAL = f".modules_to_save.{ADAPTER}.", ".original_module."


class Tuner:
    """Parts of one of PEFT's tuners beside frozen layers; what is trained is saved alone (`adapter`)."""

    kind = "adapter"

    def __init__(self, config: OftConfig | PeftTunerConfig) -> None:
        self.config = config
        self.whole_modules_key = config.whole_modules_key
        self.tuner: Any = None
        """PEFT's object around the model, once the model is adapted."""
        self.saved_config: PeftConfig | None = None
        """What `adapter_config.json` will say, without the run's own entries."""

    def check(self, context: RunContext, model: nn.Module) -> Iterator[str]:
        """What a tuner does not go with."""
        if context.dims.tensor > 1:
            yield "of PEFT's tuners only LoRA says how it is split by tp_size; use lora, or set tp_size: 1"
        if self.config.tuner is None:
            return
        kind = named_type(self.config.tuner)
        if "quantized_base" in context.capabilities and kind not in ON_QUANTISED:
            yield (
                f"tuner {kind} computes with the weight of a layer, which is stored quantised; remove quant_config, or "
                f"use one of {', '.join(sorted(ON_QUANTISED))}"
            )

    def apply(self, model: nn.Module, context: RunContext) -> ModelEdit:
        """Insert the tuner's parts. Raises PlanError or LoadError where recipe, adapter files and model do not fit."""
        place = self.config.adapter_name_or_path
        folder = peft_folder(place, context, key=files.KEY) if place else None
        config = self._wanted(model, folder, context)
        before = {id(tensor) for tensor in tensors_of(model).values()}
        start = TunerStart(copy.deepcopy(model), copy.deepcopy(config))
        self.tuner = inject(model, config, low_cpu_mem_usage=True)
        self.saved_config = sorted_names(copy.deepcopy(config))
        new = {name: tensor for name, tensor in tensors_of(model).items() if id(tensor) not in before}
        trained = {name for name, tensor in new.items() if isinstance(tensor, nn.Parameter) and tensor.requires_grad}
        if odd := [name for name, p in model.named_parameters() if p.requires_grad and name not in trained]:
            raise PlanError(f"peft_config: this would train {odd[0]} of the base itself; leave out the option (bias?)")
        if shapeless := [name for name in trained if new[name].dim() == 0]:
            raise PlanError(f"peft_config: {shapeless[0]} has no dimension to be sharded along; use another tuner")
        copied = {name: name.replace(COPY, ORIGINAL) for name in new if COPY in name}
        drawn = {name for name, tensor in new.items() if tensor.is_meta and name not in copied}
        stored = files.stored_tensors(model, trained, drawn - trained, folder) if folder else {}
        return ModelEdit(
            fresh={name: partial(start.fill, name) for name in sorted(drawn - stored.keys())},
            copies={name: of for name, of in copied.items() if name not in stored},
            files=stored,
            buffers=frozenset(new.keys() - drawn - copied.keys()),
            after_load=[start.forget],
            trainable=trained.__contains__,
            roles=roles_of(new, trained),
            report=[summary(config, model, folder), *other_sizes(config, model)],
        )

    def save(self, model: nn.Module, tensors: Mapping[str, Tensor], folder: Path, context: RunContext) -> None:
        """Write the adapter as PEFT does."""
        config = copy.deepcopy(self.saved_config)
        assert config is not None, "save comes after apply"
        config.base_model_name_or_path = context.model_name
        config.revision = context.revision
        config.inference_mode = True
        files.write(model, tensors, config, folder)

    def reopened(self, saved: Path) -> dict[str, str] | None:
        """A continued adapter is whole in `saved`, and the folder it came from is needed no more."""
        return {"adapter_name_or_path": str(saved)} if self.config.adapter_name_or_path else None

    def merge(self, model: nn.Module) -> None:
        """Fold the adapter into the base. Nothing happens where it was folded in before."""
        if self.tuner is None:
            return
        layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)]
        if packed := [name for name, layer in layers if hasattr(layer.get_base_layer(), "dequantize")]:
            raise PlanError(
                f"{packed[0]} is stored quantised; adapters are merged into an unquantised base, set quant_config: null"
            )
        weights = [id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False)]
        for name, layer in layers:
            base: Any = layer.get_base_layer()
            if weights.count(id(base.weight)) > 1:
                raise PlanError(f"{name} shares its weight with another module, which a merge would change, too")
        try:
            self.tuner.merge_and_unload()
        except (NotImplementedError, AttributeError, ValueError) as error:
            raise PlanError(f"PEFT cannot merge this tuner into its base: {error}") from error
        if hasattr(model, "peft_config"):
            del model.peft_config
        self.tuner = None

    @contextmanager
    def disabled(self, model: nn.Module) -> Iterator[None]:
        """The base answers: layers skip their adapters, and modules trained in full give way to their originals.

        PEFT's own switch would take `requires_grad` from the adapters, which the optimiser and FSDP2 count on.
        """
        tuned = [module for module in model.modules() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
        before = [module.disable_adapters for module in tuned]
        try:
            for module in tuned:
                module._disable_adapters = True
            yield
        finally:
            for module, off in zip(tuned, before, strict=True):
                module._disable_adapters = off

    def _wanted(self, model: nn.Module, folder: Path | None, context: RunContext) -> PeftConfig:
        """PEFT's config, as the recipe says it or the adapter in `folder`. Raises PlanError for what does not fit."""
        if folder is not None:
            config = PeftConfig.from_pretrained(str(folder))
            kind = str(getattr(config.peft_type, "value", config.peft_type))
            if self.config.tuner is not None and named_type(self.config.tuner) != kind:
                raise PlanError(f"{files.KEY}: {folder} holds an adapter of the kind {kind}, not {self.config.tuner}")
            require_trainable(kind)
            config.inference_mode = False
            return config
        kind = named_type(self.config.tuner or "")
        require_trainable(kind)
        options = {"task_type": task_of(model), **self.config.options}
        if options["task_type"] != "CAUSAL_LM":  # a head that the base's files do not hold has to be trained
            heads = [head.rpartition(".")[2] for head in sorted(output_heads(model))]
            options["modules_to_save"] = list({*split_names(options.get("modules_to_save")), *heads})
        known = sorted(field.name for field in fields(config_class(kind)) if field.init)
        if unknown := sorted(options.keys() - set(known)):
            raise PlanError(
                f"peft_config.options.{unknown[0]}: PEFT's {kind} has no such option; it has {', '.join(known)}"
            )
        try:
            config = config_class(kind)(**options)
        except (TypeError, ValueError) as error:
            raise PlanError(f"peft_config.options: PEFT's {kind} does not take them: {error}") from error
        wanted = getattr(config, "target_modules", None)
        if wanted == "all":
            held = [name for name, _ in linear_layers(model) if name in context.frozen]
            own = [name for name, _ in linear_layers(model) if name not in context.frozen]
            config.target_modules = own if held else "all-linear"
        for name in wanted if isinstance(wanted, (list, set, tuple)) else ():
            if not any(path == name or path.endswith(f".{name}") for path, _ in model.named_modules()):
                raise PlanError(
                    f'peft_config: found the target "{name}", which names nothing in {type(model).__name__}; linear '
                    f"layers are {', '.join(linear_names(model))}"
                )
        return config


class TunerStart:
    """What PEFT's own initialisation gives to each new tensor, drawn when the first is asked for."""

    def __init__(self, skeleton: nn.Module, config: PeftConfig) -> None:
        self.skeleton, self.config = skeleton, config
        self.values: dict[str, Tensor] = {}

    def fill(self, name: str, tensor: Tensor) -> None:
        """Write the value of one. The generator is seeded by the core, alike on all ranks."""
        if not self.values:
            self.values = self._drawn()
        tensor.copy_(self.values[name])

    def forget(self, model: nn.Module) -> None:
        """Free the values once all are in place."""
        self.values = {}

    def _drawn(self) -> dict[str, Tensor]:
        """All tensors of a copy of the model whose own weights are zeros that take no memory: none of the tuners that
        train here starts from their values."""
        model = copy.deepcopy(self.skeleton)
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and hasattr(module, "dequantize"):
                plain = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
                model.set_submodule(name, plain)
        own = {id(tensor) for tensor in model.parameters()}
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if id(parameter) in own:
                    empty = torch.zeros(1).expand(parameter.shape)
                    module._parameters[name] = nn.Parameter(empty, requires_grad=False)
        inject(model, copy.deepcopy(self.config), low_cpu_mem_usage=False)
        return {name: tensor.detach() for name, tensor in tensors_of(model).items()}


def inject(model: nn.Module, config: PeftConfig, low_cpu_mem_usage: bool) -> Any:
    """PEFT's tuner around `model`, which changes in place. Raises PlanError where they do not fit."""
    tuner_class = PEFT_TYPE_TO_TUNER_MAPPING[PeftType(config.peft_type)]
    held = [(module, dict(module._buffers)) for module in model.modules()]
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[], enabled=low_cpu_mem_usage):
        warnings.simplefilter("ignore")
        try:
            tuner = tuner_class(model, config, adapter_name=ADAPTER, low_cpu_mem_usage=low_cpu_mem_usage)
        except (ValueError, TypeError, NotImplementedError) as error:
            said = " ".join(str(error).split())
            raise PlanError(f"peft_config: PEFT cannot adapt {type(model).__name__}: {said}") from error
    for module, buffers in held:  # PEFT moves a quantised layer's own ones, too, where its weight is: to meta
        module._buffers.update(buffers)
    return tuner


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by name."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def roles_of(new: Mapping[str, Tensor], trained: set[str]) -> dict[str, ParameterRole]:
    """Matrices of adapters, by name; vectors keep the roles that core gives them."""
    return {name: "adapter_a" for name in trained if new[name].dim() > 1 and COPY not in name}


def sorted_names(config: PeftConfig) -> PeftConfig:
    """The config with lists in place of sets, so that its file does not change from run to run."""
    for name, value in vars(config).items():
        if isinstance(value, set):
            setattr(config, name, sorted(value))
    return config


def task_of(model: nn.Module) -> str:
    """PEFT's name for what the model does."""
    kind = type(model).__name__
    if "ForSequenceClassification" in kind:
        return "SEQ_CLS"
    return "TOKEN_CLS" if "ForTokenClassification" in kind else "CAUSAL_LM"


def linear_names(model: nn.Module) -> list[str]:
    """Last components of the names of linear layers, each once."""
    heads = output_heads(model)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in heads]
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))


def other_sizes(config: PeftConfig, model: nn.Module) -> Iterator[str]:
    """Where PEFT rotates other blocks than an OFT adapter says, as its size divides no layer's inputs."""
    if config.peft_type != PeftType.OFT:
        return
    key, what = ("r", "blocks") if vars(config)["r"] else ("oft_block_size", "inputs a block")
    wanted = vars(config)[key]
    found: dict[int, dict[str, int]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer) and (size := vars(layer)[key][ADAPTER]) != wanted:
            found.setdefault(size, {})[name.rpartition(".")[2]] = vars(layer)["in_features"]
    for size, layers in sorted(found.items()):
        names = ", ".join(f"{name} ({inputs})" for name, inputs in layers.items())
        yield f"{wanted} {what} do not divide the inputs of {names}; PEFT takes {size} there"


def summary(config: PeftConfig, model: nn.Module, folder: Path | None) -> str:
    """A line for the plan."""
    layers = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    names = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in layers))
    kind = getattr(config.peft_type, "value", config.peft_type)
    return f"{kind} on {len(layers)} layers: {names}" + (f", from {folder}" if folder else "")
