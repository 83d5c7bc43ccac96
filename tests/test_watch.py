"""Between the steps: what is logged, judged and saved does not depend on when a run was stopped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import llmtune
from llmtune.contract.errors import CheckpointError, DivergedError, LoadError, PlanError
from llmtune.distributed.stopping import StopRequest
from llmtune.training.callbacks import TrainingCallbacks
from tests.runs import LORA, recipe
from tests.test_resume import assert_equal_runs, stop_after


def keeper(**train: Any) -> TrainingCallbacks:
    settings = {"greater_is_better": False, "early_stopping_threshold": 0.0, **train}
    plan: Any = SimpleNamespace(recipe=SimpleNamespace(train=SimpleNamespace(**settings)))
    return TrainingCallbacks(plan, None, None, None, [], StopRequest())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "larger", "best", "bad"),
    [
        ([float("nan"), 2.0, 1.0, 1.5], False, 3, 1),
        ([2.0, float("nan"), 3.0], False, 1, 2),
        ([1.0, 3.0, 2.0], True, 2, 1),
        ([1.0, float("inf")], False, 1, 1),
    ],
)
def test_the_best_evaluation(values: list[float], larger: bool, best: int, bad: int) -> None:
    watch = keeper(greater_is_better=larger)
    for step, value in enumerate(values, 1):
        watch.judge(step, value)
    assert (watch.best_step, watch.bad_evaluations) == (best, bad)


def test_the_threshold_counts_for_patience_and_not_for_the_best() -> None:
    watch = keeper(early_stopping_threshold=0.5)
    for step, value in enumerate([3.0, 2.9, 2.8], 1):
        watch.judge(step, value)
    assert (watch.best_step, watch.bad_evaluations) == (3, 2)


def test_metrics_of_a_continued_run_average_the_same_steps(tiny_llama: str, chats: str, tmp_path: Path) -> None:
    straight = recipe(tiny_llama, chats, tmp_path / "straight", logging_steps=5)
    llmtune.train(straight)
    broken = {**straight, "output_dir": str(tmp_path / "broken")}
    stop_after(broken, 3)
    llmtune.train(broken)
    assert_equal_runs(tmp_path / "straight", tmp_path / "broken")


def test_asked_to_stop_at_the_last_step_the_run_is_simply_done(
    tiny_llama: str, chats: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked_at_once(self: StopRequest) -> StopRequest:
        self.asked = True
        return self

    monkeypatch.setattr(StopRequest, "__enter__", asked_at_once)
    keys = recipe(tiny_llama, chats, tmp_path / "run", max_steps=2)
    assert llmtune.train(keys).status == "interrupted"
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000001"]
    assert llmtune.train(keys).status == "done"


def test_a_run_that_stopped_early_does_not_go_on_when_continued(tiny_llama: str, chats: str, tmp_path: Path) -> None:
    keys = recipe(
        tiny_llama, chats, tmp_path / "run", learning_rate=1e-12, save_steps=1, eval_dataset=chats, eval_steps=1,
        eval_strategy="steps", early_stopping_patience=1, early_stopping_threshold=0.01,
    )  # fmt: skip
    llmtune.train(keys)
    record = tmp_path / "run" / "run.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "status": "running"}))
    assert max(row["step"] for row in llmtune.train(keys).metrics) == 2


def test_changed_data_cannot_continue_a_run(tiny_llama: str, chats: str, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    shutil.copy(chats, data)
    keys = recipe(tiny_llama, str(data), tmp_path / "run")
    stop_after(keys, 3)
    data.write_text(data.read_text().replace("Good day then.", "Farewell."))
    with pytest.raises(CheckpointError, match="dataset: the tokens to train on are not those"):
        llmtune.train(keys)


def test_resuming_from_a_path(tiny_llama: str, chats: str, tmp_path: Path) -> None:
    straight = recipe(tiny_llama, chats, tmp_path / "straight", save_steps=4)
    llmtune.train(straight)
    step = tmp_path / "straight" / "checkpoints" / "step-00000004"
    other = {**straight, "output_dir": str(tmp_path / "other"), "resume_from_checkpoint": str(step)}
    llmtune.train(other)
    expected, found = (load_file(tmp_path / run / "trained.safetensors") for run in ("straight", "other"))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    record = tmp_path / "straight" / "run.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "status": "running"}))
    with pytest.raises(CheckpointError, match="holds later steps than step-00000004"):
        llmtune.train({**straight, "resume_from_checkpoint": str(step)})
    whole = {**straight, "output_dir": str(tmp_path / "third"), "resume_from_checkpoint": str(tmp_path / "straight")}
    assert llmtune.train(whole).status == "done"


def test_a_metric_that_does_not_exist(tiny_llama: str, chats: str, tmp_path: Path) -> None:
    keys = recipe(tiny_llama, chats, tmp_path / "run", val_size=4, metric_for_best_model="eval_bleu")
    with pytest.raises(PlanError, match='found "eval_bleu", allowed is one of eval_loss'):
        llmtune.train(keys)


def test_a_validation_set_is_evaluated_without_being_asked(tiny_llama: str, chats: str, tmp_path: Path) -> None:
    run = llmtune.train(recipe(tiny_llama, chats, tmp_path / "run", val_size=4))
    assert any("eval_loss" in row for row in run.metrics)


def test_divergence_names_the_rows_of_the_file(tiny_llama: str, chats: str, tmp_path: Path) -> None:
    keys = recipe(
        tiny_llama, chats, tmp_path / "run", peft_config=None, learning_rate=1e30, max_grad_norm=0, val_size=3
    )
    with pytest.raises(DivergedError, match=r"chats\.jsonl:\d+"):
        llmtune.train(keys)


def test_wrong_shapes_are_named_under_quantisation_too(folder: Path, chats: str, tmp_path: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name] = weights[name][:-2].clone()
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(LoadError, match=r"of another shape: model\.layers\.0\.mlp\.up_proj\.weight \[62, 32\]"):
        llmtune.train(recipe(str(folder), chats, tmp_path / "run", quant_config="bnb", peft_config=LORA))


def test_a_model_that_lets_documents_leak_is_not_packed(chats: str, tmp_path: Path) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    from tests.tiny import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    config = MambaConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, state_size=4)
    MambaForCausalLM(config).save_pretrained(tmp_path / "mamba")
    tokenizer.save_pretrained(tmp_path / "mamba")
    keys = recipe(str(tmp_path / "mamba"), chats, tmp_path / "run", peft_config=None, learning_rate=1e-3)
    with pytest.raises(PlanError, match=r"packing: MambaForCausalLM takes no position ids.* set packing: false"):
        llmtune.plan({**keys, "packing": True, "disable_gradient_checkpointing": True})
