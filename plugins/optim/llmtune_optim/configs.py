"""The keys of the optimisers beyond AdamW."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from llmtune import Ge, Gt, Le, Lt

Beta = Annotated[float, Ge(0), Lt(1)]
Decay = Annotated[float, Ge(0)]


@dataclass(frozen=True, kw_only=True)
class MuonConfig:
    """Orthogonal updates for layers' matrices, AdamW for all else (https://arxiv.org/abs/2502.16982)."""

    momentum: Beta = 0.95
    """Decay rate of a matrix's running mean."""
    nesterov: bool = True
    """Look one step ahead along the momentum."""
    ns_steps: Annotated[int, Ge(1), Lt(100)] = 5
    """Newton-Schulz iterations."""
    adjust_lr_fn: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """How large updates are for the shape of a matrix: as AdamW's, so that its learning rates fit, or by
    sqrt(max(1, rows / columns)) as first published."""
    weight_decay: Decay = 0.0
    """Share of a matrix that decays per step, times the learning rate. Norms, biases and other vectors never decay."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """AdamW's decay rates, for convolutions, embeddings, head, norms and biases."""
    eps: Annotated[float, Gt(0)] = 1e-8
    """AdamW's addition to the denominator."""


@dataclass(frozen=True, kw_only=True)
class LowRankConfig:
    """Keys that GaLore and APOLLO share."""

    rank: Annotated[int, Ge(1)] = 16
    """Inner width of the projected gradient: a matrix of m x n keeps about 2 * rank * max(m, n) numbers of state."""
    update_interval: Annotated[int, Ge(1)] = 200
    """Steps between two projections."""
    target: str | tuple[str, ...] = "all"
    """Layers whose matrices are projected: `all` (every layer's), or names as a list or comma string. All other
    parameters are updated by AdamW."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Decay rates of the running means of the gradient and of its square."""
    eps: Annotated[float, Gt(0)] = 1e-8
    """Added to the denominator."""
    weight_decay: Decay = 0.0
    """Share of a matrix that decays per step, times the learning rate. Norms, biases and other vectors never decay."""
    layerwise: bool = False
    """Update each parameter during the backward pass and free its gradient at once. Needs `max_grad_norm: 0` and
    `gradient_accumulation_steps: 1`."""


@dataclass(frozen=True, kw_only=True)
class GaLoreConfig(LowRankConfig):
    """Adam in a subspace of the gradient's singular vectors (Zhao et al. 2024, https://arxiv.org/abs/2403.03507)."""

    scale: Annotated[float, Gt(0)] = 0.25
    """What the update is multiplied by when it comes back from the subspace."""
    proj_type: Literal["std", "reverse_std", "right", "left", "full"] = "std"
    """The side that is projected: the shorter (`std`) or the longer one, always columns (`right`) or rows (`left`), or
    both."""


@dataclass(frozen=True, kw_only=True)
class ApolloConfig(LowRankConfig):
    """SGD, scaled by what Adam does in a random subspace (Zhu et al. 2024, https://arxiv.org/abs/2412.05270).

    APOLLO-Mini is `rank: 1, scale: 128, scale_type: tensor`.
    """

    scale: Annotated[float, Gt(0)] = 32.0
    """The update is multiplied by its square root."""
    proj: Literal["random", "svd"] = "random"
    """Random directions, or the gradient's singular vectors."""
    proj_type: Literal["std", "right", "left"] = "std"
    """The side that is projected: the shorter one, always columns (`right`) or always rows (`left`)."""
    scale_type: Literal["channel", "tensor"] = "channel"
    """One scale for each channel, or one for the whole matrix."""
    scale_front: bool = False
    """Multiply by the root of `scale` before the growth of the update's norm is limited, not after."""


