"""What starts over, what goes on, and what in a folder is never deleted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import llmtune
from llmtune.contract.errors import CheckpointError, PlanError
from llmtune.recipe.recipe import load_recipe
from llmtune.training import run_folder, step_folders
from llmtune.training.run_folder import read_record
from tests.runs import recipe
from tests.test_resume import stop_after, trained


@pytest.fixture(scope="module")
def runs(tiny_llama: str, chats: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """A recipe of four steps, and a folder with its runs: `finished`, and `unfinished` after step 3."""
    root = tmp_path_factory.mktemp("runs")
    keys = recipe(tiny_llama, chats, root / "unfinished", max_steps=4)
    stop_after(keys, 3)
    llmtune.train({**keys, "output_dir": str(root / "finished"), "save_steps": 2})
    return keys, root


@pytest.fixture
def place(runs: tuple[dict[str, Any], Path], tmp_path: Path) -> dict[str, Any]:
    """The recipe, writing into a copy of both runs in `tmp_path`."""
    keys, root = runs
    for name in ("unfinished", "finished"):
        shutil.copytree(root / name, tmp_path / name)
    return {**keys, "output_dir": str(tmp_path / "unfinished")}


def steps(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in step_folders.published(folder / "checkpoints")]


def test_overwriting_is_meant_for_a_finished_run(place: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    """The key stands in the file, and the same command continues what was interrupted."""
    keys = {**place, "overwrite_output_dir": True, "save_steps": 1}
    assert llmtune.train(keys).status == "done"
    assert "Continuing after step 3" in capsys.readouterr().out
    assert steps(tmp_path / "unfinished") == [1, 2, 3, 4]
    llmtune.train({**keys, "save_steps": 4})
    assert "Continuing" not in capsys.readouterr().out and steps(tmp_path / "unfinished") == [4]


@pytest.mark.parametrize("which", ["unfinished", "finished"])
def test_a_fresh_start_has_to_be_asked_for(which: str, place: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    run = llmtune.train({**place, "save_steps": 4}, fresh=True, output_dir=str(tmp_path / which))
    assert "Continuing" not in capsys.readouterr().out
    assert steps(tmp_path / which) == [4] and [row["step"] for row in run.metrics] == [1, 2, 3, 4]


def test_the_command_line_asks_for_a_fresh_start(place: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    from llmtune.cli import main

    (tmp_path / "r.json").write_text(json.dumps(place))
    assert main(["train", str(tmp_path / "r.json"), "--fresh", "save_steps=4"]) == 0
    assert "Continuing" not in capsys.readouterr().out and steps(tmp_path / "unfinished") == [4]


def test_checkpoints_behind_a_link_are_replaced_too(place: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    folder, disk = tmp_path / "finished", tmp_path / "disk"
    (folder / "checkpoints").rename(disk)
    (folder / "checkpoints").symlink_to(disk)
    (disk / "notes.txt").write_text("mine")
    llmtune.train({**place, "save_steps": 3, "overwrite_output_dir": True, "output_dir": str(folder)})
    assert "Continuing" not in capsys.readouterr().out
    assert (folder / "checkpoints").is_symlink() and steps(folder) == [3, 4]
    assert (disk / "notes.txt").read_text() == "mine"


def test_a_run_from_a_path_goes_on_with_its_own_checkpoints(place: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    start = tmp_path / "unfinished" / "checkpoints" / "step-00000002"
    keys = {**place, "output_dir": str(tmp_path / "other"), "resume_from_checkpoint": str(start)}
    stop_after(keys, 3)
    capsys.readouterr()
    assert llmtune.train(keys).status == "done"
    assert f"Continuing after step 3 from {tmp_path / 'other'}" in capsys.readouterr().out
    expected, found = trained(tmp_path / "finished"), trained(tmp_path / "other")
    assert all(expected[name].equal(found[name]) for name in expected)


def test_what_the_run_reads_is_not_deleted_by_it(place: dict[str, Any], tiny_llama: str, tmp_path: Path) -> None:
    folder = tmp_path / "finished"
    model = Path(shutil.copytree(tiny_llama, folder / "model" / "base"))
    adapter = {"name": "lora", "adapter_name_or_path": str(folder / "model")}
    (folder / "mine.jsonl").write_text(Path(place["dataset"]).read_text())
    for change in (
        {"model": str(model)}, {"peft_config": adapter}, {"eval_dataset": str(folder / "mine.jsonl")},
    ):  # fmt: skip
        keys = {**place, **change, "output_dir": str(folder), "overwrite_output_dir": True}
        with pytest.raises(PlanError, match=f"^{next(iter(change))}.*lies in output_dir .*copy it elsewhere"):
            llmtune.train(keys, fresh=True)
    assert (model / "config.json").exists() and (folder / "model" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("content", ['{"status": "done"}', '{"packages": "none"}', "{}"])
def test_any_run_json_is_not_a_run_of_ours(content: str, place: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "athletics"
    (folder / "model").mkdir(parents=True)
    (folder / "run.json").write_text(content)
    (folder / "model" / "shoes.txt").write_text("mine")
    for fresh in (False, True):
        with pytest.raises(PlanError, match="holds no run of llmtune"):
            llmtune.train({**place, "output_dir": str(folder), "overwrite_output_dir": True}, fresh=fresh)
    assert (folder / "model" / "shoes.txt").read_text() == "mine" and (folder / "run.json").read_text() == content


def test_only_what_llmtune_wrote_is_deleted(place: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "finished"
    mine = [folder / "notes.txt", folder / "model" / "mine.txt", folder / "checkpoints" / "step-00000003.bak" / "a"]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    changes = {"output_dir": str(folder), "overwrite_output_dir": True, "save_steps": 1, "save_total_limit": 1}
    llmtune.train({**place, **changes})
    assert steps(folder) == [4] and (folder / "model" / "adapter_model.safetensors").exists()
    assert [path.read_text() for path in mine if path.exists() and path.parent.name != "model"] == ["mine", "mine"]


@pytest.mark.parametrize("which", ["unfinished", "finished"])
def test_what_loggers_wrote_goes_where_the_run_starts_over(which: str, place: dict[str, Any], tmp_path: Path) -> None:
    old = tmp_path / which / "loggers" / "tensorboard" / "events.out.tfevents.1"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"")
    keys = {**place, "output_dir": str(tmp_path / which), "overwrite_output_dir": True, "logger_config": "tensorboard"}
    llmtune.train(keys)
    assert old.exists() == (which == "unfinished")  # which is continued
    assert len(list(old.parent.iterdir())) == 1 + old.exists()


def test_a_start_that_was_killed_at_once_can_be_repeated(place: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    folder.mkdir()
    for name in (".lock", "run.json.partial", ".probe-1"):
        (folder / name).write_text("")
    run_folder.check_folder(load_recipe({**place, "output_dir": str(folder)}))
    (folder / "run.json").write_text(json.dumps({"packages": {"llmtune": "0.1"}, "result": ["model/../../mine"]}))
    (tmp_path / "mine").write_text("mine")
    run_folder.clear(folder)
    (folder / "notes.txt").write_text("mine")
    run_folder.check_folder(load_recipe({**place, "output_dir": str(folder)}))  # it is still a run's
    assert (tmp_path / "mine").exists() and read_record(folder).keys() == {"status", "packages"}


def test_a_record_that_a_power_cut_emptied(place: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "unfinished" / "run.json").write_text("")
    assert llmtune.train(place).status == "done"
    assert "Continuing after step 3" in capsys.readouterr().out


def test_the_result_appears_whole_and_on_record(place: dict[str, Any], tmp_path: Path) -> None:
    import hashlib

    folder = tmp_path / "finished"
    record = read_record(folder)
    assert all((folder / name).is_file() for name in record["result"])
    assert "model/adapter_model.safetensors" in record["result"]
    assert record["trained_sha256"] == hashlib.sha256((folder / "trained.safetensors").read_bytes()).hexdigest()
    assert (folder / "chat_template.jinja").read_text() and record["seconds"] > 0
    assert record["peak_memory_bytes"] > 2**20
    assert not [path.name for path in folder.iterdir() if path.name.endswith((".partial", ".former"))]
    assert all(row["peak_memory_bytes"] > 2**20 for row in llmtune.load(folder).metrics)


def test_an_unfinished_run_asks_how_to_go_on(place: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match="unfinished run; set resume_from_checkpoint=auto .* --fresh"):
        llmtune.train({**place, "resume_from_checkpoint": False})
    with pytest.raises(CheckpointError, match="other values of seed .* --fresh"):
        llmtune.train({**place, "seed": 1})
