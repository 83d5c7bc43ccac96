"""One run at a time in a folder; ranks that cannot go on say so once, together, and at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import llmtune
from llmtune.contract.errors import LlmtuneError, PlanError
from llmtune.contract.launching import LaunchRequest
from llmtune.distributed.ranks import fail_together, pick_device
from llmtune.training.lock import FolderLock, require_shared
from tests.runs import recipe
from tests.spawn import in_ranks

HOLD = "import sys, time; from pathlib import Path; from llmtune.training.lock import FolderLock\n"
HOLD += "FolderLock(Path(sys.argv[1])).take(); print('held', flush=True); time.sleep(60)"


def test_a_folder_in_use_is_refused_until_its_process_is_gone(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(PlanError, match=rf"is in use by another run \(process {holder.pid} on .*, since 20"):
        FolderLock(tmp_path).take()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    FolderLock(tmp_path).take()  # what a killed run left does not bind


def test_two_runs_of_one_process_cannot_share_a_folder(tiny_llama: str, chats: str, tmp_path: Path) -> None:
    keys = recipe(tiny_llama, chats, tmp_path / "run", max_steps=1)
    other = FolderLock(tmp_path / "run")
    other.take()
    for extra in ({}, {"overwrite_output_dir": True}):
        with pytest.raises(PlanError, match="wait for it, stop it, or name another folder"):
            llmtune.train({**keys, **extra})
    other.release()
    assert llmtune.train(keys).status == "done"
    assert llmtune.train({**keys, "overwrite_output_dir": True}).status == "done"


def test_a_run_that_failed_lets_go(tiny_llama: str, chats: str, tmp_path: Path) -> None:
    keys = recipe(tiny_llama, chats, tmp_path / "run", max_steps=1, val_size=2, metric_for_best_model="eval_bleu")
    with pytest.raises(PlanError) as kept:
        llmtune.train(keys)
    assert kept.value.__traceback__ is not None  # a notebook keeps it, and every frame in it
    FolderLock(tmp_path / "run").take()


def _probe(folder: str) -> str:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    try:
        require_shared(Path(folder, "a" if rank < 2 else "b"), rank == 0)
    except PlanError as error:
        return str(error)
    return ""


def _fail(which: int) -> tuple[str, str, bool]:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    try:
        fail_together(PlanError("no such file") if which in (rank, 99) else None)
    except LlmtuneError as error:
        return error.where, str(error), error.everywhere
    return "", "", False


def test_a_folder_that_is_not_shared_is_refused_on_every_rank(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    said = in_ranks(3, tmp_path / "ranks", _probe, str(tmp_path))
    assert len({text.partition(" on ")[2] for text in said}) == 1
    assert "(rank 2) is not the folder that rank 0" in said[0] and "(rank 1)" not in said[0]
    assert not list((tmp_path / "a").iterdir())


@pytest.mark.parametrize(("which", "where"), [(1, "rank 1 on "), (99, "")])
def test_ranks_fail_together(which: int, where: str, tmp_path: Path) -> None:
    for found, text, everywhere in in_ranks(2, tmp_path / "ranks", _fail, which):
        assert found.startswith(where) and bool(found) == bool(where)
        assert text == "no such file" and everywhere


@pytest.mark.parametrize("missing", ["data.jsonl", "recipe.json"])
def test_one_rank_without_its_file_ends_all_with_one_sentence(
    missing: str, tiny_llama: str, chats: str, tmp_path: Path
) -> None:
    for rank in (0, 1):
        folder = tmp_path / f"rank{rank}"
        folder.mkdir()
        keys = recipe(tiny_llama, "data.jsonl", tmp_path / "run", max_steps=1)
        (folder / "recipe.json").write_text(json.dumps(keys))
        (folder / "data.jsonl").write_text(Path(chats).read_text())
    (tmp_path / "rank1" / missing).unlink()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    each = f"cd {tmp_path}/rank$RANK && exec {sys.executable} -m llmtune train recipe.json"
    root = str(Path(__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    started = time.monotonic()
    done = subprocess.run([*torchrun, "sh", "-c", each], capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("llmtune: ")]
    assert len(said) == 1 and said[0].startswith("llmtune: rank 1 on ") and missing in said[0], done.stderr
    assert time.monotonic() - started < 200  # not the 1800 s of ddp_timeout
    assert not (tmp_path / "run").exists()


def test_a_rank_uses_the_device_of_its_place_on_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    from llmtune.distributed.ranks import ranks_from_environment

    for name, value in {"RANK": "11", "WORLD_SIZE": "16", "LOCAL_RANK": "3"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert pick_device("auto", ranks_from_environment().local_rank) == torch.device("cuda", 3)
    with pytest.raises(PlanError, match="rank 8 of this machine has no GPU of its own: 8 found"):
        pick_device("auto", 8)


def test_no_other_place_numbers_devices() -> None:
    """`cuda:N` with a global rank works on the first machine and nowhere else."""
    import ast

    root = Path(llmtune.__file__).parent
    found = set()
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            numbered = isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.device" and len(node.args) > 1
            spelled = (
                isinstance(node, ast.JoinedStr) and "cuda:" in ast.unparse(node) and "gloo" not in ast.unparse(node)
            )
            if numbered or spelled:
                found.add(path.name)
    assert found <= {"ranks.py"}


def settings(**changes: Any) -> dict[str, Any]:
    return {"nnodes": "1", "endpoint": None, "run_id": None, **changes}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"nnodes": "3:2"}, '--nnodes: found "3:2"'),
        ({"nnodes": "two"}, '--nnodes: found "two"'),
        ({"nnodes": "2"}, "--rdzv-endpoint: .* several machines need HOST:PORT"),
        ({"run_id": "a/b"}, '--rdzv-id: found "a/b"'),
        ({"nnodes": "1:2", "endpoint": "head"}, '--rdzv-endpoint: found "head"'),
    ],
)
def test_machines_are_named_rightly(changes: dict[str, Any], sentence: str) -> None:
    from llmtune.distributed.launch import Torchrun, parse_machines

    with pytest.raises(LlmtuneError, match=sentence):
        machines = parse_machines(**settings(**changes))
        Torchrun().starts(LaunchRequest(command=("x",), name="x", output_dir=Path("x"), machines=machines))
    made = parse_machines(**settings(nnodes="2:4", endpoint="10.0.0.1:29400"))
    assert (made.least, made.most, made.run_id) == (2, 4, "llmtune")
