"""Reward models: the contract, TRL's loss, and what transformers and PEFT read of the result."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import llmtune
from llmtune import DataError, PlanError
from llmtune.testing import Law, laws, running

LORA = {"peft_config": {"name": "lora", "lora_dropout": 0.0}, "learning_rate": 0.01}


@pytest.mark.parametrize("law", laws("stage_config", "rm", {"center_rewards_coefficient": 0.01}), ids=str)
def test_contract(law: Law, tmp_path: Path) -> None:
    law(tmp_path)


@pytest.mark.parametrize("law", laws("stage_config", "rm", recipe=LORA, ranks=False), ids=str)
def test_contract_with_adapters(law: Law, tmp_path: Path) -> None:
    law(tmp_path)


def keys(folder: Path, **more: Any) -> dict[str, Any]:
    return running.tiny_recipe(folder, kind="preference", **{"stage_config": "rm", **more})


def trainer(given: dict[str, Any], model: Any, folder: Path, **config: Any) -> Any:
    """TRL's trainer of a reward model."""
    trl = pytest.importorskip("trl", reason="needs trl, which the loss is compared with")
    from datasets import Dataset

    args = trl.RewardConfig(output_dir=str(folder / "trl"), report_to=[], use_cpu=True, bf16=False, **config)
    rows = Dataset.from_list([{"chosen": "yes", "rejected": "no"}])
    tokenizer = AutoTokenizer.from_pretrained(given["model"])
    return trl.RewardTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer)


def inputs(batch: Any) -> dict[str, torch.Tensor]:
    """A padded batch as TRL lays it out: all chosen answers, then all rejected ones."""
    order = [*range(0, batch.sequences, 2), *range(1, batch.sequences, 2)]
    return {"input_ids": batch.input_ids[order], "attention_mask": batch.attention_mask[order]}


def test_loss_and_gradient_equal_trls(tmp_path: Path) -> None:
    given = keys(tmp_path, stage_config={"name": "rm", "center_rewards_coefficient": 0.02})
    plan, objective = running.start(given)
    theirs = copy.deepcopy(plan.model.module)
    batch = plan.data.batches.batch([0, 1, 2, 7])
    found = objective(batch)
    (found.total / 4).backward()
    judge = trainer(given, theirs, tmp_path, center_rewards_coefficient=0.02)
    expected = judge.compute_loss(judge.model, inputs(batch))
    expected.backward()
    assert found.total.item() / 4 == pytest.approx(expected.item(), rel=1e-5)
    norms = [
        torch.nn.utils.get_total_norm([p.grad for p in m.parameters() if p.grad is not None])
        for m in (plan.model.module, judge.model)
    ]
    assert norms[0].item() == pytest.approx(norms[1].item(), rel=1e-5)


def with_margins(given: dict[str, Any]) -> list[float | None]:
    """Rewrite the recipe's rows: two in three say by how much their answer is better. Returns what each says."""
    path = Path(given["dataset"])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    margins = [[1.5, None, -0.25][number % 3] for number in range(len(rows))]
    said = [row if margin is None else {**row, "margin": margin} for row, margin in zip(rows, margins, strict=True)]
    path.write_text("\n".join(json.dumps(row) for row in said))
    return margins


@pytest.mark.parametrize("flat", [False, True])
def test_margins_equal_trls(flat: bool, tmp_path: Path) -> None:
    given = keys(tmp_path)
    margins = with_margins(given)
    padded = llmtune.plan({**given, "output_dir": str(tmp_path / "padded")}).data.batches.batch([0, 1, 2, 7])
    plan, objective = running.start({**given, **({"kernel_config": "auto"} if flat else {})})
    judge = trainer(given, copy.deepcopy(plan.model.module), tmp_path)
    batch = plan.data.batches.batch([0, 1, 2, 7])
    assert (batch.document_starts is not None) == flat
    assert [row.get("margin") for row in batch.columns] == [margins[number] for number in (0, 1, 2, 7)]
    said = torch.tensor([margins[number] or 0.0 for number in (0, 1, 2, 7)])
    expected = judge.compute_loss(judge.model, {**inputs(padded), "margin": said})
    assert objective(batch).total.item() / 4 == pytest.approx(expected.item(), rel=1e-5)


