"""The contract, and real runs that several trackers follow at once, read back from what the trackers keep."""

from __future__ import annotations

import json
import os
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from llmtune_trackers import logger_config
from llmtune_trackers.configs import MlflowConfig
from llmtune_trackers.mlflow_run import MlflowRun
from llmtune_trackers.tracker import flat

import llmtune
from llmtune.testing import Law, laws, tiny_recipe

NAMES = ("wandb", "mlflow", "swanlab", "trackio")
KEYS: dict[str, dict[str, Any]] = {
    "wandb": {"mode": "offline", "api_key": "hunter2" * 8},
    "mlflow": {},
    "swanlab": {"swanlab_mode": "local", "swanlab_api_key": "hunter2"},
    "trackio": {},
}
SECRET = "hunter2"


@pytest.fixture(scope="module", autouse=True)
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the trackers keep what they would keep in a home."""
    folder = tmp_path_factory.mktemp("trackers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        patch.setenv("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        patch.chdir(folder)
        yield folder


@pytest.fixture(scope="module")
def server(places: Path) -> Iterator[str]:
    """The address of a real MLflow server."""
    pytest.importorskip("mlflow.server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {"host": "127.0.0.1", "port": port, "workers": 1}
    options |= {"backend-store-uri": f"sqlite:///{places}/served.db", "artifacts-destination": places / "artifacts"}
    command = [sys.executable, "-m", "mlflow", "server", *(f"--{key}={value}" for key, value in options.items())]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (places / "server.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                with urllib.request.urlopen(f"{address}/health", timeout=5):
                    break
            except OSError:
                assert process.poll() is None, (places / "server.log").read_text()
                time.sleep(0.2)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


def wandb_records(own: Path) -> list[Any]:
    """The records of a run's offline files: blocks of 32 KiB, of chunks with checksum, length and kind."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for path in sorted(own.rglob("*.wandb")):
        if path.parent.parent.name == "latest-run" or path.parent.is_symlink():
            continue
        data, at, message = path.read_bytes(), 7, b""
        while at < len(data):
            if 32768 - at % 32768 < 7:
                at += 32768 - at % 32768
                continue
            length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
            message += data[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (1, 4):  # whole, or the last of several
                found.append(Record.FromString(message))
                message = b""
    return found


def wandb_history(own: Path) -> list[dict[str, Any]]:
    rows = [record.history for record in wandb_records(own) if record.WhichOneof("record_type") == "history"]
    return [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row.item} for row in rows]


def trackio_database(project: str = "llmtune") -> Path:
    """Where trackio keeps a project: it read TRACKIO_DIR when it was first imported, which TRL may have done."""
    from trackio.utils import TRACKIO_DIR

    return TRACKIO_DIR / f"{project}.db"


def trackio_rows(project: str, name: str) -> list[tuple[int, dict[str, Any]]]:
    with sqlite3.connect(trackio_database(project)) as database:
        rows = database.execute("select step, metrics from metrics where run_name = ? order by id", (name,)).fetchall()
    return [(step, json.loads(metrics)) for step, metrics in rows]


def state(own: Path) -> dict[str, Any]:
    return json.loads((own / "tracker.json").read_text())


def swanlab_rows(own: Path, name: str) -> list[tuple[int, Any]]:
    """What SwanLab's local files hold of a metric; its number is in the database beside them."""
    with sqlite3.connect(own / "runs.swanlab") as database:
        tags = "select run_id, folder from tag join experiment on experiment.id = experiment_id where tag.name = ?"
        found = database.execute(tags, (name,)).fetchall()
    logs = [path for run, number in found for path in sorted((own / run / "logs" / number).glob("*.log"))]
    lines = [json.loads(line) for path in logs for line in path.read_text().splitlines()]
    return [(line["index"], line["data"]) for line in lines]


def steps(name: str, own: Path) -> list[int]:
    """The steps at which a tracker has a loss."""
    if name == "wandb":
        return [row["_step"] for row in wandb_history(own) if "train/loss" in row]
    if name == "mlflow":
        from mlflow import MlflowClient

        return [metric.step for metric in MlflowClient().get_metric_history(state(own)["id"], "train/loss")]
    if name == "swanlab":
        return [step for step, _ in swanlab_rows(own, "train/loss")]
    return [step for step, row in trackio_rows("llmtune", state(own)["id"]) if "train/loss" in row]


