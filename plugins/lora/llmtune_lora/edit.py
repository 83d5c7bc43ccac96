"""The peft edit: PEFT puts adapters into the meta skeleton; what they start from is reported to the core."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from llmtune import ModelEdit, ParameterRole, PlanError, RunContext, split_names

from . import files
from .merge import fold, set_magnitudes
from .targets import (
    adapted_layers,
    adapted_parameters,
    classification_heads,
    compact,
    expressible,
    saved_modules,
    short,
    stacked_weights,
    task_of,
)

if TYPE_CHECKING:
    from . import LoraRecipe

FRESH: dict[str, Callable[[Tensor], object]] = {
    "lora_A": partial(nn.init.kaiming_uniform_, a=math.sqrt(5)),
    "lora_B": nn.init.zeros_,
    "lora_embedding_A": nn.init.zeros_,
    "lora_embedding_B": nn.init.normal_,
    "lora_magnitude_vector": nn.init.ones_,
}
"""How each part of a new adapter starts, as in PEFT. Magnitudes get their value when the weights are there."""


class Lora:
    """Adapters beside frozen layers; what is trained is saved alone (`adapter`)."""

    kind = "adapter"
    whole_modules_key = "modules_to_save"

    def __init__(self, config: LoraRecipe) -> None:
        self.config = config
        self.adapters: list[str] = []
        """PEFT's names of the adapters in the model, in order."""
        self.saved_config: LoraConfig | None = None
        """What `adapter_config.json` will say, without the run's own entries."""

    def check(self, context: RunContext, model: nn.Module) -> list[str]:
        """Which numbers of adapters a run can take."""
        given = split_names(self.config.adapter_name_or_path)
        if context.mode == "train" and len(given) > 1:
            return [
                f"adapter_name_or_path names {len(given)} adapters; training continues exactly one. Merge the others "
                "into the base first (llmtune export), or name one"
            ]
        if self.config.target_parameters and (context.dims.tensor > 1 or context.dims.expert > 1):
            return [
                "target_parameters needs whole stacks of experts on every rank, which tp_size and ep_size split; "
                "remove those, or target_parameters"
            ]
        return []

    def apply(self, model: nn.Module, context: RunContext) -> ModelEdit:
        """Insert the adapters. Raises PlanError or LoadError where recipe, adapter files and model do not fit."""
        given = split_names(self.config.adapter_name_or_path)
        change = self._existing(model, given, context) if given else self._new(model)
        return replace(change, roles=_roles(model), lr_factor=loraplus(self.config, context.learning_rate))

    def save(self, model: nn.Module, tensors: Mapping[str, Tensor], folder: Path, context: RunContext) -> None:
        """Write the adapter as PEFT does."""
        config = copy.deepcopy(self.saved_config)
        assert config is not None, "save comes after apply"
        config.base_model_name_or_path = context.model_name
        config.revision = context.revision
        config.inference_mode = True
        files.write(tensors, config, folder)

    def reopened(self, saved: Path) -> dict[str, tuple[str, ...]] | None:
        """A continued adapter is whole in `saved`, and the folder it came from is needed no more."""
        return {"adapter_name_or_path": (str(saved),)} if self.config.adapter_name_or_path else None

    def merge(self, model: nn.Module) -> None:
        """Fold the adapters into the base. Nothing happens where they were folded in before."""
        layers = [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]
        if packed := [name for name, layer in layers if hasattr(layer.get_base_layer(), "dequantize")]:
            raise PlanError(
                f"{packed[0]} is stored quantised; adapters are merged into an unquantised base, set quant_config: null"
            )
        if self.adapters:
            fold(model, self.adapters)
            self.adapters.clear()

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

    def _new(self, model: nn.Module) -> ModelEdit:
        recipe = self.config
        saved = saved_modules(model, recipe.modules_to_save)
        saved += [head for head in classification_heads(model) if head not in saved]
        named_all = "all" in split_names(recipe.target_modules)
        layers, left_out = expressible(model, adapted_layers(model, recipe.target_modules, saved), named_all)
        parameters = adapted_parameters(model, recipe.target_parameters)
        stacks = [name for name in stacked_weights(model) if name not in parameters] if named_all else []
        config = LoraConfig(
            r=recipe.r,
            lora_alpha=recipe.lora_alpha,
            lora_dropout=recipe.lora_dropout,
            target_modules=layers,
            target_parameters=parameters or None,
            use_rslora=recipe.use_rslora,
            use_dora=recipe.use_dora,
            modules_to_save=saved or None,
            fan_in_fan_out=any(isinstance(model.get_submodule(layer), Conv1D) for layer in layers),
            task_type=task_of(model),
        )
        self.saved_config = copy.deepcopy(config)
        # A list, so that the file's order does not change from run to run.
        self.saved_config.target_modules = compact(model, layers)
        self.saved_config.target_parameters = parameters or None
        self.saved_config.modules_to_save = compact(model, saved) if saved else None
        self._inject(model, config, "default")
        require_adapted(model, layers, parameters)
        parts = {name: tensor for name in model.state_dict() if (tensor := files.taken_apart(name))}
        fresh = {name: FRESH[tensor.part] for name, tensor in parts.items() if tensor.part in FRESH}
        copies = {
            name: f"{tensor.module}.original_module.{tensor.rest}"
            for name, tensor in parts.items()
            if tensor.part == "modules_to_save"
        }
        after_load = [partial(set_magnitudes, adapter="default")] if recipe.use_dora else []
        report = [_summary(config, layers, parameters), *_left_out(left_out, stacks), *_saved_lines(model, saved)]
        return ModelEdit(
            fresh=fresh,
            copies=copies,
            after_load=after_load,
            trainable=_is_adapter,
            report=report,
            tp_follow=_follow(model),
        )

    def _existing(self, model: nn.Module, places: tuple[str, ...], context: RunContext) -> ModelEdit:
        folders = [files.adapter_folder(place, context) for place in places]
        configs = [files.read_config(folder) for folder in folders]
        self._check_several(configs, context)
        stored: dict[str, tuple[Path, str]] = {}
        report = []
        for number, (folder, config) in enumerate(zip(folders, configs, strict=True)):
            name = "default" if number == 0 else f"adapter_{number + 1}"
            if context.mode == "train":
                files.check_agreement(self.config, config, folder)
                if self.config.lora_dropout != type(self.config).lora_dropout:
                    config.lora_dropout = self.config.lora_dropout
                self.saved_config = copy.deepcopy(config)
            config.inference_mode = False
            self._inject(model, config, name)
            held, base = files.files_of(model, name, folder)
            stored |= held
            mine = [(p, m) for p, m in model.named_modules() if isinstance(m, LoraLayer) and name in m.r]
            layers = [path for path, module in mine if not isinstance(module, ParamWrapper)]
            stacks = [module.parameter_name for _, module in mine if isinstance(module, ParamWrapper)]
            report.append(f"{_summary(config, layers, stacks)}, from {folder}")
            if base:
                report.append(f"{folder} also holds base weights, which are not read: {files.describe(base)}")
        several = len(places) > 1
        if several and "quantized_base" in context.capabilities:
            self._use_side_by_side(model)
        after_load = [self.merge] if several and "quantized_base" not in context.capabilities else []
        return ModelEdit(
            files=stored,
            after_load=after_load,
            trainable=_is_adapter,
            report=report,
            tp_follow=_follow(model),
        )

    def _check_several(self, configs: list[LoraConfig], context: RunContext) -> None:
        if len(configs) < 2:
            return
        if "quantized_base" in context.capabilities and any(c.use_dora or c.modules_to_save for c in configs):
            raise PlanError(
                "peft_config.adapter_name_or_path: several adapters cannot be merged into a quantised base, and those "
                "with use_dora or modules_to_save cannot be used side by side; name one, or remove quant_config"
            )

    def _inject(self, model: nn.Module, config: LoraConfig, adapter: str) -> None:
        with warnings.catch_warnings():
            # Said in the plan's own words, see `_saved_lines`; merging takes care of it.
            warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
            # Several adapters are what the recipe asked for.
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            try:
                inject_adapter_in_model(config, model, adapter_name=adapter, low_cpu_mem_usage=True)
            except (ValueError, TypeError) as error:
                raise PlanError(f"peft_config: PEFT cannot adapt {type(model).__name__}: {error}") from error
        self.adapters.append(adapter)

    def _use_side_by_side(self, model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, LoraLayer):
                module.set_adapter([name for name in self.adapters if name in module.r])


