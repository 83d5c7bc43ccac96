"""Routers of mixtures of experts, as transformers records them."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def routers(model: Any) -> list[tuple[nn.Module, int]]:
    """(router, place of its logits among what it returns) for each layer whose balance transformers measures; empty
    where the model has no `load_balancing_loss_func`, as it has no routers, or balances them in another way."""
    if not hasattr(sys.modules[type(model).__module__], "load_balancing_loss_func"):
        return []
    recorded: list[Any] = []
    for module in model.modules():
        found = (getattr(module, "_can_record_outputs", None) or {}).get("router_logits", ())
        recorded += found if isinstance(found, list | tuple) else [found]
    return [
        (module, recorder.index)
        for name, module in model.named_modules()
        for recorder in {id(each): each for each in recorded if hasattr(each, "target_class")}.values()
        if isinstance(module, recorder.target_class) and (recorder.layer_name or "") in name
    ]
