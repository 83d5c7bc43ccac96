"""What the page is made of, without a server: the form, the folder, the processes, and who may open it."""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

import pytest
from llmtune_web.command import Web
from llmtune_web.desk import Desk, word
from llmtune_web.folder import Folder
from llmtune_web.form import SECTIONS, USUAL, Form
from llmtune_web.jobs import Job, Jobs
from llmtune_web.server import is_loopback, with_environment
from llmtune_web.yaml_text import Values

import llmtune
from llmtune import PlanError, RecipeError

VARIABLES = (
    "GRADIO_SERVER_NAME", "GRADIO_SERVER_PORT", "GRADIO_ROOT_PATH", "GRADIO_IPV6", "GRADIO_SHARE", "LLMTUNE_WEB_USER",
    "LLMTUNE_WEB_PASSWORD",
)  # fmt: skip


@pytest.fixture(scope="module")
def form() -> Form:
    return Form(llmtune.recipe_schema())


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment without the page's variables."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_every_key_of_the_schema_is_in_the_form(form: Form) -> None:
    shown = re.findall(r'data-name="([\w.]+)"', form.html("model: x\n"))
    assert sorted(name for name in shown if "." not in name) == sorted(form.properties)
    assert "optim_config.weight_decay" in shown  # of the default, which the recipe does not name
    assert "peft_config.r" not in shown
    assert "peft_config.r" in re.findall(r'data-name="([\w.]+)"', form.html("model: x\npeft_config: lora\n"))
    assert set(USUAL) <= set(form.properties) and set(SECTIONS) <= set(form.properties)


@pytest.mark.parametrize(
    ("key", "typed", "read"),
    [
        ("learning_rate", "1e-4", "1e-4"),
        ("model", "1e-4", '"1e-4"'),
        ("model", "no", '"no"'),
        ("default_system", "Be kind: yes", '"Be kind: yes"'),
        ("dataset", "[a.jsonl, b.jsonl]", "[a.jsonl, b.jsonl]"),
        ("dataset", "[a", '"[a"'),
        ("dataset", "a.jsonl", "a.jsonl"),
        ("template_kwargs", "{enable_thinking: false}", "{enable_thinking: false}"),
        ("packing", "true", "true"),
        ("eval_strategy", "no", "no"),
        ("max_steps", "null", "null"),
        ("peft_config.r", "8", "8"),
        ("learning_rate", "fast", "fast"),
    ],
)
def test_what_is_typed_is_read_as_the_key_takes_it(form: Form, key: str, typed: str, read: str) -> None:
    text = form.changed("model: x\npeft_config: {name: lora}\n", key, typed)
    assert f"{key.rpartition('.')[2]}: {read}" in text
    assert form.changed(text, key, "") != text and Values(form.changed(text, key, "")).at(*key.split(".")) is None


def test_a_recipe_that_cannot_be_read_has_no_form(form: Form) -> None:
    assert "as soon as the YAML can be read" in form.html("a: [")


def test_only_what_lies_below_the_folder_is_named(tmp_path: Path) -> None:
    root = tmp_path / "desk"
    root.mkdir()
    (root / "in.jsonl").write_text("{}")
    (tmp_path / "out.jsonl").write_text("{}")
    (root / "link.jsonl").symlink_to(tmp_path / "out.jsonl")
    folder = Folder.of(root)
    for name in ("../out.jsonl", str(tmp_path / "out.jsonl"), "link.jsonl", "../*.jsonl", "a/../../out.jsonl"):
        (problem,) = {*folder.outside(f"dataset: [{name}]\n")}
        assert problem.startswith("dataset.0: ") and "lies outside of" in problem
    assert folder.outside(f"dataset: {{path: 'in.jsonl,{tmp_path}/out.jsonl'}}\n")
    assert folder.outside("data: ${oc.env:HOME}\n") and folder.outside("output_dir: ../new\n")
    assert folder.outside("a: ../\nb: ${a}out.jsonl\n")
    fine = "dataset: in.jsonl\nmodel: owner/name\nsample_prompts: [/no_think hello?]\noutput_dir: runs/a\n"
    assert folder.outside(fine) == [] and folder.outside("a: [") == []
    assert Folder.of(root, (tmp_path,)).outside("dataset: ../out.jsonl\n") == []
    assert Folder.of(root, (tmp_path,)).outside("output_dir: ../new\n")
    with pytest.raises(PlanError, match="folders: found no folder"):
        Folder.of(root, (tmp_path / "none",))
    with pytest.raises(PlanError, match="lies outside"):
        Desk.at(folder).model("../out.jsonl")
    assert Desk.at(folder).model("owner/name") == "owner/name"


def test_recipes_are_written_below_the_folder_and_in_no_run(tmp_path: Path) -> None:
    folder = Folder.of(tmp_path)
    folder.write_recipe("new/a.yaml", "model: x\n")
    assert folder.read_recipe("new/a.yaml") == "model: x\n" and folder.recipes() == ["new/a.yaml"]
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "run.json").write_text("{}")
    assert folder.run_folders() == [tmp_path / "runs" / "a"] and Desk.at(folder).runs() == {}
    for name in ("a.py", "", "../a.yaml", "runs/a/resolved.yaml", ".llmtune-web/a.yaml", "a\0.yaml"):
        with pytest.raises((PlanError, ValueError)):
            folder.write_recipe(name, "x")
    assert (tmp_path / "runs" / "a").is_dir() and word("-x") == "./-x" and word("x") == "x"


