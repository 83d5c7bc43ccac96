"""The peft edit: PEFT puts adapters into the meta skeleton; what they start from is reported to the core."""

from __future__ import annotations

import copy
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

from llmtune import ModelEdit, ParameterRole, PlanError, RunContext, peft_folder, split_names, subfolder_of

from . import files
from .beneath import merged_rules
from .merge import fold, set_magnitudes
from .starts import TakenOut, fresh_tensors, rules_of, takes_from_base, widened
from .targets import (
    adapted_layers,
    adapted_parameters,
    classification_heads,
    compact,
    expressible,
    narrow,
    require_patterns,
    saved_modules,
    short,
    stacked_weights,
    task_of,
)

if TYPE_CHECKING:
    from . import LoraRecipe


class Lora:
    """Adapters beside frozen layers; what is trained is saved alone (`adapter`)."""

    kind = "adapter"
    whole_modules_key = "modules_to_save"

    def __init__(self, config: LoraRecipe) -> None:
        self.config = config
        self.init = config.init
        self.adapters: list[str] = []
        """PEFT's names of the adapters in the model, in order."""
        self.saved_config: LoraConfig | None = None
        """What `adapter_config.json` will say, without the run's own entries."""
        self.initial: dict[str, Tensor] = {}
        """The factors at the start that were taken out of the base, by name; they come with the weights."""

    def check(self, context: RunContext, model: nn.Module) -> list[str]:
        """Which ways of spreading a run can take."""
        if self.config.target_parameters and (context.dims.tensor > 1 or context.dims.expert > 1):
            return [
                "target_parameters needs whole stacks of experts on every rank, which tp_size and ep_size split; "
                "remove those, or target_parameters"
            ]
        return []

    def apply(self, model: nn.Module, context: RunContext) -> ModelEdit:
        """Insert the adapters. Raises PlanError or LoadError where recipe, adapter files and model do not fit."""
        folders = [
            peft_folder(place, context, key=files.KEY, subfolder=self.config.adapter_folder) for place in self._given()
        ]
        # Where nothing trains, the given ones are used, but for the frozen copy of a model whose base gave a part away.
        new = self.config.create_new_adapter and (context.mode == "train" or takes_from_base(self.init))
        own = [] if new else folders[-1:]
        beneath = folders[: len(folders) - len(own)]
        merged = [rule for folder in beneath for rule in merged_rules(model, folder, files.read_config(folder))]
        change = self._existing(model, own[0], context) if own else self._new(model, context)
        lines = [f"{folder} is merged into the weights as they are loaded" for folder in beneath]
        if beneath and context.mode == "train":
            lines.append(
                f"the result belongs on top of {'that' if len(beneath) == 1 else 'these'}: name both, in order"
            )
        if ratio := self.config.loraplus_lr_ratio:
            lines.append(f"the learning rate of adapters' B is {ratio:g} times that of A (LoRA+)")
        return replace(
            change,
            weight_rules=[*merged, *change.weight_rules],
            report=[*change.report, *lines],
            trainable=_is_adapter,
            tp_follow=_follow(model),
            roles=_roles(model),
            lr_factor=loraplus(self.config, context.learning_rate),
        )

    def _given(self) -> tuple[str, ...]:
        return split_names(self.config.adapter_name_or_path)

    def save(self, model: nn.Module, tensors: Mapping[str, Tensor], folder: Path, context: RunContext) -> None:
        """Write the adapter as PEFT does."""
        config = copy.deepcopy(self.saved_config)
        assert config is not None, "save comes after apply"
        config.base_model_name_or_path = context.model_name
        config.revision = context.revision
        config.inference_mode = True
        if self.initial:
            tensors, config = widened(tensors, self.initial, config)
        files.write(tensors, config, folder, taken_out=bool(self.initial))

    def reopened(self, saved: Path) -> dict[str, object] | None:
        """An adapter that came from a folder is whole in `saved`; one that took a part of the base away, too, and with
        it what it took. Those that were merged into the base are still needed."""
        new = self.config.create_new_adapter
        beneath = self._given() if new else self._given()[:-1]
        if not self._given() and not takes_from_base(self.init):
            return None
        # Folders of former adapters are as the recipe names them, their subfolders included.
        places = [subfolder_of(place, self.config.adapter_folder) for place in beneath]
        parameters: dict[str, object] = {"adapter_name_or_path": (*places, str(saved))}
        return parameters | ({"init_lora_weights": self.init} if takes_from_base(self.init) else {})

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

    def _new(self, model: nn.Module, context: RunContext) -> ModelEdit:
        recipe = self.config
        saved = saved_modules(model, recipe.modules_to_save)
        saved += [head for head in classification_heads(model) if head not in saved]
        named_all = "all" in split_names(recipe.target_modules)
        layers, left_out = expressible(
            model, adapted_layers(model, recipe.target_modules, saved, context.frozen), named_all
        )
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
            rank_pattern=dict(recipe.rank_pattern or {}),
            alpha_pattern=dict(recipe.alpha_pattern or {}),
        )
        self.saved_config = copy.deepcopy(config)
        layers = narrow(model, layers, recipe, self.saved_config)
        config.target_modules = layers
        require_patterns(recipe, [*layers, *parameters])
        self.saved_config.target_parameters = parameters or None
        self.saved_config.modules_to_save = compact(model, saved) if saved else None
        self._inject(model, config, "default")
        require_adapted(model, layers, parameters)
        fresh, rules = fresh_tensors(model, self.init), self._rules(model, context)
        for rule in rules:
            fresh = {name: how for name, how in fresh.items() if name not in rule.targets}
        copies = {
            name: f"{tensor.module}.original_module.{tensor.rest}"
            for name in model.state_dict()
            if (tensor := files.taken_apart(name)) and tensor.part == "modules_to_save"
        }
        after_load = [partial(set_magnitudes, adapter="default")] if recipe.use_dora else []
        report = [_summary(config, layers, parameters), *_left_out(left_out, stacks), *_saved_lines(model, saved)]
        if rules:
            report.append(
                f"{len(rules)} adapters start as a part of the base's weights ({self.init}), which keeps the rest; "
                f"the result has twice the rank and belongs to the base as it was"
            )
        return ModelEdit(fresh=fresh, copies=copies, after_load=after_load, report=report, weight_rules=rules)

    def _rules(self, model: nn.Module, context: RunContext, stored: Path | None = None) -> list[TakenOut]:
        self.initial.clear()
        if not takes_from_base(self.init):
            return []
        return rules_of(model, str(self.init), context.trainable_dtype, self.initial, stored)

    def _existing(self, model: nn.Module, folder: Path, context: RunContext) -> ModelEdit:
        config = files.read_config(folder)
        again = takes_from_base(self.init)
        if again:
            config = files.narrowed(config, folder)
        if context.mode == "train":
            files.check_agreement(self.config, config, folder)
            if self.config.lora_dropout != type(self.config).lora_dropout:
                config.lora_dropout = self.config.lora_dropout
            self.saved_config = copy.deepcopy(config)
        config.inference_mode = False
        self._inject(model, config, "default")
        rules = self._rules(model, context, folder)
        made = {target for rule in rules for target in rule.targets}
        stored, base = files.files_of(model, "default", folder, elsewhere=made)
        mine = [(p, m) for p, m in model.named_modules() if isinstance(m, LoraLayer) and "default" in m.r]
        layers = [path for path, module in mine if not isinstance(module, ParamWrapper)]
        stacks = [module.parameter_name for _, module in mine if isinstance(module, ParamWrapper)]
        report = [f"{_summary(config, layers, stacks)}, from {folder}"]
        if base:
            report.append(f"{folder} also holds base weights, which are not read: {files.describe(base)}")
        return ModelEdit(files=stored, report=report, weight_rules=rules)

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


class SwitchableLora(Lora):
    """Adapters whose base is the original one, so that it answers as soon as they are off."""

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
    kinds = [name for name, used in (("rsLoRA", config.use_rslora), ("DoRA", config.use_dora)) if used]
    kind = " and ".join(kinds) or "LoRA"
    stacks = f" and {len(parameters)} stacks of experts" if parameters else ""
    names = files.describe(short([*layers, *parameters]))
    patterns = {"r": config.rank_pattern, "alpha": config.alpha_pattern}
    apart = [f"{key}={value} on {name}" for key, own in patterns.items() for name, value in (own or {}).items()]
    but = f" ({', '.join(apart)})" if apart else ""
    return f"{kind} r={config.r} alpha={config.lora_alpha}{but} on {len(layers)} layers{stacks}: {names}"


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
