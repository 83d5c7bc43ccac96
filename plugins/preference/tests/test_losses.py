"""Formulas where numbers are extreme, and keys that do not go together."""

from __future__ import annotations

import math

import pytest
import torch
from llmtune_preference import MEANS, REFERENCE_FREE, DpoConfig
from llmtune_preference.losses import LOSSES, Scores

EXTREME = [-1e4, -300.0, -1.0, -1e-9, 0.0, 1.0, 300.0]
SMOOTHED = ("exo", "robust", "sigmoid", "simpo")


@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients_of_extreme_values_are_finite(name: str) -> None:
    config = DpoConfig(pref_loss=name, dpo_label_smoothing=0.1 if name in SMOOTHED else 0.0)  # type: ignore[arg-type]
    values = [value for value in EXTREME if value <= 0] if name in REFERENCE_FREE else EXTREME
    chosen, rejected = (
        each.flatten().requires_grad_()
        for each in torch.meshgrid(torch.tensor(values), torch.tensor(values), indexing="ij")
    )
    loss = LOSSES[name](Scores(chosen, rejected, torch.tensor([0.0, 300.0])), config)
    assert loss.shape == chosen.shape and bool(loss.isfinite().all())
    found = torch.autograd.grad(loss.sum(), [chosen, rejected], allow_unused=True)
    assert all(grad is None or bool(grad.isfinite().all()) for grad in found)


def test_every_name_of_the_key_has_a_formula_and_the_other_way_round() -> None:
    assert set(DpoConfig.__annotations__) >= {"pref_loss", "pref_beta"}
    for name in LOSSES:
        DpoConfig(pref_loss=name, dpo_label_smoothing=0.1 if name == "exo" else 0.0)  # type: ignore[arg-type]
    assert set(MEANS) < set(LOSSES)


def test_a_pair_that_is_level_costs_ln_2_or_what_its_paper_says() -> None:
    level = Scores(torch.zeros(1), torch.zeros(1))
    expected = {"sigmoid": math.log(2), "hinge": 1.0, "ipo": 25.0, "bco": 2 * math.log(2), "nca": 2 * math.log(2),
                "apo_zero": 1.0, "apo_down": 1.0, "sppo": 50.0, "robust": math.log(2)}  # fmt: skip
    assert {name: LOSSES[name](level, DpoConfig()).item() for name in expected} == pytest.approx(expected)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"pref_loss": "simpo", "ref_model": "m"}, "ref_model: pref_loss simpo asks no reference"),
        ({"pref_loss": "hinge", "dpo_label_smoothing": 0.1}, "dpo_label_smoothing: found 0.1, which pref_loss hinge"),
        ({"pref_loss": "exo"}, "pref_loss exo takes its logarithm; set it above 0"),
        ({"pref_loss": "ipo", "ld_alpha": 0.5}, "ld_alpha: found 0.5 with pref_loss ipo"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(keys: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DpoConfig(**keys)