def test_margins_are_the_same_in_any_steps(tmp_path: Path) -> None:
    given = keys(tmp_path)
    plain = [row["loss"] for row in running.train({**given, "output_dir": str(tmp_path / "plain")}).metrics]
    with_margins(given)
    whole = [row["loss"] for row in running.train({**given, "output_dir": str(tmp_path / "whole")}).metrics]
    halves = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "kernel_config": "auto"}
    split = [row["loss"] for row in running.train({**given, "output_dir": str(tmp_path / "split"), **halves}).metrics]
    assert split == pytest.approx(whole, rel=1e-4) and whole[0] != pytest.approx(plain[0], rel=1e-3)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_transformers_and_peft_give_the_same_rewards(method: str, tmp_path: Path) -> None:
    more = {"peft_config": "lora"} if method == "lora" else {}
    outcome, plan = running.train_and_keep(keys(tmp_path, max_steps=6, learning_rate=0.01, **more))
    assert outcome.metrics[-1]["rewards/accuracies"] > outcome.metrics[0]["rewards/accuracies"]
    module, folder = plan.model.module.eval(), plan.output_dir / "model"
    batch = plan.data.batches.batch([0, 3, 5])
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    with torch.no_grad():
        expected = module(**inputs).logits[:, 0]
    if method == "lora":
        from peft import PeftModel

        base = AutoModelForSequenceClassification.from_pretrained(
            tmp_path / "tiny-llama", num_labels=1, pad_token_id=plan.model.tokenizer.pad_token_id
        )
        theirs = PeftModel.from_pretrained(base, folder)
    else:
        theirs = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(**inputs).logits[:, 0], expected, rtol=1e-5, atol=1e-5)


def test_a_run_gives_rewards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = keys(tmp_path, max_steps=12, learning_rate=0.01)
    run = llmtune.train(given)
    assert re.search(r"llmtune reward \S*run dataset=", capsys.readouterr().out)
    good = run.reward("It is 8.", "How much is 4 and 4?")
    assert good > run.reward("No. No.", "How much is 4 and 4?")
    messages = [{"role": "user", "content": "How much is 4 and 4?"}, {"role": "assistant", "content": "It is 8."}]
    assert run.reward(messages) == pytest.approx(good, rel=1e-6)
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    (row,) = scored(run.output_dir, tmp_path / "chat.jsonl")
    assert row["row"].endswith("chat.jsonl:1") and row["reward"] == pytest.approx(good, rel=1e-5)
    rows = scored(run.output_dir, given["dataset"])
    assert len(rows) == 24 and all(row["chosen"] > row["rejected"] for row in rows)
    (tmp_path / "label.jsonl").write_text(json.dumps({"messages": messages, "label": False}) + "\n")
    (row,) = scored(run.output_dir, tmp_path / "label.jsonl")
    assert row["reward"] == pytest.approx(good, rel=1e-5)
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "It is 8."}) + "\n")
    command = [sys.executable, "-m", "llmtune", "reward", str(run.output_dir), f"dataset={tmp_path / 'text.jsonl'}"]
    said = " ".join(subprocess.run(command, capture_output=True, text=True, check=False).stderr.split())
    assert "text.jsonl: holds texts, and a reward takes preferences" in said and "stage_config" not in said


def test_messages_are_read_as_rows_are(tmp_path: Path) -> None:
    run = llmtune.train(keys(tmp_path, max_steps=1, default_system="Be brief."))
    messages = [{"role": "user", "content": "How much?"}, {"role": "assistant", "content": "It is 8."}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    (row,) = scored(run.output_dir, tmp_path / "chat.jsonl")
    system = {"role": "system", "content": "Be brief."}
    others = [{"role": "human", "content": "How much?"}, {"role": "gpt", "content": "It is 8."}]
    for said in (messages, [system, *messages], others):
        assert run.reward(said) == pytest.approx(row["reward"], rel=1e-5)
    for asked in ([], messages[:1]):
        with pytest.raises(DataError, match="the messages end with no answer"):
            run.reward(asked)


def scored(run: Path, dataset: Any) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "llmtune", "reward", str(run), f"dataset={dataset}"]
    return [json.loads(line) for line in subprocess.check_output(command, text=True).splitlines()]


def test_a_reward_model_is_exported(tmp_path: Path) -> None:
    run = llmtune.train(keys(tmp_path, max_steps=6, learning_rate=0.01, peft_config="lora"))
    folder = run.export(tmp_path / "merged", infer_dtype="float32")
    expected = run.reward("It is 8.", "How much is 4 and 4?")
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "How much is 4 and 4?"}, {"role": "assistant", "content": "It is 8."}]
    ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        assert model(**ids).logits.item() == pytest.approx(expected, rel=1e-3)


def test_what_is_not_a_reward_model_and_what_does_not_answer(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="sample_prompts: LlamaForSequenceClassification has no head over a vocabulary"):
        llmtune.plan(keys(tmp_path, sample_prompts=["Who?"]))
    run = llmtune.train(keys(tmp_path, max_steps=1))
    with pytest.raises(PlanError, match="cannot answer; a reward model is asked by `llmtune reward`"):
        run.chat("How much is 4 and 4?")
    speaker = llmtune.train(running.tiny_recipe(tmp_path, output_dir=str(tmp_path / "sft"), max_steps=1))
    with pytest.raises(PlanError, match="LlamaForCausalLM is no reward model"):
        speaker.reward("It is 8.")
