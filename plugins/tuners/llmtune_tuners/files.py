"""PEFT's files: which tensor is under which key, what an adapter's folder holds, and writing one."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftConfig, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from llmtune import LoadError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
KEY = "peft_config.adapter_name_or_path"


def in_peft(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`tensors`, named as in the model, under their keys in PEFT's file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = get_peft_model_state_dict(model, state_dict=dict(tensors), save_embedding_layers=False)
    return {f"{PREFIX}{key}": tensor for key, tensor in state.items()}


def stored_tensors(model: nn.Module, trained: set[str], buffers: set[str], folder: Path) -> dict[str, tuple[Path, str]]:
    """Model name to (file, key) for every trained tensor, and for those `buffers` that PEFT keeps in the file. Only the
    file's header is read.

    Raises LoadError that names missing and misshapen keys.
    """
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    mine = {name: named[name] for name in trained | buffers}
    keys = {id(tensor): key for key, tensor in in_peft(model, mine).items()}
    path = folder / WEIGHTS
    with safe_open(path, framework="pt") as file:
        there = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    wanted = {name: keys[id(tensor)] for name, tensor in mine.items() if name in trained or id(tensor) in keys}
    if wrong := [key for name, key in wanted.items() if there.get(key) != tuple(mine[name].shape)]:
        raise LoadError(
            f"{path} does not fit {type(model).__name__}: {', '.join(sorted(wrong)[:8])} is missing or of another "
            "shape. Check that it was made for this model"
        )
    return {name: (path, key) for name, key in wanted.items()}


def write(model: Any, tensors: Mapping[str, Tensor], config: PeftConfig, folder: Path) -> None:
    """Both files, as `PeftModel.save_pretrained` writes them. Tensors are named as in the model."""
    buffers = {name: buffer.cpu() for name, buffer in model.named_buffers() if name in model.state_dict()}
    state = in_peft(model, {**buffers, **tensors})
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, folder / WEIGHTS, metadata={"format": "pt"})
    config.save_pretrained(str(folder))
