"""What a step of a plan costs, in figures: memory by two methods, FLOPs, time, whether it fits."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from llmtune.contract.errors import PlanError
from llmtune.cost.flops import Flops, count
from llmtune.cost.trace import trace
from llmtune.planning.devices import Device
from llmtune.planning.memory import Estimate
from llmtune.planning.memory_formulas import estimate_memory
from llmtune.planning.micro_batch import MicroBatch

if TYPE_CHECKING:
    from llmtune.planning.plan import Plan


@dataclass(kw_only=True, repr=False)
class Figures:
    """What an optimiser step costs on one rank. Each figure is computed when it is first asked for."""

    plan: Plan
    shape: MicroBatch
    """The micro-batch that memory is counted for."""
    device: Device
    untraced: str = field(default="", init=False)
    """Why there is no traced figure, once it was asked for."""

    @cached_property
    def quick(self) -> Estimate:
        """Memory by formulas, at once."""
        return estimate_memory(self.plan, self.shape)

    @cached_property
    def traced(self) -> Estimate | None:
        """Memory by a step on fake tensors; None where an operation has no fake version (`untraced` says which)."""
        try:
            return trace(self.plan, self.shape)
        except Exception as error:
            # Any operation of any plugin may have no fake version; the formulas still stand.
            said = " ".join(str(error).split())[:200]
            self.untraced = said if isinstance(error, PlanError) else f"{type(error).__name__}: {said}"
            return None

    @property
    def memory(self) -> Estimate:
        """The traced figures, or the formulas' where there are none."""
        return self.traced or self.quick

    @property
    def fits(self) -> bool:
        """Whether the peak leaves the device its reserve."""
        return self.memory.at_peak.total <= self.device.usable

    @property
    def result_bytes(self) -> int:
        """What rank 0 needs of host memory, beside the step's, to write the whole model; 0 where it writes an adapter
        or the weights as they lie there."""
        model, width = self.plan.model, self.plan.model.precision.compute.itemsize
        as_they_lie = self.plan.ranks.size == 1 and self.device.kind == "cpu" and width == 4
        return 0 if model.is_adapter or as_they_lie else width * sum(p.numel() for p in model.module.parameters())

    @cached_property
    def flops(self) -> Flops:
        """Operations per token, by the rule of docs/costs.md."""
        return count(self.plan.model, self.shape)

    @property
    def step_tokens(self) -> float:
        """Tokens of an optimiser step on one rank, on average, without padding."""
        share = self.plan.ranks.dims.context * self.plan.ranks.dims.tensor
        return self.shape.mean_tokens * self.shape.micro_steps / share

    def step_seconds(self, mfu: float) -> float | None:
        """Time of an optimiser step at a model FLOPs utilisation; None where the device's peak is not known."""
        return self.flops.total * self.step_tokens / (self.device.flops * mfu) if self.device.flops else None

    def mfu(self, tokens_per_second: float) -> float | None:
        """Model FLOPs utilisation at a speed of all ranks together; None where the device's peak is not known."""
        if not self.device.flops:
            return None
        return tokens_per_second * self.flops.total / (self.device.flops * self.plan.ranks.size)

    def as_dict(self) -> dict[str, Any]:
        """All figures but advice as plain values: bytes, FLOPs a token, seconds a step."""
        expected = self.flops.expected_mfu
        return {
            "device": asdict(self.device) | {"usable": self.device.usable},
            "ranks": self.plan.ranks.size,
            "layout": asdict(self.plan.ranks.dims),
            "micro_batch": asdict(self.shape),
            "media": asdict(self.plan.media) if self.plan.media is not None else None,
            "memory": _plain(self.memory),
            "method": "traced" if self.traced else "formulas",
            "formulas": _plain(self.quick),
            "untraced": self.untraced,
            "fits": self.fits,
            "result_bytes": self.result_bytes,
            "flops_per_token": asdict(self.flops) | {"total": self.flops.total},
            "expected_mfu": expected,
            "step_seconds": self.step_seconds(expected),
        }


def _plain(estimate: Estimate) -> dict[str, Any]:
    return {
        "moment": estimate.moment,
        "peak": estimate.at_peak.total,
        "at_peak": asdict(estimate.at_peak),
        "most": asdict(estimate.most),
    }
