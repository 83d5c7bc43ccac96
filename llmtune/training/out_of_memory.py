"""When memory runs out in a run: where it did, what a step takes by the plan, and what would help."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from llmtune.contract.errors import LlmtuneError, OutOfMemoryError

if TYPE_CHECKING:
    from llmtune.planning.plan import Plan

_SHOWN = 5


@contextmanager
def explain_out_of_memory(plan: Plan, place: Callable[[], str]) -> Iterator[None]:
    """Raise OutOfMemoryError, with the plan's table and advice, for what torch raises when an allocation fails.

    `place` says where the run is, such as `step 3`.
    """
    import torch

    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        # On a CPU torch has no class of its own for it.
        if type(error) is RuntimeError and "can't allocate memory" not in str(error):
            raise
        reason = " ".join(str(error).split())
    else:
        return
    if plan.device.type == "cuda":
        torch.cuda.empty_cache()
    raise OutOfMemoryError(exhausted_text(plan, place(), reason))


def exhausted_text(plan: Plan, place: str, reason: str) -> str:
    """The message: one sentence, the table of the plan, and changes in the order in which to try them."""
    from llmtune.cost.advice import advise
    from llmtune.cost.text import rows, size

    kind = "GPU" if plan.device.type == "cuda" else "host"
    lines = [f"{place}: out of {kind} memory ({reason[:200]}). The last checkpoint is good"]
    try:
        cost = plan.cost
        traced = plan.ranks.size == 1  # tracing several ranks needs a process group of its own, and the run has one
        found = cost.memory if traced else cost.quick
        table = [f"  {name:<16}{now:>12}" for name, now, _ in rows(found)[1:]]
        lines += [f"By the plan a step takes on each rank, of {size(cost.device.usable)}:", *table]
        if traced:
            better = advise(cost).single[:_SHOWN]
            lines += ["Try, in this order:", *(f"  {each.change}, for a peak of {size(each.peak)}" for each in better)]
        else:
            lines.append(f"`llmtune plan RECIPE --ranks {plan.ranks.size}` says what would help, in order")
    except LlmtuneError as error:  # a plan that cannot be estimated still has the sentence above
        lines.append(f"Its cost cannot be estimated ({error}); take a smaller per_device_train_batch_size")
    return "\n".join(lines)
