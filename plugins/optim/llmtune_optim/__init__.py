"""Optimisers, `optim_config`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from llmtune import Ge, Gt, Plugin, hookimpl

from .configs import (
    AdafactorConfig,
    AdamMiniConfig,
    ApolloConfig,
    BAdamConfig,
    Beta,
    GaLoreConfig,
    LionConfig,
    LowRankConfig,
    MuonConfig,
    SgdConfig,
)

ADAMW_RATES = frozenset({"adamw_learning_rates"})
"""The word of optimisers that do well at the learning rates that AdamW does well at."""


@dataclass(frozen=True, kw_only=True)
class AdamWConfig:
    """AdamW, decoupled weight decay (Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101)."""

    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Decay rates of the running means of the gradient and of its square."""
    eps: Annotated[float, Gt(0)] = 1e-8
    """Added to the denominator."""
    weight_decay: Annotated[float, Ge(0)] = 0.0
    """Share of a matrix that decays per step, times the learning rate. Norms, biases and other vectors never decay.
    0.0 is the default of transformers' Trainer (torch's own is 0.01)."""
    fused: bool | None = None
    """One kernel for the whole update. null: wherever it exists (CPU, CUDA, MPS, XPU). false: torch's plain
    operations, which on CPU are some 5 times slower but give the same bits for every number of ranks; the fused CPU
    kernel rounds the last few elements of a shard differently (1 unit in the last place)."""
    layerwise: bool = False
    """Update each parameter during the backward pass and free its gradient at once, by plain operations. Needs
    `max_grad_norm: 0` and `gradient_accumulation_steps: 1`."""

    def __post_init__(self) -> None:
        if self.layerwise and self.fused:
            raise ValueError("fused: found true beside layerwise, which updates one parameter at a time; remove it")


@dataclass(frozen=True, kw_only=True)
class AdamW8bitConfig:
    """AdamW with 8-bit states, quantised in blocks of 256 (Dettmers et al. 2022, https://arxiv.org/abs/2110.02861)."""

    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Decay rates of the running means of the gradient and of its square."""
    eps: Annotated[float, Gt(0)] = 1e-8
    """Added to the denominator."""
    weight_decay: Annotated[float, Ge(0)] = 0.0
    """Share of a matrix that decays per step, times the learning rate. Norms, biases and other vectors never decay."""
    min_8bit_size: Annotated[int, Ge(0)] = 4096
    """Parameters with fewer elements (over all ranks) keep 32-bit states."""
    full_precision_names: tuple[str, ...] = ("embed", "wte", "wpe")
    """Parameters with one of these in their name keep 32-bit states. By default the embeddings, whose rare and uneven
    gradients 8-bit states represent badly (section 2.3 of the paper)."""
    paged: bool = False
    """Let CUDA move states to host memory when the GPU is full."""


def build_adamw(config: AdamWConfig) -> Any:
    """An `OptimizerFactory` for `adamw`."""
    from .adamw import AdamWFactory

    return AdamWFactory(config)


def build_adamw_8bit(config: AdamW8bitConfig) -> Any:
    """An `OptimizerFactory` for `adamw_8bit`; imports bitsandbytes."""
    from .adamw_8bit import AdamW8bitFactory

    return AdamW8bitFactory(config)


def build_muon(config: MuonConfig) -> Any:
    """An `OptimizerFactory` for `muon`."""
    from .muon import MuonFactory

    return MuonFactory(config)


def build_low_rank(config: LowRankConfig) -> Any:
    """An `OptimizerFactory` for `galore` and `apollo`."""
    from .low_rank import LowRankFactory

    return LowRankFactory(config)


def build_adam_mini(config: AdamMiniConfig) -> Any:
    """An `OptimizerFactory` for `adam_mini`."""
    from .by_rows import AdamMiniFactory

    return AdamMiniFactory(config)


def build_adafactor(config: AdafactorConfig) -> Any:
    """An `OptimizerFactory` for `adafactor`."""
    from .by_rows import AdafactorFactory

    return AdafactorFactory(config)


def build_badam(config: BAdamConfig) -> Any:
    """An `OptimizerFactory` for `badam`."""
    from .badam import BAdamFactory

    return BAdamFactory(config)


def build_lion(config: LionConfig) -> Any:
    """An `OptimizerFactory` for `lion`."""
    from .elementwise import LionFactory

    return LionFactory(config)


def build_sgd(config: SgdConfig) -> Any:
    """An `OptimizerFactory` for `sgd`."""
    from .elementwise import SgdFactory

    return SgdFactory(config)


@hookimpl
def optim_config() -> list[Plugin]:
    """All optimisers."""
    at_adamws_rates = (
        ("adamw", AdamWConfig, build_adamw, "AdamW, fused where it exists"),
        ("muon", MuonConfig, build_muon, "Orthogonal updates for matrices, AdamW for all else: half the state"),
        ("adam_mini", AdamMiniConfig, build_adam_mini, "AdamW with one second moment a row: half the state"),
    )
    others = (
        ("galore", GaLoreConfig, build_low_rank, "Adam in a subspace of each matrix's gradient: little state"),
        ("apollo", ApolloConfig, build_low_rank, "SGD scaled by what Adam does in a subspace: little state"),
        ("adafactor", AdafactorConfig, build_adafactor, "Second moments of rows and columns: hardly any state"),
        ("badam", BAdamConfig, build_badam, "Adam on one block of the model at a time: the state of one block"),
        ("lion", LionConfig, build_lion, "The sign of a momentum: half the state"),
        ("sgd", SgdConfig, build_sgd, "Gradient descent, with momentum if wanted"),
    )
    eight_bit = Plugin(
        name="adamw_8bit",
        config=AdamW8bitConfig,
        build=build_adamw_8bit,
        summary="AdamW with 8-bit states (bitsandbytes): 2 bytes per trained parameter instead of 8",
        gives=ADAMW_RATES,
        requires=("bitsandbytes>=0.50.2",),
    )
    return [
        eight_bit,
        *(
            Plugin(name=name, config=config, build=build, summary=summary, gives=ADAMW_RATES)
            for name, config, build, summary in at_adamws_rates
        ),
        *(Plugin(name=name, config=config, build=build, summary=summary) for name, config, build, summary in others),
    ]