@dataclass(frozen=True, kw_only=True)
class AdamMiniConfig:
    """AdamW with one second moment for each head, or row (Zhang et al. 2024, https://arxiv.org/abs/2406.16793)."""

    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Decay rates of the running means of the gradient and of its square."""
    eps: Annotated[float, Gt(0)] = 1e-8
    """Added to the denominator."""
    weight_decay: Decay = 0.0
    """Share of a matrix that decays per step, times the learning rate. Norms, biases and other vectors never decay."""


@dataclass(frozen=True, kw_only=True)
class LionConfig:
    """The sign of a momentum (Chen et al. 2023, https://arxiv.org/abs/2302.06675). Takes a third to a tenth of AdamW's
    learning rate."""

    betas: tuple[Beta, Beta] = (0.9, 0.99)
    """Weights of the momentum in an update, and in the next momentum."""
    weight_decay: Decay = 0.0
    """Share of a matrix that decays per step, times the learning rate. Norms, biases and other vectors never decay."""


@dataclass(frozen=True, kw_only=True)
class SgdConfig:
    """Gradient descent, as torch.optim.SGD does it."""

    momentum: Beta = 0.0
    """Decay rate of the running sum of gradients; 0 keeps no state."""
    dampening: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Share of a gradient that does not go into the momentum."""
    nesterov: bool = False
    """Look one step ahead along the momentum."""
    weight_decay: Decay = 0.0
    """Times a matrix, added to its gradient (L2 penalty). Norms, biases and other vectors never decay."""

    def __post_init__(self) -> None:
        if self.nesterov and (not self.momentum or self.dampening):
            raise ValueError("nesterov: found true, which needs a momentum and dampening 0; set both, or leave it out")


@dataclass(frozen=True, kw_only=True)
class AdafactorConfig:
    """Adam's second moment from the means of rows and columns (Shazeer & Stern 2018, https://arxiv.org/abs/1804.04235),
    at the recipe's learning rate, as transformers' Trainer uses it."""

    decay_rate: Annotated[float, Lt(0)] = -0.8
    """The second moment's decay rate at step t is 1 - t ** decay_rate."""
    eps: tuple[Annotated[float, Gt(0)], Annotated[float, Gt(0)]] = (1e-30, 1e-3)
    """Added to the squared gradient; least scale of a parameter with `scale_parameter`."""
    clip_threshold: Annotated[float, Gt(0)] = 1.0
    """Largest root mean square of an update of one parameter."""
    beta1: Beta | None = None
    """Decay rate of the running mean of updates; null keeps none."""
    scale_parameter: bool = False
    """Multiply the learning rate by the root mean square of the parameter."""
    weight_decay: Decay = 0.0
    """Share of a matrix that decays per step, times the learning rate. Norms, biases and other vectors never decay."""


@dataclass(frozen=True, kw_only=True)
class BAdamConfig:
    """AdamW on one block at a time (Luo et al. 2024, https://arxiv.org/abs/2404.02827)."""

    mode: Literal["layer", "ratio"] = "layer"
    """`layer`: one transformer layer at a time trains. `ratio`: a share of each layer's numbers."""
    start_block: Annotated[int, Ge(0)] | None = None
    """The layer to begin with, from 0; null: the first in the order of `switch_mode`. Only for mode `layer`."""
    switch_mode: Literal["ascending", "descending", "random", "fixed"] = "ascending"
    """The order of the layers; `fixed` stays with one. Only for mode `layer`."""
    switch_interval: Annotated[int, Ge(-1)] = 50
    """Steps with one block; -1 never switches."""
    update_ratio: Annotated[float, Gt(0), Le(1)] = 0.05
    """Share of each parameter's numbers that trains at a time. Only for mode `ratio`."""
    mask_mode: Literal["adjacent", "scatter"] = "adjacent"
    """Whether these lie next to each other, or anywhere. Only for mode `ratio`."""
    verbose: Literal[0, 1, 2] = 0
    """1 says which block trains when it changes, 2 also names its parameters."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Decay rates of the running means of the gradient and of its square."""
    eps: Annotated[float, Gt(0)] = 1e-8
    """Added to the denominator."""
    weight_decay: Decay = 0.0
    """Share of a matrix that decays per step, times the learning rate. Norms, biases and other vectors never decay."""

    def __post_init__(self) -> None:
        if self.switch_interval == 0:
            raise ValueError("switch_interval: found 0, allowed is a number from 1, or -1 to stay with one block")
        if self.mode == "ratio" and self.weight_decay:
            raise ValueError("weight_decay: found beside mode ratio, which has none; remove it, or set mode: layer")
