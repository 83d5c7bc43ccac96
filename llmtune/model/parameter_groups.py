"""What each parameter that trains is for, and the optimiser of them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from llmtune.contract.errors import PlanError, PluginError
from llmtune.contract.optimizers import OptimizerContext, ParameterGroup, ParameterRole
from llmtune.contract.structure import output_heads, text_layers, transformer_layers
from llmtune.model.sizes import sizes_of

if TYPE_CHECKING:
    import torch

    from llmtune.contract.optimizers import OptimizerFactory
    from llmtune.model.edits import Ledger

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
"""Their weights are no stacks of matrices, though they have as many dimensions."""

Named = Sequence[tuple[str, nn.Parameter]]


def parameter_roles(model: nn.Module, given: Mapping[str, ParameterRole]) -> dict[str, ParameterRole]:
    """What each parameter of `model` is for, by name: as an edit has said (`given`), else by its place."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    convolutions = [module for module in model.modules() if isinstance(module, CONVOLUTIONS)]
    kernels = {id(parameter) for module in convolutions for parameter in module.parameters()}
    heads = tuple(f"{name}." for name in output_heads(model))

    def role(name: str, parameter: nn.Parameter) -> ParameterRole:
        if name in given:
            return given[name]
        if parameter.dim() < 2:
            return "bias" if name.endswith("bias") else "norm"
        if id(parameter) in embeddings:
            return "embedding"
        if id(parameter) in kernels:
            return "convolution"
        return "head" if name.startswith(heads) else "matrix"

    return {name: role(name, parameter) for name, parameter in model.named_parameters()}


def model_groups(model: nn.Module, ledger: Ledger, learning_rate: float) -> list[ParameterGroup]:
    """Groups of all parameters of `model` that train."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return group_parameters(named, parameter_roles(model, ledger.roles), ledger.lr_factors, learning_rate)


def group_parameters(
    named: Named, roles: Mapping[str, ParameterRole], lr_factors: Mapping[str, float], learning_rate: float
) -> list[ParameterGroup]:
    """Groups of one role and one rate each; those at the recipe's own rate first, which is the one that is logged."""
    found: dict[tuple[float, ParameterRole], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in named:
        found.setdefault((lr_factors.get(name, 1.0), roles[name]), []).append((name, parameter))
    return [
        ParameterGroup(
            role=role, parameters=members, lr=learning_rate * factor, lr_factor=factor,
            decays=role not in ("norm", "bias"),
        )
        for (factor, role), members in sorted(found.items(), key=lambda item: item[0][0] != 1.0)
    ]  # fmt: skip


def optimizer_context(
    model: Any, learning_rate: float, seed: int, new: frozenset[str] = frozenset()
) -> OptimizerContext:
    """The facts of `model` that optimisers may want to know; `new` are the names of what started from no file."""
    sizes = sizes_of(model.config)
    size = sizes.queries // sizes.heads
    return OptimizerContext(
        learning_rate=learning_rate, hidden_size=sizes.width, heads=sizes.heads, key_value_heads=sizes.keys // size,
        head_size=size, layers=[name for name, _ in transformer_layers(model)],
        text_layers=[name for name, _ in text_layers(model)], seed=seed, new=new,
    )  # fmt: skip


def _members(groups: Sequence[ParameterGroup], decays: bool) -> Named:
    return [pair for group in groups if group.decays == decays for pair in group.parameters]


def create_optimizer(
    factory: OptimizerFactory, groups: Sequence[ParameterGroup], context: OptimizerContext
) -> torch.optim.Optimizer:
    """The factory's optimiser. A factory of an earlier llmtune, `create(decay, no_decay, lr)`, gets what it asks for.

    Raises PluginError for any other signature, PlanError where it cannot give parameters rates of their own.
    """
    create: Any = factory.create
    wanted = [
        parameter for parameter in inspect.signature(create).parameters.values() if parameter.default is parameter.empty
    ]
    if len(wanted) == 2:
        optimizer = create(groups, context)
    elif len(wanted) == 3:
        if apart := next((group for group in groups if group.lr_factor != 1.0), None):
            raise PlanError(
                "optim_config: this optimiser, made for an earlier llmtune, has one rate for all, and peft_config asks "
                f"for {apart.lr_factor:g} times the learning rate for {apart.parameters[0][0]}; choose another one"
            )
        optimizer = create(_members(groups, True), _members(groups, False), context.learning_rate)
    else:
        raise PluginError(f"create{inspect.signature(create)} of the optimiser has to be create(groups, context)")
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    return optimizer
