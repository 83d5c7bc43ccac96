"""Loss, gradient norm and rewards of each loss, against TRL's trainers on the same pairs and weights, in float32."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from llmtune.testing import running

trl = pytest.importorskip("trl", reason="needs trl, which these losses are compared with")
from trl import DPOConfig, DPOTrainer  # noqa: E402
from trl.experimental.cpo import CPOTrainer  # noqa: E402
from trl.experimental.orpo import ORPOTrainer  # noqa: E402

ROWS = [0, 1, 2, 3, 9, 14]
LOSSES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sigmoid": ({}, {"loss_type": ["sigmoid"]}),
    "hinge": ({"pref_beta": 0.5}, {"loss_type": ["hinge"], "beta": 0.5}),
    "ipo": ({}, {"loss_type": ["ipo"]}),
    "robust": ({"dpo_label_smoothing": 0.1}, {"loss_type": ["robust"], "label_smoothing": 0.1}),
    "exo": ({"dpo_label_smoothing": 0.01}, {"loss_type": ["exo_pair"], "label_smoothing": 0.01}),
    "bco": ({}, {"loss_type": ["bco_pair"]}),
    "nca": ({}, {"loss_type": ["nca_pair"]}),
    "apo_zero": ({}, {"loss_type": ["apo_zero"]}),
    "apo_down": ({}, {"loss_type": ["apo_down"]}),
    "sppo": ({}, {"loss_type": ["sppo_hard"]}),
    "discopop": ({}, {"loss_type": ["discopop"]}),
    "ld": ({"pref_loss": "sigmoid", "ld_alpha": 0.3}, {"loss_type": ["sigmoid"], "ld_alpha": 0.3}),
}


def start(tmp_path: Path, **stage: Any) -> tuple[Any, Any, Any]:
    """(batch, objective, reference): a model that has moved away from where it began."""
    plan, objective = running.start(
        running.tiny_recipe(tmp_path, kind="preference", stage_config={"name": "dpo", **stage})
    )
    reference = copy.deepcopy(plan.model.module).eval()
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        for weight in plan.model.module.parameters():
            weight += 0.02 * torch.randn_like(weight)
    return plan.data.batches.batch(ROWS), objective.train(), reference


def ours(objective: Any, batch: Any) -> tuple[float, float, dict[str, float]]:
    found, pairs = objective(batch), len(ROWS)
    (found.total / pairs).backward()
    return (
        found.total.item() / pairs, norm(objective.model),
        {name: value.item() / pairs for name, value in found.metrics.items()},
    )  # fmt: skip


def norm(model: torch.nn.Module) -> float:
    return float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))


def inputs(batch: Any) -> dict[str, torch.Tensor]:
    """The batch as TRL lays it out: all chosen answers, then all rejected ones."""
    order = [*range(0, batch.sequences, 2), *range(1, batch.sequences, 2)]
    mask = (batch.labels != -100).long()
    return {
        "input_ids": batch.input_ids[order], "attention_mask": batch.attention_mask[order],
        "completion_mask": mask[order],
    }  # fmt: skip


def trainer(model: Any, reference: Any, tmp_path: Path, **keys: Any) -> Any:
    from datasets import Dataset
    from transformers import AutoTokenizer

    config = DPOConfig(
        output_dir=str(tmp_path / "trl"), report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False, **keys
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tiny-llama")
    rows = Dataset.from_list([{"prompt": "How much", "chosen": "is it", "rejected": "no"}])
    return DPOTrainer(model=model, ref_model=reference, args=config, train_dataset=rows, processing_class=tokenizer)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_equals_trls(name: str, tmp_path: Path) -> None:
    stage, keys = LOSSES[name]
    batch, objective, reference = start(tmp_path, **{"pref_loss": name, **stage})
    theirs = copy.deepcopy(objective.model)
    theirs.zero_grad()
    loss, gradient, metrics = ours(objective, batch)
    judge = trainer(theirs, reference, tmp_path, **keys)
    judge.model.train()
    expected = judge.compute_loss(judge.model, inputs(batch))
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert gradient == pytest.approx(norm(judge.model), rel=1e-5)
    rewards = {key: values[0] for key, values in judge._metrics["train"].items() if key in metrics}
    assert set(rewards) == set(metrics)
    if name != "ipo":  # whose rewards are over means here, as its loss is
        assert metrics == pytest.approx(rewards, rel=1e-4, abs=1e-5)


def test_losses_without_reference_equal_trls_formulas(tmp_path: Path) -> None:
    """SimPO as in TRL's CPO trainer, ORPO's odds ratio as in its ORPO trainer, on the same log-probabilities."""
    from types import SimpleNamespace

    from accelerate import PartialState

    for smoothing in (0.0, 0.2):
        keys = {"pref_loss": "simpo", "pref_beta": 2.0, "simpo_gamma": 1.0, "dpo_label_smoothing": smoothing}
        batch, objective, _ = start(tmp_path, **keys)
        means = means_of(objective, batch)
        judge: Any = SimpleNamespace(
            accelerator=PartialState(), loss_type="simpo", simpo_gamma=1.0, beta=2.0, label_smoothing=smoothing,
            alpha=0.0,
        )  # fmt: skip
        expected, chosen, _ = CPOTrainer.cpo_loss(judge, means[0::2], means[1::2])
        loss, _, metrics = ours(objective, batch)
        assert loss == pytest.approx(expected.mean().item(), rel=1e-5)
        assert metrics["rewards/chosen"] == pytest.approx(chosen.mean().item(), rel=1e-5)
    batch, objective, _ = start(tmp_path, pref_loss="orpo", pref_beta=0.3)
    means = means_of(objective, batch)
    judge = SimpleNamespace(accelerator=PartialState(), beta=0.3)
    ratio, *_ = ORPOTrainer.odds_ratio_loss(judge, means[0::2], means[1::2])
    assert ours(objective, batch)[0] == pytest.approx((-means[0::2] - ratio).mean().item(), rel=1e-5)


def means_of(objective: Any, batch: Any) -> torch.Tensor:
    """Mean log-probability of each answer, by transformers' model alone."""
    with torch.no_grad():
        logits = objective.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1]
    logps = -F.cross_entropy(logits.transpose(1, 2), batch.input_ids[:, 1:], reduction="none")
    counted = batch.labels[:, 1:] != -100
    return (logps * counted).sum(1) / counted.sum(1)
