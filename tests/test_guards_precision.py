"""Number types: mixed precision means what it says on one device too, and float16 steps that overflow are repeated."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import llmtune
from tests.guards import Silent, one_step, start
from tests.runs import recipe
from tests.tiny import tiny_model_folder

METHODS: dict[str, dict[str, Any]] = {
    "full": {"peft_config": None},
    "lora": {},
    "freeze": {"peft_config": {"name": "freeze", "freeze_trainable_layers": 1}},
    "qlora": {"quant_config": "bnb"},
}
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("key", TYPES)
def test_mixed_precision_computes_in_16_bits_and_learns_in_32(
    key: str, method: str, tiny_llama: str, chats: str, tmp_path: Path
) -> None:
    keys = recipe(tiny_llama, chats, tmp_path / "run", **METHODS[method])
    plan, training = start({**keys, key: True})
    outputs = set()
    for layer in plan.model.module.model.layers:
        layer.mlp.up_proj.register_forward_hook(lambda *arguments: outputs.add(arguments[-1].dtype))
    loss = one_step(training)["loss"].item()
    assert outputs == {TYPES[key]}
    for name, parameter in plan.model.module.named_parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else TYPES[key]), name
    assert {weight.grad.dtype for weight in training.parameters if weight.grad is not None} == {torch.float32}
    assert loss == pytest.approx(one_step(start(keys)[1])["loss"].item(), rel=2e-2)


@pytest.mark.parametrize("method", METHODS)
def test_a_small_update_is_not_lost_in_mixed_precision(
    method: str, tiny_llama: str, chats: str, tmp_path: Path
) -> None:
    """At 1e-5 a step is below bfloat16's resolution of most weights; stored in 32 bits they move."""
    _, training = start(recipe(tiny_llama, chats, tmp_path / "run", **METHODS[method], bf16=True))
    before = [weight.detach().clone() for weight in training.parameters]
    one_step(training)
    for group in training.optimizer.param_groups:
        group["lr"] = 1e-5
    training.optimizer.step()
    shares = []
    for old, weight in zip(before, training.parameters, strict=True):
        assert weight.grad is not None
        if len(moved := (old != weight)[weight.grad != 0]):
            shares.append(moved.float().mean().item())
    assert shares and min(shares) > 0.9, shares


def test_layer_one_is_not_layer_eleven(chats: str, tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path, num_hidden_layers=12)
    peft = {"name": "freeze", "freeze_trainable_layers": -2}
    plan = llmtune.plan(recipe(str(folder), chats, tmp_path / "run", peft_config=peft))
    assert {name.split(".")[2] for name in plan.model.trainable} == {"0", "1"}


class Overflowing:
    """A stage whose loss overflows as long as it is scaled by more than 2**13."""

    def __init__(self, inner: Any, training: Any) -> None:
        self.inner, self.training = inner, training

    def loss(self, *arguments: Any) -> Any:
        result = self.inner.loss(*arguments)
        factor = float("inf") if self.training.scaler.scale > 2**13 else 1.0
        return replace(result, total=result.total * factor)


def test_a_step_that_overflows_is_repeated_not_skipped(tiny_llama: str, chats: str, tmp_path: Path) -> None:
    """The rows are trained on, and the learning rate does not move on without them."""
    from llmtune.training.loop import train

    keys = recipe(tiny_llama, chats, tmp_path / "run", fp16=True, max_steps=3, lr_scheduler_config="cosine")
    found = []
    for overflows in (True, False):
        _, training = start(keys)
        assert training.scaler is not None
        if overflows:
            training.objective.stage = Overflowing(training.objective.stage, training)  # type: ignore[assignment]
        else:
            training.scaler.scale = 2.0**13
        watcher = Silent()
        assert train(training, watcher) == 3
        assert training.scaler.scale == 2**13
        numbers = [(step.loss, step.grad_norm, step.learning_rate) for step in watcher.stats]
        found.append((numbers, [weight.detach().clone() for weight in training.parameters]))
    assert found[0][0] == found[1][0] and len(found[0][0]) == 3
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))
