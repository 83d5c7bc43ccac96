"""A run of trackio."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from llmtune import LoggerStart, RunStatus, SampleAnswer

from .tracker import TrackerRun

if TYPE_CHECKING:
    import trackio

    from .configs import TrackioConfig


class TrackioRun(TrackerRun):
    """A `Logger`. Its id is the run's name, which is what trackio knows runs by."""

    def __init__(self, config: TrackioConfig) -> None:
        super().__init__()
        self.config = config

    def open_run(self, start: LoggerStart, known: bool) -> str:
        """`resume="allow"` goes on with the name."""
        import trackio

        config = self.config
        name = self.id if known else config.run_name or f"{start.run_folder.name}-{self.id}"
        self.run: trackio.Run = trackio.init(
            project=config.project, name=name, group=config.group, space_id=config.space_id, resume="allow",
            config=dict(start.recipe), embed=False, auto_log_cpu=False,
        )  # fmt: skip
        return name

    def send(self, step: int, metrics: Mapping[str, float]) -> None:
        """The numbers of a step."""
        self.run.log(dict(metrics), step=step)

    def log_samples(self, step: int, samples: Sequence[SampleAnswer]) -> None:
        """A table."""
        import trackio

        rows = [[step, sample.question, sample.answer] for sample in samples]
        self.run.log({"samples": trackio.Table(columns=["step", "question", "answer"], data=rows)}, step=step)

    def log_picture(self, step: int, name: str, png: bytes) -> None:
        """A picture of the step."""
        import trackio

        self.run.log({name: trackio.Image(str(self.saved_picture(step, name, png)))}, step=step)

    def ended(self, status: RunStatus) -> None:
        """An alert, as trackio has no status of runs."""
        import trackio

        levels = {"done": trackio.AlertLevel.INFO, "failed": trackio.AlertLevel.ERROR}
        self.run.alert(f"The run is {status}", level=levels.get(status, trackio.AlertLevel.WARN))

    def close_run(self) -> None:
        """Write what is left."""
        self.run.finish()
