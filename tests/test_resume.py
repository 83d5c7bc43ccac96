"""Stop at any step, continue, and nobody can tell: same weights, same metrics, same checkpoints."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import llmtune
from llmtune.contract.errors import CheckpointError, LlmtuneError, PlanError
from llmtune.training import checkpoint, step_folders
from tests.runs import recipe
from tests.spawn import in_ranks

METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "full": {"peft_config": None, "learning_rate": 1e-3},
    "qlora_8bit_adam": {
        "quant_config": "bnb",
        "optim_config": {"name": "adamw_8bit", "min_8bit_size": 64},
        "lr_scheduler_config": "cosine",
        "packing": True,
        "kernel_config": "auto",
    },
    "hqq": {"quant_config": {"name": "hqq", "quantization_bit": 3, "group_size": 16}},
}


def trained(folder: Path) -> dict[str, torch.Tensor]:
    adapter = folder / "trained.safetensors"
    return load_file(adapter if adapter.exists() else folder / "model" / "model.safetensors")


def assert_equal_runs(one: Path, other: Path) -> None:
    expected, found = trained(one), trained(other)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name
    kept = ("step", "epoch", "loss", "grad_norm", "learning_rate", "tokens")
    rows = [[{key: row.get(key) for key in kept} for row in llmtune.load(run).metrics] for run in (one, other)]
    assert rows[0] == rows[1]


def stop_after(keys: dict[str, Any], step: int) -> None:
    """Train with checkpoints every step, then forget everything after `step`, as a kill there would have left it."""
    llmtune.train({**keys, "save_steps": 1})
    forget_after(Path(keys["output_dir"]), step)


def forget_after(folder: Path, step: int) -> None:
    for path in (folder / "checkpoints").glob("step-*"):
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    shutil.rmtree(folder / "model")
    (folder / "trained.safetensors").unlink(missing_ok=True)
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**record, "status": "running"}))


@pytest.mark.parametrize("method", METHODS)
def test_a_continued_run_is_bit_identical(method: str, tiny_tied_llama: str, chats: str, tmp_path: Path) -> None:
    straight = recipe(tiny_tied_llama, chats, tmp_path / "straight", **METHODS[method])
    llmtune.train(straight)
    llmtune.train({**straight, "output_dir": str(tmp_path / "saved"), "save_steps": 1})
    broken = {**straight, "output_dir": str(tmp_path / "broken")}
    for step in (1, 3, 7):  # inside an epoch, at its edge, inside a later one
        shutil.copytree(tmp_path / "saved", tmp_path / "broken")
        forget_after(tmp_path / "broken", step)
        llmtune.train(broken)
        assert_equal_runs(tmp_path / "straight", tmp_path / "broken")
        shutil.rmtree(tmp_path / "broken")


def _stop_and_continue(keys: dict[str, Any], step: int) -> None:
    torch.distributed.init_process_group("gloo")
    llmtune.train({**keys, "save_steps": 1})
    if torch.distributed.get_rank() == 0:
        shutil.copytree(keys["output_dir"], keys["output_dir"] + "-straight")
        forget_after(Path(keys["output_dir"]), step)
    torch.distributed.barrier()
    llmtune.train(keys)


@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_continue_bit_identically(method: str, tiny_tied_llama: str, chats: str, tmp_path: Path) -> None:
    keys = recipe(tiny_tied_llama, chats, tmp_path / "run", **METHODS[method], gradient_accumulation_steps=1)
    in_ranks(2, tmp_path / "ranks", _stop_and_continue, keys, 4)
    assert_equal_runs(tmp_path / "run-straight", tmp_path / "run")


def test_a_lora_checkpoint_holds_the_adapter_and_its_optimiser_only(
    tiny_llama: str, chats: str, tmp_path: Path
) -> None:
    keys = recipe(tiny_llama, chats, tmp_path / "run", save_steps=6)
    llmtune.train(keys)
    folder = tmp_path / "run" / "checkpoints" / "step-00000006"
    stored = load_file(next((folder / "state").glob("*.safetensors")))
    assert all("lora_" in name for name in stored)
    weights = {name for name in stored if name.startswith("model/")}
    assert {f"optim/{name.removeprefix('model/')}/exp_avg" for name in weights} <= set(stored)
    assert (folder / "adapter" / "adapter_model.safetensors").exists()
    assert not [path for path in (tmp_path / "run").rglob("*") if path.suffix in (".pt", ".bin", ".pkl", ".pickle")]


def test_sigterm_saves_and_the_same_command_finishes(tiny_llama: str, chats: str, tmp_path: Path) -> None:
    keys = recipe(tiny_llama, chats, tmp_path / "run", max_steps=80)
    straight = {**keys, "output_dir": str(tmp_path / "straight")}
    path = tmp_path / "r.json"
    path.write_text(json.dumps(keys))
    command = [sys.executable, "-m", "llmtune", "train", str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    assert "Run the same command again" in output
    assert llmtune.load(tmp_path / "run").status == "interrupted"
    assert "status" in json.loads((tmp_path / "run" / "run.json").read_text())
    subprocess.run(command, check=True, capture_output=True)
    llmtune.train(straight)
    assert_equal_runs(tmp_path / "straight", tmp_path / "run")


@pytest.fixture
def unfinished(tiny_llama: str, chats: str, tmp_path: Path) -> dict[str, Any]:
    keys = recipe(tiny_llama, chats, tmp_path / "run", max_steps=4)
    stop_after(keys, 3)
    return keys


def test_a_damaged_checkpoint_is_passed_over_and_named(unfinished: dict[str, Any], capsys: Any) -> None:
    newest = Path(unfinished["output_dir"]) / "checkpoints" / "step-00000003"
    victim = next((newest / "state").glob("*.safetensors"))
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    llmtune.train(unfinished)
    said = capsys.readouterr().out
    assert "step-00000002" in said and f"{victim}: its content does not match" in said


def test_if_no_checkpoint_is_sound_the_run_does_not_start_over(unfinished: dict[str, Any]) -> None:
    for folder in (Path(unfinished["output_dir"]) / "checkpoints").glob("step-*"):
        next((folder / "state").glob("*.safetensors")).write_bytes(b"")
    with pytest.raises(CheckpointError, match="no checkpoint is sound: .*0 bytes, the manifest says"):
        llmtune.train(unfinished)


def test_a_partial_checkpoint_is_invisible(unfinished: dict[str, Any]) -> None:
    root = Path(unfinished["output_dir"]) / "checkpoints"
    shutil.copytree(root / "step-00000003", root / ".step-00000004.partial")
    found = step_folders.newest(root)
    assert found is not None and found[0].name == "step-00000003"
    assert llmtune.train(unfinished).status == "done"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 0.5}, r"other values of learning_rate \(was 0.01, now 0.5\)"),
        ({"seed": 1}, "other values of seed"),
        ({"per_device_train_batch_size": 2}, "started with 8 rows a step .* this recipe makes 4"),
        ({"peft_config": {"name": "lora", "r": 8}}, "other values of peft_config"),
    ],
)
def test_another_recipe_cannot_continue_the_run(
    change: dict[str, Any], message: str, unfinished: dict[str, Any]
) -> None:
    with pytest.raises(CheckpointError, match=message):
        llmtune.train({**unfinished, **change})


def test_what_does_not_change_the_result_may_differ(unfinished: dict[str, Any]) -> None:
    changed = {"logging_steps": 2, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    assert llmtune.train({**unfinished, **changed}).status == "done"


def test_folders_that_are_not_ours_are_left_alone(tiny_llama: str, chats: str, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "cat.jpg").write_text("cat")
    for extra in ({}, {"overwrite_output_dir": True}):
        with pytest.raises(PlanError, match="holds no run of llmtune"):
            llmtune.train(recipe(tiny_llama, chats, folder, **extra))
    assert (folder / "cat.jpg").read_text() == "cat"


def test_a_finished_run_is_not_overwritten_by_accident(tiny_llama: str, chats: str, tmp_path: Path) -> None:
    keys = recipe(tiny_llama, chats, tmp_path / "run", max_steps=2)
    llmtune.train(keys)
    with pytest.raises(PlanError, match="holds a finished run.*overwrite_output_dir=true"):
        llmtune.train(keys)
    assert llmtune.train({**keys, "overwrite_output_dir": True}).status == "done"


def test_a_plan_beside_a_finished_run_is_shown_with_a_note(tiny_llama: str, chats: str, tmp_path: Path) -> None:
    keys = recipe(tiny_llama, chats, tmp_path / "run", max_steps=1)
    llmtune.train(keys)
    plan = llmtune.plan(keys, ranks=64, device="h100")
    assert f"Note: a run would not start. output_dir: {tmp_path / 'run'} holds a finished run" in str(plan)
    assert plan.cost.device.name == "h100"


def test_checkpoints_at_the_end_of_each_epoch(tiny_llama: str, chats: str, tmp_path: Path) -> None:
    keys = recipe(tiny_llama, chats, tmp_path / "run", max_steps=7, save_strategy="epoch", save_steps=1)
    llmtune.train(keys)
    kept = sorted(int(path.name[5:]) for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == [3, 6, 7]  # three steps an epoch; the last step is saved, too
    llmtune.train({**keys, "output_dir": str(tmp_path / "none"), "max_steps": 1, "save_strategy": False})
    assert not list((tmp_path / "none" / "checkpoints").iterdir())


def test_retention_keeps_the_newest_and_the_best(tiny_llama: str, chats: str, tmp_path: Path) -> None:
    keys = recipe(
        tiny_llama, chats, tmp_path / "run", save_steps=1, save_total_limit=2, max_steps=6, learning_rate=0.5,
        eval_dataset=chats, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
    )  # fmt: skip
    run = llmtune.train(keys)
    losses = {row["step"]: row["eval_loss"] for row in run.metrics if "eval_loss" in row}
    best = min(losses, key=losses.__getitem__)
    left = {int(path.name[5:]) for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert best in left and 6 in left and len(left) == 2
    stored = checkpoint.read_trained(tmp_path / "run" / "checkpoints" / f"step-{best:08d}")
    for name, tensor in trained(tmp_path / "run").items():
        assert torch.equal(tensor, stored[name])


def test_early_stopping_counts_evaluations_without_gain(tiny_llama: str, chats: str, tmp_path: Path) -> None:
    keys = recipe(
        tiny_llama, chats, tmp_path / "run", learning_rate=1e-12, eval_dataset=chats, eval_strategy="steps",
        eval_steps=1, early_stopping_patience=3, early_stopping_threshold=0.01,
    )  # fmt: skip
    run = llmtune.train(keys)
    assert max(row["step"] for row in run.metrics) == 4  # one to set the mark, three without gain
    assert run.status == "done"


def test_a_loss_that_is_not_finite_stops_before_the_update(tiny_llama: str, chats: str, tmp_path: Path) -> None:
    keys = recipe(
        tiny_llama, chats, tmp_path / "run", peft_config=None, learning_rate=1e30, save_steps=1, max_grad_norm=0
    )
    with pytest.raises(LlmtuneError, match=r"step \d+: the loss is .* stopped before the update.*Lower learning_rate"):
        llmtune.train(keys)
    assert llmtune.load(tmp_path / "run").status == "failed"
    newest = step_folders.newest(tmp_path / "run" / "checkpoints")
    assert newest is not None
    assert all(tensor.isfinite().all() for tensor in checkpoint.read_trained(newest[0]).values())
