"""Pairs: the contract of stages for several losses, and those that depend on a whole step."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from llmtune.testing import Law, laws, running


@pytest.mark.parametrize("law", laws("stage_config", "dpo"), ids=str)
def test_contract(law: Law, tmp_path: Path) -> None:
    law(tmp_path)


LORA = {"peft_config": {"name": "lora", "lora_dropout": 0.0}, "learning_rate": 0.01}


@pytest.mark.parametrize("law", laws("stage_config", "dpo", {"ld_alpha": 0.5, "pref_ftx": 0.5}, recipe=LORA), ids=str)
def test_contract_with_adapters(law: Law, tmp_path: Path) -> None:
    law(tmp_path)


PAIRED = {"pref_loss": "kto_pair", "pref_beta": 0.5}


@pytest.mark.parametrize(
    "law", laws("stage_config", "dpo", {**PAIRED, "ld_alpha": 0.5}, recipe=LORA, ranks=False), ids=str
)
def test_contract_of_a_loss_over_a_whole_step(law: Law, tmp_path: Path) -> None:
    law(tmp_path)


@pytest.mark.parametrize("precomputed", [False, True])
def test_kto_pair_is_the_loss_by_hand_over_the_whole_step(precomputed: bool, tmp_path: Path) -> None:
    stage = {"name": "dpo", **PAIRED, "precompute_reference": precomputed}
    plan, objective = running.start(running.tiny_recipe(tmp_path, kind="preference", stage_config=stage))
    model = plan.model.module
    reference = copy.deepcopy(model).eval()
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        for weight in model.parameters():
            weight += 0.02 * torch.randn_like(weight)
    theirs = copy.deepcopy(model)
    batches = plan.data.batches.step(0, plan.device)
    with torch.no_grad():
        prepared = objective(lambda: objective.stage.prepare(model, batches, objective.context))
    assert len(prepared) > 1
    total = sum(objective(batch).total for batch in prepared)
    total.backward()

    ratio_S = torch.cat([said(theirs, batch) - said(reference, batch).detach() for batch in batches])
    chosen_P, rejected_P = ratio_S[0::2], ratio_S[1::2]
    kl_chosen, kl_rejected = (each.detach().mean().clamp(min=0) for each in (chosen_P, rejected_P))
    assert max(kl_chosen, kl_rejected) > 0
    losses = torch.cat([
        1 - torch.sigmoid(0.5 * (chosen_P - kl_rejected)), 1 - torch.sigmoid(0.5 * (kl_chosen - rejected_P)),
    ])  # fmt: skip
    losses.mean().backward()
    assert (total / len(chosen_P)).item() == pytest.approx(losses.mean().item(), rel=1e-5)
    assert gradient(model) / len(chosen_P) == pytest.approx(gradient(theirs), rel=1e-5)


def said(model: Any, batch: Any) -> torch.Tensor:
    """(S,) summed log-probabilities of the answers, from whole logits."""
    logps = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1].log_softmax(-1)
    labels = batch.labels[:, 1:]
    return (logps.gather(2, labels.clamp(min=0)[..., None])[..., 0] * (labels != -100)).sum(1)


def gradient(model: torch.nn.Module) -> float:
    return float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))
