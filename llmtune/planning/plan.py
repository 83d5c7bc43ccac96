"""The plan of a run: frozen, so that it can be printed, compared and trained. What changes it gives a new one."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from llmtune import __version__
from llmtune.data.media_stats import MediaShare
from llmtune.planning.show import data_lines, edit_lines, epoch_text, further_lines, model_lines, parameter_lines
from llmtune.terminal import Shown

if TYPE_CHECKING:
    import torch

    from llmtune.distributed.ranks import Ranks
    from llmtune.planning.data_plan import DataPlan
    from llmtune.planning.devices import Device
    from llmtune.planning.model_plan import ModelPlan
    from llmtune.recipe.parts import Parts
    from llmtune.recipe.recipe import Recipe


@dataclass(frozen=True, kw_only=True, repr=False)
class Plan(Shown):
    """A recipe, resolved for training."""

    folds: ClassVar[bool] = True
    recipe: Recipe
    parts: Parts
    """All plugins of the recipe."""
    model: ModelPlan
    """The model that is trained."""
    data: DataPlan
    further: Mapping[str, ModelPlan] = field(default_factory=dict)
    """The further models of stage and rewards that have weights of their own, by their names."""
    notes: tuple[str, ...] = ()
    target: Device | None = None
    """The described device that this is a plan for, where it need not be one of this machine."""

    @property
    def ranks(self) -> Ranks:
        """The processes of the run."""
        return self.model.ranks

    @property
    def device(self) -> torch.device:
        """The device of this rank."""
        return self.model.device

    @property
    def output_dir(self) -> Path:
        """The folder of the run."""
        assert self.recipe.train.output_dir is not None  # filled in when the recipe was read
        return Path(self.recipe.train.output_dir)

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        train = self.recipe.train
        if train.max_steps:
            return train.max_steps
        per_epoch = self.data.batches.order.steps_per_epoch
        assert per_epoch is not None  # a stream's plan is not made without max_steps
        return max(1, math.ceil(train.num_train_epochs * per_epoch - 1e-9))

    @property
    def warmup_steps(self) -> int:
        """Optimiser steps over which the learning rate rises."""
        train = self.recipe.train
        return train.warmup_steps or math.ceil(train.warmup_ratio * self.steps)

    @cached_property
    def media(self) -> MediaShare | None:
        """What an epoch shows, of a stream its first rows; None where that is text alone."""
        samples, reads = self.data.batches.samples, self.model.media
        return MediaShare.of_samples(samples, reads) if reads is not None and samples.media_count else None

    def every(self, interval: float | None) -> int | None:
        """Steps from one time to the next, for an interval in steps or, below 1, as a share of all; None for none."""
        if interval is None or interval >= 1:
            return None if interval is None else int(interval)
        return max(1, math.ceil(interval * self.steps - 1e-9))

    def noted(self, *notes: str) -> Plan:
        """The plan with further notes for whoever reads it."""
        return replace(self, notes=(*self.notes, *notes))

    def facts(self) -> dict[str, Any]:
        """What all ranks must agree on."""
        evaluation = self.data.prepared.evaluation
        return {
            "llmtune": __version__,
            **{key: json.dumps(value, sort_keys=True, default=str) for key, value in self.recipe.resolved.items()},
            **{f"{key} (read from the environment)": value for key, value in self.recipe.environment.items()},
            "plugins": self.parts.fingerprint(),
            "the chat template": str(self.model.tokenizer.chat_template),
            "training data": self.data.digest,
            "evaluation data": (evaluation.digest or evaluation.hashed()) if evaluation is not None else "",
        }

    def __str__(self) -> str:
        trainable, everything = self.model.parameters()
        epoch = epoch_text(self.data, self.recipe.data.packing)
        warm = min(self.warmup_steps, self.steps) or "none"
        shown = "the first rows show" if self.data.prepared.stream is not None else "an epoch shows"
        numbers = [
            ("Parameters", f"{trainable:,} trainable of {everything:,} ({trainable / everything:.2%})"),
            *data_lines(self.data, self.ranks, self.parts.one("stage_config").built),
            *([("Media", f"{shown} {self.media}")] if self.media is not None else []),
            ("Steps", f"{self.steps} ({epoch}{warm} of them warm-up)"),
            ("Output", f"{self.output_dir}"),
        ]
        lines = [*model_lines(self.model, flat=self.data.batches.flat), *further_lines(self.parts, self.further)]
        lines += ["", "Steps, in order"]
        lines += [*edit_lines(self.parts, self.model), "", *(f"{name:<12}{text}" for name, text in numbers)]
        lines += parameter_lines(self.model)
        if notes := [*self.model.notes, *self.data.notes, *self.notes]:
            lines += ["", *(f"Note: {note}" for note in notes)]
        return "\n".join(lines)