def test_a_process_is_known_by_when_it_was_started(tmp_path: Path) -> None:
    jobs = Jobs(Folder.of(tmp_path))
    job = jobs.start(["--version"], "runs/a")
    jobs._children[job.pid].wait(60)
    assert not jobs.runs(job) and not jobs.stop(job) and jobs.log(job).startswith("llmtune ")
    assert Jobs(Folder.of(tmp_path)).of("runs/a") == job
    if sys.platform.startswith("linux"):  # a number that another process has by now is not signalled
        assert not jobs.stop(Job("x", ("train",), "runs/a", 1, "0", 0.0))


def test_a_runs_status_is_told_by_its_folder_and_its_process(tmp_path: Path) -> None:
    from llmtune_web.runs_tab import ShownRun, shown_runs

    at = tmp_path / "runs" / "a"
    at.mkdir(parents=True)
    record = {"status": "done", "packages": {"llmtune": "0.1.0"}, "started": "2026-01-01T00:00:00+00:00", "steps": 4}
    (at / "run.json").write_text(json.dumps(record))
    desk = Desk.at(Folder.of(tmp_path))
    (run,) = shown_runs(desk).values()
    assert (run.name, run.status, run.alive) == ("runs/a", "done", False)
    began = datetime.fromisoformat(record["started"]).timestamp()
    statuses = [
        ShownRun("runs/a", run.summary, Job("x", ("train",), "runs/a", 1, "0", began + later), True).status
        for later in (0.5, 60)
    ]
    assert statuses == ["done", "starting"]  # its own folder, and one of a run before it
    assert ShownRun("runs/b", None, run.job, False).status == "failed"
    (at / "run.json").write_text(json.dumps(record | {"status": "interrupted"}))
    os.utime(at / "run.json", (1, 2**31))  # written again: it is read again
    assert shown_runs(desk)["runs/a"].status == "interrupted"
    for number, name in enumerate(("runs/c", "runs/d")):
        ended = Job(f"2026-{number}", ("train",), name, 1, "0", 0.0)
        desk.jobs.at.mkdir(exist_ok=True)
        (desk.jobs.at / f"{ended.name}.json").write_text(json.dumps(asdict(ended)))
    shown = {name: each.status for name, each in shown_runs(desk).items()}
    assert shown == {"runs/d": "failed", "runs/a": "interrupted"}  # without a folder, only the last one


def test_a_start_that_a_run_refuses_looks_like_no_success(tmp_path: Path) -> None:
    from llmtune_web.runs_tab import RunsView

    record = {"status": "done", "packages": {"llmtune": "0.1.0"}, "started": "2026-01-01T00:00:00+00:00", "steps": 4}
    for name in ("runs/a", "runs/b"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "run.json").write_text(json.dumps(record))
    desk = Desk.at(Folder.of(tmp_path))
    text = "model: m\ndataset: d\noutput_dir: runs/a\n"
    told = RunsView(desk).begin("r.yaml", text, False, "loss", [])[1]
    assert "runs/a holds a finished run; tick “Start over” to replace it" in told and not desk.jobs.all()

    began = datetime.fromisoformat(record["started"]).timestamp()
    desk.jobs.at.mkdir(exist_ok=True)
    for number, said in enumerate(("step 4 of 4", "llmtune: it cannot be")):  # the run's own process, and a later one
        job = Job(f"2026-{number}", ("train",), "runs/a", 1, "0", began - 1 + 60 * number)
        (desk.jobs.at / f"{job.name}.json").write_text(json.dumps(asdict(job)))
        (desk.jobs.at / f"{job.name}.log").write_text(said)
    look = RunsView(desk).look("runs/a", "loss", ["b", "nonsense"])
    about, compared, log = look[2], look[8], look[9]
    assert "lt-done" in about and "lt-error" in about and "it cannot be" in about
    assert "step 4 of 4" in log and "it cannot be" not in log
    assert (
        "found &quot;nonsense&quot;, allowed are the runs in the list" in compared and "the same settings" in compared
    )


def test_others_need_a_password(plain: pytest.MonkeyPatch) -> None:
    assert with_environment(Web()).host == "127.0.0.1"
    for host in ("0.0.0.0", "::", "192.168.1.2", "example.org", "127.0.0.1.example.org"):
        assert not is_loopback(host)
        with pytest.raises(PlanError, match="user and password: not given"):
            with_environment(Web(host=host))
        assert with_environment(Web(host=host, user="ann", password="x")).host == host
    assert is_loopback("localhost") and is_loopback("::1") and is_loopback("127.8.0.1")
    with pytest.raises(PlanError, match="a proxy shows it to others"):
        with_environment(Web(root_path="/llmtune"))
    with pytest.raises(PlanError, match="one is given without the other"):
        with_environment(Web(user="ann"))


def test_gradios_variables_are_taken_or_answered(plain: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    plain.setenv("GRADIO_SERVER_NAME", "localhost")
    plain.setenv("GRADIO_SERVER_PORT", "7999")
    plain.setenv("GRADIO_SHARE", "true")
    made = with_environment(Web())
    assert (made.host, made.port) == ("localhost", 7999) and "GRADIO_SHARE is set" in capsys.readouterr().err
    assert with_environment(Web(host="::1", port=1)).port == 1
    plain.setenv("LLMTUNE_WEB_USER", "ann")
    plain.setenv("LLMTUNE_WEB_PASSWORD", "secret")
    plain.setenv("GRADIO_ROOT_PATH", "/llmtune")
    plain.delenv("GRADIO_SERVER_NAME")
    plain.setenv("GRADIO_IPV6", "1")
    made = with_environment(Web())
    assert (made.host, made.user, made.password, made.root_path) == ("::", "ann", "secret", "/llmtune")
    plain.setenv("GRADIO_SERVER_PORT", "many")
    with pytest.raises(RecipeError, match='GRADIO_SERVER_PORT: found "many"'):
        with_environment(Web())
