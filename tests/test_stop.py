"""SIGTERM and Ctrl-C at every moment of a run: acknowledged, nothing lost, the documented code, no process left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import llmtune
from llmtune.cli import main
from llmtune.distributed.stopping import Stopped, StopRequest
from llmtune.training import callbacks, checkpoint, run
from llmtune.training.step_folders import published
from tests.runs import recipe
from tests.test_resume import assert_equal_runs


def send(*numbers: signal.Signals) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


def test_a_request_raises_where_nothing_has_to_be_saved() -> None:
    before = signal.getsignal(signal.SIGTERM)
    for number in (signal.SIGTERM, signal.SIGINT):
        with pytest.raises(Stopped, match="stopped while planning; run the same command again"), StopRequest() as stop:
            stop.doing = "while planning"
            send(number)
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_request_is_acknowledged_at_once_and_a_second_one_obeyed(capfd: Any) -> None:
    with StopRequest() as stop, stop.finishing(lambda: "finishing step 7, then saving"):
        send(signal.SIGTERM, signal.SIGTERM)
        assert stop.asked and not stop.ordered
        assert capfd.readouterr().err == "\nllmtune: finishing step 7, then saving; Ctrl-C again to stop now\n"
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
        assert stop.ordered


def at(number: int, call: Callable[..., Any], then: Callable[[], None]) -> Callable[..., Any]:
    """`call`, but before its `number`th time `then` is done."""
    calls = []

    def wrapped(*arguments: Any, **keywords: Any) -> Any:
        calls.append(number)
        if len(calls) == number:
            then()
        return call(*arguments, **keywords)

    return wrapped


@pytest.mark.parametrize("step", [2, 4])
def test_an_evaluation_is_left_and_done_again(
    step: int, tiny_llama: str, chats: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    straight = recipe(
        tiny_llama, chats, tmp_path / "straight", max_steps=4, eval_dataset=chats, eval_strategy="steps", eval_steps=2
    )
    llmtune.train(straight)
    keys, seen, whole = {**straight, "output_dir": str(tmp_path / "run")}, [], callbacks.evaluation_batches

    def interrupted(*arguments: Any, **keywords: Any) -> Iterator[Any]:
        seen.append(0)
        for number, batch in enumerate(whole(*arguments, **keywords)):
            seen[-1] = number
            if number == 1 and len(seen) == step // 2:
                send(signal.SIGTERM)
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(callbacks, "evaluation_batches", interrupted)
        assert llmtune.train(keys).status == "interrupted"
    assert seen[-1] == 1, "it was not left at once"
    assert f"leaving the evaluation of step {step}, then saving" in capfd.readouterr().err
    assert [path.name for path in published(tmp_path / "run" / "checkpoints")] == [f"step-{step:08d}"]
    assert llmtune.train(keys).status == "done"
    assert_equal_runs(tmp_path / "straight", tmp_path / "run")
    values = [[row.get("eval_loss") for row in llmtune.load(tmp_path / name).metrics] for name in ("straight", "run")]
    assert values[0] == values[1]


@pytest.mark.parametrize(
    ("what", "which", "save_steps"),
    [
        ("make_plan", 1, None), ("build_run", 1, None), ("sample_answers", 1, None), ("sample_answers", 2, 2),
        ("write_result", 1, 2),
    ],
)  # fmt: skip
def test_stopped_where_nothing_has_to_be_saved(
    what: str, which: int, save_steps: int | None, tiny_llama: str, chats: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: Any,
) -> None:  # fmt: skip
    """Exit code 75, one line, and the same command finishes."""
    keys = recipe(tiny_llama, chats, tmp_path / "run", max_steps=2, save_steps=save_steps, sample_prompts=["Hi"])
    (tmp_path / "r.json").write_text(json.dumps(keys))
    with monkeypatch.context() as patch:
        patch.setattr(run, what, at(which, getattr(run, what), lambda: send(signal.SIGTERM)))
        assert main(["train", str(tmp_path / "r.json")]) == 75
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("llmtune: ")]
    assert len(said) == 1 and said[0].endswith("run the same command again to continue"), said
    if what != "make_plan":
        assert llmtune.load(tmp_path / "run").status == "interrupted"
    assert main(["train", str(tmp_path / "r.json")]) == 0


def test_a_result_that_nothing_else_holds_is_written_to_its_end(
    tiny_llama: str, chats: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """Nobody has to run the command again: the run is whole, and its exit code says so."""
    keys = recipe(tiny_llama, chats, tmp_path / "run", max_steps=1)
    (tmp_path / "r.json").write_text(json.dumps(keys))
    monkeypatch.setattr(run, "write_result", at(1, run.write_result, lambda: send(signal.SIGTERM)))
    assert main(["train", str(tmp_path / "r.json")]) == 0
    finished = llmtune.load(tmp_path / "run")
    assert finished.status == "done" and (tmp_path / "run" / "model").is_dir()
    assert "llmtune: finishing the run; Ctrl-C again" in capfd.readouterr().err


def test_a_second_ctrl_c_in_a_save_ends_with_one_line(
    tiny_llama: str, chats: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    keys = recipe(tiny_llama, chats, tmp_path / "run", max_steps=4)
    (tmp_path / "r.json").write_text(json.dumps(keys))

    def wrapped(*_: Any) -> None:
        try:
            send(signal.SIGINT)
        except KeyboardInterrupt as error:  # as torch.distributed.checkpoint does
            raise RuntimeError("CheckpointException ranks:dict_keys([0])") from error

    monkeypatch.setattr(callbacks, "asdict", at(1, callbacks.asdict, lambda: send(signal.SIGINT)), raising=False)
    monkeypatch.setattr(run, "train", at(1, run.train, lambda: send(signal.SIGINT)))
    monkeypatch.setattr(checkpoint, "_write_state", wrapped)
    assert main(["train", str(tmp_path / "r.json")]) == 130
    errors = capfd.readouterr().err
    said = [line for line in errors.splitlines() if line.startswith("llmtune")]
    assert "Traceback" not in errors and said == [
        "llmtune: finishing step 1, then saving; Ctrl-C again to stop now", "llmtune: interrupted",
    ], said  # fmt: skip
    assert llmtune.load(tmp_path / "run").status == "interrupted"


def test_a_request_that_is_swallowed_still_ends_the_process() -> None:
    """As where Python ignores what is raised in a hook of fork; a process that is stopped where it hangs, too."""
    code = (
        "import os, signal, time\n"
        "from llmtune.distributed import stopping\n"
        "stopping._PATIENCE_S = 0.2\n"
        "with stopping.StopRequest():\n"
        "    try: os.kill(os.getpid(), signal.SIGTERM); time.sleep(5)\n"
        "    except stopping.Stopped: pass\n"
        "    time.sleep(60)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=30, check=False).returncode == 75


def children(parent: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == parent and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


def wait(until: Callable[[], Any], seconds: float = 120) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := until()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)
    return found


def start(keys: dict[str, Any], folder: Path, *options: str) -> subprocess.Popen[str]:
    (folder / "r.json").write_text(json.dumps(keys))
    command = [sys.executable, "-m", "llmtune", "train", str(folder / "r.json"), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LLMTUNE_CACHE": str(folder / "cache")}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_a_run_that_was_tokenising(
    number: signal.Signals, tiny_llama: str, chats: str, tmp_path: Path
) -> None:
    data = tmp_path / "many.jsonl"
    data.write_text(Path(chats).read_text() * 20_000)
    keys = recipe(tiny_llama, str(data), tmp_path / "run", max_steps=1, preprocessing_num_workers=2)
    process = start(keys, tmp_path)
    workers = wait(lambda: found if len(found := children(process.pid)) >= 2 else process.poll() and [0])
    assert process.poll() is None, process.communicate()
    process.send_signal(number)
    errors = process.communicate(timeout=60)[1]
    wait(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers), 10)
    if number == signal.SIGTERM:
        assert process.returncode == 75 and "stopped before anything was learnt" in errors
        assert "Traceback" not in errors


@pytest.mark.slow
def test_two_ranks_leave_an_evaluation_and_save(tiny_llama: str, chats: str, tmp_path: Path) -> None:
    data = tmp_path / "many.jsonl"
    data.write_text(Path(chats).read_text() * 500)
    keys = recipe(
        tiny_llama, chats, tmp_path / "run", max_steps=4, gradient_accumulation_steps=1, eval_dataset=str(data),
        eval_strategy="steps", eval_steps=1,
    )  # fmt: skip
    process = start(keys, tmp_path, "--nproc", "2")
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait(lambda: process.poll() is not None or (metrics.exists() and metrics.read_text()))
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    assert "Interrupted and saved" in output and "leaving the evaluation of step 1" in errors
    assert "elastic" not in errors and "Traceback" not in errors, errors
    assert [path.name for path in published(tmp_path / "run" / "checkpoints")] == ["step-00000001"]
