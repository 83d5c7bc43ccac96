"""What was logged can be read back from the event file."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
from llmtune_tensorboard import TensorBoardConfig, build, logger_config


def read(folder: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def test_scalars_come_back(tmp_path: Path) -> None:
    logger = build(TensorBoardConfig())
    logger.start(tmp_path, {"model": "some/model", "optim_config": {"name": "adamw"}})
    logger.log(1, {"loss": 2.5, "learning_rate": 1e-4, "tokens": 128})
    logger.log(3, {"loss": 1.25, "eval_loss": 1.5})
    found = read(tmp_path / "tensorboard")  # before finish: a killed run has its metrics
    assert [(event.step, event.value) for event in found.Scalars("train/loss")] == [(1, 2.5), (3, 1.25)]
    assert found.Scalars("train/learning_rate")[0].value == pytest.approx(1e-4)
    assert [(event.step, event.value) for event in found.Scalars("eval/loss")] == [(3, 1.5)]
    assert b"some/model" in found.Tensors("recipe/text_summary")[0].tensor_proto.string_val[0]
    logger.finish()


def test_log_dir_and_continuing(tmp_path: Path) -> None:
    for step in (1, 2):
        logger = build(TensorBoardConfig(log_dir=str(tmp_path / "here")))
        logger.start(tmp_path / "run", {})
        logger.log(step, {"loss": float(step), "grad_norm": math.inf})
        logger.finish()
    assert [event.value for event in read(tmp_path / "here").Scalars("train/loss")] == [1.0, 2.0]
    assert not (tmp_path / "run").exists()


def test_entry_module_is_light() -> None:
    (plugin,) = logger_config()
    assert plugin.name == "tensorboard"
    code = "import sys, llmtune_tensorboard; print([m for m in ('torch', 'tensorboard') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
