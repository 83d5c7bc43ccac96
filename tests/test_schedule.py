"""The learning rate of a run: kinds of warm-up, and a schedule that follows evaluations."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llmtune import PlanError
from llmtune.planning.plan import Plan
from llmtune.testing.running import tiny_recipe, train
from llmtune.training.log import read_metrics
from llmtune.training.schedule import WarmedSchedule

PLATEAU = {"name": "reduce_lr_on_plateau", "patience": 0, "factor": 0.5, "threshold": 10.0, "threshold_mode": "abs"}


def rates(folder: Path, **keys: Any) -> list[float]:
    return [row["learning_rate"] for row in train(tiny_recipe(folder, learning_rate=0.01, **keys)).metrics]


@pytest.mark.parametrize(
    ("keys", "shares"),
    [
        ({}, [0.0, 1 / 3, 2 / 3, 1.0]),
        ({"warmup_type": "cosine"}, [0.5 - 0.5 * math.cos(math.pi * step / 3) for step in range(4)]),
        ({"warmup_type": "constant"}, [1.0, 1.0, 1.0, 1.0]),
        ({"warmup_type": "constant", "warmup_start_ratio": 0.2}, [0.2, 0.2, 0.2, 1.0]),
        ({"warmup_start_ratio": 0.4}, [0.4, 0.6, 0.8, 1.0]),
    ],
)
def test_kinds_of_warm_up(keys, shares) -> None:
    from llmtune.recipe.train_config import TrainConfig

    config = TrainConfig(**keys)

    class Part:
        full_label = "lr_scheduler_config flat"

        class built:
            factor = staticmethod(lambda step, total, warmup: 1.0)

    schedule = WarmedSchedule(Part(), config.warmup_type, config.warmup_start)  # type: ignore[arg-type]
    assert [schedule.factor(step, 9, 3) for step in range(4)] == pytest.approx(shares)


def test_a_run_warms_up_as_its_recipe_says(tmp_path: Path) -> None:
    found = rates(tmp_path, warmup_steps=2, warmup_type="cosine", lr_scheduler_config="constant")
    assert found == pytest.approx([0.0, 0.005, 0.01, 0.01])


def test_plateau_follows_the_runs_evaluations_and_is_resumed(tmp_path: Path) -> None:
    """The threshold is never met, so that each evaluation but the first halves the rate."""
    keys = {"eval_strategy": "steps", "eval_steps": 1, "val_size": 4, "lr_scheduler_config": PLATEAU, "save_steps": 3}
    whole = rates(tmp_path, **keys, max_steps=5, output_dir=str(tmp_path / "whole"))
    assert whole == pytest.approx([0.01, 0.01, 0.005, 0.0025, 0.00125])
    place = str(tmp_path / "whole" / "checkpoints" / "step-00000003")
    rest = rates(tmp_path, **keys, max_steps=5, resume_from_checkpoint=place, output_dir=str(tmp_path / "rest"))
    assert rest == pytest.approx(whole[3:])


def test_plateau_without_evaluations_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="reduce_lr_on_plateau follows evaluations, and the recipe has none; set eval_"):
        train(tiny_recipe(tmp_path, lr_scheduler_config=PLATEAU))


def test_intervals_may_be_shares_of_all_steps(tmp_path: Path) -> None:
    keys = {"eval_strategy": "steps", "eval_steps": 0.4, "val_size": 4, "save_steps": 0.5, "max_steps": 4}
    train(tiny_recipe(tmp_path, **keys))
    assert [row["step"] for row in read_metrics(tmp_path / "run") if "eval_loss" in row] == [2, 4]
    found = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.startswith("step-")]
    assert sorted(found) == ["step-00000002", "step-00000004"]
    assert [Plan.every(SimpleNamespace(steps=30), each) for each in (0.1, 0.01, 1, 7)] == [3, 1, 1, 7]  # type: ignore[arg-type]
