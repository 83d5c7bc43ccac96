"""From what the recipe asks for to what is put in, with a line on each kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import Any

from torch import nn

from llmtune import ModelEdit, PlanError, RunContext
from llmtune_kernels import KERNELS
from llmtune_kernels.spec import KernelSpec

KEY = "kernel_config.include_kernels"


class Kernels:
    """The edit that `kernel_config: auto` builds."""

    def __init__(self, asked_for: Sequence[str] | None) -> None:
        self.asked_for = asked_for
        """Ids, or None for all that suit."""

    def check(self, context: RunContext, model: nn.Module) -> Iterator[str]:
        """A sentence for each kernel the recipe names that cannot be put in."""
        if self.asked_for is None:
            return
        chosen: dict[str, str] = {}
        for spec in map(load, self.asked_for):
            if spec.op in chosen:
                yield f'{KEY}: "{chosen[spec.op]}" and "{spec.id}" both replace {spec.op}; keep one of them'
                continue
            chosen[spec.op] = spec.id
            if obstacle := spec.obstacle(model, context):
                reason, fix = obstacle
                yield f'{KEY}: "{spec.id}" cannot be used: {reason}; {fix}, or write include_kernels: auto'

    def apply(self, model: nn.Module, context: RunContext) -> ModelEdit:
        """Put the kernels in. Raises PlanError if one that the recipe names cannot run here."""
        if problems := list(self.check(context, model)):
            raise PlanError("\n".join(problems))
        ops: dict[str, Callable[..., Any]] = {}
        attention, report, done = None, [], {}
        for spec in map(load, KERNELS if self.asked_for is None else self.asked_for):
            if obstacle := spec.obstacle(model, context):
                report.append(f"{spec.id}: not used, {obstacle[0]}")
            elif spec.op in done:
                report.append(f"{spec.id}: not used, {done[spec.op]} replaces {spec.op}")
            elif spec.train_only and context.mode == "infer":
                report.append(f"{spec.id}: changes nothing in inference")
            else:
                change = spec.apply(model, context)
                ops |= change.ops
                attention = change.attention or attention
                report += change.report
                done[spec.op] = spec.id
        return ModelEdit(ops=ops, attention=attention, report=report or ["no kernels: include_kernels is off"])


def load(name: str) -> KernelSpec:
    """The kernel's own module, imported only when the kernel is considered."""
    return import_module(f"llmtune_kernels.{name}").SPEC
