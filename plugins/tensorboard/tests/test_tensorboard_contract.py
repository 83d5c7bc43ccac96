"""The contract."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmtune.testing import Law, laws


def steps(own: Path, run: Path) -> list[int]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(own))
    events.Reload()
    return [event.step for event in events.Scalars("train/loss")]


@pytest.mark.parametrize("law", laws("logger_config", "tensorboard", reader=steps), ids=str)
def test_contract(law: Law, tmp_path: Path) -> None:
    law(tmp_path)
