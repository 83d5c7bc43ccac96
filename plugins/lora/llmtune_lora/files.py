"""PEFT's files: which tensor is under which key, what an adapter's folder holds, and writing one."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from peft import LoraConfig, PeftConfig
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from llmtune import LoadError, PlanError

if TYPE_CHECKING:
    from . import LoraRecipe

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
KEY = "peft_config.adapter_name_or_path"

_CHANGED_BASE = ("olora", "corda", "loftq", "lora_ga")
"""Ways of PEFT to start an adapter that take something from the base's weights, besides PiSSA."""

TAKEN_OUT = "llmtune_taken_out_of_base"
"""Entry of a file's metadata: the second half of each factor is what the adapter took out of the base at its start."""

FREE = ("adapter_name_or_path", "adapter_folder", "create_new_adapter", "lora_dropout", "init_lora_weights",
        "pissa_init", "pissa_iter", "pissa_convert", "loraplus_lr_ratio", "loraplus_lr_embedding")  # fmt: skip
"""Keys of the recipe that an adapter's own settings cannot contradict."""

_PARTS = "lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|modules_to_save"
_NAME = re.compile(rf"(?P<module>.+)\.(?P<part>{_PARTS})\.(?P<adapter>[^.]+)(?:\.(?P<rest>.+))?")


class AdapterTensor(NamedTuple):
    """A tensor's name in an adapted model, taken apart."""

    module: str
    """The layer it belongs to, as the base model names it."""
    part: str
    """`lora_A`, `lora_B`, ..., `modules_to_save`."""
    adapter: str
    rest: str
    """`weight`, `bias`, or a path inside a module trained in full."""

    @property
    def key(self) -> str:
        """Its key in PEFT's file."""
        if self.part == "modules_to_save":
            return f"{PREFIX}{self.module}.{self.rest}"
        if self.part == "lora_magnitude_vector":  # a bare parameter in PEFT's first DoRA; the file has kept that
            return f"{PREFIX}{self.module}.{self.part}"
        return f"{PREFIX}{self.module}.{self.part}" + (f".{self.rest}" if self.rest else "")


def taken_apart(name: str) -> AdapterTensor | None:
    """None for a tensor that belongs to the base model."""
    match = _NAME.fullmatch(name)
    return AdapterTensor(match["module"], match["part"], match["adapter"], match["rest"] or "") if match else None


NOT_UNDERSTOOD = ("alora_invocation_tokens", "trainable_token_indices", "layer_replication", "use_qalora", "use_bdlora")
"""Settings of PEFT under which an adapter is more than its factors, or less."""


def read_config(folder: Path) -> LoraConfig:
    """The adapter's own settings. Raises PlanError if it is no LoRA adapter or needs what llmtune does not train."""
    config = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, LoraConfig):
        raise PlanError(f"{KEY}: {folder} holds a {config.peft_type} adapter, not LoRA")
    if config.bias != "none":
        raise PlanError(
            f"{KEY}: {folder} trains biases of the base model (bias: {config.bias}), "
            "which cannot be continued here; merge it into the base with PEFT first"
        )
    if config.init_lora_weights in _CHANGED_BASE or str(config.init_lora_weights).startswith("pissa"):
        raise PlanError(
            f"{KEY}: {folder} starts from a base that PEFT changed (init_lora_weights: {config.init_lora_weights}) and "
            "answers wrongly on the original one; convert it with PEFT: "
            "save_pretrained(FOLDER, path_initial_model_for_weight_conversion=...)"
        )
    for key in NOT_UNDERSTOOD:
        if value := getattr(config, key, None):
            raise PlanError(
                f"{KEY}: {folder} has {key}: {value!r:.80}, which changes what its weights mean and is not done here; "
                "merge it into the base with PEFT first, where that is possible"
            )
    # The values come from the file: whatever the first initialisation was, it must not run again.
    config.init_lora_weights = True
    return config


