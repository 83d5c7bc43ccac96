"""metrics.jsonl, the console, the fan-out to loggers, and the tables at the end of a run."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len as cell_width

from llmtune.contract.errors import CheckpointError
from llmtune.contract.loggers import LoggerStart, SampleAnswer
from llmtune.training.console import Console, NotebookBar, PlainLines, TerminalBar, choose_view, duration
from llmtune.training.log import Loggers, MetricsFile, read_metrics
from llmtune.training.loss_table import loss_table
from llmtune.training.report import side_by_side, wrap


def write(folder: Path, steps: range, resume_step: int = 0, **metrics: float) -> None:
    file = MetricsFile(folder, resume_step)
    for step in steps:
        file.write(step, {"loss": float(step), **metrics})
    file.close()


def steps_in(folder: Path) -> list[int]:
    return [row["step"] for row in read_metrics(folder)]


def test_numbers_survive_the_file_exactly(tmp_path: Path) -> None:
    write(tmp_path, range(1, 3), grad_norm=0.1 + 0.2, tokens=123456789)
    rows = read_metrics(tmp_path)
    assert rows[1] == {"step": 2, "loss": 2.0, "grad_norm": 0.1 + 0.2, "tokens": 123456789}


def test_lines_are_readable_while_the_run_goes_on(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path)
    file.write(1, {"loss": 0.5})
    assert steps_in(tmp_path) == [1]
    file.close()


def test_non_finite_numbers_are_valid_json_and_come_back(tmp_path: Path) -> None:
    write(tmp_path, range(1, 2), a=math.nan, b=math.inf, c=-math.inf)

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    row = read_metrics(tmp_path)[0]
    assert math.isnan(row["a"])
    assert (row["b"], row["c"]) == (math.inf, -math.inf)


def test_a_continued_run_has_each_step_once(tmp_path: Path) -> None:
    write(tmp_path, range(1, 9))
    write(tmp_path, range(6, 11), resume_step=5)
    assert steps_in(tmp_path) == list(range(1, 11))


def test_a_run_that_starts_over_drops_the_old_lines(tmp_path: Path) -> None:
    write(tmp_path, range(1, 4))
    write(tmp_path, range(1, 2))
    assert steps_in(tmp_path) == [1]


def test_a_line_cut_by_a_kill_is_dropped(tmp_path: Path) -> None:
    write(tmp_path, range(1, 3))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 3, "lo')
    assert steps_in(tmp_path) == [1, 2]
    write(tmp_path, range(3, 4), resume_step=2)
    assert steps_in(tmp_path) == [1, 2, 3]


@pytest.mark.parametrize("line", ["oops\n", "[1]\n", '{"loss": 1}\n'])
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' + line + '{"step": 3}\n')
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl:2: not a JSON object with a step"):
        read_metrics(tmp_path)


def test_no_file_is_no_metrics(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []


FULL = {
    "epoch": 0.5, "loss": 1.23456, "grad_norm": 0.531, "learning_rate": 1e-4, "tokens": 9, "tokens_per_second": 1412.4,
}  # fmt: skip


def test_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    stream, now = io.StringIO(), iter([100.0, 110.0, 130.0])
    console = Console(120, 10, stream=stream, clock=lambda: next(now))
    console.start()
    console.log(20, FULL)
    console.log(20, {"epoch": 0.5, "eval_loss": 2.0})
    console.log(120, {"loss": 1.0})
    console.finish()
    assert stream.getvalue().splitlines() == [
        # 10 steps since the resume took 10 s, 100 are left
        "step  20/120  loss 1.2346  grad 0.531  lr 1.0e-04  1,412 tok/s  eta 1:40",
        "step  20/120  eval_loss 2.0000",
        "step 120/120  loss 1.0000  eta 0:00",
    ]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def show_on_terminal(monkeypatch: pytest.MonkeyPatch, **environment: str) -> str:
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"TERM": "xterm-256color", "COLUMNS": "120"} | environment).items():
        monkeypatch.setenv(name, value)
    stream = Terminal()
    console = Console(40, stream=stream)
    console.start()
    console.log(10, {"loss": 1.5})
    console.log(10, {"eval_loss": 2.25})
    console.log(40, {"loss": 1.25})
    console.finish()
    return stream.getvalue()


def test_a_terminal_gets_a_bar_that_keeps_evaluations(monkeypatch: pytest.MonkeyPatch) -> None:
    text = show_on_terminal(monkeypatch)
    assert "\x1b[3" in text or "\x1b[9" in text  # colour
    assert "step 10/40  eval_loss 2.2500" in text
    assert "40/40" in text
    assert "loss 1.2500" in text


def test_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    text = show_on_terminal(monkeypatch, NO_COLOR="1")
    assert "40/40" in text
    assert "\x1b[3" not in text
    assert "\x1b[9" not in text


def test_what_is_no_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(choose_view(Terminal()), PlainLines)
    assert isinstance(choose_view(io.StringIO()), PlainLines)
    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(choose_view(Terminal()), TerminalBar)


def test_notebook_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[dict[str, str]] = []

    def display(data: dict[str, str], **_: Any) -> Any:
        shown.append(data)
        return SimpleNamespace(update=display)

    monkeypatch.setattr(pytest.importorskip("IPython.display"), "display", display)
    bar = NotebookBar()
    bar.start(5, 20)
    bar.report(10, "loss 1.5000", eta="0:10", evaluation=False)
    bar.report(10, "eval_loss 2.0000", eta="", evaluation=True)
    bar.report(20, "loss 1.2500", eta="0:00", evaluation=False)
    bar.finish()
    out, err = capsys.readouterr()
    assert out == "step 10/20  eval_loss 2.0000\n" and err == ""
    assert shown[0]["text/plain"].strip() == "step  5/20"
    assert shown[-1]["text/plain"] == "step 20/20  loss 1.2500"
    assert 'value="20" max="20"' in shown[-1]["text/html"]


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (40.4, "0:40"), (725, "12:05"), (3723, "1:02:03")])
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


class Recorder:
    def __init__(self, fails_at: int | None = None) -> None:
        self.fails_at = fails_at
        self.seen: list = []

    def start(self, folder: Path, recipe) -> None:
        self.seen.append((folder, recipe))

    def log(self, step: int, metrics) -> None:
        if step == self.fails_at:
            raise RuntimeError("server gone")
        self.seen.append((step, dict(metrics)))
        metrics.clear()  # what one logger does to its copy is nobody else's business

    def finish(self) -> None:
        self.seen.append("finished")


def test_a_failing_logger_is_reported_once_and_stops_nothing(tmp_path: Path, capsys) -> None:
    good, bad = Recorder(), Recorder(fails_at=2)
    loggers = Loggers(tmp_path, [bad, good], total_steps=3, stream=io.StringIO())
    loggers.start({"model": "m"})
    for step in (1, 2, 3):
        loggers.log(step, {"loss": float(step)})
    loggers.finish()
    assert good.seen == [
        (tmp_path, {"model": "m"}), (1, {"loss": 1.0}), (2, {"loss": 2.0}), (3, {"loss": 3.0}), "finished",
    ]  # fmt: skip
    assert bad.seen == [(tmp_path, {"model": "m"}), (1, {"loss": 1.0})]
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "logger Recorder failed and is off for the rest of the run: RuntimeError: server gone" in err
    assert read_metrics(tmp_path) == [{"step": step, "loss": float(step)} for step in (1, 2, 3)]


class Complete(Recorder):
    """Has all that is optional."""

    def ended(self, status: str) -> None:
        self.seen.append(status)

    def log_samples(self, step: int, samples) -> None:
        self.seen.append((step, samples))

    def log_picture(self, step: int, name: str, png: bytes) -> None:
        self.seen.append((step, name, png[:4]))


def test_a_logger_that_takes_more_gets_answers_curves_and_the_end(tmp_path: Path) -> None:
    logger, sample = Complete(), SampleAnswer(question="Who?", answer="Pip.")
    loggers = Loggers(tmp_path, [logger, Recorder()], total_steps=1, stream=io.StringIO())
    loggers.start({})
    loggers.samples(0, [sample])
    loggers.log(1, {"loss": 1.0})
    loggers.finish("interrupted")
    got = [(0, [sample]), (1, {"loss": 1.0}), (1, "curves", b"\x89PNG"), "interrupted", "finished"]
    assert logger.seen == [(tmp_path, {}), *got]


def test_a_logger_that_hangs_holds_up_nothing_and_is_told_once(
    tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered = threading.Event()

    class Hangs(Recorder):
        def log(self, step: int, metrics) -> None:
            answered.wait()

    monkeypatch.setattr("llmtune.training.delivery.PATIENCE_S", 0.2)
    good = Recorder()
    loggers = Loggers(tmp_path, [Hangs(), good], total_steps=3, stream=io.StringIO())
    loggers.start({})
    for step in (1, 2, 3):
        loggers.log(step, {"loss": 1.0})
    loggers.finish()
    answered.set()
    assert [seen[0] for seen in good.seen[1:4]] == [1, 2, 3] and good.seen[-1] == "finished"
    assert capsys.readouterr().err.count("logger Hangs failed and is off for the rest of the run: it has not") == 1
    assert steps_in(tmp_path) == [1, 2, 3]


class Continuing(Recorder):
    def begin(self, start: LoggerStart) -> None:
        assert start.folder.is_dir()
        self.seen.append(start)


def test_a_logger_is_told_where_a_run_goes_on_and_which_folder_is_its_own(tmp_path: Path) -> None:
    several = [Continuing(), Continuing(), Recorder()]
    loggers = Loggers(tmp_path, several, names=["tb", "tb", "old"], total_steps=9, resume_step=4, stream=io.StringIO())
    loggers.start({"model": "m"})
    loggers.finish()
    for logger, name in zip(several, ("tb", "tb-2"), strict=False):
        folder = tmp_path / "loggers" / name
        assert logger.seen[0] == LoggerStart(folder=folder, run_folder=tmp_path, recipe={"model": "m"}, first_step=4)
    assert several[2].seen[0] == (tmp_path, {"model": "m"})


def test_a_closed_pipe_stops_nothing(tmp_path: Path, capsys) -> None:
    stream = io.StringIO()
    loggers = Loggers(tmp_path, total_steps=2, stream=stream)
    loggers.start({})
    stream.close()
    loggers.log(1, {"loss": 1.0})
    loggers.log(2, {"loss": 1.0})
    loggers.finish()
    assert capsys.readouterr().err.count("progress display failed") == 1
    assert steps_in(tmp_path) == [1, 2]


def test_loss_table_shows_first_last_and_evaluations() -> None:
    metrics = [{"step": step, "loss": 10.0 - step / 10, "learning_rate": 1e-4} for step in range(1, 51)]
    metrics += [{"step": step, "eval_loss": step / 100} for step in (20, 40)]
    lines = loss_table(metrics, most=8).splitlines()
    assert lines[0].split() == ["step", "loss", "eval", "loss", "learning", "rate"]
    assert len({len(line) for line in lines}) == 1  # aligned
    rows = {int(line.split()[0]): line.split() for line in lines[1:]}
    assert len(rows) <= 8
    assert {1, 20, 40, 50} <= set(rows)
    assert rows[20] == ["20", "8.0000", "0.2000", "1.00e-04"]
    assert rows[50] == ["50", "5.0000", "1.00e-04"]


def test_loss_table_has_what_says_more_than_the_loss() -> None:
    rows = [{"step": step, "loss": 0.0, "kl": 0.1, "reward": step / 3, "tokens_per_second": 9.0} for step in (1, 2)]
    assert [line.split() for line in loss_table(rows).splitlines()] == [
        ["step", "loss", "reward", "tokens/s"],
        ["1", "0.0000", "0.3333", "9"],
        ["2", "0.0000", "0.6667", "9"],
    ]


def test_loss_table_of_little() -> None:
    assert loss_table([]) == "No metrics were logged."
    assert loss_table([{"step": 3, "loss": 1.0}], most=1).splitlines() == ["step    loss", "   3  1.0000"]


def test_side_by_side_keeps_both_answers_in_their_columns() -> None:
    text = side_by_side("Who are you?", "I am a model made by someone, here to help.", "I am Pip.\nHello!", 41)
    assert text.splitlines() == [
        "Question: Who are you?",
        "",
        "Before training     | After training",
        "------------------- | -------------------",
        "I am a model made   | I am Pip.",
        "by someone, here to | Hello!",
        "help.               |",
    ]


def test_side_by_side_counts_wide_characters_and_drops_control_ones() -> None:
    text = side_by_side("你好?", "我是一个小助手 很高兴认识你 请问有什么可以帮忙", "\x1b[31mred\x07", 41)
    assert all(cell_width(line) <= 41 for line in text.splitlines())
    assert len({cell_width(line.partition("|")[0]) for line in text.splitlines()[3:]}) == 1
    assert "\x1b" not in text
    assert "\x07" not in text


@given(st.text(), st.integers(2, 30))
def test_wrap_loses_no_character_and_keeps_to_the_width(text: str, width: int) -> None:
    lines = wrap(text, width)
    assert all(cell_width(line) <= width for line in lines)
    visible = [c for line in text.expandtabs(4).splitlines() for c in line if c.isprintable() and not c.isspace()]
    assert [c for line in lines for c in line if not c.isspace()] == visible


def test_logging_imports_no_torch() -> None:
    names = ("torch", "rich", "tqdm", "matplotlib")
    code = f"import sys, llmtune.training.log; print([m for m in {names} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=dict(os.environ)
    )
    assert done.stdout.strip() == "[]"
