"""PPO's formulas against those of TRL 0.9, the last release whose trainer had them, written out here."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from llmtune_rollouts.adaptive import KlCoefficient, RunningScale
from llmtune_rollouts.advantages import gae, moments, whitened
from torch import Tensor


class Alone:
    """A context of one rank."""

    def total(self, values: Tensor) -> Tensor:
        return values


ALONE = cast("Any", Alone())
LENGTHS = [5, 1, 12, 3]


def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """trl.core.masked_whiten."""
    mean = (values * mask).sum() / mask.sum()
    variance = ((values - mean) ** 2 * mask).sum() / mask.sum() * mask.sum() / (mask.sum() - 1)
    result = (values - mean) * torch.rsqrt(variance + 1e-8)
    return result if shift_mean else result + mean


def compute_advantages(
    values: Tensor, rewards: Tensor, mask: Tensor, gamma: float, lam: float, whiten_rewards: bool
) -> tuple[Tensor, Tensor]:
    """trl.PPOTrainer.compute_advantages: (whitened advantages, returns)."""
    last, backwards, width = torch.zeros(len(values)), [], rewards.shape[-1]
    values, rewards = values * mask, rewards * mask
    if whiten_rewards:
        rewards = masked_whiten(rewards, mask, shift_mean=False)
    rewards = rewards * mask  # what whitening leaves beyond an answer's end is no reward of it
    for t in reversed(range(width)):
        next_values = values[:, t + 1] if t < width - 1 else 0.0
        delta = rewards[:, t] + gamma * next_values - values[:, t]
        last = delta + gamma * lam * last
        backwards.append(last)
    advantages = torch.stack(backwards[::-1]).transpose(0, 1)
    return masked_whiten(advantages, mask), advantages + values


def padded(numbers_N: Tensor) -> tuple[Tensor, Tensor]:
    """Answers as rows, and what of them is there."""
    rows = numbers_N.split(LENGTHS)
    mask = torch.zeros(len(rows), max(LENGTHS))
    for row, length in zip(mask, LENGTHS, strict=True):
        row[:length] = 1
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True), mask


@pytest.mark.parametrize("whiten", [False, True])
def test_advantages_and_returns_are_trls(whiten: bool) -> None:
    torch.manual_seed(0)
    rewards_N, values_N = torch.randn(2, sum(LENGTHS))
    said_by_N = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    (rewards_BT, mask), (values_BT, _) = padded(rewards_N), padded(values_N)
    expected, returns = compute_advantages(values_BT, rewards_BT, mask, 0.97, 0.9, whiten)
    if whiten:
        (rewards_N,) = whitened([rewards_N], ALONE, shift=False)
    found_N = gae(rewards_N, values_N, said_by_N, 0.97, 0.9)
    torch.testing.assert_close(found_N + values_N, returns[mask > 0], rtol=1e-5, atol=1e-5)
    first, second = whitened(list(found_N.split([4, 17])), ALONE)
    torch.testing.assert_close(torch.cat([first, second]), expected[mask > 0], rtol=1e-5, atol=1e-5)


def test_answers_without_tokens_that_train_change_nothing() -> None:
    rewards_N, values_N = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, 0.0, 1.0])
    with_a_gap = gae(rewards_N, values_N, torch.tensor([0, 0, 2]), 1.0, 0.95)
    assert torch.equal(with_a_gap, gae(rewards_N, values_N, torch.tensor([0, 0, 1]), 1.0, 0.95))
    assert len(gae(rewards_N[:0], values_N[:0], torch.tensor([], dtype=torch.int64), 1.0, 0.95)) == 0
    assert moments([rewards_N[:0]], ALONE) == (0.0, 0.0, 0.0)


def test_the_coefficient_adapts_as_trls() -> None:
    found, value = KlCoefficient(0.2, 6.0, 1000), 0.2
    for kl, answers in ((0.0, 8), (30.0, 8), (6.5, 64), (5.9, 1)):
        found.update(kl, answers)
        value *= 1 + max(-0.2, min(0.2, kl / 6.0 - 1)) * answers / 1000
        assert found.value == pytest.approx(value, rel=1e-12)
    fixed = KlCoefficient(0.2, None, 1000)
    fixed.update(30.0, 8)
    assert fixed.value == 0.2


def test_the_scale_of_scores_is_that_of_all_so_far() -> None:
    torch.manual_seed(1)
    scale, seen = RunningScale(), torch.zeros(0)
    for count in (3, 1, 16):
        scores = 5 + 3 * torch.randn(count)
        seen = torch.cat([seen, scores])
        scale = scale.joined(moments([scores[:2], scores[2:]], ALONE))
        assert scale.mean == pytest.approx(seen.double().mean().item(), rel=1e-9)
        assert scale.deviation == pytest.approx(seen.double().std().item(), rel=1e-9)
    assert scale.joined(moments([seen[:0]], ALONE)) == scale
    assert RunningScale().joined(moments([seen[:1]], ALONE)).deviation == 1.0
