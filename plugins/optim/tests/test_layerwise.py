"""Updates during the backward pass are those after it, and free each gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import llmtune
from llmtune import DivergedError, PlanError
from llmtune.testing import in_ranks, tiny_recipe

ADAMW = {"name": "adamw", "fused": False, "weight_decay": 0.1}
LAYERWISE_ADAMW = {"name": "adamw", "layerwise": True, "weight_decay": 0.1}
GALORE = {"name": "galore", "rank": 4, "update_interval": 2}
APOLLO = {"name": "apollo", "rank": 4, "update_interval": 2}


def keys_for(folder: Path, optimizer: dict[str, Any], **changes: Any) -> dict[str, Any]:
    changes = {"max_grad_norm": 0, "gradient_accumulation_steps": 1, "per_device_train_batch_size": 8, **changes}
    return tiny_recipe(folder, learning_rate=0.01, optim_config=optimizer, **changes)


def run(keys: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    from safetensors.torch import load_file

    done = llmtune.train(keys)
    rows = [[row["loss"], row["grad_norm"]] for row in done.metrics if "loss" in row]
    return torch.tensor(rows, dtype=torch.float64), load_file(Path(keys["output_dir"]) / "model" / "model.safetensors")


@pytest.mark.parametrize(
    ("plain", "layerwise"),
    [(ADAMW, LAYERWISE_ADAMW), *((keys, {**keys, "layerwise": True}) for keys in (GALORE, APOLLO))],
    ids=lambda keys: keys["name"],
)
def test_it_learns_the_same_on_one_rank_and_on_two(plain, layerwise, tmp_path: Path) -> None:
    expected = run(keys_for(tmp_path, plain, output_dir=str(tmp_path / "plain")))
    found = run(keys_for(tmp_path, layerwise, output_dir=str(tmp_path / "layerwise"), save_steps=2))
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=0)
    for name, tensor in expected[1].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-5, atol=1e-6)
    # The same rows a step on two ranks, half a micro-batch each; and a run that continues.
    halves = keys_for(tmp_path, layerwise, output_dir=str(tmp_path / "ranks"), per_device_train_batch_size=4)
    place = tmp_path / "layerwise" / "checkpoints" / "step-00000002"
    again = {**keys_for(tmp_path, layerwise, output_dir=str(tmp_path / "again")), "resume_from_checkpoint": str(place)}
    ranked, resumed = in_ranks(2, tmp_path / "scratch", run, halves)[0], run(again)
    torch.testing.assert_close(ranked[0], expected[0], rtol=1e-4, atol=0)
    assert torch.equal(resumed[0], found[0][2:])
    for name, tensor in found[1].items():
        assert torch.equal(resumed[1][name], tensor)


def test_one_gradient_is_there_at_a_time(tmp_path: Path, monkeypatch) -> None:
    from llmtune_optim.whole import WholeMatrixOptimizer

    there, update = [], WholeMatrixOptimizer.step_parameter

    def counted(self, parameter) -> None:
        there.append(sum(one.grad is not None for group in self.param_groups for one in group["params"]))
        update(self, parameter)

    monkeypatch.setattr(WholeMatrixOptimizer, "step_parameter", counted)
    llmtune.train(keys_for(tmp_path, LAYERWISE_ADAMW, max_steps=2))
    # 2 layers of 9 tensors, embedding, last norm and head, twice; autograd may have the next one ready.
    assert len(there) == 42 and max(there) <= 2


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"gradient_accumulation_steps": 2}, "beside gradient_accumulation_steps 2, which sums gradients of several"),
        (
            {"max_grad_norm": 1.0},
            "beside max_grad_norm 1, which needs the norm of all gradients before the",
        ),
        ({"fp16": True, "bf16": None}, "beside fp16, whose loss scaling looks at all gradients"),
    ],
    ids=str,
)
def test_what_needs_all_gradients_is_refused(changes, reason, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=f"optim_config: layerwise: found true, .*{reason}"):
        llmtune.plan(keys_for(tmp_path, LAYERWISE_ADAMW, **changes))


def test_fused_beside_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(llmtune.LlmtuneError, match="fused: found true beside layerwise"):
        llmtune.plan(keys_for(tmp_path, {**LAYERWISE_ADAMW, "fused": True}))


def test_a_loss_that_is_not_finite_moves_nothing(tmp_path: Path) -> None:
    keys = keys_for(tmp_path, LAYERWISE_ADAMW, max_steps=12, save_steps=1)
    with pytest.raises(DivergedError, match=r"not finite|the loss is .*nan"):
        llmtune.train({**keys, "learning_rate": 1e30})


def test_a_plan_counts_one_gradient(tmp_path: Path) -> None:
    found = {}
    for optimizer in (ADAMW, LAYERWISE_ADAMW):
        cost = llmtune.plan(keys_for(tmp_path, optimizer)).cost
        found[optimizer.get("layerwise", False)] = (cost.quick.most.gradients, cost.traced.most.gradients)
    assert all(after < 0.5 * before for after, before in zip(found[True], found[False], strict=True))
