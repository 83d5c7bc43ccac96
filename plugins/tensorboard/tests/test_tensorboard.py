"""What was logged can be read back from the event file."""

from __future__ import annotations

import io
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
from llmtune_tensorboard import TensorBoardConfig, build, logger_config
from PIL import Image

from llmtune import LoggerStart, SampleAnswer


def read(folder: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def test_scalars_come_back(tmp_path: Path) -> None:
    logger = build(TensorBoardConfig())
    recipe = {"model": "some/model", "optim_config": {"name": "adamw"}}
    logger.begin(LoggerStart(folder=tmp_path / "tensorboard", run_folder=tmp_path, recipe=recipe, first_step=0))
    logger.log(1, {"loss": 2.5, "learning_rate": 1e-4, "tokens": 128})
    logger.log(3, {"loss": 1.25, "eval_loss": 1.5})
    found = read(tmp_path / "tensorboard")  # before finish: a killed run has its metrics
    assert [(event.step, event.value) for event in found.Scalars("train/loss")] == [(1, 2.5), (3, 1.25)]
    assert found.Scalars("train/learning_rate")[0].value == pytest.approx(1e-4)
    assert [(event.step, event.value) for event in found.Scalars("eval/loss")] == [(3, 1.5)]
    logger.log_samples(3, [SampleAnswer(question="Who?", answer="Pip.")])
    picture = io.BytesIO()
    Image.new("RGB", (2, 2)).save(picture, "PNG")
    logger.log_picture(3, "curves", picture.getvalue())
    logger.ended("interrupted")
    assert b"some/model" in found.Tensors("recipe/text_summary")[0].tensor_proto.string_val[0]
    logger.finish()
    found.Reload()
    (sample,), (status,) = found.Tensors("samples/text_summary"), found.Tensors("status/text_summary")
    assert sample.step == 3 and sample.tensor_proto.string_val[0] == b"**Who?**\n\nPip."
    assert status.step == 3 and status.tensor_proto.string_val[0] == b"interrupted"
    (picture,) = found.Images("curves")
    assert (picture.step, picture.width, picture.height) == (3, 2, 2)


def run(log_dir: Path, own: Path, steps: range) -> None:
    logger = build(TensorBoardConfig(log_dir=str(log_dir)))
    logger.begin(LoggerStart(folder=own, run_folder=own.parent, recipe={}, first_step=steps.start - 1))
    for step in steps:
        logger.log(step, {"loss": float(step), "grad_norm": math.inf})
    logger.finish()


def test_log_dir_and_continuing(tmp_path: Path) -> None:
    for step in (1, 2):
        run(tmp_path / "here", tmp_path / "run" / "own", range(step, step + 1))
    assert [event.value for event in read(tmp_path / "here").Scalars("train/loss")] == [1.0, 2.0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("again", "expected"), [(range(4, 7), [1, 2, 3, 4, 5, 6]), (range(1, 3), [1, 2])])
def test_steps_that_are_done_again_are_there_once(again: range, expected: list[int], tmp_path: Path) -> None:
    """A run of 12 steps, continued after step 3 or started over in the same `log_dir`."""
    run(tmp_path, tmp_path / "own", range(1, 13))
    time.sleep(1.1)  # the files are told apart by the second in their names
    run(tmp_path, tmp_path / "own", again)
    assert [event.step for event in read(tmp_path).Scalars("train/loss")] == expected


def test_entry_module_is_light() -> None:
    (plugin,) = logger_config()
    assert plugin.name == "tensorboard"
    code = "import sys, llmtune_tensorboard; print([m for m in ('torch', 'tensorboard') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
