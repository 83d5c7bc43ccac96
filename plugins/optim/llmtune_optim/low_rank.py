"""GaLore and APOLLO: Adam's state in a subspace of few dimensions of each matrix's gradient.

GaLore: Zhao et al. 2024, https://arxiv.org/abs/2403.03507. APOLLO: Zhu et al. 2024, https://arxiv.org/abs/2412.05270.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llmtune import OptimizerContext, ParameterGroup, PlanError, split_names

from .configs import ApolloConfig, LowRankConfig
from .whole import Whole, WholeMatrixOptimizer, seed_of, whole_groups


class LowRankFactory:
    """Makes a `GaLore` or an `Apollo`."""

    def __init__(self, config: LowRankConfig) -> None:
        self.config = config
        self.layerwise = config.layerwise

    def create(self, groups: Sequence[ParameterGroup], context: OptimizerContext) -> GaLore | Apollo:
        """Projects the targets among layers' matrices. Raises PlanError where none of them trains."""
        if problems := self.check_groups(groups):
            raise PlanError(f"optim_config: {problems[0]}")
        config, targets = self.config, split_names(self.config.target)

        def chosen(group: ParameterGroup, name: str, _: object) -> bool:
            return group.role == "matrix" and is_target(name, targets)

        shared = {"betas": config.betas, "eps": config.eps}
        made, names = whole_groups(groups, chosen, vars(config) | shared, shared, config.weight_decay)
        return Apollo(made, names, context.seed) if isinstance(config, ApolloConfig) else GaLore(made, names)

    def check_groups(self, groups: Sequence[ParameterGroup]) -> list[str]:
        """A name that fits no matrix that trains; or there is none, as with adapters."""
        names = [name for group in groups if group.role == "matrix" for name, _ in group.parameters]
        if not names:
            method = "apollo" if isinstance(self.config, ApolloConfig) else "galore"
            return [
                f"{method} projects the gradients of layers' matrices, and peft_config lets none of them train; choose "
                "adamw, or train the layers themselves"
            ]
        known = ", ".join(sorted({name.split(".")[-2] for name in names if "." in name}))
        return [
            f'target: found "{target}", allowed is all or names of layers that train, such as {known}'
            for target in split_names(self.config.target)
            if not any(is_target(name, [target]) for name in names)
        ]

    def remarks(self, groups: Sequence[ParameterGroup], total_steps: int, warmup_steps: int) -> Iterator[str]:
        """Matrices that a subspace of this rank makes no smaller."""
        config, targets = self.config, split_names(self.config.target)
        sides = {
            name: min(matrix.shape[-2:])
            for group in groups if group.role == "matrix"
            for name, matrix in group.parameters if is_target(name, targets)
        }  # fmt: skip
        if whole := [name for name, side in sides.items() if side <= config.rank]:
            short = ", ".join(sorted({f"{name.split('.')[-2]} {sides[name]}" for name in whole}))
            yield (
                f"rank: {config.rank} is no less than the shorter side of {len(whole)} of {len(sides)} matrices "
                f"({short}), for which no less state is kept than by AdamW"
            )


def is_target(name: str, targets: Sequence[str]) -> bool:
    """Whether a parameter belongs to a layer that is named, by the last parts of its name or a part of it."""
    return "all" in targets or any(f".{target}." in f".{name}." for target in targets)