def narrowed(config: LoraConfig, folder: Path) -> LoraConfig:
    """The settings of an adapter that `starts.widened` has given twice its rank, as they were.

    Raises PlanError for any other adapter.
    """
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        mark = (file.metadata() or {}).get(TAKEN_OUT)
    if mark is None:
        raise PlanError(
            f"peft_config.init_lora_weights: {folder} does not hold what its adapter took out of the base at its start "
            "(PiSSA, OLoRA), which files of llmtune do; remove the key, and pissa_init, to continue it as it is"
        )
    alpha = 2**0.5 if config.use_rslora else 2
    config.r //= 2
    config.lora_alpha = round(config.lora_alpha / alpha)
    config.rank_pattern = {name: rank // 2 for name, rank in (config.rank_pattern or {}).items()}
    config.alpha_pattern = {name: round(value / alpha) for name, value in (config.alpha_pattern or {}).items()}
    return config


def check_agreement(recipe: LoraRecipe, config: LoraConfig, folder: Path) -> None:
    """Raise PlanError if a key of the recipe was set to something the adapter contradicts."""
    from llmtune import split_names

    for field in dataclasses.fields(recipe):
        wish = getattr(recipe, field.name)
        if field.name in FREE or wish == field.default:
            continue
        has = getattr(config, field.name)
        if field.name in ("rank_pattern", "alpha_pattern"):
            wish, has = wish or {}, has or {}
        elif field.name in ("layers_to_transform", "layers_pattern"):
            wish, has = ([x] if isinstance(x, (int, str)) else list(x or ()) for x in (wish, has))
        elif field.name in ("target_modules", "target_parameters", "modules_to_save", "exclude_modules"):
            wish = sorted(split_names(wish))
            has = sorted(has or ()) if not isinstance(has, str) else has
        if wish != has:
            raise PlanError(
                f"peft_config.{field.name}: the recipe says {wish}, the adapter {folder} that is continued has {has}; "
                "remove the key, or train a new adapter"
            )


def files_of(
    model: nn.Module, adapter: str, folder: Path, elsewhere: Collection[str] = ()
) -> tuple[dict[str, tuple[Path, str]], list[str]]:
    """Model name to (file, key) for every tensor of `adapter`, and keys of base weights that PEFT put beside them.

    Tensors whose names are `elsewhere` are read by others.

    Only the file's header is read. Raises LoadError that lists missing, surplus and misshapen keys.
    """
    mine = {name: parts for name in model.state_dict() if (parts := taken_apart(name)) and parts.adapter == adapter}
    others = {mine.pop(name).key for name in elsewhere}
    shapes = {parts.key: tuple(model.state_dict()[name].shape) for name, parts in mine.items()}
    path = folder / WEIGHTS
    with safe_open(path, framework="pt") as file:
        there = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    there = {key: shape for key, shape in there.items() if key not in others}
    base = [key for key in there if key not in shapes and key.endswith(".base_layer.weight")]
    wrong = [
        f"{key} {list(there[key])}, wanted {list(shapes[key])}"
        for key in shapes.keys() & there.keys()
        if there[key] != shapes[key]
    ]
    problems = [
        f"{what}: {', '.join(sorted(keys)[:8])}" + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")
        for what, keys in (
            ("missing", list(shapes.keys() - there.keys())),
            ("not part of this model", list(there.keys() - shapes.keys() - set(base))),
            ("of another shape", wrong),
        )
        if keys
    ]
    if problems:
        raise LoadError(
            f"{path} does not fit {type(model).__name__}. {'; '.join(problems)}. Check that it was made for this model"
        )
    return {name: (path, parts.key) for name, parts in mine.items()}, base


def write(tensors: Mapping[str, Tensor], config: LoraConfig, folder: Path, taken_out: bool = False) -> None:
    """Both files, as `PeftModel.save_pretrained` writes them. Tensors are named as in the model."""
    state = {parts.key: tensor.contiguous() for name, tensor in tensors.items() if (parts := taken_apart(name))}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"} | ({TAKEN_OUT: "1"} if taken_out else {}))
    config.save_pretrained(str(folder))


def describe(names: Sequence[str]) -> str:
    """`q_proj, v_proj and 5 more`."""
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
