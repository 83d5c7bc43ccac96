"""From config.json to modules: the whole model on the meta device, with only its computed buffers real."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn


def config_value(config: Any, name: str) -> Any:
    """A value of a transformers config by its usual name, which some kinds of model spell otherwise and others lack;
    None where it does."""
    return getattr(config, name, None)  # configs are open: no class declares these


def build_skeleton(auto_class: Any, config: Any, dtype: torch.dtype, attention: str | None, **kwargs: Any) -> nn.Module:
    """A transformers model with parameters and persistent buffers on meta, in `dtype`.

    Buffers that no checkpoint holds (rotary frequencies, position ids) are computed by the model's own
    initialisation, exactly as `from_pretrained` does it. Modules that a model keeps in float32 stay so.
    """
    import torch
    from transformers import initialization

    if attention is not None:
        kwargs["attn_implementation"] = attention
    with torch.device("meta"), initialization.meta_device_safe_creation_ops():
        model = auto_class.from_config(config, dtype=dtype, **kwargs)
    _keep_float32(model, dtype)
    model.tie_weights()
    _compute_buffers(model)
    model.train()
    return model


def cast(model: Any, dtype: torch.dtype) -> None:
    """Store the parameters of a loaded model in `dtype`, but those that its kind keeps in float32."""
    kept = {id(parameter) for parameter, _ in _kept(model, dtype)}
    for parameter in model.parameters():
        if parameter.is_floating_point() and id(parameter) not in kept:
            parameter.data = parameter.data.to(dtype)


def upcast_norms(model: nn.Module) -> set[str]:
    """Store the weights of norms in float32. Returns the names of those that had another type."""
    raised = set()
    for name, parameter in model.named_parameters():
        module = name.rpartition(".")[0].rpartition(".")[2].lower()
        if parameter.ndim == 1 and ("norm" in module or re.match(r"ln(_|\d|$)", module)):
            if parameter.dtype.itemsize < 4:
                raised.add(name)
            parameter.data = parameter.data.float()
    return raised


def _keep_float32(model: Any, dtype: torch.dtype) -> None:
    for parameter, kept in _kept(model, dtype):
        parameter.data = parameter.data.to(kept)


def _kept(model: Any, dtype: torch.dtype) -> list[tuple[nn.Parameter, torch.dtype]]:
    """Parameters that a model of this kind holds in another type where the rest is in `dtype`."""
    patterns = {
        re.compile(rf"(^|\.){re.escape(pattern).replace(re.escape('*'), '.*')}(\.|$)"): kept
        for pattern, kept in (model._get_dtype_plan(dtype) or {}).items()
    }
    return [
        (parameter, kept)
        for name, parameter in model.named_parameters()
        for pattern, kept in patterns.items()
        if pattern.search(name)
    ]


def _compute_buffers(model: Any) -> None:
    """Give non-persistent buffers their values, through the model's own `initialize_weights`."""
    import torch

    # Everything else is marked as done, so that only these buffers are initialised.
    for tensor in model.state_dict(keep_vars=True).values():
        tensor._is_hf_initialized = True
    for module in model.modules():
        module.__dict__.pop("_is_hf_initialized", None)
    for name, buffer in list(model.named_non_persistent_buffers()):
        parent, _, leaf = name.rpartition(".")
        model.get_submodule(parent)._buffers[leaf] = torch.empty_like(buffer, device="cpu")
    with torch.device("cpu"):
        model.initialize_weights()
