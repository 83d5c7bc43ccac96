"""Updates during the backward pass: each parameter moves as soon as its gradient is there, which is freed at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch.distributed.tensor import DTensor

from llmtune.contract.errors import DivergedError, PlanError
from llmtune.distributed.ranks import total

if TYPE_CHECKING:
    from torch import Tensor, nn

    from llmtune.contract.optimizers import StepsEach


class LayerwiseUpdates:
    """Hooks on all parameters that train, asleep until `updating`."""

    def __init__(self, optimizer: StepsEach, parameters: Sequence[nn.Parameter]) -> None:
        self.optimizer, self.awake = optimizer, False
        self.norms: list[Tensor] = []
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._update)

    def _update(self, parameter: Tensor) -> None:
        if not self.awake:
            return
        assert parameter.grad is not None
        self.norms.append(torch.linalg.vector_norm(parameter.grad.detach()))
        self.optimizer.step_parameter(parameter)  # type: ignore[arg-type]  # hooks are typed for tensors
        parameter.grad = None

    @contextmanager
    def updating(self, micros: int) -> Iterator[None]:
        """A block whose backward pass updates. Raises PlanError where gradients of several micro-batches are summed."""
        if micros > 1:
            raise PlanError(
                f"optim_config: layerwise updates during the backward pass, and a step has {micros} micro-batches; "
                "go on with as many ranks as the run was started on, or with a larger per_device_train_batch_size"
            )
        self.awake = True
        try:
            yield
        finally:
            self.awake = False

    def require_finite(self, loss: Tensor, step: int) -> None:
        """Raise DivergedError on all ranks, before the backward pass, where a loss is not finite on any of them."""
        if total((~loss.detach().isfinite()).double()).item():
            raise DivergedError(
                f"step {step + 1}: the loss is not finite; stopped before the update, so the weights and the last "
                "checkpoint are good. Lower learning_rate"
            )

    def norm(self) -> Tensor:
        """L2 norm of all gradients of the last backward pass, each number counted once."""
        norms, self.norms = self.norms, []
        return torch.linalg.vector_norm(torch.stack([n.full_tensor() if isinstance(n, DTensor) else n for n in norms]))
