"""Whether a model, as it was edited, can be spread over ranks as `dist_config` wants it; each objection a sentence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from llmtune.distributed.expert_parallel import BY_EXPERT, EXCHANGE, expert_modules, expert_plan, too_old
from llmtune.distributed.tensor_parallel import BY_INPUTS, BY_OUTPUTS, SHARED, base_layer, is_linear, styles
from llmtune.planning.objections import packing_obstacle

if TYPE_CHECKING:
    from llmtune.contract.records import ParallelDims
    from llmtune.model.edits import Ledger


def objections_to_spreading(module: Any, ledger: Ledger, attention: str, dims: ParallelDims) -> Iterator[str]:
    """What speaks against this arrangement of the ranks, one sentence each."""
    yield from context_objections(module, ledger, attention, dims)
    yield from tensor_objections(module, ledger, dims)
    yield from expert_objections(module, ledger, dims)


def context_objections(module: Any, ledger: Ledger, attention: str, dims: ParallelDims) -> Iterator[str]:
    """Why rows cannot be split over `dims.context` ranks."""
    size, tensor = dims.context, dims.tensor
    if size == 1:
        return
    changes = [change for _, change in ledger.changes]
    if not any(change.attention == attention for change in changes):
        lines = [line for change in changes for line in change.report if "attention: not used" in line]
        found = f"{attention} ({lines[0]})" if lines else attention
        fix = "set cp_size: 1" if lines else "set kernel_config: auto and flash_attn: auto, or cp_size: 1"
        yield (
            f"cp_size is {size}, which needs an attention kernel that keeps documents apart by their bounds, found "
            f"{found}; {fix}"
        )
    elif reason := packing_obstacle(module, attention):
        yield f"cp_size is {size}, but {type(module).__name__} {reason}; set cp_size: 1"
    heads = getattr(module.config.get_text_config(), "num_attention_heads", 0)
    if heads % (tensor * size):
        groups = f"cp_size {size}" + (f" x tp_size {tensor}" if tensor > 1 else "")
        yield f"{groups} does not divide the {heads} attention heads of {type(module).__name__}; choose a divisor"
    if kind := _stretched_by_length(module):
        yield (
            f"cp_size is {size}, but {type(module).__name__} stretches rotary positions by the length of its input "
            f"(rope type {kind}), which a piece of a row does not show; set rope_scaling: yarn or linear, or cp_size: 1"
        )


def _stretched_by_length(module: Any) -> str | None:
    """The kind of rotary positions whose frequencies depend on the largest position that a forward pass sees."""
    found = (getattr(inner, "rope_type", None) for inner in module.modules())
    kinds = {kind for types in found for kind in (types.values() if isinstance(types, dict) else [types])}
    return next((kind for kind in ("dynamic", "longrope") if kind in kinds), None)


def tensor_objections(model: Any, ledger: Ledger, dims: ParallelDims) -> Iterator[str]:
    """Why this model, as it was edited, cannot be split over `dims.tensor` ranks; one sentence each."""
    size = dims.tensor
    if size == 1:
        return
    chosen = styles(model)
    if not chosen:
        yield f"tp_size is {size}, but transformers has no tensor parallel plan for {type(model).__name__}; use 1"
        return
    experts = tuple(f"{name}." for name in expert_modules(model))
    for name, style in chosen.items():
        if f"{name}.".startswith(experts):
            if dims.expert == 1:
                yield (
                    f"tp_size is {size}, but {name} holds experts, which are spread whole; "
                    f"set ep_size to {size} or a multiple too"
                )
                return
        elif style == SHARED:
            if ledger.direct.get(f"{name}.weight") != f"{name}.weight":
                yield f"tp_size is {size}, but {name}, which sees single heads, was replaced by an edit; use 1"
                return
        elif style not in BY_OUTPUTS | BY_INPUTS:
            yield f'tp_size is {size}, but {name} would have to be split as "{style}", which llmtune does not do; use 1'
            return
        elif sentence := _tensor_objection(model, ledger, name, style, size):
            yield f"tp_size is {size}, but {sentence}"
            return


def _tensor_objection(model: Any, ledger: Ledger, name: str, style: str, size: int) -> str | None:
    if packed := next((rule for original, rule in ledger.rules.items() if original.startswith(f"{name}.")), None):
        return f"{name} is stored by {packed.plugin} in a form that cannot be split; use 1, or remove quant_config"
    base = base_layer(model, ledger.direct, name)
    if not is_linear(base):
        return f"{name} is a {type(base).__name__}, and only torch's linear layers are split; use 1"
    width = base.out_features if style in BY_OUTPUTS else base.in_features
    head = getattr(model.get_submodule(name.rpartition(".")[0]), "head_dim", None)
    head = head if isinstance(head, int) and style in ("colwise", "rowwise") else 1
    if width // head % size:
        kind = "heads" if head > 1 else "features"
        return f"{name} has {width // head} {kind} to share out; use a divisor of {width // head}"
    known = set(ledger.direct.values()) | {f"{part}.{leaf}" for part in ledger.tp_follow for leaf in ("weight", "bias")}
    inside = [other for other, _ in model.named_parameters() if other.startswith(f"{name}.") and other not in known]
    if inside:
        return f"the edit that made {inside[0]} does not say how it is split; use 1, or another peft_config"
    return None


def expert_objections(model: Any, ledger: Ledger, dims: ParallelDims) -> Iterator[str]:
    """Why the experts of this model, as it was edited, cannot be spread over `dims.expert` ranks."""
    size, group = dims.expert, dims.shard * dims.tensor
    if size == 1:
        return
    plan = expert_plan(model)
    if sentence := too_old():
        yield f"ep_size is {size}, which {sentence}; use 1 or update it"
    elif dims.context > 1:
        yield f"ep_size is {size} beside cp_size {dims.context}, which are not combined; set one of them to 1"
    elif EXCHANGE not in plan.values():
        yield f"ep_size is {size}, but transformers has no expert parallel plan for {type(model).__name__}; use 1"
    elif size % dims.tensor or group % size:
        yield (
            f"ep_size is {size}, allowed is a multiple of tp_size ({dims.tensor}) that divides the {group} ranks "
            "of a copy"
        )
    else:
        for name in expert_modules(model):
            if sentence := _expert_objection(model, ledger, plan, name, size):
                yield f"ep_size is {size}, but {sentence}"
                return


def _expert_objection(model: Any, ledger: Ledger, plan: dict[str, str], name: str, size: int) -> str | None:
    originals = set(ledger.direct.values())
    for other, parameter in model.get_submodule(name).named_parameters(prefix=name):
        if other not in originals or plan.get(other) != BY_EXPERT:
            return f"{other} is not a tensor of the original model with an expert in each row; use 1"
        if parameter.shape[0] % size:
            return f"{name} has {parameter.shape[0]} experts to share out; use a divisor of {parameter.shape[0]}"
    return None