def _follow(model: nn.Module) -> dict[str, Literal["inputs", "outputs"]]:
    """A takes what its layer takes, B gives what its layer gives."""
    sides: dict[str, Literal["inputs", "outputs"]] = {"lora_A": "inputs", "lora_B": "outputs"}
    return {
        f"{path}.{part}.{adapter}": side
        for path, module in model.named_modules()
        if isinstance(module, LoraLayer) and not isinstance(module, ParamWrapper)
        for part, side in sides.items()
        for adapter in getattr(module, part)
    }


def loraplus(config: LoraRecipe, learning_rate: float) -> Callable[[str], float] | None:
    """LoRA+'s multiple of the learning rate for each tensor (Hayou et al. 2024), as PEFT groups them."""
    ratio = config.loraplus_lr_ratio
    if ratio is None or not learning_rate:
        return None

    def factor(name: str) -> float:
        part = tensor.part if (tensor := files.taken_apart(name)) else ""
        if part.startswith("lora_embedding"):
            return config.loraplus_lr_embedding / learning_rate
        faster = part in ("lora_B", "lora_magnitude_vector") or name.endswith("bias")
        return ratio if faster else 1.0

    return factor


def _roles(model: nn.Module) -> dict[str, ParameterRole]:
    """The factors of adapters, by name."""
    roles: dict[str, ParameterRole] = {
        "lora_A": "adapter_a", "lora_B": "adapter_b", "lora_embedding_A": "adapter_a", "lora_embedding_B": "adapter_b",
    }  # fmt: skip
    found = {name: files.taken_apart(name) for name, parameter in model.named_parameters() if parameter.dim() > 1}
    return {name: roles[part.part] for name, part in found.items() if part is not None and part.part in roles}


