"""A run of Weights & Biases."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmtune import LoggerStart, RunStatus, SampleAnswer

from .tracker import EXIT_CODES, TrackerRun

if TYPE_CHECKING:
    import wandb

    from .configs import WandbConfig


class WandbRun(TrackerRun):
    """A `Logger`. Its files are in the logger's folder; what a process prints stays there where it was printed."""

    def __init__(self, config: WandbConfig) -> None:
        super().__init__()
        self.config = config
        self.status: RunStatus = "failed"

    def open_run(self, start: LoggerStart, known: bool) -> str:
        """`resume="allow"` goes on with the id; offline, `wandb sync` joins the parts by it."""
        import wandb

        config = self.config
        self.run: wandb.Run = wandb.init(
            id=self.id, resume="allow", mode=config.mode, dir=str(start.folder), config=dict(start.recipe),
            project=config.project or os.environ.get("WANDB_PROJECT") or "llmtune", entity=config.entity,
            name=config.run_name or start.run_folder.name, group=config.group, tags=config.tags or None,
            allow_val_change=True, reinit="create_new", save_code=False,
            settings=wandb.Settings(silent=True, console="off", disable_git=True, api_key=config.api_key),
        )  # fmt: skip
        if self.run.url:
            print(f"wandb: {self.run.url}", flush=True)
        return self.run.id

    def send(self, step: int, metrics: Mapping[str, float]) -> None:
        """One row of the history for each step."""
        self.run.log(dict(metrics), step=step)

    def log_samples(self, step: int, samples: Sequence[SampleAnswer]) -> None:
        """A table."""
        import wandb

        rows: list[Iterable[Any]] = [[step, sample.question, sample.answer] for sample in samples]
        table = wandb.Table(columns=["step", "question", "answer"], data=rows)
        self.run.log({"samples": table}, step=step)

    def log_picture(self, step: int, name: str, png: bytes) -> None:
        """A picture of the step."""
        import wandb

        self.run.log({name: wandb.Image(str(self.saved_picture(step, name, png)))}, step=step)

    def ended(self, status: RunStatus) -> None:
        """The word goes into the summary, and into the exit code, which W&B shows as finished or failed."""
        self.status = status
        self.run.summary["status"] = status

    def close_run(self) -> None:
        """Send what is left."""
        self.run.finish(exit_code=EXIT_CODES[self.status])
