"""Metrics as TensorBoard scalars, the recipe as text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from llmtune import LoggerStart

from . import TensorBoardConfig


class TensorBoard:
    """A `Logger`. Training metrics appear under `train/`, those called `eval_...` under `eval/`."""

    def __init__(self, config: TensorBoardConfig) -> None:
        self.config = config
        self.writer: SummaryWriter | None = None

    def begin(self, start: LoggerStart) -> None:
        """Open an event file. A continued run adds another one, which has TensorBoard drop what the earlier ones hold
        of steps that are done again; so does a new run in a `log_dir` that an earlier one has used."""
        log_dir = Path(self.config.log_dir).expanduser() if self.config.log_dir else start.folder
        self.writer = SummaryWriter(str(log_dir), purge_step=start.first_step + 1)
        # Four spaces make a code block of every line.
        text = json.dumps(start.recipe, indent=2, default=str)
        self.writer.add_text("recipe", "\n".join(f"    {line}" for line in text.splitlines()))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write every number of `metrics` at `step` and flush, so that a killed run loses nothing."""
        assert self.writer is not None, "log before begin"
        for name, value in metrics.items():
            if isinstance(value, (int, float)):
                tag = f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"
                self.writer.add_scalar(tag, value, step)
        self.writer.flush()

    def finish(self) -> None:
        """Close the event file."""
        if self.writer is not None:
            self.writer.close()
