"""An experiment of SwanLab."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from llmtune import LoggerStart, RunContext, RunStatus, SampleAnswer

from .tracker import TrackerRun, as_text

if TYPE_CHECKING:
    import swanlab
    from torch import nn

    from .configs import SwanLabConfig

STATES: Mapping[RunStatus, str] = {"done": "success", "interrupted": "aborted", "failed": "crashed"}


class SwanLabRun(TrackerRun):
    """A `Logger`. SwanLab itself has one run in a process: this ends another one that is active."""

    def __init__(self, config: SwanLabConfig) -> None:
        super().__init__()
        self.config = config
        self.status: RunStatus = "failed"

    def check(self, context: RunContext, model: nn.Module) -> Iterable[str]:
        """An objection where SwanLab would write files that its local dashboard then does not know."""
        if self.config.swanlab_mode == "local" and find_spec("swanboard") is None:
            yield "swanlab_mode: local needs SwanLab's dashboard; run `pip install 'swanlab[dashboard]'`"

    def open_run(self, start: LoggerStart, known: bool) -> str:
        """In the cloud the id is gone on with. SwanLab's local dashboard cannot do that: it shows NAME and NAME-2."""
        import swanlab

        config = self.config
        callbacks = []
        if config.swanlab_lark_webhook_url:
            from swanlab.plugin.notification import LarkCallback

            callbacks = [LarkCallback(config.swanlab_lark_webhook_url, config.swanlab_lark_secret, language="en")]
        if config.swanlab_api_key and config.swanlab_mode == "cloud":
            swanlab.login(api_key=config.swanlab_api_key, save=False)
        folder = Path(config.swanlab_logdir).expanduser() if config.swanlab_logdir else start.folder
        self.run: swanlab.Run = swanlab.init(
            mode="online" if config.swanlab_mode == "cloud" else config.swanlab_mode, log_dir=str(folder),
            project=config.swanlab_project, workspace=config.swanlab_workspace, id=self.id, resume="allow",
            name=config.swanlab_run_name or start.run_folder.name, config=dict(start.recipe), reinit=True,
            callbacks=callbacks,
            # It would write the command down, as the system knows it, and with it a key that the command holds.
            settings=swanlab.Settings(interactive=False, probe=swanlab.Settings.Probe(runtime=False)),
        )  # fmt: skip
        return self.id

    def send(self, step: int, metrics: Mapping[str, float]) -> None:
        """The numbers of a step."""
        self.run.log(dict(metrics), step=step)

    def log_samples(self, step: int, samples: Sequence[SampleAnswer]) -> None:
        """A text of Markdown."""
        import swanlab

        self.run.log({"samples": swanlab.Text(as_text(samples))}, step=step)

    def log_picture(self, step: int, name: str, png: bytes) -> None:
        """A picture of the step."""
        import swanlab

        self.run.log({name: swanlab.Image(str(self.saved_picture(step, name, png)))}, step=step)

    def ended(self, status: RunStatus) -> None:
        """For `finish`."""
        self.status = status

    def close_run(self) -> None:
        """Send what is left; the Lark bot is told now."""
        self.run.finish(state=STATES[self.status], error="the run failed" if self.status == "failed" else None)
