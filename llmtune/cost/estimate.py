"""The cost of a plan: instant figures, traced figures, FLOPs, time, whether it fits and what would help."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from llmtune.cost.memory import Estimate
from llmtune.cost.shape import Shape, largest
from llmtune.planning.devices import Device, this_device

if TYPE_CHECKING:
    from llmtune.cost.advice import Advice
    from llmtune.cost.flops import Flops
    from llmtune.planning.plan import Plan


@dataclass(kw_only=True)
class Cost:
    """What an optimiser step costs on one rank. Each figure is computed when it is first asked for."""

    plan: Plan = field(repr=False)
    shape: Shape
    """The micro-batch that memory is counted for."""
    device: Device
    untraced: str = ""
    """Why there is no traced figure, once it was asked for."""

    @cached_property
    def quick(self) -> Estimate:
        """By formulas, at once."""
        from llmtune.cost.closed import closed_form

        return closed_form(self.plan, self.shape)

    @cached_property
    def traced(self) -> Estimate | None:
        """By a step on fake tensors; None where an operation has no fake version (`untraced` says which)."""
        from llmtune.cost.trace import trace

        try:
            return trace(self.plan, self.shape)
        except Exception as error:
            # Any operation of any plugin may have no fake version; the formulas still stand.
            self.untraced = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            return None

    @property
    def memory(self) -> Estimate:
        """The traced figures, or the formulas' where there are none."""
        return self.traced or self.quick

    @property
    def fits(self) -> bool:
        """Whether the peak leaves the device its reserve."""
        return self.memory.at_peak.total <= self.device.usable

    @cached_property
    def flops(self) -> Flops:
        """Per token, by the rule of docs/costs.md."""
        from llmtune.cost.flops import count

        return count(self.plan, self.shape)

    @property
    def step_tokens(self) -> float:
        """Tokens of an optimiser step on one rank, on average, without padding."""
        share = self.plan.ranks.layout.context * self.plan.ranks.layout.tensor
        return self.shape.mean_tokens * self.shape.micro_steps / share

    def step_seconds(self, mfu: float) -> float | None:
        """Time of an optimiser step at a model FLOPs utilisation; None where the device's peak is not known."""
        return self.flops.total * self.step_tokens / (self.device.flops * mfu) if self.device.flops else None

    def mfu(self, tokens_per_second: float) -> float | None:
        """Model FLOPs utilisation at a speed of all ranks together; None where the device's peak is not known."""
        if not self.device.flops:
            return None
        return tokens_per_second * self.flops.total / (self.device.flops * self.plan.ranks.size)

    @cached_property
    def advice(self) -> Advice | None:
        """What to change, where it does not fit."""
        from llmtune.cost.advice import advise

        return None if self.fits else advise(self)

    def remedies(self) -> list[str]:
        """What a step takes and what would help, in lines, for a run whose memory is exhausted."""
        from llmtune.cost.text import remedy_lines

        return remedy_lines(self)

    def as_dict(self) -> dict[str, Any]:
        """All figures as plain values: bytes, FLOPs a token, seconds a step."""
        expected = self.flops.expected_mfu
        return {
            "device": asdict(self.device) | {"usable": self.device.usable},
            "ranks": self.plan.ranks.size,
            "layout": asdict(self.plan.ranks.layout),
            "micro_batch": asdict(self.shape),
            "memory": _plain(self.memory),
            "method": "traced" if self.traced else "formulas",
            "formulas": _plain(self.quick),
            "untraced": self.untraced,
            "fits": self.fits,
            "flops_per_token": asdict(self.flops) | {"total": self.flops.total},
            "expected_mfu": expected,
            "step_seconds": self.step_seconds(expected),
            "advice": self.advice.as_dict() if self.advice else None,
        }

    def __str__(self) -> str:
        from llmtune.cost.text import cost_text

        return cost_text(self)

    def _repr_html_(self) -> str:
        from llmtune.cost.text import cost_html

        return cost_html(self)


def _plain(estimate: Estimate) -> dict[str, Any]:
    return {
        "moment": estimate.moment,
        "peak": estimate.at_peak.total,
        "at_peak": asdict(estimate.at_peak),
        "most": asdict(estimate.most),
    }


def estimate(plan: Plan) -> Cost:
    """The cost of a plan."""
    device = plan.target or this_device(plan.device)
    if plan.target is None and device.kind == "cpu":  # ranks on this machine's CPU share its memory
        device = replace(device, memory=device.memory // plan.ranks.size)
    return Cost(plan=plan, shape=largest(plan), device=device)
