"""Laws of optimisers: they lower a loss, obey rates and groups, and continue exactly from what a checkpoint holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmtune.distributed.ranks import Ranks
from llmtune.testing import running
from llmtune.testing.contract import Broken, Check, Subject, names
from llmtune.testing.optimizers import create_for
from llmtune.testing.points import edits
from llmtune.testing.points.edits import same_bytes
from llmtune.training import checkpoint
from llmtune.training.manifest import Manifest, verify

RATE = 0.02


def laws(subject: Subject) -> list[Check]:
    """All; those on several ranks where they can be started."""
    found = [
        takes_every_parameter, lowers_a_loss, obeys_the_learning_rate, spares_vectors_from_decay,
        leaves_parameters_without_gradient, resumes_exactly, trains_a_model,
    ]  # fmt: skip
    return found + ([edits.same_on_ranks] if subject.spreads else [])


class Bowl(nn.Module):
    """Sum of squared distances from zero, each coordinate of another curvature; matrices and vectors."""

    def __init__(self, device: str) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.large, self.small, self.vector = (
            nn.Parameter(torch.randn(shape, generator=generator).to(device)) for shape in ((96, 64), (3, 5), (7,))
        )

    def forward(self) -> Tensor:
        """The loss, a scalar."""
        curves = [torch.linspace(0.5, 2.0, p.numel(), device=p.device).view_as(p) for p in self.parameters()]
        return torch.stack([(c * p.square()).sum() for c, p in zip(curves, self.parameters(), strict=True)]).sum()


def _start(subject: Subject, rate: float = RATE) -> tuple[Bowl, torch.optim.Optimizer]:
    bowl = Bowl(subject.device)
    return bowl, create_for(subject.built(), list(bowl.named_parameters()), rate)


def _go(bowl: Bowl, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        loss = bowl()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return losses


def takes_every_parameter(subject: Subject, folder: Path) -> None:
    """`create` returns a torch optimiser that holds each parameter once."""
    bowl, optimizer = _start(subject)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise Broken(f"`create` returned {type(optimizer).__name__}", "Return a torch.optim.Optimizer")
    held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    if odd := [name for name, parameter in bowl.named_parameters() if held.count(id(parameter)) != 1]:
        raise Broken(f"{names(odd)} are held not at all or twice", "Put all groups into it")


def lowers_a_loss(subject: Subject, folder: Path) -> None:
    """A hundred steps down a bowl lower the loss at least to two thirds."""
    losses = _go(*_start(subject), 100)
    if not losses[-1] < losses[0] * 2 / 3:
        raise Broken(f"the loss went from {losses[0]:.4g} to {losses[-1]:.4g}", "Check the update's sign and size")


def obeys_the_learning_rate(subject: Subject, folder: Path) -> None:
    """The rate in its groups decides the next step: at 0 nothing moves, weight decay included."""
    bowl, optimizer = _start(subject)
    _go(bowl, optimizer, 2)
    before = {name: parameter.detach().clone() for name, parameter in bowl.named_parameters()}
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    _go(bowl, optimizer, 2)
    if moved := [name for name, parameter in bowl.named_parameters() if not torch.equal(parameter, before[name])]:
        raise Broken(f"{names(moved)} move at a learning rate of 0", 'Read group["lr"] on every step')


def spares_vectors_from_decay(subject: Subject, folder: Path) -> None:
    """A parameter of a group without `decays` (norms, biases) stays where it is while its gradient is zero."""
    bowl, optimizer = _start(subject)
    before = bowl.vector.detach().clone()
    for _ in range(3):
        for parameter in bowl.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    if not torch.equal(bowl.vector, before):
        raise Broken("a vector without gradient moved", "Give groups that do not decay no weight decay")


def leaves_parameters_without_gradient(subject: Subject, folder: Path) -> None:
    """A parameter whose gradient is None is passed over."""
    bowl, optimizer = _start(subject)
    before = bowl.small.detach().clone()
    bowl().backward()
    bowl.small.grad = None
    optimizer.step()
    if not torch.equal(bowl.small, before):
        raise Broken("a parameter without gradient moved", "Skip parameters whose grad is None")


def resumes_exactly(subject: Subject, folder: Path) -> None:
    """Weights and state from a checkpoint continue bit for bit: the state is tensors and plain numbers, all of it."""
    straight, optimizer = _start(subject)
    _go(straight, optimizer, 3)
    for parameter in straight.parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, (Tensor, bool, int, float)):
                raise Broken(f"its state {key} is a {type(value).__name__}", "Use tensors and plain numbers")
    manifest = Manifest(step=3, ranks=1, recipe={}, plugins={}, llmtune="")
    saved = checkpoint.save(folder, straight, optimizer, manifest, Ranks())
    _go(straight, optimizer, 3)
    again, other = _start(subject)
    checkpoint.restore(saved, verify(saved), again, other, Ranks())
    _go(again, other, 3)
    ends = dict(again.named_parameters())
    if odd := [name for name, parameter in straight.named_parameters() if not same_bytes(ends[name], parameter)]:
        raise Broken(f"{names(odd)} differ after resuming", "Keep all state in `optimizer.state[parameter]`")


def trains_a_model(subject: Subject, folder: Path) -> None:
    """Eight steps on the same rows lower a language model's loss, and two runs of them are equal."""
    keys: dict[str, Any] = {
        "max_steps": 8, "per_device_train_batch_size": 12, "disable_shuffling": True, "learning_rate": 0.005,
    }  # fmt: skip
    runs = [running.train(subject.keys(folder, **keys, output_dir=str(folder / name))) for name in ("one", "two")]
    losses = [row["loss"] for row in runs[0].metrics]
    if not losses[-1] < losses[0]:
        raise Broken(f"the loss went from {losses[0]:.4f} to {losses[-1]:.4f}", "Check the update's sign and size")
    if odd := [name for name, tensor in runs[0].tensors.items() if not same_bytes(runs[1].tensors[name], tensor)]:
        raise Broken(f"two equal runs end with different {names(odd)}", "Draw no random numbers of your own")
