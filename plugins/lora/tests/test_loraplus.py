"""LoRA+: each tensor has the learning rate that PEFT's own optimiser for it gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft.optimizers import create_loraplus_optimizer

from llmtune.testing import learning_rates, running, tiny_recipe

TARGETS = "q_proj,v_proj,down_proj,embed_tokens"
PLUS = {"name": "lora", "lora_dropout": 0.0, "target_modules": TARGETS, "loraplus_lr_ratio": 8.0}


@pytest.mark.parametrize("extra", [{}, {"use_dora": True}, {"modules_to_save": "lm_head"}], ids=str)
def test_rates_are_pefts(extra, tmp_path: Path) -> None:
    if extra.get("use_dora"):  # PEFT computes magnitudes of embeddings otherwise
        extra = {**extra, "target_modules": "q_proj,v_proj"}
    keys = tiny_recipe(tmp_path, learning_rate=0.02, peft_config={**PLUS, **extra, "loraplus_lr_embedding": 3e-4})
    plan = running.plan(keys)
    theirs = create_loraplus_optimizer(
        plan.model.module, torch.optim.AdamW, lr=0.02, loraplus_lr_ratio=8.0, loraplus_lr_embedding=3e-4
    )
    names = {id(parameter): name for name, parameter in plan.model.module.named_parameters()}
    expected = {names[id(p)]: group["lr"] for group in theirs.param_groups for p in group["params"]}
    found = learning_rates(plan)
    assert found == pytest.approx(expected)
    assert len(set(found.values())) == (2 if extra.get("use_dora") else 3)


def test_without_a_ratio_all_have_one_rate(tmp_path: Path) -> None:
    plan = running.plan(tiny_recipe(tmp_path, learning_rate=0.02, peft_config={**PLUS, "loraplus_lr_ratio": None}))
    assert set(learning_rates(plan).values()) == {0.02}


def test_a_run_has_the_recipes_rate_in_its_metrics_and_learns_otherwise(tmp_path: Path) -> None:
    common = {"learning_rate": 0.002, "optim_config": "adamw", "lr_scheduler_config": "constant", "max_steps": 3}
    plain, faster = (
        running.train(tiny_recipe(tmp_path, peft_config=peft, output_dir=str(tmp_path / name), **common))
        for name, peft in (("plain", {**PLUS, "loraplus_lr_ratio": None}), ("plus", PLUS))
    )
    assert [row["learning_rate"] for row in faster.metrics] == [0.002] * 3
    assert faster.metrics[2]["loss"] < plain.metrics[2]["loss"]
    # B starts at zero, and Adam's first step is the learning rate.
    ends = {name: float(tensor.abs().max()) for name, tensor in faster.tensors.items() if "q_proj.lora_B" in name}
    assert ends and all(0.01 < end <= 3 * 0.0161 for end in ends.values())
