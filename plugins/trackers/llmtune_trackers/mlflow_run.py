"""A run of MLflow."""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from llmtune import LoggerStart, RunContext, RunStatus, SampleAnswer

from .tracker import TrackerRun, as_text, flat

if TYPE_CHECKING:
    from torch import nn

    from .configs import MlflowConfig

STATES: Mapping[RunStatus, str] = {"done": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}
MOST_PARAMS = 100
"""So many a request takes."""
_REFUSED = re.compile(r"[^\w\-. :/]")
"""Characters that no name of a metric has at MLflow, which refuses the whole request for one."""
LONGEST_PARAM = 500
"""Characters that every MLflow server takes as the value of a parameter; the recipe is there as a file, too."""


class MlflowRun(TrackerRun):
    """A `Logger`. It uses the client that names its run, and so does not disturb an active run of the process."""

    def __init__(self, config: MlflowConfig) -> None:
        super().__init__()
        self.config = config
        self.status: RunStatus = "failed"

    def check(self, context: RunContext, model: nn.Module) -> Iterable[str]:
        """Objections to an address that would be written down with its password."""
        given = urlsplit(self.config.tracking_uri or "")
        if given.password or (given.username and given.scheme.startswith("http")):  # where it may be a token
            yield (
                "tracking_uri: holds a password or a name; leave it out and set "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            )

    def open_run(self, start: LoggerStart, known: bool) -> str:
        """Parameters of a run of MLflow cannot change: those of its first part stay."""
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self.client = MlflowClient(tracking_uri=self.config.tracking_uri)
        run_id = self.id
        if known:
            self.client.update_run(run_id, status="RUNNING")
        else:
            name = self.config.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "llmtune"
            experiment = self.client.get_experiment_by_name(name)
            place = experiment.experiment_id if experiment else self.client.create_experiment(name)
            made = self.client.create_run(place, run_name=self.config.run_name or start.run_folder.name)
            run_id = made.info.run_id
            params = [Param(key, str(value)[:LONGEST_PARAM]) for key, value in flat(start.recipe).items()]
            for first in range(0, len(params), MOST_PARAMS):
                self.client.log_batch(run_id, params=params[first : first + MOST_PARAMS])
        self.client.log_dict(run_id, dict(start.recipe), "recipe.yaml")
        return run_id

    def send(self, step: int, metrics: Mapping[str, float]) -> None:
        """All metrics of a step in one request."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        # A database would keep an infinite value as the largest number, which is one: NaN is none.
        finite = {name: value if math.isfinite(value) else math.nan for name, value in metrics.items()}
        self.client.log_batch(self.id, metrics=[
            Metric(_REFUSED.sub("_", name), value, now, step) for name, value in finite.items()
        ])  # fmt: skip

    def log_samples(self, step: int, samples: Sequence[SampleAnswer]) -> None:
        """A file of Markdown."""
        self.client.log_text(self.id, as_text(samples), f"samples/step_{step}.md")

    def log_picture(self, step: int, name: str, png: bytes) -> None:
        """A file."""
        self.client.log_artifact(self.id, str(self.saved_picture(step, name, png)), "pictures")

    def ended(self, status: RunStatus) -> None:
        """For `finish`."""
        self.status = status

    def close_run(self) -> None:
        """Set the run's status."""
        self.client.set_terminated(self.id, STATES[self.status])
