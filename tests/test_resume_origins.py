"""What a result depends on besides the recipe's text cannot change between a run and its continuation, or by rank."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import llmtune
from llmtune.contract.errors import CheckpointError, LlmtuneError, PlanError, PluginError
from llmtune.recipe.recipe import load_recipe
from llmtune.training import origins, resume
from llmtune.training.manifest import Manifest
from tests.runs import recipe
from tests.spawn import in_ranks
from tests.test_resume import stop_after

BATCH = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
RATE = "${oc.decode:${oc.env:LT_RATE}}"


def test_values_from_the_environment_are_compared_as_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {
        "model": "m", "learning_rate": RATE, "seed": 1, "max_steps": "${seed}", "token": "${oc.env:LT}",
        "output_dir": "${oc.env:LT}/x", "peft_config": {"name": "lora", "r": RATE},
    }  # fmt: skip
    monkeypatch.setenv("LT", "hf_secret")
    monkeypatch.setenv("LT_RATE", "5e-4")
    first = load_recipe(keys).environment
    assert sorted(first) == ["learning_rate", "max_steps", "peft_config"]
    assert all(len(value) == 64 for value in first.values())
    monkeypatch.setenv("LT_RATE", "5e-3")
    second = load_recipe(keys).environment
    assert [key for key in first if first[key] != second[key]] == ["learning_rate", "peft_config"]
    assert load_recipe({"model": "m", "seed": 1}).environment == {}


def test_another_value_from_the_environment_cannot_continue_a_run(
    tiny_llama: str, chats: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LT_RATE", "5e-4")
    keys = recipe(tiny_llama, chats, tmp_path / "run", learning_rate=RATE, max_steps=2)
    stop_after(keys, 1)
    monkeypatch.setenv("LT_RATE", "2.5e-2")
    with pytest.raises(CheckpointError, match="^learning_rate: not what it was when the run in .* --fresh"):
        llmtune.train(keys)
    assert "5e-4" not in (tmp_path / "run" / "checkpoints" / "step-00000001" / "manifest.json").read_text()


@pytest.mark.parametrize("judged", [True, False])
def test_other_evaluation_data_cannot_choose_the_best(
    judged: bool, tiny_llama: str, chats: str, tmp_path: Path
) -> None:
    data = tmp_path / "evaluation.jsonl"
    shutil.copy(chats, data)
    keys = recipe(
        tiny_llama, chats, tmp_path / "run", max_steps=2, eval_dataset=str(data), eval_strategy="steps", eval_steps=1,
        load_best_model_at_end=judged,
    )  # fmt: skip
    stop_after(keys, 1)
    data.write_text("\n".join(data.read_text().splitlines()[:5]) + "\n")
    if judged:
        with pytest.raises(CheckpointError, match="^evaluation data: not what it was"):
            llmtune.train(keys)
    else:
        assert llmtune.train(keys).status == "done"


def test_an_edited_template_cannot_continue_a_run(folder: Path, chats: str, tmp_path: Path) -> None:
    keys = recipe(str(folder), chats, tmp_path / "run", max_steps=2)
    stop_after(keys, 1)
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text() + "{# the same text, another template #}")
    with pytest.raises(CheckpointError, match="^chat template: not what it was"):
        llmtune.train(keys)


def test_a_base_model_that_was_replaced_cannot_continue_a_run(folder: Path, chats: str, tmp_path: Path) -> None:
    keys = recipe(str(folder), chats, tmp_path / "run", max_steps=2)
    stop_after(keys, 1)
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({**weights, name: weights[name] + 0.5}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="^model: the files of .* are not those that the run in"):
        llmtune.train(keys)


def plan_of(recipe: dict[str, Any], revision: str | None = None, plugins: dict[str, str] | None = None) -> Any:
    """As much of a plan as is compared."""
    train = SimpleNamespace(**BATCH, load_best_model_at_end=False, early_stopping_patience=None)
    model = SimpleNamespace(
        files=SimpleNamespace(revision=revision), tokenizer=SimpleNamespace(chat_template=None)
    )  # fmt: skip
    return SimpleNamespace(
        recipe=SimpleNamespace(resolved={**recipe, **BATCH}, environment={}, train=train),
        ranks=SimpleNamespace(batch_ranks=1),
        data=SimpleNamespace(
            digest="", prepared=SimpleNamespace(evaluation=None), batches=SimpleNamespace(reads=1)
        ), model=model, output_dir="runs/a",
        parts=SimpleNamespace(fingerprint=lambda: plugins or {}),
    )  # fmt: skip


def manifest_of(recipe: dict[str, Any], **more: Any) -> Manifest:
    return Manifest(step=1, ranks=1, recipe={**recipe, **BATCH}, llmtune="", **{"plugins": {}, **more})


def test_the_advice_to_name_the_commit_can_be_followed() -> None:
    manifest = manifest_of({"revision": None}, revision="a1b2")
    with pytest.raises(CheckpointError, match="set revision: a1b2"):
        resume.compare(plan_of({"revision": None}, revision="c3d4"), manifest)
    resume.compare(plan_of({"revision": "a1b2"}, revision="a1b2"), manifest)


def test_a_plugin_of_another_version_cannot_continue_a_run() -> None:
    manifest = manifest_of({}, plugins={"peft_config lora": "llmtune-lora 0.1", "logger_config tb": "tb 1"})
    now = {"peft_config lora": "llmtune-lora 0.2", "logger_config tb": "tb 2"}
    with pytest.raises(PluginError, match="^peft_config lora: the run in runs/a was started with llmtune-lora 0.1"):
        resume.compare(plan_of({}, plugins=now), manifest)
    resume.compare(plan_of({}, plugins={**now, "peft_config lora": "llmtune-lora 0.1"}), manifest)


def _train_on(keys: dict[str, Any]) -> str:
    # As where machines have other files of one name.
    origins.base_fingerprint = lambda folder, ledger: os.environ["RANK"]
    torch.distributed.init_process_group("gloo")
    with pytest.raises(PlanError) as error:
        llmtune.train(keys)
    return str(error.value)


def test_ranks_with_other_base_models_are_refused(tiny_llama: str, chats: str, tmp_path: Path) -> None:
    keys = recipe(tiny_llama, chats, tmp_path / "run", max_steps=1)
    for said in in_ranks(2, tmp_path / "ranks", _train_on, keys):
        assert said.startswith(f"model: the files of {tiny_llama} on rank 1 are not those on rank 0; use the same")


def _train_with(values: list[str], keys: dict[str, Any]) -> str:
    os.environ["LT_RATE"] = values[int(os.environ["RANK"])]
    torch.distributed.init_process_group("gloo")
    try:
        llmtune.train(keys)
    except LlmtuneError as error:
        assert isinstance(error, PlanError)
        return str(error)
    return "trained"


def test_ranks_with_other_values_are_refused_by_name(tiny_llama: str, chats: str, tmp_path: Path) -> None:
    keys = recipe(tiny_llama, chats, tmp_path / "run", learning_rate=RATE, max_steps=1)
    for said in in_ranks(2, tmp_path / "ranks", _train_with, ["1e-4", "1e-3"], keys):
        assert said.startswith("ranks disagree on learning_rate (read from the environment): rank 0 has ")
