"""Twenty steps of llmtune against twenty steps of a loop written by hand on transformers and PEFT."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import llmtune
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


def hand_written(keys: dict[str, Any], prepare_model: Callable[[Any], Any]) -> list[tuple[float, float]]:
    """The same training, without any of llmtune's arithmetic: padding, transformers' logits, mean over the batch."""
    from transformers import AutoTokenizer, get_cosine_schedule_with_warmup

    plan = llmtune.plan(keys)
    tokenizer = AutoTokenizer.from_pretrained(keys["model"])
    model = prepare_model(keys["model"])
    model.train()
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in weights if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in weights if p.dim() <= 1], "weight_decay": 0.0},
        ],
        lr=keys["learning_rate"],
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, keys["warmup_steps"], STEPS)
    rows = [json.loads(line)["messages"] for line in Path(keys["dataset"]).read_text().splitlines()]
    found = []
    for step in range(STEPS):
        batch = [encode(tokenizer, rows[index]) for index in plan.feed.order.step_units(step)]
        loss = mean_loss(model, batch, tokenizer.pad_token_id)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        found.append((loss.item(), norm.item()))
    return found


def encode(tokenizer: Any, messages: list[dict[str, str]]) -> tuple[list[int], list[int]]:
    """Token by token: ChatML written out, answers and their end-of-turn counted."""
    ids: list[int] = []
    labels: list[int] = []
    for message in messages:
        head = tokenizer(f"<|im_start|>{message['role']}\n", add_special_tokens=False)["input_ids"]
        body = tokenizer(f"{message['content']}<|im_end|>", add_special_tokens=False)["input_ids"]
        tail = tokenizer("\n", add_special_tokens=False)["input_ids"]
        ids += head + body + tail
        counted = message["role"] == "assistant"
        labels += [-100] * len(head) + (body if counted else [-100] * len(body)) + [-100] * len(tail)
    return ids, labels


def mean_loss(model: Any, batch: list[tuple[list[int], list[int]]], pad: int) -> torch.Tensor:
    longest = max(len(ids) for ids, _ in batch)
    ids = torch.tensor([i + [pad] * (longest - len(i)) for i, _ in batch])
    labels = torch.tensor([y + [-100] * (longest - len(y)) for _, y in batch])
    mask = torch.tensor([[1] * len(i) + [0] * (longest - len(i)) for i, _ in batch])
    logits = model(input_ids=ids, attention_mask=mask).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def reference_model(keys: Mapping[str, Any]) -> Callable[[str], Any]:
    """The model as transformers and PEFT build it, its adapter starting where llmtune's starts."""

    def build(folder: str) -> Any:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        quant, peft = keys.get("quant_config"), keys.get("peft_config")
        options: dict[str, Any] = {"dtype": torch.float32}
        if quant:
            options["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type=quant.get("quantization_type", "nf4"),
                bnb_4bit_use_double_quant=quant.get("double_quantization", True),
                bnb_4bit_compute_dtype=torch.float32,
            )
        model = AutoModelForCausalLM.from_pretrained(folder, **options)
        if peft is None:
            return model
        if peft["name"] == "freeze":
            model.requires_grad_(False)
            for part in (model.model.layers[-1], model.model.norm):
                part.requires_grad_(True)
            return model
        targets = peft.get("target_modules", "all-linear")
        adapted = get_peft_model(
            model,
            LoraConfig(
                r=peft["r"], lora_alpha=peft["lora_alpha"], lora_dropout=0.0,
                target_modules=targets.split(",") if "," in targets else targets,
                use_dora=peft.get("use_dora", False), use_rslora=peft.get("use_rslora", False),
                modules_to_save=peft.get("modules_to_save"), task_type="CAUSAL_LM",
            ),
        )  # fmt: skip
        ours = dict(llmtune.build({**keys})[0].named_parameters())
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_A" in name:
                    parameter.copy_(ours[name.removeprefix("base_model.model.")])
        return adapted

    return build


def assert_same(
    found: list[tuple[float, float]], expected: list[tuple[float, float]], tolerance: float = 1e-5, steps: int = STEPS
) -> None:
    assert len(found) == len(expected) == steps
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert ours == pytest.approx(theirs, rel=tolerance), f"step {step + 1}"


@pytest.mark.parametrize("method", METHODS)
def test_twenty_steps_equal_a_loop_written_by_hand(method: str, tiny_llama: str, chats: str, tmp_path: Path) -> None:
    keys = recipe(tiny_llama, chats, tmp_path / "run", **METHODS[method])
    expected = hand_written(keys, reference_model(keys))
    assert_same(train(keys), expected, 1e-5)
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
    half = {"gradient_accumulation_steps": 1, "max_steps": 6}
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
        method: train(recipe(tiny_llama, chats, root / method, **METHODS[method], max_steps=6))
        for method, _ in TWO[::3]
    }


@pytest.mark.parametrize(("method", "init"), TWO)
def test_two_ranks_learn_what_one_learns(method: str, init: str, two_ranks: Path, one_rank: dict[str, Any]) -> None:
    assert_same(numbers(llmtune.load(two_ranks / f"{method}-{init}")), one_rank[method], steps=6)


@pytest.mark.parametrize(("size", "micro_steps"), [(8, 1), (2, 4), (1, 8)])
def test_the_split_into_micro_batches_changes_nothing(
    size: int, micro_steps: int, tiny_llama: str, chats: str, tmp_path: Path
) -> None:
    keys = recipe(tiny_llama, chats, tmp_path / "a", **METHODS["lora"])
    other = {**keys, "per_device_train_batch_size": size, "gradient_accumulation_steps": micro_steps}
    short = {"max_steps": 6}
    assert_same(train({**other, **short, "output_dir": str(tmp_path / "b")}), train({**keys, **short}), steps=6)


@pytest.mark.parametrize("changes", [{"kernel_config": "auto"}, {"disable_gradient_checkpointing": False}])
def test_kernels_and_checkpointing_change_no_number(
    changes: dict[str, Any], tiny_llama: str, chats: str, tmp_path: Path
) -> None:
    keys = recipe(tiny_llama, chats, tmp_path / "plain", **METHODS["lora"])
    short = {"max_steps": 6}
    assert_same(
        train({**keys, **changes, **short, "output_dir": str(tmp_path / "other")}), train({**keys, **short}), steps=6
    )


def test_evaluating_between_steps_changes_nothing(tiny_llama: str, chats: str, tmp_path: Path) -> None:
    keys = recipe(tiny_llama, chats, tmp_path / "without", **METHODS["qlora"])
    keys |= {"peft_config": {**LORA, "lora_dropout": 0.2}, "max_steps": 6}
    evaluating = {"eval_dataset": chats, "eval_strategy": "steps", "eval_steps": 1}
    assert train({**keys, **evaluating, "output_dir": str(tmp_path / "with")}) == train(keys)
