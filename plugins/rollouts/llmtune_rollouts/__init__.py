"""Learning from the model's own answers: groups of them (`stage_config: grpo`), or with a value function (`ppo`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from llmtune import Ge, Gt, Le, Plugin, hookimpl


@dataclass(frozen=True, kw_only=True)
class AnswerKeys:
    """How the model answers the prompts of a step."""

    max_new_tokens: Annotated[int, Ge(1)] = 256
    """Most tokens of an answer."""
    temperature: Annotated[float, Gt(0)] = 1.0
    """Divides the logits before sampling, and in the loss."""
    top_p: Annotated[float, Gt(0), Le(1)] = 1.0
    """Sample from the fewest tokens whose probabilities add up to this; below 1 answers are drawn from another
    distribution than the one that is learnt."""
    top_k: Annotated[int, Ge(0)] = 0
    """Sample from this many likeliest tokens; 0 is all."""
    reward_weights: tuple[float, ...] | None = None
    """What each reward of `reward_config` counts, in its order; null counts them all 1."""
    sampling_correction: Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] | None = (
        "sequence_mask"
    )
    """Where answers are drawn by another engine than the model itself (vLLM): the loss is multiplied by how much
    likelier they are to the model, by tokens or whole answers; beyond the limits below that is the limit (`truncate`)
    or 0 (`mask`). null does not correct."""
    sampling_clip_max: Annotated[float, Gt(0)] | None = 3.0
    """Most of that ratio; null sets no limit."""
    sampling_clip_min: Annotated[float, Gt(0)] | None = None
    """Least of that ratio; null sets no limit."""


@dataclass(frozen=True, kw_only=True)
class RolloutReferenceKeys:
    """The model that answers are kept near."""

    ref_model: str | None = None
    """Another model as reference: a folder or a hub id. null is the model as it was before training."""
    ref_model_adapters: str | tuple[str, ...] | None = None
    """Adapters of the reference, in PEFT's format."""
    ref_model_quantization_bit: Literal[4, 8] | None = None
    """Bits per weight of the reference; null does not quantise it, unless it is the trained model's base."""


@dataclass(frozen=True, kw_only=True)
class GrpoConfig(AnswerKeys, RolloutReferenceKeys):
    """Keys of `stage_config: {name: grpo}`."""

    num_generations: Annotated[int, Ge(2)] = 8
    """Answers to each prompt."""
    num_iterations: Annotated[int, Ge(1)] = 1
    """Updates of the weights from the answers of a step."""
    beta: Annotated[float, Ge(0)] = 0.0
    """What the distance from the reference counts (an estimate of the KL divergence, arXiv 2402.03300, equation 4); 0
    needs no reference."""
    use_bias_correction_kl: bool = True
    """Multiply that estimate by the ratio of probabilities, without which its gradient is not that of the divergence
    (arXiv 2512.02556)."""
    epsilon: Annotated[float, Gt(0)] = 0.2
    """How far the probability of a token may fall, as a share, before it stops to count."""
    epsilon_high: Annotated[float, Gt(0)] | None = None
    """How far it may rise; null is `epsilon` (DAPO, arXiv 2503.14476, has 0.28)."""
    delta: Annotated[float, Gt(1)] | None = None
    """Most that a ratio of probabilities counts where the answer is bad (arXiv 2505.07291); null sets no limit."""
    loss_type: Literal["grpo", "dr_grpo", "dapo", "bnpo"] = "dapo"
    """What a token counts. `grpo`: each answer alike, its tokens share that. `dr_grpo`: each token alike, divided by
    `max_new_tokens` (arXiv 2503.20783). `dapo` and `bnpo`: each token alike, divided by the tokens of the update over
    all ranks and micro-batches; the two differ where a loss depends on how a step is split, which it does not here."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """What advantages are divided by: the deviation of the rewards of the same prompt, or of the step; `none` divides
    by nothing (as the authors of `dr_grpo` advise)."""
    mask_truncated_completions: bool = False
    """Learn nothing from answers that `max_new_tokens` cut. They still count in their group's mean."""
    importance_sampling_level: Literal["token", "sequence"] = "token"
    """Whether probabilities are compared token by token, or as the geometric mean over an answer (GSPO, arXiv
    2507.18071; with `loss_type: grpo`)."""


def build_grpo(config: GrpoConfig) -> Any:
    """The stage of groups of answers that `config` describes."""
    from .grpo import Groups

    return Groups(config)


@dataclass(frozen=True, kw_only=True)
class PpoConfig(AnswerKeys, RolloutReferenceKeys):
    """Keys of `stage_config: {name: ppo}`."""

    ppo_buffer_size: Annotated[int, Ge(1)] = 1
    """Times as many prompts a step answers as an update learns from; each part of them makes an update."""
    ppo_epochs: Annotated[int, Ge(1)] = 4
    """Times that the answers of a step are learnt from."""
    ppo_target: Annotated[float, Gt(0)] | None = 6.0
    """The distance from the reference, summed over an answer, that `init_kl_coef` is adapted to reach; null leaves it
    as it is."""
    ppo_score_norm: bool = False
    """Subtract the mean of all rewards so far and divide by their deviation."""
    ppo_whiten_rewards: bool = False
    """Divide the rewards of tokens, the cost of their distance included, by their deviation in the step."""
    init_kl_coef: Annotated[float, Ge(0)] = 0.2
    """What the distance from the reference costs at first; 0 needs no reference."""
    horizon: Annotated[int, Ge(1)] = 10000
    """Answers over which that cost adapts."""
    gamma: Annotated[float, Gt(0), Le(1)] = 1.0
    """What a reward counts one token earlier."""
    lam: Annotated[float, Ge(0), Le(1)] = 0.95
    """How far rewards are believed rather than the value head: 0 looks one token ahead, 1 to the end of the answer."""
    cliprange: Annotated[float, Gt(0)] = 0.2
    """How far the probability of a token may move, as a share, before it stops to count."""
    cliprange_value: Annotated[float, Gt(0)] = 0.2
    """How far a value may move before it stops to count."""
    vf_coef: Annotated[float, Ge(0)] = 0.1
    """What the loss of the values counts."""
    missing_eos_penalty: Annotated[float, Ge(0)] = 0.0
    """Subtracted from the reward of an answer that `max_new_tokens` cut."""


def build_ppo(config: PpoConfig) -> Any:
    """The stage of a policy and its value head that `config` describes."""
    from .ppo import Policy

    return Policy(config)


@hookimpl
def stage_config() -> list[Plugin]:
    """`grpo`, `ppo`."""
    return [
        Plugin(name="grpo", config=GrpoConfig, build=build_grpo, summary="Groups of the model's own answers (GRPO)"),
        Plugin(name="ppo", config=PpoConfig, build=build_ppo, summary="The model's own answers and a value head (PPO)"),
    ]
