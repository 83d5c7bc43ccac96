"""Losses of pairs, one formula each. P pairs; `logits` are differences between the chosen and the rejected answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import logsigmoid

if TYPE_CHECKING:
    from torch import Tensor

    from . import DpoConfig


@dataclass(frozen=True)
class Scores:
    """What is known of P pairs: (P,) float32 each, log-probabilities of whole answers, as sums or as means."""

    chosen: Tensor
    rejected: Tensor
    """Against the reference (log-ratios) where the loss has one."""
    moved: Tensor | None = None
    """(2,) mean log-ratio of the chosen and of the rejected answers of the whole step, 0 at least, without a gradient;
    for losses in `WHOLE_STEP`."""

    @property
    def logits(self) -> Tensor:
        """By how much the chosen answer is ahead."""
        return self.chosen - self.rejected


def sigmoid(s: Scores, c: DpoConfig) -> Tensor:
    """DPO; smoothed as in cDPO (Mitchell 2023)."""
    return _smoothed(c.pref_beta * s.logits, c.dpo_label_smoothing)


def hinge(s: Scores, c: DpoConfig) -> Tensor:
    """Nothing to learn from a pair that is ahead by more than 1 / beta."""
    return torch.relu(1 - c.pref_beta * s.logits)


def ipo(s: Scores, c: DpoConfig) -> Tensor:
    """Equation 17, over means; `pref_beta` is its tau."""
    return (s.logits - 1 / (2 * c.pref_beta)).square()


def orpo(s: Scores, c: DpoConfig) -> Tensor:
    """Cross-entropy of the chosen answer, and the log of the odds ratio (equations 6 and 7), over means."""
    return -s.chosen - c.pref_beta * logsigmoid(s.logits - (_log1mexp(s.chosen) - _log1mexp(s.rejected)))


def simpo(s: Scores, c: DpoConfig) -> Tensor:
    """Equation 6, over means."""
    return _smoothed(c.pref_beta * s.logits - (0.5 if c.simpo_gamma is None else c.simpo_gamma), c.dpo_label_smoothing)


def kto_pair(s: Scores, c: DpoConfig) -> Tensor:
    """KTO of pairs: each answer against how far the model has moved with those of the other kind, half of the sum."""
    assert s.moved is not None, "prepared with the step"
    chosen, rejected = s.chosen - s.moved[1], s.moved[0] - s.rejected
    return 1 - (torch.sigmoid(c.pref_beta * chosen) + torch.sigmoid(c.pref_beta * rejected)) / 2


def robust(s: Scores, c: DpoConfig) -> Tensor:
    """Unbiased where labels are wrong with the probability of the smoothing."""
    right, wrong = -logsigmoid(c.pref_beta * s.logits), -logsigmoid(-c.pref_beta * s.logits)
    return ((1 - c.dpo_label_smoothing) * right - c.dpo_label_smoothing * wrong) / (1 - 2 * c.dpo_label_smoothing)


def exo(s: Scores, c: DpoConfig) -> Tensor:
    """Equation 16: reverse KL divergence to the smoothed label."""
    chosen, rejected = logsigmoid(c.pref_beta * s.logits), logsigmoid(-c.pref_beta * s.logits)
    label = torch.tensor([1 - c.dpo_label_smoothing, c.dpo_label_smoothing], device=chosen.device).log()
    return chosen.exp() * (chosen - label[0]) + rejected.exp() * (rejected - label[1])


def bco(s: Scores, c: DpoConfig) -> Tensor:
    """Each answer against the reference for itself, as a binary classifier's reward (equation 9, shift 0)."""
    return -logsigmoid(c.pref_beta * s.chosen) - logsigmoid(-c.pref_beta * s.rejected)


def nca(s: Scores, c: DpoConfig) -> Tensor:
    """Noise-contrastive alignment of a pair: also lowers what grows of both answers together."""
    chosen, rejected = c.pref_beta * s.chosen, c.pref_beta * s.rejected
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def apo_zero(s: Scores, c: DpoConfig) -> Tensor:
    """Equation 7: chosen answers become likelier, rejected ones less likely."""
    return 1 - torch.sigmoid(c.pref_beta * s.chosen) + torch.sigmoid(c.pref_beta * s.rejected)


def apo_down(s: Scores, c: DpoConfig) -> Tensor:
    """Equation 8: both become less likely, rejected ones more so."""
    return torch.sigmoid(c.pref_beta * s.chosen) + 1 - torch.sigmoid(c.pref_beta * s.logits)


def sppo(s: Scores, c: DpoConfig) -> Tensor:
    """Equation 4.7 with a probability of 1 that the chosen answer wins."""
    return (s.chosen - 0.5 / c.pref_beta).square() + (s.rejected + 0.5 / c.pref_beta).square()


def discopop(s: Scores, c: DpoConfig) -> Tensor:
    """Equation 5, with the paper's temperature of 0.05: logistic and exponential, blended by the logits."""
    logits = c.pref_beta * s.logits
    share = torch.sigmoid(logits / 0.05)
    # As one exponential: far behind, the first would be infinite while its share is 0.
    return -logsigmoid(logits) * (1 - share) + torch.exp(logsigmoid(logits / 0.05) - logits)


def _smoothed(logits: Tensor, smoothing: float) -> Tensor:
    return -(1 - smoothing) * logsigmoid(logits) - smoothing * logsigmoid(-logits)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, without cancellation at either end (Maechler 2012); x is kept below -1e-7, where
    float32 cannot tell a probability from 1."""
    x = x.clamp(max=-1e-7)
    near = x > -0.6931472
    return torch.where(
        near, torch.log(-torch.expm1(torch.where(near, x, -1.0))), torch.log1p(-torch.exp(torch.where(near, -1.0, x)))
    )


LOSSES: Mapping[str, Callable[[Scores, Any], Tensor]] = {
    function.__name__: function
    for function in (
        sigmoid, hinge, ipo, kto_pair, orpo, simpo, robust, exo, bco, nca, apo_zero, apo_down, sppo, discopop,
    )
}  # fmt: skip
"""(P,) losses by the names of `pref_loss`."""
