"""A run continues on another number of ranks: the same rows in the same order, and the optimiser's state with it."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import llmtune
from llmtune.contract.errors import CheckpointError
from llmtune.distributed import placement
from llmtune.distributed.ranks import ranks_from_environment
from llmtune.training import checkpoint
from llmtune.training.manifest import Manifest, verify
from llmtune.training.step_folders import step_folder
from tests.runs import LORA, recipe
from tests.spawn import in_ranks
from tests.test_resume import forget_after, stop_after, trained

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
    "galore": {"peft_config": None, "learning_rate": 1e-3, "optim_config": {"name": "galore", "rank": 4}},
    "adafactor": {"peft_config": None, "learning_rate": 1e-3, "optim_config": {"name": "adafactor", "beta1": 0.5}},
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
        straight = root / f"{method}-straight"
        llmtune.train({**keys, "output_dir": str(straight)})
        shutil.copytree(straight, root / method)
        forget_after(root / method, 3)
        runs.append(keys)
    in_ranks(2, root / "two", continue_each, runs, 6)
    for keys in runs:
        shutil.copytree(keys["output_dir"], keys["output_dir"] + "-at-6")
    in_ranks(4, root / "four", continue_each, [{**keys, "dist_config": COPIES} for keys in runs], 9)
    for keys in runs:
        llmtune.train(keys)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_one_two_four_and_one_rank_learn_what_one_learns(method: str, moved: Path) -> None:
    # 8-bit states are rounded anew where blocks move, about 1 % of a moment.
    rtol, atol = (2e-2, 2e-3) if method == "adamw_8bit" else (2e-4, 2e-5)
    assert_close_runs(moved / f"{method}-straight", moved / method, rtol, atol)


@pytest.mark.slow
def test_ranks_that_do_not_divide_the_batch(moved: Path) -> None:
    """Eight rows over three ranks are three, three and two."""
    runs = [{"output_dir": str(moved / f"{method}-at-6"), **_keys(moved / f"{method}-at-6")} for method in METHODS]
    in_ranks(3, moved / "three", continue_each, runs, None)
    for method in METHODS:
        rtol, atol = (2e-2, 2e-3) if method == "adamw_8bit" else (2e-4, 2e-5)
        assert_close_runs(moved / f"{method}-straight", moved / f"{method}-at-6", rtol, atol)


def test_the_plan_says_how_the_batch_is_kept(tiny_llama: str, chats: str, tmp_path: Path) -> None:
    keys = recipe(tiny_llama, chats, tmp_path / "run", max_steps=4)
    stop_after(keys, 3)
    shown = str(llmtune.plan(keys, nproc=3))
    assert "continues the run in" in shown and "after step 3" in shown
    assert "gradient_accumulation_steps: 2 -> 1 on 3 ranks, so that a step still has the run's 8 rows" in shown
    assert "8 rows a step = 3 x 1 micro-batch x 3 ranks" in shown
    assert "4 of the ranks have none" in str(llmtune.plan(keys, nproc=12))
    assert "cannot be continued: the run in" in str(llmtune.plan(keys, learning_rate=0.5))


class Factored(torch.optim.SGD):
    """Keeps one number a row of its piece, and does not say how to cut that anew."""

    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["rows"] = placement.local(parameter.detach()).square().flatten(1).sum(1)


def _save_and_restore(folder: str, save: bool) -> str:
    from torch.distributed.fsdp import fully_shard

    ranks = ranks_from_environment()
    torch.distributed.init_process_group("gloo")
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 8, bias=False)
    fully_shard(model)
    optimizer = Factored(model.parameters(), lr=0.1)
    model(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    manifest = Manifest(step=1, ranks=2, recipe={}, plugins={}, llmtune="")
    if save:
        checkpoint.save(Path(folder), model, optimizer, manifest, ranks)
    before = optimizer.state[model.weight].pop("rows")
    found = step_folder(Path(folder), 1)
    try:
        checkpoint.restore(found, verify(found), model, optimizer, ranks)
    except CheckpointError as error:
        return str(error)
    return "same" if torch.equal(optimizer.state[model.weight]["rows"], before) else "other"


@pytest.mark.slow
def test_state_that_cannot_be_cut_anew_is_refused_on_all_ranks(tmp_path: Path) -> None:
    assert in_ranks(2, tmp_path / "ranks", _save_and_restore, str(tmp_path / "c"), True) == ["same", "same"]
    said = in_ranks(4, tmp_path / "ranks", _save_and_restore, str(tmp_path / "c"), False)
    assert all("cut for 2 ranks and cannot be used on 4; resume on 2 ranks" in text for text in said)


def _keys(folder: Path) -> dict[str, Any]:
    import yaml

    return {**yaml.safe_load((folder / "recipe.yaml").read_text()), "output_dir": str(folder)}
