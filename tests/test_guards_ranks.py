"""Several ranks: packed bytes arrive as they were sent, files are written once, all stop together, all count alike."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import llmtune
from llmtune.contract.errors import DivergedError
from tests.guards import Silent, start
from tests.runs import recipe
from tests.spawn import in_ranks

FOUR_BITS = {"name": "bnb", "double_quantization": False}
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "plain": torch.float32}


def bytes_in_use(keys: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What each 4-bit layer multiplies with, as bytes, once FSDP2 has gathered it from all ranks."""
    from bitsandbytes.nn import Linear4bit

    plan, training = start(keys)
    found: dict[str, torch.Tensor] = {}
    for name, module in plan.model.module.named_modules():
        if isinstance(module, Linear4bit):
            module.register_forward_pre_hook(
                lambda module, _, name=name: found.update(
                    {name: module.weight.detach().clone().view(torch.uint8).flatten()}
                )
            )
    (batch, *_) = training.batches.step(0, training.device)
    with torch.no_grad():
        training.objective(batch)
    return {name.removesuffix(".base_layer"): tensor for name, tensor in found.items()}


class Poisoned:
    """A stage whose loss is infinite on one rank."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def loss(self, *arguments: Any) -> Any:
        result = self.inner.loss(*arguments)
        return replace(result, total=result.total * float("inf"))


def poisoned(keys: dict[str, Any]) -> tuple[str, bool, int]:
    """The error of a step whose loss is infinite on rank 1, whether weights stayed, and the optimiser's states."""
    from llmtune.distributed.placement import local
    from llmtune.training.loop import train

    plan, training = start(keys)
    if plan.ranks.rank == 1:
        training.objective.stage = Poisoned(training.objective.stage)  # type: ignore[assignment]
    before = [local(weight).clone() for weight in training.parameters]
    with pytest.raises(DivergedError) as caught:
        train(training, Silent())
    stayed = all(torch.equal(a, local(b)) for a, b in zip(before, training.parameters, strict=True))
    return str(caught.value), stayed, len(training.optimizer.state)


def saved_apart(keys: dict[str, Any], folder: Path) -> int:
    """Let each rank write the result into a folder of its own; how many files this rank wrote."""
    from llmtune.training.save import write_result

    plan, _ = start(keys)
    mine = folder / f"rank{plan.ranks.rank}"
    write_result(plan.model, mine / "model")
    return sum(path.is_file() for path in mine.rglob("*"))


def everything(keys: dict[str, Any], folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in TYPES:
        precision = {name: True} if name != "plain" else {}
        found[name] = bytes_in_use({**keys, "quant_config": FOUR_BITS, **precision})
    found["poisoned"] = poisoned(keys)
    found["saved"] = [saved_apart({**keys, **changes}, folder / name) for name, changes in SAVED.items()]
    os.chdir(folder)
    run = llmtune.train({**{key: keys[key] for key in keys if key != "output_dir"}, "save_steps": 2, "max_steps": 2})
    found["output_dir"] = str(run.output_dir.resolve())
    return found


SAVED: dict[str, dict[str, Any]] = {"adapter": {}, "whole": {"peft_config": None}}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def two(tiny_llama: str, chats: str, place: Path) -> list[dict[str, Any]]:
    keys = recipe(tiny_llama, chats, place / "run")
    return in_ranks(2, place / "results", everything, keys, place)


@pytest.mark.parametrize("name", TYPES)
def test_packed_weights_are_never_cast_on_their_way(name: str, two: list[dict[str, Any]], tiny_llama: str) -> None:
    """A cast of the storage type, by value, would change the 4-bit numbers that it carries."""
    from bitsandbytes.functional import quantize_4bit

    weights = load_file(Path(tiny_llama) / "model.safetensors")
    for rank in two:
        assert len(rank[name]) == 14
        for layer, found in rank[name].items():
            packed, _ = quantize_4bit(weights[f"{layer}.weight"].to(TYPES[name]), blocksize=64, quant_type="nf4")
            assert torch.equal(found, packed.flatten()), layer


def test_a_loss_that_is_infinite_on_one_rank_stops_all_before_the_update(two: list[dict[str, Any]]) -> None:
    for error, stayed, states in (rank["poisoned"] for rank in two):
        assert "step 1: the loss is inf" in error and "stopped before the update" in error
        assert stayed and states == 0


def test_results_are_written_by_one_rank(two: list[dict[str, Any]]) -> None:
    (first, *others) = (rank["saved"] for rank in two)
    assert all(count >= 3 for count in first) and others == [[0, 0]]


def test_all_ranks_agree_on_the_folder_that_nobody_named(two: list[dict[str, Any]], place: Path) -> None:
    """It follows from the recipe, not from the process; each rank's part of a checkpoint is there, under one name."""
    import json

    (folder,) = {Path(rank["output_dir"]) for rank in two}
    assert [path.name for path in (place / "runs").iterdir()] == [folder.name] == ["tiny-llama"]
    checkpoint = folder / "checkpoints" / "step-00000002"
    states = sorted(path.name for path in (checkpoint / "state").iterdir() if path.suffix == ".safetensors")
    assert len(states) == 2
    listed = json.dumps(json.loads((checkpoint / "manifest.json").read_text()))
    assert all(name in listed for name in states)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("ranks", [1, 3])
def test_an_epoch_is_every_row_once_and_the_same_on_all_ranks(
    ranks: int, packing: bool, tiny_llama: str, chats: str, tmp_path: Path
) -> None:
    """Rows that do not divide are neither repeated nor dropped, packed or not, and `num_train_epochs` counts them."""
    keys = recipe(
        tiny_llama, chats, tmp_path / "run", packing=packing, num_train_epochs=2, max_steps=None,
        per_device_train_batch_size=1 if packing else 3,
    )  # fmt: skip
    plan = llmtune.plan(keys, nproc=ranks)
    feed, rows = plan.data.batches, len(plan.data.prepared.train)
    seen: Counter[int] = Counter()
    for step in range(plan.steps):
        shares = [replace(feed, ranks=replace(feed.ranks, rank=rank)).step(step, plan.device) for rank in range(ranks)]
        assert {len(micros) for micros in shares} == {2}
        seen.update(row for micros in shares for micro in micros for row in micro.sample_ids)
        if step + 1 == feed.order.steps_per_epoch:
            assert seen == Counter(range(rows))
    assert seen == Counter({row: 2 for row in range(rows)})
