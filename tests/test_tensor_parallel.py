"""Ranks that share every matrix product must learn exactly what one process learns."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import llmtune
from tests.by_hand import assert_same
from tests.spawn import in_ranks
from tests.test_parity import METHODS, numbers, recipe
from tests.test_resume import forget_after, trained
from tests.tiny import tiny_model_folder

STEPS = 3
LORA = METHODS["lora"]["peft_config"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("llama", {}),
    "full, tied": ("tied", {}),
    "full, norms of heads": ("qwen3", {}),
    "full, biases": ("qwen2", {}),
    "full, fused": ("phi3", {}),
    "lora": ("llama", METHODS["lora"]),
    "rslora": ("llama", METHODS["rslora"]),
    "lora, all kinds of layers": ("tied", {"peft_config": {**LORA, "target_modules": "all,embed_tokens"}}),
    "lora, fused": ("phi3", METHODS["lora"]),
    "lora and a trained head": ("llama", METHODS["modules_to_save"]),
    "lora, packed": ("qwen3", {**METHODS["lora"], "packing": True, "kernel_config": "auto"}),
    "lora, recomputed": ("qwen3", {**METHODS["lora"], "disable_gradient_checkpointing": False}),
    "freeze, norms of heads": ("qwen3", METHODS["freeze"]),
}
SPREADS: dict[str, dict[str, Any]] = {
    "two shards": {"tp_size": 2},
    "two shards, gathered weights kept": {"tp_size": 2, "reshard_after_forward": False},
    "two copies": {"tp_size": 2, "dp_replicate_size": 2},
    "rows split too": {"tp_size": 2, "cp_size": 2},
}
FOUR = [(spread, method) for spread in SPREADS for method in ("full", "lora")]
FOUR += [(spread, "freeze, norms of heads") for spread in ("two shards", "rows split too")]
EVALUATING = {
    "eval_strategy": "steps", "eval_steps": 2, "sample_prompts": ["How much is 3 and 3?"], "max_new_tokens": 4,
}  # fmt: skip
SILENT: dict[str, Any] = {"sample_prompts": []}
"""A token is a forward pass on every rank: few runs are asked."""
ASKED = ("full", "full, fused", "lora")


@pytest.fixture(scope="module")
def models(tiny_llama: str, tiny_tied_llama: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    made = {family: str(tiny_model_folder(root, family)) for family in ("qwen2", "qwen3", "phi3")}
    return {"llama": tiny_llama, "tied": tiny_tied_llama, **made}


def keys_for(case: str, models: dict[str, str], data: str, output: Path, **changes: Any) -> dict[str, Any]:
    family, method = CASES[case]
    keys = recipe(models[family], data, output, **{**method, "max_steps": STEPS, **EVALUATING, **changes})
    return {**keys, "eval_dataset": data}


def train_each(recipes: list[dict[str, Any]]) -> None:
    for keys in recipes:
        llmtune.train(keys)


@pytest.fixture(scope="module")
def alone(models: dict[str, str], chats: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("alone")
    train_each([keys_for(case, models, chats, root / case) for case in CASES])
    return root


@pytest.fixture(scope="module")
def two_ranks(models: dict[str, str], chats: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("two")
    dist = {"dist_config": {"name": "fsdp2", "tp_size": 2}}
    recipes = [
        keys_for(case, models, chats, root / case, **dist, **({} if case in ASKED else SILENT)) for case in CASES
    ]
    in_ranks(2, root / "ranks", train_each, recipes)
    return root


@pytest.fixture(scope="module")
def four_ranks(models: dict[str, str], chats: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("four")
    recipes = []
    for spread, method in FOUR:
        dist = {"name": "fsdp2", **SPREADS[spread]}
        # The same eight rows a step in two micro-batches, whether two groups of ranks share them or one takes all.
        share = {"per_device_train_batch_size": 4 if "cp_size" in dist else 2}
        kernels = {"kernel_config": "auto"} if "cp_size" in dist else {}
        folder, asked = root / f"{spread}, {method}", {} if method == "full" else SILENT
        recipes.append(keys_for(method, models, chats, folder, dist_config=dist, **share, **kernels, **asked))
    in_ranks(4, root / "ranks", train_each, recipes)
    return root


def assert_same_run(found: Path, expected: Path, asked: bool = False) -> None:
    """Losses and gradient norms of every step, evaluations, the weights that are saved, and answers where asked for."""
    ours, theirs = llmtune.load(found), llmtune.load(expected)
    assert_same(numbers(ours), numbers(theirs))
    evaluated = [[row["eval_loss"] for row in run.metrics if "eval_loss" in row] for run in (ours, theirs)]
    assert len(evaluated[0]) == 2 and evaluated[0] == pytest.approx(evaluated[1], rel=1e-5)
    if asked:
        assert ours.answers == theirs.answers != []
    weights, wanted = trained(found), trained(expected)
    assert weights.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=2e-5, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_learn_what_one_learns(case: str, two_ranks: Path, alone: Path) -> None:
    assert_same_run(two_ranks / case, alone / case, asked=case in ASKED)


@pytest.mark.parametrize(("spread", "method"), FOUR)
def test_four_ranks_learn_what_one_learns(spread: str, method: str, four_ranks: Path, alone: Path) -> None:
    assert_same_run(four_ranks / f"{spread}, {method}", alone / method, asked=method == "full")


FAMILIES = (
    "gemma2",
    "olmo2",
    "glm4",
    "cohere2",
    "starcoder2",
    "gpt_neox",
    "apertus",
    "phi",
    "nemotron",
    "qwen3_5_text",
)
"""Other orders of norms, biases, halves of heads rotated, layers in parallel, gated attention, no gate in the MLP."""


def test_other_families_learn_what_one_rank_learns(chats: str, tmp_path: Path) -> None:
    alone, split = [], []
    for family in FAMILIES:
        keys = recipe(str(tiny_model_folder(tmp_path, family)), chats, tmp_path / f"alone-{family}", max_steps=2)
        alone.append(keys)
        dist = {"dist_config": {"name": "fsdp2", "tp_size": 2}}
        split.append({**keys, **dist, "output_dir": str(tmp_path / f"split-{family}")})
    train_each(alone)
    in_ranks(2, tmp_path / "ranks", train_each, split)
    for family in FAMILIES:
        found, expected = (llmtune.load(tmp_path / f"{kind}-{family}") for kind in ("split", "alone"))
        assert_same(numbers(found), numbers(expected))


def first_gradients(keys: dict[str, Any]) -> dict[str, Any]:
    """Whole gradients of the first micro-batch, this rank's elements of every weight, and its copies of what the group
    shares."""
    from llmtune.distributed.placement import full, local
    from llmtune.distributed.ranks import join, pick_device, ranks_from_environment
    from llmtune.planning.make import make_plan
    from llmtune.recipe.recipe import load_recipe
    from llmtune.recipe.registry import Registry
    from llmtune.training.building import build_objective

    plan = make_plan(load_recipe(keys, {}), Registry(), ranks_from_environment(), pick_device("cpu"))
    join(plan.ranks, plan.device)
    objective = build_objective(plan.model)
    objective(plan.data.batches.step(0, plan.device)[0]).total.backward()
    parameters = dict(plan.model.module.named_parameters())
    grads = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    shared = {name: local(g) for name, g in grads.items() if tuple(local(g).shape) == tuple(g.shape)}
    held = sum(local(p).numel() for name, p in parameters.items() if ".layers." in name)
    return {
        "whole": {name: full(g) for name, g in grads.items()},
        "shared": {name: g.clone() for name, g in shared.items()},
        "held": held,
    }


@pytest.mark.parametrize("case", ["full, norms of heads", "lora", "lora, fused"])
def test_gradients_are_whole_and_alike_on_all_ranks(
    case: str, models: dict[str, str], chats: str, tmp_path: Path
) -> None:
    keys = keys_for(case, models, chats, tmp_path / "run", **SILENT)
    dist = {"dist_config": {"name": "fsdp2", "tp_size": 2}}
    first, second = in_ranks(2, tmp_path / "ranks", first_gradients, {**keys, **dist})
    (expected,) = in_ranks(1, tmp_path / "one", first_gradients, keys)
    assert first["whole"].keys() == expected["whole"].keys()
    for name, gradient in expected["whole"].items():
        torch.testing.assert_close(first["whole"][name], gradient, rtol=1e-4, atol=1e-5)
    assert 0 < len(first["shared"]) < len(first["whole"])
    for name, gradient in first["shared"].items():
        assert torch.equal(gradient, second["shared"][name]), name
    assert first["held"] == second["held"] < 0.6 * expected["held"]  # halves of all but norms and half of the adapters


@pytest.mark.parametrize("case", ["full, norms of heads", "lora"])
def test_a_run_continues_on_one_rank_and_on_two(case: str, models: dict[str, str], chats: str, tmp_path: Path) -> None:
    """Checkpoints of split weights and optimiser states are whole: a step on two ranks, two on one, and back."""
    straight = keys_for(case, models, chats, tmp_path / "straight", **SILENT)
    llmtune.train(straight)
    two = {"dist_config": {"name": "fsdp2", "tp_size": 2}}
    split = {**straight, **two, "output_dir": str(tmp_path / "split"), "save_steps": 1}
    in_ranks(2, tmp_path / "ranks", train_each, [split])
    shutil.copytree(tmp_path / "split", tmp_path / "whole")
    forget_after(tmp_path / "split", 1)
    forget_after(tmp_path / "whole", 1)
    whole = {**straight, "output_dir": str(tmp_path / "whole"), "save_steps": 1}
    llmtune.train({**whole, "resume_from_checkpoint": True})
    assert_same_run(tmp_path / "whole", tmp_path / "straight")
    forget_after(tmp_path / "whole", 2)
    in_ranks(2, tmp_path / "ranks", train_each, [{**whole, **two, "resume_from_checkpoint": True}])
    assert_same_run(tmp_path / "whole", tmp_path / "straight")


def test_dropout_masks_agree_within_a_group(models: dict[str, str], chats: str, tmp_path: Path) -> None:
    """On adapters of layers whose whole input each rank has, dropout is that of one rank, so the runs are the same."""
    dropping = {"peft_config": {**LORA, "lora_dropout": 0.3, "target_modules": "q_proj,up_proj"}}
    keys = keys_for("lora", models, chats, tmp_path / "one", **dropping, **SILENT)
    llmtune.train(keys)
    dist = {"dist_config": {"name": "fsdp2", "tp_size": 2}, "output_dir": str(tmp_path / "two")}
    in_ranks(2, tmp_path / "ranks", train_each, [{**keys, **dist}])
    assert_same_run(tmp_path / "two", tmp_path / "one")


@pytest.mark.parametrize(
    ("family", "changes", "size", "sentence"),
    [
        ("llama", {}, 4, "tp_size is 4, but .*k_proj has 2 heads to share out; use a divisor of 2"),
        ("llama", {}, 3, "tp_size 3 needs a multiple of 3 ranks"),
        ("phi3", {}, 64, "o_proj has 32 features to share out; use a divisor of 32"),
        ("gpt2", {}, 2, "tp_size is 2, but transformers has no tensor parallel plan for GPT2LMHeadModel; use 1"),
        ("llama", METHODS["qlora"], 2, "q_proj is stored by bnb in a form that cannot be split; .*remove quant_config"),
        ("llama", METHODS["dora"], 2, "lora_magnitude_vector.* does not say how it is split; use 1, or another peft"),
        ("llama", {"peft_config": {**LORA, "modules_to_save": ["up_proj"]}}, 2, "up_proj.* does not say how"),
        ("qwen3", {"peft_config": {**LORA, "modules_to_save": ["q_norm"]}}, 2, "q_norm, .* was replaced by an edit"),
        ("qwen3_moe", {}, 2, "mlp.experts.* (holds experts, .*; set ep_size to 2|would have to be split)"),
        ("deepseek_v2", {}, 2, 'would have to be split as "mla_kv_a_proj", which llmtune does not do'),
    ],
)  # fmt: skip
def test_what_cannot_be_split_is_refused_by_the_plan(
    family: str, changes: dict[str, Any], size: int, sentence: str, models: dict[str, str], chats: str, tmp_path: Path
) -> None:
    model = models.get(family) or str(tiny_model_folder(tmp_path, family, **SPECIAL.get(family, {})))
    keys = recipe(model, chats, tmp_path / "run", **changes, dist_config={"name": "fsdp2", "tp_size": size})
    with pytest.raises(llmtune.PlanError, match=sentence):
        llmtune.plan(keys, nproc=4 if size == 3 else size)


SPECIAL: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 512},
    "deepseek_v2": {
        "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16,
        "first_k_dense_replace": 2, "num_key_value_heads": 4,
    },
}  # fmt: skip