def _is_adapter(name: str) -> bool:
    return files.taken_apart(name) is not None


def require_adapted(model: nn.Module, layers: Sequence[str], parameters: Sequence[str]) -> None:
    """Raise PlanError if PEFT put adapters elsewhere than it was told."""
    adapted = {name for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    # Several weights of one module have wrappers inside each other.
    stacks = {name.rpartition(".")[0] for name in parameters}
    adapted = {name for name in adapted if name.removesuffix(".base_layer") not in stacks}
    if wrong := sorted(adapted ^ set(layers)):
        raise PlanError(
            f"peft_config.target_modules: PEFT does not adapt {type(model).__name__} as told, it differs in "
            f"{files.describe(wrong)}; leave {short(wrong)[0]} out"
        )


def _summary(config: LoraConfig, layers: list[str], parameters: list[str]) -> str:
    kind = "DoRA" if config.use_dora else "rsLoRA" if config.use_rslora else "LoRA"
    stacks = f" and {len(parameters)} stacks of experts" if parameters else ""
    names = files.describe(short([*layers, *parameters]))
    return f"{kind} r={config.r} alpha={config.lora_alpha} on {len(layers)} layers{stacks}: {names}"


def _left_out(layers: list[str], stacks: list[str]) -> list[str]:
    lines = []
    if stacks:
        names = ", ".join(dict.fromkeys(".".join(name.split(".")[-2:]) for name in stacks))
        lines.append(
            f"stacks of experts get no adapter: {len(stacks)} weights ({names}); name them in target_parameters, with "
            "lora_dropout: 0"
        )
    if layers:
        lines.append(
            f"{len(layers)} layers get no adapter, as PEFT takes their names to mean the experts: "
            f"{files.describe(['.'.join(name.split('.')[-2:]) for name in layers])}"
        )
    return lines


def _saved_lines(model: nn.Module, saved: list[str]) -> list[str]:
    lines = [f"{name} is trained in full, as a copy saved with the adapter" for name in saved]
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    tied = {name for same in names.values() if len(same) > 1 for name in same}
    return lines + [
        f"{name} shares its weight with another module; its copy does not, so they part in training"
        for name in saved
        if any(other.startswith(f"{name}.original_module.") for other in tied)
    ]