def asked(name: str) -> list[Law]:
    """All but `follows_a_run`: the runs below have all of them at once."""
    found = laws("logger_config", name, KEYS[name], reader=lambda own, run: steps(name, own))
    return [law for law in found if law.__name__ != "follows_a_run"]


@pytest.mark.parametrize("law", [law for name in NAMES for law in asked(name)], ids=str)
def test_contract(law: Law, tmp_path: Path) -> None:
    pytest.importorskip(law.subject.name)
    law(tmp_path)


@pytest.fixture(scope="module")
def run(server: str, places: Path) -> Path:
    """A run that was interrupted after its third step and went on."""
    for name in NAMES:
        pytest.importorskip(name)
    folder = places / "pips"
    loggers = [{"name": name, **KEYS[name]} for name in NAMES]
    loggers[1] |= {"tracking_uri": server, "experiment": "tests"}
    keys = tiny_recipe(
        folder, output_dir=str(places / "run"), device="cpu", bf16=False, max_steps=6, logging_steps=1, val_size=0.2,
        eval_strategy="steps", eval_steps=3, sample_prompts=["Who are you?"], logger_config=loggers, token=SECRET,
        resume_from_checkpoint="auto", save_steps=100,
    )  # fmt: skip

    def tell(self: Any, event: Any) -> None:
        if event.kind == "step" and event.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llmtune.training.callbacks.TrainingCallbacks.tell", tell)
        assert llmtune.train(keys).status == "interrupted"
    assert llmtune.train(keys).status == "done"
    return places / "run"


def test_each_step_is_there_once(run: Path, server: str) -> None:
    from mlflow import MlflowClient

    own = run / "loggers"
    assert [steps(name, own / name) for name in ("wandb", "swanlab", "trackio")] == [[1, 2, 3, 4, 5, 6]] * 3
    history = MlflowClient(server).get_metric_history(state(own / "mlflow")["id"], "train/loss")
    logged = {row["step"]: row["loss"] for row in llmtune.load(run).metrics if "loss" in row}
    assert {metric.step: metric.value for metric in history} == logged
    evaluated = [step for step, row in trackio_rows("llmtune", state(own / "trackio")["id"]) if "eval/loss" in row]
    assert evaluated == [3, 6]


def test_a_continued_run_is_the_same_run_there_and_ends_as_here(run: Path, server: str) -> None:
    from mlflow import MlflowClient

    own, client = run / "loggers", MlflowClient(server)
    (found,) = client.search_runs([client.get_experiment_by_name("tests").experiment_id])
    assert (found.info.run_name, found.info.status) == ("run", "FINISHED")
    records = wandb_records(own / "wandb")
    assert {record.run.run_id for record in records if record.WhichOneof("record_type") == "run"} == {
        state(own / "wandb")["id"]
    }
    assert [record.exit.exit_code for record in records if record.WhichOneof("record_type") == "exit"] == [130, 0]
    assert {path.name.rpartition("-")[2] for path in (own / "swanlab").glob("run-*")} == {state(own / "swanlab")["id"]}
    with sqlite3.connect(trackio_database()) as database:
        alerts = database.execute("select title from alerts where run_name = ?", (state(own / "trackio")["id"],))
        assert [title for (title,) in alerts] == ["The run is interrupted", "The run is done"]


def test_recipe_answers_and_curves_are_there(run: Path, server: str) -> None:
    from mlflow import MlflowClient

    own, client = run / "loggers", MlflowClient(server)
    params = client.get_run(state(own / "mlflow")["id"]).data.params
    assert params["max_steps"] == "6" and params["optim_config.name"]
    ((question, before, after),) = llmtune.load(run).answers
    for step, answer in ((0, before), (6, after)):
        path = client.download_artifacts(state(own / "mlflow")["id"], f"samples/step_{step}.md", str(own))
        assert Path(path).read_text() == f"**{question}**\n\n{answer}"
    tables = [row["samples"] for _, row in trackio_rows("llmtune", state(own / "trackio")["id"]) if "samples" in row]
    assert [table["_value"][0]["answer"] for table in tables] == [before, after]
    assert [row["_step"] for row in wandb_history(own / "wandb") if "curves/path" in row or "curves" in row] == [3, 6]
    assert [step for step, _ in swanlab_rows(own / "swanlab", "curves")] == [3, 6]
    picture = client.download_artifacts(state(own / "mlflow")["id"], "pictures/curves_6.png", str(own))
    assert Path(picture).stat().st_size > 10_000


