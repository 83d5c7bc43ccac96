"""KTO: the contract, TRL's loss and rewards, and steps with answers of one label only."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import llmtune
from llmtune.testing import Law, laws, running

LORA = {"peft_config": {"name": "lora", "lora_dropout": 0.0}, "learning_rate": 0.01}
WEIGHTS = {"kto_chosen_weight": 0.7, "kto_rejected_weight": 1.3, "pref_beta": 0.5}


@pytest.mark.parametrize("law", laws("stage_config", "kto", WEIGHTS), ids=str)
def test_contract(law: Law, tmp_path: Path) -> None:
    law(tmp_path)


@pytest.mark.parametrize("law", laws("stage_config", "kto", {"pref_ftx": 0.3}, recipe=LORA), ids=str)
def test_contract_with_adapters(law: Law, tmp_path: Path) -> None:
    law(tmp_path)


def keys(folder: Path, **more: Any) -> dict[str, Any]:
    return running.tiny_recipe(folder, kind="labelled", **{"stage_config": {"name": "kto", **WEIGHTS}, **more})


def test_loss_gradient_and_rewards_equal_trls(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="needs trl, which the loss is compared with")
    from datasets import Dataset
    from transformers import AutoTokenizer

    given = keys(tmp_path, per_device_train_batch_size=6, gradient_accumulation_steps=1, disable_shuffling=True)
    plan, objective = running.start(given)
    reference = copy.deepcopy(plan.model.module).eval()
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        for weight in plan.model.module.parameters():
            weight += 0.02 * torch.randn_like(weight)
    theirs = copy.deepcopy(plan.model.module)
    batches = plan.data.batches.step(0, plan.device)
    stage: Any = objective.stage
    with torch.no_grad():
        (batch,) = objective(lambda: stage.prepare(plan.model.module, batches, objective.context))
    found = objective(batch)
    (found.total / 6).backward()
    config = trl.KTOConfig(
        output_dir=str(tmp_path / "trl"), report_to=[], use_cpu=True, bf16=False, beta=0.5, desirable_weight=0.7,
        undesirable_weight=1.3,
    )  # fmt: skip
    rows = Dataset.from_list([{"prompt": "How", "completion": "so", "label": i % 2 == 0} for i in range(4)])
    tokenizer = AutoTokenizer.from_pretrained(given["model"])
    judge = trl.KTOTrainer(
        model=theirs, ref_model=reference, args=config, train_dataset=rows, processing_class=tokenizer
    )
    crossed = batch.mismatched

    def laid(one: Any, prefix: str) -> dict[str, torch.Tensor]:
        mask = one.attention_mask if one.attention_mask is not None else torch.ones_like(one.input_ids)
        return {
            f"{prefix}input_ids": one.input_ids, f"{prefix}attention_mask": mask,
            f"{prefix}completion_mask": (one.labels != -100).long(),
        }  # fmt: skip

    inputs = {**laid(batch, ""), **laid(crossed, "KL_"), "label": batch.desirable}
    judge.model.train()
    expected = judge.compute_loss(judge.model, inputs)
    expected.backward()
    assert judge._metrics["train"]["kl"][0] > 0
    assert batch.extra["kl"].item() == pytest.approx(judge._metrics["train"]["kl"][0], rel=1e-5)
    assert found.total.item() / 6 == pytest.approx(expected.item(), rel=1e-5)
    norms = [
        torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).item()
        for model in (plan.model.module, judge.model)
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    total, count = found.metrics["rewards/chosen"]
    assert (total / count).item() == pytest.approx(judge._metrics["train"]["rewards/chosen"][0], rel=1e-4)


@pytest.mark.parametrize("size", [1, 3], ids="batch{}".format)
def test_each_prompt_meets_the_answer_to_another_one(tmp_path: Path, size: int) -> None:
    given = keys(tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=1, disable_shuffling=True)
    given["dataset"] = write(tmp_path, 4)  # a last step of one answer, if batches are of three
    plan = llmtune.plan(given)
    tokenizer, mark = plan.model.tokenizer, "<|im_start|>assistant"
    met: dict[str, str] = {}
    for step in range(plan.data.batches.order.steps_per_epoch):
        for batch in plan.data.batches.step(step, plan.device):
            for own, crossed in zip(batch.input_ids, batch.mismatched.input_ids, strict=True):
                question, other = tokenizer.decode(own).split(mark)[0], tokenizer.decode(crossed).split(mark)
                assert other[0] == question
                met[question.split("number ")[1][0]] = other[1].split("answer ")[1][0]
    assert met == {1: dict(zip("0123", "1230", strict=True)), 3: dict(zip("0123", "1200", strict=True))}[size]


def write(folder: Path, rows: int) -> str:
    lines = [
        {"messages": [{"role": "user", "content": f"number {i}"}, {"role": "assistant", "content": f"answer {i}"}],
         "label": i % 2 == 0} for i in range(rows)
    ]  # fmt: skip
    path = folder / f"rows-{rows}.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return str(path)


def test_answers_without_another_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(llmtune.PlanError, match="the data are a single one; give at least 2 rows"):
        llmtune.plan(keys(tmp_path, dataset=write(tmp_path, 1)))
    with pytest.raises(llmtune.PlanError, match="the rows to evaluate on are a single one"):
        llmtune.plan(keys(tmp_path, eval_dataset=write(tmp_path, 1), eval_strategy="epoch"))
    alone = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
    with pytest.raises(llmtune.PlanError, match="a step of this stream has one; set per_device_train_batch_size"):
        llmtune.plan(keys(tmp_path, streaming=True, max_steps=2, **alone))


def test_steps_with_one_label_only_train_and_report_what_they_have(tmp_path: Path) -> None:
    lines = (Path(keys(tmp_path)["dataset"])).read_text().splitlines()
    good = tmp_path / "good.jsonl"
    good.write_text("\n".join(line for line in lines if '"label": true' in line))
    rows = running.train(keys(tmp_path, dataset=str(good))).metrics
    assert all("rewards/chosen" in row and "rewards/rejected" not in row for row in rows)
    assert np.isfinite([row["loss"] for row in rows]).all() and rows[-1]["loss"] < rows[0]["loss"]


def test_metrics_of_several_steps_are_means_of_those_that_have_them(tmp_path: Path) -> None:
    given = keys(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=1, logging_steps=3, max_steps=12)
    rows = running.train(given).metrics
    assert len(rows) == 5 and all(np.isfinite(list(row.values())).all() for row in rows)


def test_evaluation_does_not_depend_on_its_batches(tmp_path: Path) -> None:
    found = []
    for size in (1, 5):
        given = keys(
            tmp_path, val_size=6, eval_strategy="steps", eval_steps=4, per_device_eval_batch_size=size,
            output_dir=str(tmp_path / f"run-{size}"),
        )  # fmt: skip
        run = llmtune.train(given)
        found.append(next(row for row in run.metrics if "eval_loss" in row))
    for name in ("eval_loss", "eval_kl", "eval_rewards/chosen"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-5), name


def test_the_plan_knows_the_memory_of_a_step(tmp_path: Path) -> None:
    cost = llmtune.plan(keys(tmp_path)).cost
    assert not cost.untraced