class LowRank(WholeMatrixOptimizer):
    """What both share: projections and Adam between them. Matrices may come in stacks, as those of experts do."""

    def state_shapes(self, shape: torch.Size, group: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Means of the projected gradient, and what projects it."""
        *stack, rows, columns = shape
        rank, side = min(group["rank"], rows, columns), side_of(group["proj_type"], rows, columns)
        low = (rows if side == "right" else rank, columns if side == "left" else rank)
        shapes: dict[str, tuple[int, ...]] = {"exp_avg": (*stack, *low), "exp_avg_sq": (*stack, *low)}
        if side != "right":
            shapes["left"] = (*stack, rows, rank)
        if side != "left":
            shapes["right"] = (*stack, rank, columns)
        return shapes

    def project(self, name: str, step: int, whole: Whole, group: Mapping[str, Any]) -> Tensor:
        """The gradient in the subspace, which is chosen anew every so many steps."""
        gradient = whole["update"]
        count, rest = divmod(step - 1, group["update_interval"])
        if not rest:
            self.choose(name, count, whole, group)
        if "left" in whole:
            gradient = whole["left"].mT @ gradient
        return gradient @ whole["right"].mT if "right" in whole else gradient

    def choose(self, name: str, count: int, whole: Whole, group: Mapping[str, Any]) -> None:
        """The gradient's first singular vectors."""
        left, _, right = torch.linalg.svd(whole["update"].float(), full_matrices=False)
        if "left" in whole:
            whole["left"].copy_(left[..., : whole["left"].shape[-1]])
        if "right" in whole:
            whole["right"].copy_(right[..., : whole["right"].shape[-2], :])


class GaLore(LowRank):
    """The update is Adam's in the subspace, brought back."""

    def update(self, name: str, step: int, whole: Whole, group: Mapping[str, Any]) -> None:
        """Adam's direction, projected back, times `scale`."""
        low = self.project(name, step, whole, group)
        direction = adam_direction(low, whole, group)
        if "left" in whole:
            direction = whole["left"] @ direction
        if "right" in whole:
            direction = direction @ whole["right"]
        whole["update"].copy_(direction * (group["scale"] * bias_correction(step, group)))


class Apollo(LowRank):
    """The update is the gradient, each channel as long as Adam would make it in the subspace."""

    def __init__(self, groups: Sequence[Mapping[str, Any]], names: Mapping[int, str], seed: int) -> None:
        super().__init__(groups, names)
        self.seed = seed

    def state_shapes(self, shape: torch.Size, group: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Also the norm of the last update."""
        return super().state_shapes(shape, group) | {"norm": (*shape[:-2], 1, 1)}

    def choose(self, name: str, count: int, whole: Whole, group: Mapping[str, Any]) -> None:
        """Random directions: a function of the run's seed, the name, and how often they were chosen."""
        if group["proj"] == "svd":
            return super().choose(name, count, whole, group)
        for key in ("left", "right"):
            if key in whole:
                generator = torch.Generator().manual_seed(seed_of(self.seed, name, count))
                drawn = torch.randn(whole[key].shape, generator=generator)
                rank = drawn.shape[-1 if key == "left" else -2]
                whole[key].copy_(drawn / math.sqrt(rank))
        return None

    def update(self, name: str, step: int, whole: Whole, group: Mapping[str, Any]) -> None:
        """The scaled gradient, whose norm grows by 1 % a step at most (Chen et al. 2024, arXiv 2410.01623)."""
        low = self.project(name, step, whole, group)
        direction = adam_direction(low, whole, group)
        channel = (-1,) if "right" in whole else (-2,)
        dims = channel if group["scale_type"] == "channel" else (-2, -1)
        scaling = direction.norm(dim=dims, keepdim=True) / (low.norm(dim=dims, keepdim=True) + 1e-8)
        scaled, root = whole["update"] * scaling, math.sqrt(group["scale"])
        if group["scale_front"]:
            scaled = scaled * root
        norm = scaled.norm(dim=(-2, -1), keepdim=True)
        limiter = (norm / (whole["norm"] + 1e-8)).clamp(min=1.01) / 1.01 if step > 1 else torch.ones_like(norm)
        whole["norm"].copy_(norm / limiter)
        factor = bias_correction(step, group) * (1.0 if group["scale_front"] else root)
        whole["update"].copy_(scaled / limiter * factor)


def side_of(proj_type: str, rows: int, columns: int) -> str:
    """`right` to project columns (onto few of them), `left` to project rows, `full` for both."""
    if proj_type not in ("std", "reverse_std"):
        return proj_type
    return "right" if (rows >= columns) == (proj_type == "std") else "left"


def adam_direction(gradient: Tensor, whole: Whole, group: Mapping[str, Any]) -> Tensor:
    """Mean over root of the mean square, brought up to date in place, before `bias_correction`."""
    beta1, beta2 = group["betas"]
    whole["exp_avg"].mul_(beta1).add_(gradient, alpha=1 - beta1)
    whole["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    return whole["exp_avg"] / whole["exp_avg_sq"].sqrt().add_(group["eps"])


def bias_correction(step: int, group: Mapping[str, Any]) -> float:
    """What makes up for means that began at zero."""
    beta1, beta2 = group["betas"]
    return math.sqrt(1 - beta2**step) / (1 - beta1**step)
