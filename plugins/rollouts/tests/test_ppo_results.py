"""What becomes of PPO's value head: it is planned, trained and continued, and is in nothing that users take away."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import llmtune
from llmtune.testing import in_ranks, running

LORA = {"peft_config": {"name": "lora", "r": 4, "lora_dropout": 0.0}}
FREEZE = {"peft_config": {"name": "freeze", "freeze_trainable_layers": 1}}
LETTERS = {"name": "rule", "match": "regex", "answer_pattern": "[aeiou]"}
METHODS: dict[str, dict[str, Any]] = {"full": {}, "lora": LORA, "freeze": FREEZE}


def keys(folder: Path, **more: Any) -> dict[str, Any]:
    stage = {"name": "ppo", "max_new_tokens": 6, "ppo_epochs": 2, "ppo_buffer_size": 2}
    given = {"stage_config": stage, "reward_config": LETTERS, "learning_rate": 0.01, "max_steps": 2, **more}
    return running.tiny_recipe(folder, kind="prompt", **given)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 15)[None], use_cache=False).logits


@pytest.mark.parametrize("method", METHODS)
def test_others_open_the_result_and_find_no_value_head(method: str, tmp_path: Path) -> None:
    given = keys(tmp_path, save_steps=1, **METHODS[method])
    outcome, plan = running.train_and_keep(given)
    expected, folder = logits(plan.model.module), plan.output_dir / "model"
    assert plan.model.module.value_head.weight.detach().abs().max() > 0
    if method == "lora":
        from peft import PeftModel

        theirs: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(given["model"]), folder)
        written = [folder / "adapter_model.safetensors", plan.output_dir / "trained.safetensors"]
    else:
        theirs, said = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(said[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        written = sorted(folder.glob("*.safetensors"))
    torch.testing.assert_close(logits(theirs), expected, rtol=1e-4, atol=1e-4)
    held = [name for path in written for name in load_file(path)]
    assert held and not any("value_head" in name for name in [*held, *outcome.tensors])
    state = plan.output_dir / "checkpoints" / "step-00000002" / "state"
    stored = {name for path in state.glob("*.safetensors") for name in load_file(path)}
    assert {"model/value_head.weight", "model/value_head.bias"} <= stored


@pytest.mark.parametrize("method", METHODS)
def test_a_run_and_its_checkpoint_answer_and_are_exported(method: str, tmp_path: Path) -> None:
    run = llmtune.train(keys(tmp_path, save_steps=1, **METHODS[method]))
    expected = logits(run.model()[0])
    merged = run.export(tmp_path / "merged", infer_dtype="float32")
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(merged)), expected, rtol=1e-4, atol=1e-4)
    assert isinstance(run.chat("How much is 4 and 4?"), str)
    (run.output_dir / "trained.safetensors").unlink(missing_ok=True)  # as a run that was stopped leaves its folder
    shutil.rmtree(run.output_dir / "model")
    torch.testing.assert_close(logits(llmtune.load(run.output_dir).model()[0]), expected, rtol=1e-4, atol=1e-4)
    again = llmtune.load(run.output_dir).export(tmp_path / "again", infer_dtype="float32")
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(again)), expected, rtol=1e-4, atol=1e-4)


def test_a_checkpoint_is_talked_to_from_the_command_line(tmp_path: Path) -> None:
    run = llmtune.train(keys(tmp_path, save_steps=1, **LORA))
    place = run.output_dir / "checkpoints" / "step-00000001"
    command = [sys.executable, "-m", "llmtune", "chat", str(place), "max_new_tokens=4"]
    said = subprocess.run(command, input="How much is 4 and 4?\n", text=True, capture_output=True, check=False)
    assert said.returncode == 0, said.stderr


def test_the_plan_counts_it(tmp_path: Path) -> None:
    plan, plain = llmtune.plan(keys(tmp_path, **LORA)), llmtune.plan(running.tiny_recipe(tmp_path, **LORA))
    assert plan.model.parameters()[0] == plain.model.parameters()[0] + 33
    said = str(llmtune.plan(keys(tmp_path, kernel_config="auto", **LORA)))
    (stage,) = [line for line in said.splitlines() if line.startswith("  stage ")]
    assert stage.endswith(": value head of 33 parameters, which trains and is no part of the result")
    (kernels,) = [line for line in said.splitlines() if line.startswith("  kernel ")]
    assert "value head" not in kernels


def test_it_is_continued_on_another_number_of_ranks_and_rows(tmp_path: Path) -> None:
    given = keys(tmp_path, max_steps=4, save_steps=2)
    whole = running.train(given)
    start = tmp_path / "run" / "checkpoints" / "step-00000002"
    assert json.loads((start / "manifest.json").read_text())["numbers"]["aside"] == [
        "value_head.bias", "value_head.weight",
    ]  # fmt: skip
    more = {"resume_from_checkpoint": str(start), "output_dir": str(tmp_path / "two")}
    two = in_ranks(2, tmp_path / "ranks", running.train, {**given, **more})[
        0
    ]  # with twice the rows, were they not kept
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "output_dir": str(tmp_path / "split")}
    for other in (two, running.train({**given, **more, **split})):
        for row, same in zip(whole.metrics[2:], other.metrics, strict=True):
            for name in ("loss", "grad_norm", "value_loss", "reward"):
                assert same[name] == pytest.approx(row[name], rel=1e-3, abs=1e-6), name
        for name, tensor in whole.tensors.items():
            torch.testing.assert_close(other.tensors[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("spread", [{"tp_size": 2}, {"offload_params": True}], ids=["tensor", "offload"])
def test_it_is_spread_like_the_rest(spread: dict[str, Any], tmp_path: Path) -> None:
    whole = running.train(keys(tmp_path))
    micros = 2 if "tp_size" in spread else 1
    given = keys(
        tmp_path, dist_config={"name": "fsdp2", **spread}, gradient_accumulation_steps=micros,
        output_dir=str(tmp_path / "two"),
    )  # fmt: skip
    two = in_ranks(2, tmp_path / "ranks", running.train, given)[0]
    for row, same in zip(whole.metrics, two.metrics, strict=True):
        for name in ("loss", "grad_norm", "value_loss", "reward", "tokens"):
            assert same[name] == pytest.approx(row[name], rel=1e-3, abs=1e-6), name
    for name, tensor in whole.tensors.items():
        torch.testing.assert_close(two.tensors[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_rows_of_a_stream_are_answered(tmp_path: Path) -> None:
    rows = running.train(keys(tmp_path, streaming=True, per_device_train_batch_size=2)).metrics
    assert len(rows) == 2 and all(row["completions/length"] > 0 and row["grad_norm"] > 0 for row in rows)


def test_rows_are_not_split_over_ranks(tmp_path: Path) -> None:
    given = keys(tmp_path, dist_config={"name": "fsdp2", "cp_size": 2}, kernel_config="auto")
    with pytest.raises(llmtune.PlanError, match="cp_size is 2, but the loss of prompts needs whole answers"):
        llmtune.plan(given, nproc=2)
