"""Questions about a transformers model's structure that plugins and the core both ask."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def transformer_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The repeated blocks of `model` in order, with their full names.

    A block is an element of an `nn.ModuleList` whose class the model lists in `_no_split_modules`, or whose
    own attention is of such a class, which is what Idefics 3 lists of its tower; a model that lists none gets the
    elements of its longest homogeneous `nn.ModuleList`.
    """
    from torch import nn

    listed = set(getattr(model, "_no_split_modules", None) or ())
    lists = [
        (name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)
    ]
    found = [
        (f"{name}.{index}", block)
        for name, blocks in lists
        for index, block in enumerate(blocks)
        if listed & {_plain_class_name(each) for each in (block, *block.children())}
    ]
    if found:
        return found
    uniform = [(name, blocks) for name, blocks in lists if len({type(block) for block in blocks}) == 1]
    if not uniform:
        return []
    name, blocks = max(uniform, key=lambda item: len(item[1]))
    return [(f"{name}.{index}", block) for index, block in enumerate(blocks)]


def language_model(model: Any) -> Any:
    """What in a transformers model reads embeddings of tokens; another model without such a part is one itself."""
    return model.get_decoder() if hasattr(model, "get_decoder") else model


def text_layers(model: Any) -> list[tuple[str, nn.Module]]:
    """The repeated blocks of the text decoder, without those of vision or audio towers."""
    layers = transformer_layers(model)
    if len({name.rpartition(".")[0] for name, _ in layers}) <= 1:
        return layers
    decoder = {id(module) for module in language_model(model).modules()}
    return [(name, layer) for name, layer in layers if id(layer) in decoder]


def _plain_class_name(module: nn.Module) -> str:
    # FSDP2 swaps a module's class for a subclass called FSDP<name>.
    return type(module).__name__.removeprefix("FSDP")


def output_heads(model: Any) -> set[str]:
    """Full names of the modules that map hidden states to logits or scores."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    names = {name for name, module in model.named_modules() if head is not None and module is head}
    return names | {name for name, _ in model.named_modules() if name in ("lm_head", "score", "classifier", "v_head")}


def linear_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every linear layer (`nn.Linear`, its subclasses, GPT-2's `Conv1D`) but output heads, in model order."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    heads = output_heads(model)
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and name not in heads
    ]
