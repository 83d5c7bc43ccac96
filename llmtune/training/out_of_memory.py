"""When memory runs out in a run: where it did, what a step takes by the plan, and what would help."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from llmtune.contract.errors import LlmtuneError, OutOfMemoryError, is_out_of_memory


@contextmanager
def explain_out_of_memory(
    device: torch.device, place: Callable[[], str], remedies: Callable[[], list[str]]
) -> Iterator[None]:
    """Raise OutOfMemoryError for what torch raises when an allocation fails, with lines that say what would help.

    `place` says where the run is, such as `step 3`; `remedies` gives the lines.
    """
    try:
        yield
    except BaseException as error:
        if not is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())
    else:
        return
    if device.type == "cuda":
        torch.cuda.empty_cache()
    kind = "GPU" if device.type == "cuda" else "host"
    lines = [f"{place()}: out of {kind} memory ({reason[:200]}). The last checkpoint is good"]
    try:
        lines += remedies()
    except LlmtuneError as error:  # a plan that cannot be estimated still has the sentence above
        lines.append(f"Its cost cannot be estimated ({error}); take a smaller per_device_train_batch_size")
    raise OutOfMemoryError("\n".join(lines))
