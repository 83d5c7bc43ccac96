"""What stays in sight on a terminal while a run trains."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from llmtune.training.console import Console
from llmtune.training.status import BARS, CURVE, Milestones, Status, curve_text, trend

pytest.importorskip("pyte")

from tests.terminal import on_terminal
from tests.test_log import Terminal

NUMBERS = {
    "epoch": 0.5, "loss": 0.75, "grad_norm": 0.5, "learning_rate": 1e-4, "tokens": 9, "tokens_per_second": 12345.6,
    "peak_memory_bytes": 3 * 2**29,
}  # fmt: skip


def test_a_trend_is_told_where_it_is_more_than_noise() -> None:
    noise = random.Random(0)
    falling = [2 - at / 20 + noise.gauss(0, 0.05) for at in range(20)]
    assert trend(falling) == "falling" and trend([-loss for loss in falling]) == "rising"
    assert trend([1 + noise.gauss(0, 0.3) for _ in range(20)]) == "level"
    assert trend([1.0] * 9) == "level"
    assert trend(falling[:4]) == ""  # too few to tell
    assert trend([*falling, *[1.0, 1.1] * 10]) == "level"  # only the last ones count


def test_the_curve_goes_from_the_highest_to_the_lowest() -> None:
    assert curve_text([3.0, 1.0, 2.0, 1.0]) == "█▁▅▁"
    long = curve_text([float(100 - at) for at in range(100)])
    assert len(long) == CURVE and long[0] == BARS[-1] and long[-1] == BARS[0]
    assert curve_text([1.0, 1.0]) == BARS[0] * 2


def test_memory_is_shown_beside_the_plan_and_the_next_evaluation_and_save_are_told() -> None:
    status = Status(120, Milestones(planned_memory_bytes=2**31, eval_every=20, save_every=50))
    status.watch(NUMBERS)
    status.watch({"epoch": 0.5, "eval_loss": 1.25})
    shown = {name: text.strip() for name, text in status.parts(40)}
    assert shown == {
        "loss": "0.7500         ▁", "eval loss": "1.2500", "lr": "1.0e-04", "": "12,346 tok/s",
        "memory": "1.50 GiB (2.00 planned)", "next eval": "60", "next save": "50",
    }  # fmt: skip
    assert dict(status.parts(110))["next eval"].strip() == "120"
    assert dict(status.parts(118))["next save"].strip() == "120"  # the last step is saved, too
    assert "next save" not in dict(status.parts(120))
    assert [name for name, _ in Status(9, Milestones()).parts(1)] == []


def test_preferences_and_rewards_show_their_main_metric() -> None:
    status = Status(9, Milestones(), draws=False)
    status.watch({**NUMBERS, "rewards/chosen": 1.0, "rewards/accuracies": 0.75, "rewards/margins": 0.5})
    assert [name for name, _ in status.parts(1)][:3] == ["loss", "rewards/accuracies", "rewards/margins"]
    status.watch({"loss": 1.0, "reward": 0.25})
    assert [name for name, _ in status.parts(1)][:3] == ["loss", "reward", "rewards/accuracies"]
    assert not set(BARS) & set("".join(text for _, text in status.parts(1)))


SCRIPT = f"""
from llmtune.training.console import Console
from llmtune.training.console import Console
from llmtune.training.status import Milestones
console = Console(120, milestones=Milestones(planned_memory_bytes=2**31, eval_every=20, save_every=50))
console.start()
for step in range(1, 100):
    console.at(step)
    if step % 10 == 0:
        console.log(step, {NUMBERS!r} | {{"loss": 1 / step, "rewards/accuracies": 0.5}})
console.log(99, {{"eval_loss": 1.25}})
console.finish()
"""


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_it_fits_the_terminal(columns: int, tmp_path: Path) -> None:
    (tmp_path / "show.py").write_text(SCRIPT)
    screen = on_terminal(["show.py"], columns=columns, folder=tmp_path)
    assert screen.code == 0 and screen.lines == screen.unbroken, screen.text
    bottom = " ".join(screen.text.splitlines()[-6:])
    for part in ("falling", "rewards/accuracies 0.5", "memory 1.50 GiB (2.00 planned)", "next eval 100",
                 "next save 100", "eval loss 1.2500", "eta"):  # fmt: skip
        assert part in bottom, screen.text
    assert "99/120" in screen.lines[-1]


def test_the_numbers_of_a_step_are_in_sight_at_once_and_in_colours_of_the_terminal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    stream = Terminal()
    console = Console(40, stream=stream, milestones=Milestones(planned_memory_bytes=2**31))
    console.start()
    console.log(10, NUMBERS)
    text = stream.getvalue()
    console.finish()
    assert "1.50 GiB (2.00 planned)" in text
    assert "\x1b[38;2" not in text and "\x1b[48" not in text  # none that only a dark background suits
