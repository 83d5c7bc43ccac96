"""Curves show what was logged, and drawing them leaves matplotlib as it was."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest

from llmtune import PlanError
from llmtune.data import plot as drawing
from llmtune.training import plot

pytest.importorskip("matplotlib")

METRICS = [
    {"step": 1, "loss": 2.0, "grad_norm": 1.0, "learning_rate": 1e-4, "tokens_per_second": 100.0},
    {"step": 2, "loss": math.nan, "grad_norm": 900.0, "learning_rate": 5e-5, "tokens_per_second": 110.0},
    {"step": 2, "eval_loss": 1.75},
    {"step": 3, "loss": 1.5, "grad_norm": 2.0, "learning_rate": 0.0, "tokens_per_second": 120.0},
]


def test_panels_hold_the_logged_numbers(tmp_path: Path) -> None:
    path = tmp_path / "loss.png"
    figure = plot.plot_metrics(METRICS, path)
    loss, rate, norm, speed = figure.axes
    assert loss.lines[0].get_xydata().tolist() == [[1, 2.0], [3, 1.5]]  # NaN has no place on an axis
    assert loss.lines[1].get_xydata().tolist() == [[2, 1.75]]
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["training", "evaluation"]
    assert rate.lines[0].get_xydata().tolist() == [[1, 1e-4], [2, 5e-5], [3, 0.0]]
    assert norm.get_yscale() == "log"  # a spike of 900 would flatten the rest
    assert speed.get_ylim()[0] == 0
    assert path.read_bytes().startswith(b"\x89PNG")


def test_nothing_logged_is_said() -> None:
    figure = plot.plot_metrics([])
    assert [axes.texts[0].get_text() for axes in figure.axes] == ["not logged"] * 4


def test_without_global_state() -> None:
    code = (
        "import sys, matplotlib; before = dict.__getitem__(matplotlib.rcParams, 'backend')\n"
        "from llmtune.training.plot import plot_metrics; plot_metrics([{'step': 1, 'loss': 1.0}])\n"
        "print('matplotlib.pyplot' in sys.modules, 'torch' in sys.modules)\n"
        "print(dict.__getitem__(matplotlib.rcParams, 'backend') == before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False", "True"]


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    assert drawing.plotting_problem() is None
    monkeypatch.setattr(drawing, "find_spec", lambda name: None)
    assert "pip install llmtune[plot]" in (drawing.plotting_problem() or "")
    with pytest.raises(PlanError, match=r"matplotlib, which is not installed; run `pip install llmtune\[plot\]`"):
        plot.plot_metrics(METRICS)


def test_no_metric_is_told() -> None:
    with pytest.raises(PlanError, match="metrics: none is given; .* Logged are loss"):
        plot.plot_runs({"a": [{"step": 1, "loss": 1.0}]}, metrics=[])


def test_another_ending_is_told(tmp_path: Path) -> None:
    for draw in (lambda path: plot.plot_metrics(METRICS, path), lambda path: plot.plot_runs({"a": METRICS}, path)):
        with pytest.raises(PlanError, match=r'loss.xyz: found the ending ".xyz", allowed is one of .png, .svg, .pdf'):
            draw(tmp_path / "loss.xyz")
    assert not list(tmp_path.iterdir())
