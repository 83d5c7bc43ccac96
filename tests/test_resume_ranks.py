"""A run continues on another number of ranks: the same rows in the same order, and the optimiser's state with it."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import llmtune
from tests.runs import LORA, recipe
from tests.spawn import in_ranks
from tests.test_resume import forget_after, trained

NO_DROPOUT = {**LORA, "lora_dropout": 0.0}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"peft_config": NO_DROPOUT},
    "full_packed": {"peft_config": None, "learning_rate": 1e-3, "packing": True, "kernel_config": "auto"},
    "freeze": {"peft_config": {"name": "freeze", "freeze_trainable_layers": 1}, "learning_rate": 1e-3},
    "qlora": {"peft_config": NO_DROPOUT, "quant_config": "bnb"},
    "adamw_8bit": {
        "peft_config": None,
        "learning_rate": 1e-3,
        "optim_config": {"name": "adamw_8bit", "min_8bit_size": 64},
    },
}
COPIES = {"name": "fsdp2", "dp_replicate_size": 2}


def keys_for(method: str, model: str, data: str, output: Path, **changes: Any) -> dict[str, Any]:
    return recipe(model, data, output, **METHODS[method], save_steps=3, **changes)


def continue_each(runs: list[dict[str, Any]], stop: int | None) -> None:
    """On this rank: finish each run, then forget what came after step `stop`."""
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    for keys in runs:
        llmtune.train(keys)
        torch.distributed.barrier()
        if stop is not None and torch.distributed.get_rank() == 0:
            forget_after(Path(keys["output_dir"]), stop)
        torch.distributed.barrier()


def assert_close_runs(one: Path, other: Path, rtol: float, atol: float) -> None:
    straight, found = (llmtune.load(folder).metrics for folder in (one, other))
    assert [row["step"] for row in found] == [row["step"] for row in straight]
    for before, after in zip(straight, found, strict=True):
        for key in ("epoch", "tokens", "learning_rate"):
            assert after.get(key) == before.get(key)
        for key in before.keys() & {"loss", "grad_norm", "eval_loss"}:
            assert math.isclose(after[key], before[key], rel_tol=rtol), (before, after)
    expected, weights = trained(one), trained(other)
    assert expected.keys() == weights.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=atol)


@pytest.fixture(scope="module")
def moved(tiny_tied_llama: str, chats: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each method trained straight on one rank, and once more on 1, 2, 4 (two copies of two shards) and 1 ranks."""
    root = tmp_path_factory.mktemp("moved")
    # Evaluated where it is saved: a forward pass without a backward one must not leave its mark on a checkpoint.
    evaluated = {"eval_dataset": chats, "eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True}
    runs = []
    for method in METHODS:
        extra = evaluated if method in ("lora", "full_packed", "adamw_8bit") else {}
        keys = keys_for(method, tiny_tied_llama, chats, root / method, **extra)
        llmtune.train({**keys, "output_dir": str(root / f"{method}-straight")})
        llmtune.train(keys)
        forget_after(root / method, 3)
        runs.append(keys)
    in_ranks(2, root / "two", continue_each, runs, 6)
    for keys in runs:
        shutil.copytree(keys["output_dir"], keys["output_dir"] + "-at-6")
    in_ranks(4, root / "four", continue_each, [{**keys, "dist_config": COPIES} for keys in runs], 9)
    for keys in runs:
        llmtune.train(keys)
    return root


@pytest.mark.parametrize("method", METHODS)
def test_one_two_four_and_one_rank_learn_what_one_learns(method: str, moved: Path) -> None:
    # 8-bit states are rounded anew where blocks move, about 1 % of a moment.
    rtol, atol = (2e-2, 2e-3) if method == "adamw_8bit" else (2e-4, 2e-5)
    assert_close_runs(moved / f"{method}-straight", moved / method, rtol, atol)


def test_ranks_that_do_not_divide_the_batch(moved: Path) -> None:
    """Eight rows over three ranks are three, three and two."""
    runs = [{"output_dir": str(moved / f"{method}-at-6"), **_keys(moved / f"{method}-at-6")} for method in METHODS]
    in_ranks(3, moved / "three", continue_each, runs, None)
    for method in METHODS:
        rtol, atol = (2e-2, 2e-3) if method == "adamw_8bit" else (2e-4, 2e-5)
        assert_close_runs(moved / f"{method}-straight", moved / f"{method}-at-6", rtol, atol)


def _keys(folder: Path) -> dict[str, Any]:
    import yaml

    return {**yaml.safe_load((folder / "recipe.yaml").read_text()), "output_dir": str(folder)}
