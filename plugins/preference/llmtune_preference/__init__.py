"""Learning from preferences: pairs of answers (`stage_config: dpo`, `rm`), or single ones with a label (`kto`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from llmtune import Ge, Gt, Lt, Plugin, hookimpl

REFERENCE_FREE = ("orpo", "simpo")
"""Losses that ask the trained model only."""
MEANS = ("ipo", "orpo", "simpo")
"""Losses over the mean log-probability of an answer's tokens; the others take the sum."""
WHOLE_STEP = ("kto_pair",)
"""Losses of a pair that depend on the other pairs of its step."""
SMOOTHED = ("sigmoid", "simpo", "robust", "exo")
"""Losses that know wrong labels."""

PairLoss = Literal[
    "sigmoid", "hinge", "ipo", "kto_pair", "orpo", "simpo", "robust", "exo", "bco", "nca", "apo_zero", "apo_down",
    "sppo", "discopop",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ReferenceKeys:
    """The model that answers are compared with."""

    ref_model: str | None = None
    """Another model as reference: a folder or a hub id. null is the model as it was before training."""
    ref_model_adapters: str | tuple[str, ...] | None = None
    """Adapters of the reference, in PEFT's format."""
    ref_model_quantization_bit: Literal[4, 8] | None = None
    """Bits per weight of the reference; null does not quantise it, unless it is the trained model's base."""


@dataclass(frozen=True, kw_only=True)
class KtoConfig(ReferenceKeys):
    """Keys of `stage_config: {name: kto}`."""

    pref_beta: Annotated[float, Gt(0)] = 0.1
    """How strongly an answer's log-probability counts against the reference's."""
    kto_chosen_weight: Annotated[float, Ge(0)] = 1.0
    """What an answer to be given counts. Where labels are uneven, the two weights times the numbers of answers should
    be about as 1 to 1, up to 4 to 3."""
    kto_rejected_weight: Annotated[float, Ge(0)] = 1.0
    """What an answer to be avoided counts."""
    pref_ftx: Annotated[float, Ge(0)] = 0.0
    """Share of supervised learning of answers to be given: their mean cross-entropy, times this, is added."""


@dataclass(frozen=True, kw_only=True)
class DpoConfig(ReferenceKeys):
    """Keys of `stage_config: {name: dpo}`."""

    pref_loss: PairLoss = "sigmoid"
    """The loss of a pair: `sigmoid` is DPO (Rafailov et al. 2023, arXiv 2305.18290), `hinge` SLiC (arXiv 2305.10425),
    `ipo` arXiv 2310.12036, `kto_pair` KTO (arXiv 2402.01306) with pairs, `orpo` arXiv 2403.07691, `simpo` arXiv
    2405.14734, `robust` arXiv 2403.00409, `exo` arXiv 2402.00856, `bco` arXiv 2404.04656 without its shift, `nca` arXiv
    2402.05369, `apo_zero` and `apo_down` arXiv 2408.06266, `sppo` arXiv 2405.00675 with hard labels, `discopop` arXiv
    2406.08414."""
    pref_beta: Annotated[float, Gt(0)] = 0.1
    """How strongly an answer's log-probability counts, against the reference's where there is one; of `orpo` the share
    of the odds ratio in the loss."""
    pref_ftx: Annotated[float, Ge(0)] = 0.0
    """Share of supervised learning of the chosen answer: its mean cross-entropy, times this, is added to the loss."""
    dpo_label_smoothing: Annotated[float, Ge(0), Lt(0.5)] = 0.0
    """Probability that a pair's label is wrong: for `sigmoid`, `simpo`, `robust` and `exo`, the last of which needs
    one above 0."""
    simpo_gamma: float | None = None
    """Margin of `simpo` between the mean log-probabilities of the two answers, already times `pref_beta`;
    null is 0.5."""
    precompute_reference: bool = False
    """Ask the reference once for each answer before training, and keep what it says with the tokenised data: training
    then holds no reference in memory and takes about a quarter less time a step."""
    ld_alpha: Annotated[float, Ge(0)] | None = None
    """What a token counts that lies beyond the shorter answer's length, from 0 to 1 (LD-DPO, arXiv 2409.06411); null
    counts all tokens alike. Not for losses over means (`ipo`, `orpo`, `simpo`)."""

    def __post_init__(self) -> None:
        keys = ("ref_model", "ref_model_adapters", "ref_model_quantization_bit", "precompute_reference")
        named = [key for key in keys if getattr(self, key)]
        if self.pref_loss in REFERENCE_FREE and named:
            raise ValueError(f"{named[0]}: pref_loss {self.pref_loss} asks no reference; leave it out")
        if self.dpo_label_smoothing and self.pref_loss not in SMOOTHED:
            raise ValueError(
                f"dpo_label_smoothing: found {self.dpo_label_smoothing}, which pref_loss {self.pref_loss} does not "
                "know; set it to 0, or pref_loss to sigmoid, simpo, robust or exo"
            )
        if self.simpo_gamma is not None and self.pref_loss != "simpo":
            raise ValueError(
                f"simpo_gamma: found {self.simpo_gamma}, which pref_loss {self.pref_loss} does not know; leave it out, "
                "or set pref_loss to simpo"
            )
        if self.pref_loss == "exo" and not self.dpo_label_smoothing:
            raise ValueError("dpo_label_smoothing: pref_loss exo takes its logarithm; set it above 0, such as 0.001")
        if self.ld_alpha is not None and (self.ld_alpha > 1 or self.pref_loss in MEANS):
            raise ValueError(
                f"ld_alpha: found {self.ld_alpha} with pref_loss {self.pref_loss}, allowed is 0 to 1 with a loss over "
                "sums of log-probabilities, not ipo, orpo or simpo"
            )


@dataclass(frozen=True, kw_only=True)
class RmConfig:
    """Keys of `stage_config: {name: rm}`."""

    center_rewards_coefficient: Annotated[float, Ge(0)] = 0.0
    """Weight of (r_chosen + r_rejected)^2, which keeps rewards around 0 (arXiv 2312.09244); 0.01 is usual."""


def build_dpo(config: DpoConfig) -> Any:
    """The stage of pairs that `config` describes."""
    from .dpo import Pairs, PairsOfStep

    return PairsOfStep(config) if config.pref_loss in WHOLE_STEP else Pairs(config)


def build_kto(config: KtoConfig) -> Any:
    """The stage of single answers that `config` describes."""
    from .kto import Unpaired

    return Unpaired(config)


def build_rm(config: RmConfig) -> Any:
    """The stage of rewards that `config` describes."""
    from .rm import Rewards

    return Rewards(config)


@hookimpl
def stage_config() -> list[Plugin]:
    """`dpo`, `kto` and `rm`."""
    return [
        Plugin(
            name="dpo", config=DpoConfig, build=build_dpo, summary="Preferring chosen answers to rejected ones (DPO)"
        ),
        Plugin(name="kto", config=KtoConfig, build=build_kto, summary="Answers to be given or avoided (KTO)"),
        Plugin(name="rm", config=RmConfig, build=build_rm, summary="A reward model: one number for an answer"),
    ]
