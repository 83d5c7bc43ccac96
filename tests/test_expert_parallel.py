"""Ranks that each hold some of the experts must learn exactly what one process with all experts learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import llmtune
from llmtune.distributed import expert_parallel
from tests.spawn import in_ranks
from tests.test_parity import METHODS, recipe
from tests.test_resume import forget_after
from tests.test_tensor_parallel import EVALUATING, SILENT, STEPS, assert_same_run, train_each
from tests.tiny import tiny_model_folder

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
METHOD: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": METHODS["lora"],
    "freeze": METHODS["freeze"],
    "packed": {"packing": True, "kernel_config": "auto", "disable_gradient_checkpointing": False},
}
SPREADS: dict[str, tuple[int, dict[str, Any]]] = {
    "two ranks, half the experts each": (2, {"ep_size": 2}),
    "two ranks, shards in host memory": (2, {"ep_size": 2, "offload_params": True}),
    "two ranks share a batch": (2, {"ep_size": 2, "tp_size": 2}),
    "four ranks, an expert each": (4, {"ep_size": 4}),
    "four ranks, experts twice": (4, {"ep_size": 2}),
    "four ranks, two copies": (4, {"ep_size": 2, "dp_replicate_size": 2}),
    "four ranks, split twice": (4, {"ep_size": 4, "tp_size": 2}),
    "four ranks, split and sharded": (4, {"ep_size": 2, "tp_size": 2}),
}
FULL_ALONE = ("four ranks, an expert each", "four ranks, experts twice", "four ranks, split twice")
"""Spreads whose parts adapters meet elsewhere: on two ranks, in copies, and where layers are split as well."""
RUNS = [(spread, "qwen3_moe", "full") for spread in SPREADS]
RUNS += [(spread, "qwen3_moe", "lora") for spread in SPREADS if spread not in FULL_ALONE]
RUNS += [(spread, "qwen3_moe", "freeze") for spread in ("two ranks share a batch", "four ranks, experts twice")]
RUNS += [("two ranks, half the experts each", "mixtral", method) for method in ("full", "lora")]
RUNS += [("four ranks, experts twice", "qwen3_moe", "packed"), ("two ranks share a batch", "mixtral", "packed")]
ASKED = ("full", "packed")
"""Methods whose runs on several ranks answer questions, which takes longer than the training."""

new = pytest.mark.skipif(expert_parallel.too_old() is not None, reason=f"needs transformers {expert_parallel.SINCE}")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    return {family: str(tiny_model_folder(root, family, **sizes)) for family, sizes in FAMILIES.items()}


def keys_for(model: str, method: str, data: str, output: Path, **changes: Any) -> dict[str, Any]:
    keys = recipe(model, data, output, **{**METHOD[method], "max_steps": STEPS, **EVALUATING, **changes})
    return {**keys, "eval_dataset": data}


@pytest.fixture(scope="module")
def runs(models: dict[str, str], chats: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every spread on two and on four ranks, and every method alone: the same eight rows a step."""
    root = tmp_path_factory.mktemp("runs")
    train_each(
        [
            keys_for(models[family], method, chats, root / f"alone, {family}, {method}")
            for family in FAMILIES
            for method in METHOD
            if any(run[1:] == (family, method) for run in RUNS)
        ]
    )
    for ranks in (2, 4):
        recipes = []
        for spread, family, method in RUNS:
            needed, block = SPREADS[spread]
            if needed == ranks:
                share = {"per_device_train_batch_size": 4 * block.get("tp_size", 1) // ranks}
                folder, asked = root / f"{spread}, {family}, {method}", {} if method in ASKED else SILENT
                dist = {"dist_config": {"name": "fsdp2", **block}}
                recipes.append(keys_for(models[family], method, chats, folder, **share, **dist, **asked))
        in_ranks(ranks, root / f"ranks{ranks}", train_each, recipes)
    return root


@new
@pytest.mark.parametrize(("spread", "family", "method"), RUNS)
def test_ranks_learn_what_one_learns(spread: str, family: str, method: str, runs: Path) -> None:
    alone = runs / f"alone, {family}, {method}"
    assert_same_run(runs / f"{spread}, {family}, {method}", alone, asked=method in ASKED)


@new
def test_a_run_on_four_ranks_continues_on_one(models: dict[str, str], chats: str, tmp_path: Path) -> None:
    """Checkpoints hold whole stacks of experts, and their optimiser states, however they were spread."""
    straight = keys_for(models["qwen3_moe"], "full", chats, tmp_path / "straight", **SILENT)
    llmtune.train(straight)
    whole = {**straight, "output_dir": str(tmp_path / "whole"), "save_steps": 1}
    spread = {"dist_config": {"name": "fsdp2", "ep_size": 2}, "per_device_train_batch_size": 1}
    in_ranks(4, tmp_path / "ranks", train_each, [{**whole, **spread}])
    forget_after(tmp_path / "whole", 2)
    llmtune.train({**whole, "resume_from_checkpoint": True})
    assert_same_run(tmp_path / "whole", tmp_path / "straight")


@new
@pytest.mark.parametrize(
    ("family", "block", "ranks", "sentence"),
    [
        ("mixtral", {"ep_size": 8}, 8, "experts has 4 experts to share out; use a divisor of 4"),
        ("mixtral", {"ep_size": 2, "tp_size": 4}, 4, "ep_size is 2, allowed is a multiple of tp_size .4. that divides"),
        ("mixtral", {"ep_size": 4}, 2, "ep_size is 4, allowed is .* divides the 2 ranks of a copy"),
        ("mixtral", {"ep_size": 2, "cp_size": 2}, 4, "ep_size is 2 beside cp_size 2, which are not combined"),
        ("qwen3_moe, experts adapted", {"ep_size": 2}, 2, "target_parameters needs whole stacks of experts"),
        ("llama", {"ep_size": 2}, 2, "transformers has no expert parallel plan for LlamaForCausalLM; use 1"),
    ],
)
def test_what_cannot_be_spread_is_refused_by_the_plan(
    family: str, block: dict[str, Any], ranks: int, sentence: str,
    models: dict[str, str], tiny_llama: str, chats: str, tmp_path: Path,
) -> None:  # fmt: skip
    family, _, adapted = family.partition(", ")
    stacks = {"target_parameters": "gate_up_proj", "target_modules": "q_proj"} if adapted else {}
    peft = {"peft_config": {**METHODS["lora"]["peft_config"], **stacks}} if adapted else {}
    model = models.get(family, tiny_llama)
    keys = recipe(model, chats, tmp_path / "run", dist_config={"name": "fsdp2", **block}, kernel_config="auto", **peft)
    with pytest.raises(llmtune.LlmtuneError, match=sentence):
        llmtune.plan(keys, nproc=ranks)


def test_an_older_transformers_is_named(
    models: dict[str, str], chats: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expert_parallel, "SINCE", "99.1")
    keys = recipe(models["mixtral"], chats, tmp_path / "run", dist_config={"name": "fsdp2", "ep_size": 2})
    with pytest.raises(
        llmtune.PlanError, match=r"ep_size is 2, which needs transformers 99\.1 or newer, but this is 5"
    ):
        llmtune.plan(keys, nproc=2)
