"""Twenty steps of llmtune against twenty steps of a loop written by hand on transformers and PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import llmtune
from tests.by_hand import adapt_by_hand, assert_same, base_by_hand, train_by_hand
from tests.spawn import in_ranks

STEPS = 20
LORA = {"name": "lora", "r": 4, "lora_alpha": 8, "lora_dropout": 0.0}
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"peft_config": LORA},
    "dora": {"peft_config": {**LORA, "use_dora": True}},
    "rslora": {"peft_config": {**LORA, "use_rslora": True, "target_modules": "q_proj,down_proj"}},
    "modules_to_save": {"peft_config": {**LORA, "modules_to_save": ["lm_head"]}},
    "freeze": {"peft_config": {"name": "freeze", "freeze_trainable_layers": 1, "freeze_extra_modules": ["norm"]}},
    "qlora": {"peft_config": LORA, "quant_config": {"name": "bnb", "double_quantization": False}},
    "qlora_double": {"peft_config": LORA, "quant_config": {"name": "bnb", "quantization_type": "fp4"}},
    "qdora": {"peft_config": {**LORA, "use_dora": True}, "quant_config": {"name": "bnb"}},
}


def recipe(model: str, data: str, output: Path, **changes: Any) -> dict[str, Any]:
    return {
        "model": model,
        "dataset": data,
        "output_dir": str(output),
        "device": "cpu",
        "learning_rate": 1e-3,
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "warmup_steps": 3,
        "lr_scheduler_config": "cosine",
        "optim_config": {"name": "adamw", "weight_decay": 0.1},
        "logging_steps": 1,
        "disable_gradient_checkpointing": True,
        "cutoff_len": 128,
        **changes,
    }


def train(keys: dict[str, Any]) -> list[tuple[float, float]]:
    """(loss, gradient norm) of every step."""
    return numbers(llmtune.train(keys))


def numbers(run: llmtune.Run) -> list[tuple[float, float]]:
    return [(row["loss"], row["grad_norm"]) for row in run.metrics if "loss" in row]


def reference(keys: dict[str, Any]) -> list[tuple[float, float]]:
    """The same training written by hand, its adapter starting where llmtune's starts."""
    model, peft = base_by_hand(keys), keys.get("peft_config")
    if peft and peft["name"] == "freeze":
        model.requires_grad_(False)
        for part in (model.model.layers[-1], model.model.norm):
            part.requires_grad_(True)
    elif peft:
        model = adapt_by_hand(model, peft, dict(llmtune.build({**keys})[0].named_parameters()))
    return train_by_hand(keys, model, llmtune.plan(keys))


@pytest.mark.parametrize("method", METHODS)
def test_twenty_steps_equal_a_loop_written_by_hand(method: str, tiny_llama: str, chats: str, tmp_path: Path) -> None:
    keys = recipe(tiny_llama, chats, tmp_path / "run", **METHODS[method])
    expected = reference(keys)
    assert_same(train(keys), expected)
    assert expected[-1][0] < expected[0][0]  # it has learnt, so the comparison means something


TWO = [
    (method, init)
    for method in ("full", "lora", "dora", "freeze", "modules_to_save", "qlora", "qlora_double", "qdora")
    for init in ("init_on_meta", "init_on_rank0", "init_on_default")
]


def train_each(recipes: list[dict[str, Any]]) -> None:
    """Several runs in one set of processes: starting them costs more than a run."""
    for keys in recipes:
        llmtune.train(keys)


@pytest.fixture(scope="module")
def two_ranks(tiny_llama: str, chats: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every method with every init on two ranks, one folder each; half the micro-steps, so the same global batch."""
    root = tmp_path_factory.mktemp("two")
    half = {"gradient_accumulation_steps": 1, "max_steps": 4}
    recipes = [
        recipe(tiny_llama, chats, root / f"{method}-{init}", **METHODS[method], **half, init_config=init)
        for method, init in TWO
    ]
    in_ranks(2, root / "ranks", train_each, recipes)
    return root


@pytest.fixture(scope="module")
def one_rank(tiny_llama: str, chats: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("one")
    return {
        method: train(recipe(tiny_llama, chats, root / method, **METHODS[method], max_steps=4))
        for method, _ in TWO[::3]
    }


@pytest.mark.slow
@pytest.mark.parametrize(("method", "init"), TWO)
def test_two_ranks_learn_what_one_learns(method: str, init: str, two_ranks: Path, one_rank: dict[str, Any]) -> None:
    assert_same(numbers(llmtune.load(two_ranks / f"{method}-{init}")), one_rank[method])


@pytest.mark.parametrize(("size", "micro_steps"), [(8, 1), (2, 4), (1, 8)])
def test_the_split_into_micro_batches_changes_nothing(
    size: int, micro_steps: int, tiny_llama: str, chats: str, tmp_path: Path
) -> None:
    keys = recipe(tiny_llama, chats, tmp_path / "a", **METHODS["lora"])
    other = {**keys, "per_device_train_batch_size": size, "gradient_accumulation_steps": micro_steps}
    short = {"max_steps": 6}
    assert_same(train({**other, **short, "output_dir": str(tmp_path / "b")}), train({**keys, **short}))


@pytest.mark.parametrize("changes", [{"kernel_config": "auto"}, {"disable_gradient_checkpointing": False}])
def test_kernels_and_checkpointing_change_no_number(
    changes: dict[str, Any], tiny_llama: str, chats: str, tmp_path: Path
) -> None:
    keys = recipe(tiny_llama, chats, tmp_path / "plain", **METHODS["lora"])
    short = {"max_steps": 6}
    assert_same(train({**keys, **changes, **short, "output_dir": str(tmp_path / "other")}), train({**keys, **short}))


def test_evaluating_between_steps_changes_nothing(tiny_llama: str, chats: str, tmp_path: Path) -> None:
    keys = recipe(tiny_llama, chats, tmp_path / "without", **METHODS["qlora"])
    keys |= {"peft_config": {**LORA, "lora_dropout": 0.2}, "max_steps": 6}
    evaluating = {"eval_dataset": chats, "eval_strategy": "steps", "eval_steps": 1}
    assert train({**keys, **evaluating, "output_dir": str(tmp_path / "with")}) == train(keys)
