"""Metrics as TensorBoard scalars; the recipe, sample answers and the run's end as text; curves as a picture."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from llmtune import LoggerStart, RunStatus, SampleAnswer

from . import TensorBoardConfig


class TensorBoard:
    """A `Logger`. Training metrics appear under `train/`, those called `eval_...` under `eval/`."""

    def __init__(self, config: TensorBoardConfig) -> None:
        self.config = config
        self.writer: SummaryWriter | None = None
        self.step = 0

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
        self.step = step
        for name, value in metrics.items():
            if isinstance(value, (int, float)):
                tag = f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"
                self.writer.add_scalar(tag, value, step)
        self.writer.flush()

    def log_samples(self, step: int, samples: Sequence[SampleAnswer]) -> None:
        """Questions and answers as text."""
        assert self.writer is not None, "log_samples before begin"
        text = "\n\n".join(f"**{sample.question}**\n\n{sample.answer}" for sample in samples)
        self.writer.add_text("samples", text, step)

    def log_picture(self, step: int, name: str, png: bytes) -> None:
        """A picture of the step."""
        import numpy as np
        from PIL import Image

        assert self.writer is not None, "log_picture before begin"
        self.writer.add_image(name, np.asarray(Image.open(io.BytesIO(png)).convert("RGB")), step, dataformats="HWC")

    def ended(self, status: RunStatus) -> None:
        """The word as text, at the last step."""
        assert self.writer is not None, "ended before begin"
        self.writer.add_text("status", status, self.step)

    def finish(self) -> None:
        """Close the event file."""
        if self.writer is not None:
            self.writer.close()
