"""Memory that runs out is told with the step, the plan's table, and what would help."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import llmtune
from llmtune.distributed.launch import _first_failure
from llmtune.training import loop
from llmtune.training.out_of_memory import explain_out_of_memory


def keys(model: str, chats: str, folder: Path) -> dict:
    return {
        "model": model, "dataset": chats, "output_dir": str(folder), "device": "cpu", "max_steps": 3, "cutoff_len": 128,
        "per_device_train_batch_size": 8, "save_steps": 1, "logging_steps": 1,
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["cpu", "cuda", "python"])
def test_a_run_says_where_it_was_and_what_would_help(
    kind: str, tiny_llama: str, chats: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []
    plain = loop.forward_backward

    def greedy(run: loop.Training, *arguments: object) -> object:
        steps.append(run.at)
        if run.at < 3:
            return plain(run, *arguments)
        if kind == "cpu":
            return torch.empty(2**56)  # a real refusal, by the allocator
        raise torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB") if kind == "cuda" else MemoryError("no room")

    monkeypatch.setattr(loop, "forward_backward", greedy)
    with pytest.raises(llmtune.OutOfMemoryError) as error:
        llmtune.train(keys(tiny_llama, chats, tmp_path / "run"))
    said = str(error.value)
    assert steps[:3] == [1, 2, 3] and error.value.exit_code == 6
    assert re.match(r"step 3: out of host memory \(.+\)\. The last checkpoint is good\n", said)
    assert re.search(r"By the plan a step takes on each rank, of [\d.,]+ \w+:\n  weights +[\d.,]+ \w+\n", said)
    assert re.search(r"Try, in this order:\n  .+, for a peak of [\d.,]+ \w+", said)
    assert llmtune.load(tmp_path / "run").status == "failed" and (tmp_path / "run" / "checkpoints").is_dir()


def test_other_errors_stay_what_they_are(
    tiny_llama: str, chats: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "forward_backward", lambda *_: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        llmtune.train(keys(tiny_llama, chats, tmp_path / "run"))


@pytest.mark.parametrize("kind", [NotImplementedError, RecursionError])
def test_kinds_of_runtime_errors_are_no_want_of_memory(kind: type[RuntimeError]) -> None:
    with pytest.raises(kind, match="not here"), explain_out_of_memory(torch.device("cpu"), lambda: "step 3", list):
        raise kind("not here")


def test_a_rank_that_the_system_killed_is_told_so(capsys: pytest.CaptureFixture[str]) -> None:
    done = subprocess.Popen([sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"])
    done.wait()

    class Failure:
        def get_first_failure(self) -> tuple[int, object]:
            return 1, type("Process", (), {"exitcode": done.returncode})()

    assert _first_failure(Failure()) == 1
    assert capsys.readouterr().err == "llmtune: rank 1 was killed by signal 9; most likely host memory ran out\n"
