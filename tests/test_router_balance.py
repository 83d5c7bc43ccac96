"""The balance of routers is transformers' auxiliary loss over a whole step, however the step is split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import llmtune
from llmtune import PlanError
from llmtune.data.batches import collate
from llmtune.data.sequence import TokenSequence
from llmtune.model.routers import routers
from llmtune.testing.tiny import tiny_model
from llmtune.training.router_balance import RouterBalance
from tests.by_hand import base_by_hand, mean_and_output, train_by_hand
from tests.spawn import in_ranks
from tests.test_expert_parallel import FAMILIES
from tests.test_parity import recipe
from tests.tiny import tiny_model_folder

COEFFICIENT = 0.5
STEPS = 3
FULL = {"disable_gradient_checkpointing": False, "activation_checkpointing": "full"}
SPLITS: dict[str, dict[str, Any]] = {
    "one micro-batch": {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1},
    "four, padded, computed again": {
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "kernel_config": None, **FULL,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    return {family: str(tiny_model_folder(root, family, **sizes)) for family, sizes in FAMILIES.items()}


def keys_for(model: str, data: str, output: Path, **changes: Any) -> dict[str, Any]:
    return recipe(model, data, output, max_steps=STEPS, moe_aux_loss_coef=COEFFICIENT, save_steps=None, **changes)


def numbers(folder: Path) -> list[tuple[float, float]]:
    """(loss with the balance, gradient norm) of every step of a run."""
    rows = [row for row in llmtune.load(folder).metrics if "router_aux_loss" in row]
    return [(row["loss"] + COEFFICIENT * row["router_aux_loss"], row["grad_norm"]) for row in rows]


def train_both(each: list[dict[str, Any]]) -> None:
    for keys in each:
        llmtune.train(keys)


def theirs(model: Any, rows: Any, pad: int) -> torch.Tensor:
    loss, given = mean_and_output(model, rows, pad, output_router_logits=True)
    return loss + COEFFICIENT * given.aux_loss


@pytest.fixture(scope="module")
def two_ranks(models: dict[str, str], chats: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ranks")
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    spreads: dict[str, dict[str, Any]] = {
        "mixtral": FULL,
        "qwen3_moe": {"dist_config": {"name": "fsdp2", "tp_size": 2, "ep_size": 2}},
    }
    whole = {**split, "per_device_train_batch_size": 4}
    sizes = {"mixtral": split, "qwen3_moe": whole}
    each = [keys_for(models[name], chats, root / name, **sizes[name], **more) for name, more in spreads.items()]
    rows = {"kernel_config": "auto", "dist_config": {"name": "fsdp2", "cp_size": 2}, **whole}
    each += [keys_for(models[name], chats, root / "split rows" / name, **rows) for name in FAMILIES]
    in_ranks(2, root / "scratch", train_both, each)
    return root


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_are_those_of_transformers(
    family: str, models: dict[str, str], chats: str, two_ranks: Path, tmp_path: Path
) -> None:
    keys = {name: keys_for(models[family], chats, tmp_path / name, **split) for name, split in SPLITS.items()}
    train_both(list(keys.values()))
    first = keys["one micro-batch"]
    expected = train_by_hand(first, base_by_hand(first), llmtune.plan(first), theirs)
    for folder in (*(tmp_path / name for name in SPLITS), two_ranks / family, two_ranks / "split rows" / family):
        assert numbers(folder) == [pytest.approx(row, rel=2e-5) for row in expected], folder.name
    without = {**first, "output_dir": str(tmp_path / "without"), "moe_aux_loss_coef": 0}
    metrics = llmtune.train(without).metrics
    assert not any("router_aux_loss" in row for row in metrics)
    assert metrics[0]["grad_norm"] != pytest.approx(expected[0][1], rel=1e-3)


def test_dropout_and_a_reference_leave_the_count_right(
    models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is counted before the first backward pass is what then is learnt from; a reference is not counted."""
    from llmtune.testing.tiny import tiny_preferences

    counted: list[torch.Tensor] = []
    counts = RouterBalance._counted

    def spy(self: Any, logits: Any, micro: Any) -> Any:
        assert len(logits) == 2  # one for each layer
        found = counts(self, logits, micro)
        counted.append(found[0])
        return found

    monkeypatch.setattr(RouterBalance, "_counted", spy)
    lora = {"name": "lora", "r": 2, "lora_dropout": 0.4}
    keys = keys_for(
        models["qwen3_moe"], str(tiny_preferences(tmp_path)), tmp_path / "run", stage_config="dpo", peft_config=lora,
        per_device_train_batch_size=2, learning_rate=0.1,
    )  # fmt: skip
    llmtune.train(keys)
    assert len(counted) == 4 * STEPS
    for step in range(STEPS):
        before, now = counted[4 * step : 4 * step + 2], counted[4 * step + 2 : 4 * step + 4]
        assert all(torch.equal(one, other) for one, other in zip(before, now, strict=True))


@pytest.mark.parametrize("flat", [True, False])
def test_blanks_beside_rows_are_not_counted(flat: bool) -> None:
    """Blank pictures keep towers of a batch without pictures at work; how many there are hangs on ranks."""
    model = tiny_model("mixtral", **FAMILIES["mixtral"]).train()
    rows = [TokenSequence(np.arange(start, start + size), np.ones(size, bool)) for start, size in ((5, 8), (30, 5))]
    blank = TokenSequence(np.full(6, 3), np.zeros(6, bool))
    balance = RouterBalance(model, 1.0, 1)

    def share(rows: list[TokenSequence], fillers: list[TokenSequence]) -> float:
        micro = collate(rows, flat=flat, pad_id=0, fillers=fillers)
        balance.begin_step(lambda number: None, [micro])
        with balance.share(micro) as made:
            for router, _ in routers(model):
                router(embed(micro.input_ids).flatten(0, 1))
        return made[0].item()

    embed = model.get_input_embeddings()
    assert share(rows, [blank]) == pytest.approx(share(rows, []), rel=1e-6)
    assert share([], [blank]) == share([], [])


def test_every_family_has_one_router_a_layer() -> None:
    small = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    sizes = {**FAMILIES, "qwen2_moe": {**small, "shared_expert_intermediate_size": 16}, "olmoe": small}
    for family, more in sizes.items():
        assert len(routers(tiny_model(family, **more))) == 2, family
    assert routers(tiny_model("llama")) == []


def test_models_without_routers_are_told(tiny_llama: str, models: dict[str, str], chats: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="moe_aux_loss_coef: found 0.5, but LlamaForCausalLM has no routers"):
        llmtune.plan(keys_for(tiny_llama, chats, tmp_path / "run"))
    with pytest.raises(PlanError, match="moe_aux_loss_coef: routers cannot be read inside compiled layers"):
        llmtune.plan(keys_for(models["mixtral"], chats, tmp_path / "run", torch_compile=True))
    assert llmtune.plan(keys_for(models["mixtral"], chats, tmp_path / "run")).cost