def test_no_secret_is_written(run: Path, places: Path) -> None:
    holding = [path for path in places.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert holding == []


def test_a_server_that_is_down_raises_an_error_and_ends_in_peace(tmp_path: Path) -> None:
    """The core says it once and goes on without the logger."""
    pytest.importorskip("mlflow")
    logger = MlflowRun(MlflowConfig(tracking_uri="http://127.0.0.1:9"))
    with pytest.raises(Exception, match=r"127\.0\.0\.1"):
        logger.begin(llmtune.LoggerStart(folder=tmp_path, run_folder=tmp_path, recipe={}, first_step=0))
    logger.finish()


@pytest.mark.parametrize("name", ["wandb", "swanlab"])
def test_a_key_on_the_command_line_is_written_nowhere(name: str, tmp_path: Path) -> None:
    """Trackers write the command down by themselves."""
    pytest.importorskip(name)
    keys = tiny_recipe(tmp_path / "pips", output_dir=str(tmp_path / "run"), device="cpu", bf16=False, max_steps=1)
    (tmp_path / "recipe.json").write_text(json.dumps(keys))
    logger = json.dumps({"name": name, **KEYS[name]} | ({"swanlab_mode": "offline"} if name == "swanlab" else {}))
    command = [sys.executable, "-m", "llmtune", "train", str(tmp_path / "recipe.json"), f"logger_config={logger}"]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(name in str(path) for path in files)
    assert [path for path in files if b"hunter2" in path.read_bytes()] == []


def test_the_plan_refuses_a_password_in_an_address(tmp_path: Path) -> None:
    keys = tiny_recipe(tmp_path, logger_config={"name": "mlflow", "tracking_uri": "http://me:hunter2@there:5000"})
    with pytest.raises(llmtune.PlanError, match="logger_config: tracking_uri: holds a password or a name"):
        llmtune.plan(keys)


def test_a_password_in_an_address_is_refused() -> None:
    (objection,) = MlflowRun(MlflowConfig(tracking_uri="http://me:hunter2@there:5000")).check(None, None)
    assert "MLFLOW_TRACKING_PASSWORD" in objection and "hunter2" not in objection
    assert not list(MlflowRun(MlflowConfig(tracking_uri="sqlite:///runs.db")).check(None, None))


def test_nested_keys_become_one_level() -> None:
    recipe = {"a": {"b": 1, "c": [1, 2]}, "logger_config": [{"name": "x"}, {"name": "y"}]}
    assert flat(recipe) == {"a.b": 1, "a.c": [1, 2], "logger_config.0.name": "x", "logger_config.1.name": "y"}


def test_no_client_is_imported_before_a_run_begins() -> None:
    assert sorted(plugin.name for plugin in logger_config()) == sorted(NAMES)
    code = (
        "import sys, llmtune_trackers as t; [p.build(p.config()) for p in t.logger_config()]; "
        f"print([m for m in {(*NAMES, 'torch')} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_mlflow_takes_names_of_benchmarks_and_no_token_in_an_address() -> None:
    validation = pytest.importorskip("mlflow.utils.validation")
    sent: list[Any] = []
    logger = MlflowRun(MlflowConfig(tracking_uri="https://token@there:5000"))
    logger.client = SimpleNamespace(log_batch=lambda _, metrics: sent.extend(metrics))  # type: ignore[assignment]
    logger.send(3, {"eval/exact_match (strict)": 0.5, "eval/pass@1": 0.25})
    for metric in sent:
        validation._validate_metric_name(metric.key)
    assert [metric.key for metric in sent] == ["eval/exact_match _strict_", "eval/pass_1"]
    assert "holds a password or a name" in next(iter(logger.check(None, None)))  # type: ignore[arg-type]
