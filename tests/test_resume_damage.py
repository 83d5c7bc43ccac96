"""Checkpoints that were damaged, edited or lost: named, set aside, and never the reason to lose a sound one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import llmtune
from llmtune.contract.errors import CheckpointError, DivergedError
from llmtune.distributed.ranks import Ranks
from llmtune.training import checkpoint, step_folders
from llmtune.training.manifest import Manifest, read_manifest, verify
from tests.runs import recipe
from tests.test_resume import assert_equal_runs, stop_after


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The checkpoint of a single layer."""
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(4)).sum().backward()
    optimizer.step()
    numbers = {"tokens": 7, "loss": 0.1 + 0.2, "nan": float("nan")}
    manifest = Manifest(step=6, ranks=1, rows=2, recipe={"seed": 1}, plugins={}, llmtune="", numbers=numbers)
    return checkpoint.save(tmp_path, model, optimizer, manifest, Ranks())


@pytest.mark.parametrize(
    ("before", "after"), [('"step": 6', '"step": 2'), ('"rows": 2', '"rows": 6'), ('"value": 1.0', '"value": 3.0')]
)
def test_one_altered_number_in_a_manifest_is_found(before: str, after: str, saved: Path) -> None:
    assert read_manifest(saved).numbers["tokens"] == 7 and verify(saved).step == 6
    path = saved / "manifest.json"
    assert before in path.read_text()
    path.write_text(path.read_text().replace(before, after))
    with pytest.raises(CheckpointError, match=r"manifest\.json: its content does not match its own SHA-256"):
        verify(saved)


@pytest.mark.parametrize("content", ["[1, 2]", '"text"', '{"schema": 2, "sha256": ""}', '{"schema": 1, "odd": 1}', ""])
def test_a_manifest_of_another_form_is_one_sentence(content: str, saved: Path) -> None:
    (saved / "manifest.json").write_text(content)
    with pytest.raises(CheckpointError, match=str(saved)):
        verify(saved)


def test_manifests_of_the_former_release_are_read(saved: Path) -> None:
    path = saved / "manifest.json"
    content = json.loads(path.read_text())
    for name in ("sha256", "origins"):
        del content[name]
    path.write_text(json.dumps({**content, "schema": 1}))
    assert verify(saved).step == 6


def test_names_that_are_not_ours_are_left_alone(saved: Path, tmp_path: Path) -> None:
    mine = [tmp_path / name for name in ("step-00000001.bak", "step-1", ".step-x.partial", "old-step-00000001")]
    for folder in mine:
        folder.mkdir()
    (tmp_path / ".step-00000007.partial").mkdir()
    assert step_folders.published(tmp_path) == [saved]
    assert step_folders.set_aside(saved).name == "step-00000006.damaged"
    saved.mkdir()
    assert step_folders.set_aside(saved).name == "step-00000006.damaged-2"
    step_folders.retain(tmp_path, 1, set())
    step_folders.delete_all(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(mine)


def test_more_steps_than_digits_are_still_in_order(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000, 7):
        step_folders.step_folder(tmp_path, step).mkdir()
    assert [path.name for path in step_folders.published(tmp_path)][-2:] == ["step-99999999", "step-100000000"]


@pytest.mark.parametrize("damage", ["bit", "gone", "manifest"])
def test_a_run_finishes_although_its_newest_checkpoint_is_damaged(
    damage: str, tiny_llama: str, chats: str, tmp_path: Path, capsys: Any
) -> None:
    straight = recipe(tiny_llama, chats, tmp_path / "straight", max_steps=4, save_steps=1)
    llmtune.train(straight)
    keys = {**straight, "output_dir": str(tmp_path / "run")}
    stop_after(keys, 3)
    keys["save_total_limit"] = 2
    newest = tmp_path / "run" / "checkpoints" / "step-00000003"
    victim = newest / "manifest.json" if damage == "manifest" else next((newest / "state").glob("*.safetensors"))
    content = bytearray(victim.read_bytes())
    content[-40] ^= 1
    victim.write_bytes(content)
    if damage == "gone":
        victim.unlink()
    assert llmtune.train(keys).status == "done"
    said = capsys.readouterr().out
    assert "Continuing after step 2" in said and f"now step-00000003.damaged: {victim}" in said.replace("\n", " ")
    left = sorted(path.name for path in newest.parent.iterdir())
    assert left == ["step-00000003", "step-00000003.damaged", "step-00000004"]
    assert_equal_runs(tmp_path / "straight", tmp_path / "run")


def test_lost_best_weights_are_told(tiny_llama: str, chats: str, tmp_path: Path, capsys: Any) -> None:
    keys = recipe(
        tiny_llama, chats, tmp_path / "run", max_steps=4, learning_rate=1e-30, save_steps=1, eval_dataset=chats,
        eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
    )  # fmt: skip
    stop_after(keys, 3)
    best = read_manifest(tmp_path / "run" / "checkpoints" / "step-00000003").numbers["best_step"]
    assert best == 1  # evaluations that learn nothing are all alike
    victim = next((tmp_path / "run" / "checkpoints" / f"step-{best:08d}" / "state").glob("*.safetensors"))
    victim.write_bytes(b"")
    capsys.readouterr()
    assert llmtune.train(keys).status == "done"
    said = capsys.readouterr().out
    assert f"The best weights so far were those of step {best}, which are lost ({victim}: 0 bytes" in said


def test_weights_that_are_not_finite_are_never_saved(tiny_llama: str, chats: str, tmp_path: Path) -> None:
    """The loss of the last step is finite; its update is what spoils the weights."""
    for number, save_steps in enumerate((None, 1)):
        folder = tmp_path / f"run{number}"
        keys = recipe(
            tiny_llama, chats, folder, peft_config=None, learning_rate=1e39, max_steps=1, save_steps=save_steps
        )
        with pytest.raises(DivergedError, match=r"step 1: .*not finite .*nothing of this step is saved"):
            llmtune.train(keys)
        assert llmtune.load(folder).status == "failed" and not (folder / "model").exists()
        assert step_folders.published(folder / "checkpoints") == []
