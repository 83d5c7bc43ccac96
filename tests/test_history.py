"""Runs are found, listed, compared and drawn from their folders alone, whatever state those are in."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import llmtune
from llmtune.cli import main
from llmtune.contract.errors import CheckpointError, PlanError
from llmtune.history.listing import RunList
from llmtune.history.read import find_runs
from llmtune.history.summary import RunSummary
from llmtune.training.plot import plot_runs, smooth
from tests.terminal import on_terminal

SETTINGS: dict[str, Any] = {
    "model": "owner/small", "dataset": "chats.jsonl", "template": None, "learning_rate": 1e-4, "output_dir": "runs/x",
    "stage_config": {"name": "sft"}, "peft_config": {"name": "lora", "r": 8},
}  # fmt: skip

Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Writes a run's folder as a run would have: `rate` 100 tokens a second, 50 tokens a step."""

    def make(name: str, losses: list[float], *, record: dict[str, Any] | None = None, **settings: Any) -> Path:
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        given = {
            "status": "done", "packages": {"llmtune": "0.1.0", "torch": "2.13.0"}, "device": "cpu", "ranks": 2,
            "updated": f"2026-01-01T00:00:{len(os.listdir(folder.parent)):02}+00:00", "steps": 10,
            "peak_memory_bytes": 3 * 2**30, "planned_memory_bytes": 2**31, "command": ["llmtune", "train", "a.yaml"],
        }  # fmt: skip
        (folder / "run.json").write_text(json.dumps(given | (record or {})))
        (folder / "resolved.yaml").write_text(yaml.safe_dump(SETTINGS | settings))
        rows = [
            {"step": at, "epoch": at / 10, "loss": loss, "learning_rate": 1e-4, "tokens": 50 * at,
             "tokens_per_second": 100.0}
            for at, loss in enumerate(losses, 1)
        ]  # fmt: skip
        rows += [{"step": len(losses), "epoch": 0.5, "eval_loss": losses[-1] + 0.5, "eval_rewards/accuracies": 0.75}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder

    return make


def test_a_summary_has_what_the_folder_tells(make: Make) -> None:
    folder = make("a", [3.0, 1.0, 2.0])
    (folder / "predict_results.json").write_text('{"eval_exact_match": 40.0, "predictions": 7}')
    (folder / "benchmarks").mkdir()
    (folder / "benchmarks" / "mmlu.json").write_text('{"task": "mmlu", "metrics": {"acc": 0.25, "why": "text"}}')
    (folder / "benchmarks" / "step-00000002").mkdir()
    (folder / "benchmarks" / "step-00000002" / "mmlu.json").write_text('{"task": "mmlu", "metrics": {"acc": 0.5}}')
    run = RunSummary.of(folder)
    assert (run.status, run.stage, run.method, run.step, run.steps) == ("done", "sft", "lora", 3, 10)
    assert (run.loss, run.eval_loss) == (2.0, 2.5)
    assert run.best_loss is not None and (run.best_loss.value, run.best_loss.step) == (1.0, 2)
    assert run.training_seconds == pytest.approx(1.5)  # 150 tokens, 100 a second
    assert run.tokens_per_second == pytest.approx(100.0)
    assert run.results == {"eval_exact_match": 40.0, "predictions": 7, "mmlu acc": 0.25,
                           "mmlu acc of step-00000002": 0.5}  # fmt: skip
    text = str(run)
    for part in ("sft, lora", "3 of 10, 0:02 in steps", "3.00 GiB at most on a rank, 2.00 GiB planned", "2 ranks",
                 "2.0000, lowest 1.0000 at step 2", "mmlu acc 0.25", "eval loss"):  # fmt: skip
        assert part in text, text


def test_time_in_steps_is_that_of_all_starts(make: Make) -> None:
    folder = make("a", [2.0])
    rows = [{"step": 1, "tokens": 100, "tokens_per_second": 50.0}, {"step": 2, "tokens": 300, "tokens_per_second": 20}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = RunSummary.of(folder)
    assert run.training_seconds == pytest.approx(100 / 50 + 200 / 20)
    assert run.tokens_per_second == pytest.approx(300 / 12)


def test_runs_are_found_below_a_folder_and_foreign_folders_are_not(make: Make, tmp_path: Path) -> None:
    first, second = make("a", [1.0]), make("deep/er/b", [1.0])
    make("a/model/inside", [1.0])  # nothing inside of a run is one
    (tmp_path / "runs" / "wandb").mkdir()
    (tmp_path / "runs" / "wandb" / "run.json").write_text('{"id": "abc"}')
    (tmp_path / "runs" / "text").mkdir()
    (tmp_path / "runs" / "text" / "run.json").write_text("not of llmtune")
    assert list(find_runs([tmp_path])) == [first, second]
    assert list(find_runs([first, tmp_path, tmp_path])) == [first, second]


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("run.json", b"", "run.json: cannot be read"),
        ("run.json", b"\0\0\0", "run.json: cannot be read"),
        ("run.json", b'{"status": "ru', "run.json: cannot be read"),
        ("resolved.yaml", b"[1, 2", "resolved.yaml: cannot be read"),
        ("resolved.yaml", b"- a\n- b\n", "resolved.yaml: holds no mapping"),
        ("resolved.yaml", None, "resolved.yaml: is not there"),
        ("metrics.jsonl", b'{"step": 1, "loss": 2.0}\noops\n{"step": 3, "loss": 1.0}\n', "metrics.jsonl:2: not a JSON"),
        ("metrics.jsonl", b'{"step": 1, "loss": "text", "tokens": {}}\n[3]\n', "metrics.jsonl:2: not a JSON"),
        ("metrics.jsonl", b'\xff\xfe\n{"step": 3, "loss": 1.0}\n', "metrics.jsonl:1: not a JSON"),
        ("benchmarks/mmlu.json", b"{", "mmlu.json: cannot be read"),
    ],
)
def test_a_damaged_folder_is_shown_as_far_as_it_goes(
    make: Make, file: str, content: bytes | None, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make("a", [2.0, 1.0])
    (folder / "benchmarks").mkdir()
    (folder / file).unlink(missing_ok=True)
    if content is not None:
        (folder / file).write_bytes(content)
    for command in ("list", "show", "compare"):
        assert main(["runs", command, str(folder)]) == 0
    out, err = capsys.readouterr()
    assert said in " ".join((out + err).split()) and "a" in out
    assert main(["runs", "show", str(folder), "--json"]) == 0
    json.loads(capsys.readouterr().out)


def test_an_unfinished_run_says_how_far_it_is_and_whether_it_lives(make: Make) -> None:
    folder = make("a", [2.0], record={"status": "running"})
    (folder / "metrics.jsonl").write_text((folder / "metrics.jsonl").read_text() + '{"step": 2, "lo')
    lock = {"host": socket.gethostname(), "pid": os.getpid(), "started": "now"}
    (folder / ".lock").write_text(json.dumps(lock))
    run = RunSummary.of(folder)
    assert (run.status, run.step, run.problems) == ("running", 1, [])
    ended = subprocess.Popen([sys.executable, "-c", "pass"])
    ended.wait()
    (folder / ".lock").write_text(json.dumps(lock | {"pid": ended.pid}))
    assert RunSummary.of(folder).status == "killed"
    (folder / ".lock").write_text(json.dumps(lock | {"pid": ended.pid, "host": "elsewhere"}))
    assert RunSummary.of(folder).status == "running"


def test_settings_that_differ_are_compared_and_the_rest_is_not(make: Make) -> None:
    make("a", [2.0]), make("b", [1.0], learning_rate=3e-4, peft_config={"name": "lora", "r": 16}, output_dir="runs/b")
    make("c", [1.0], record={"device": "cuda"}, peft_config=None, dataset=["x", "y"])
    found = RunList.below(make("d", [1.0]).parent).compare()
    assert found.settings == {
        "dataset": ["chats.jsonl", "chats.jsonl", ["x", "y"], "chats.jsonl"],
        "learning_rate": [1e-4, 3e-4, 1e-4, 1e-4],
        "peft_config.name": ["lora", "lora", None, "lora"], "peft_config.r": [8, 16, None, 8],
    }  # fmt: skip
    assert found.surroundings == {"device": ["cpu", "cpu", "cuda", "cpu"]}
    assert found.note == "Losses may be over other tokens, and not comparable: the runs differ in dataset."
    assert "eval_rewards/accuracies" in str(found)
    dropout = make("e", [1.0], peft_config={"name": "lora", "r": 8, "lora_dropout": 0.05})  # which is the default
    written = RunList.below(*(run.folder for run in found.runs if run.folder.name in "ab"), dropout).compare()
    assert "peft_config.lora_dropout" not in written.settings and written.settings["peft_config.r"] == [8, 16, 8]
    alike = RunList.below(*(run.folder for run in found.runs if run.folder.name in "ad")).compare()
    assert alike.settings == {} and alike.note is None and "The runs have the same settings." in str(alike)


def test_commands_take_names_and_folders_and_answer_machines(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["runs", "list"]) == 0
    assert "No runs of llmtune below runs." in capsys.readouterr().out
    make("a", [2.0, math.nan]), make("b", [1.0], learning_rate=3e-4)
    assert main(["runs", "list"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["run", "status", "model"] and [row.split()[0] for row in rows] == ["a", "b"]
    assert main(["runs", "show", "a", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["folder"] == "runs/a" and shown["loss"] == "nan" and shown["settings"]["peft_config"]["r"] == 8
    assert main(["runs", "compare", "b", "runs", "--json"]) == 0
    compared = json.loads(capsys.readouterr().out)
    assert [run["folder"] for run in compared["runs"]] == ["runs/b", "runs/a"]
    assert compared["settings"] == {"learning_rate": [3e-4, 1e-4]}
    assert main(["runs", "list", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 2
    for words in (["show", "c"], ["compare", "a", "c"], ["list", "c"]):
        assert main(["runs", *words]) == 4
        assert "c: " in capsys.readouterr().err


def test_curves_of_several_runs_are_drawn_into_one_picture(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    make("a", [3.0, 2.0]), make("b", [2.0, 1.0])
    figure = RunList.below(tmp_path).plot(metrics=["loss", "rewards/accuracies"], across="tokens")
    loss, accuracy = figure.axes
    assert loss.lines[0].get_xydata().tolist() == [[50, 3.0], [100, 2.0]]
    assert loss.lines[1].get_xydata().tolist() == [[100, 2.5]]  # the evaluation, at the tokens of its step
    assert loss.lines[2].get_xydata().tolist() == [[50, 2.0], [100, 1.0]]
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["a", "a evaluation", "b", "b evaluation"]
    assert loss.lines[0].get_color() == loss.lines[1].get_color() != loss.lines[2].get_color()
    assert accuracy.get_title("left") == "rewards/accuracies"
    for name, begins in (("out.png", b"\x89PNG"), ("out.svg", b"<?xml")):
        words = ["runs", "plot", str(tmp_path), "-o", str(tmp_path / name), "--smooth", "0.5"]
        assert main([*words, "--metrics", "loss,learning_rate"]) == 0
        assert (tmp_path / name).read_bytes().startswith(begins)
    assert main([*words, "--metrics", "los"]) == 2
    assert 'no run has logged "los". Did you mean "loss"?' in capsys.readouterr().err
    for wrong in (["--smooth", "1"], ["--across", "hours"], ["-o", "curves"]):
        assert main([*words, *wrong]) == 2
        assert "allowed is" in capsys.readouterr().err


def test_smoothing_is_a_running_mean_without_bias_at_its_start() -> None:
    assert smooth([4.0, 4.0, 4.0], 0.9) == pytest.approx([4.0] * 3)
    assert smooth([1.0, 3.0], 0.5) == pytest.approx([1.0, (0.5 * 1 + 3) / 1.5])
    with pytest.raises(PlanError, match="no run has logged"):
        plot_runs({"a": []}, metrics=["loss"])


def test_from_python(make: Make, tmp_path: Path) -> None:
    make("a", [2.0]), make("b", [1.0])
    runs = llmtune.runs(tmp_path)
    assert [run.folder.name for run in runs] == ["a", "b"] and runs[1].loss == 1.0
    assert str(runs.compare().runs[0].folder) in runs.as_dicts()[0]["folder"]
    with pytest.raises(CheckpointError, match="holds no run of llmtune"):
        RunSummary.of(tmp_path)


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_tables_fit_the_terminal(make: Make, tmp_path: Path, columns: int) -> None:
    for name in ("a-longer-name", "b", "c", "d", "e"):
        make(name, [2.0], learning_rate=len(name) * 1e-5)
    for words in (["list"], ["compare", "runs"]):
        screen = on_terminal(["-m", "llmtune", "runs", *words], columns=columns, folder=tmp_path)
        assert screen.code == 0 and screen.lines == screen.unbroken, screen.text
        assert all(name in screen.text for name in ("a-longer-name", "e", "loss"))


def test_looking_at_runs_loads_no_torch(make: Make, tmp_path: Path) -> None:
    make("a", [2.0])
    code = (
        "import sys\nfrom llmtune.cli import main\n"
        f"import llmtune; assert len(llmtune.runs({str(tmp_path)!r})) == 1\n"
        f"assert main(['runs', 'list', {str(tmp_path)!r}]) == main(['runs', 'compare', {str(tmp_path)!r}]) == 0\n"
        "print([name for name in ('torch', 'transformers', 'numpy', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
