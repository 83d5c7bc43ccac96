"""What docs/capabilities.md says of each pair is what planning says of it, and what two ranks do."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import llmtune
from llmtune.contract.stages import learns_of
from llmtune.distributed import expert_parallel
from llmtune.inference.reopen import open_plan
from llmtune.recipe.parts import find_parts
from llmtune.recipe.recipe import load_recipe
from llmtune.recipe.registry import Registry
from llmtune.testing import in_ranks, tiny_model_folder
from tests.by_hand import assert_same
from tests.test_parity import numbers
from tests.test_resume import forget_after

PAGE = (Path(__file__).parents[1] / "docs" / "capabilities.md").read_text(encoding="utf-8")
LORA: dict[str, Any] = {"name": "lora", "r": 4, "lora_alpha": 8, "lora_dropout": 0.0}
WHOLE = {"modules_to_save": "embed_tokens,lm_head"}
FREEZE = {"name": "freeze", "freeze_trainable_layers": 1}
PRO = {"name": "llama_pro", "num_expanded_layers": 1}
METHODS: dict[str, list[dict[str, Any] | None]] = {
    "full": [None],
    "LoRA, rsLoRA": [LORA, {**LORA, "use_rslora": True}],
    "DoRA": [{**LORA, "use_dora": True}],
    "`modules_to_save`": [{**LORA, **WHOLE}],
    "freeze": [FREEZE],
    "`llama_pro`": [PRO],
    "`oft`": [{"name": "oft", "oft_block_size": 8}],
}
BNB = {"name": "bnb"}
REFUSALS = "8, which is for inference|quantised|quant_config (bnb|hqq)|leaves embed_tokens|how it is split|projects the"


def fsdp2(**keys: Any) -> dict[str, Any]:
    return {"dist_config": {"name": "fsdp2", **keys}}


MOE = {"moe": True}
"""Stands among the keys for a mixture of experts in place of the tiny Llama."""
CP = {**fsdp2(cp_size=2), "kernel_config": "auto"}
ROWS: dict[str, list[tuple[int, dict[str, Any]]]] = {
    "a base in 16 or 32 bits": [(1, {"bf16": True}), (1, {"pure_bf16": True}), (1, {"bf16": False})],
    "a base in 4 bits (`nf4`, `fp4`)": [
        (1, {"quant_config": {**BNB, "quantization_type": kind}}) for kind in ("nf4", "fp4")
    ],
    "a base in 1 to 8 bits (`hqq`), in int8, int4, float8 (`torchao`)": [
        (1, {"quant_config": {"name": "hqq", "quantization_bit": bits, "group_size": 16}}) for bits in (1, 8)
    ],
    "training on a base in 8 bits of bnb": [(1, {"quant_config": {**BNB, "quantization_bit": 8}})],
    "`init_on_meta`, `init_on_rank0`, `init_on_default`": [
        (1, {"init_config": f"init_on_{way}"}) for way in ("meta", "rank0", "default")
    ],
    "`kernel_config: auto`": [(1, {"kernel_config": "auto"})],
    "packing": [(1, {"packing": True}), (1, {"packing": True, "neat_packing": False})],
    "streaming": [(1, {"streaming": True})],
    "`activation_checkpointing` full, selective, none": [
        (1, {"activation_checkpointing": level}) for level in ("full", "selective", "none")
    ],
    "`torch_compile` (not with selective)": [
        (1, {"torch_compile": True, "activation_checkpointing": level}) for level in ("full", "none")
    ],
    "several ranks, FSDP2, copies": [(2, {}), (4, fsdp2(dp_replicate_size=2))],
    "`offload_params`": [(1, fsdp2(offload_params=True)), (2, fsdp2(offload_params=True))],
    "`tp_size`": [(2, fsdp2(tp_size=2)), (4, fsdp2(tp_size=2))],
    "`ep_size` (not with `cp_size`)": [(2, {**fsdp2(ep_size=2), **MOE})],
    "`cp_size`": [(2, CP), (4, {**CP, "packing": True})],
    "new tokens": [(1, {"new_special_tokens": "<|note|>", "resize_vocab": True})],
    "`adamw`, `adamw_8bit`": [(1, {"optim_config": name}) for name in ("adamw", "adamw_8bit")],
    "`muon`, `adam_mini`, `adafactor`, `badam`, `lion`, `sgd`": [
        (1, {"optim_config": name}) for name in ("muon", "adam_mini", "adafactor", "badam", "lion", "sgd")
    ],
    "`galore`, `apollo`": [(1, {"optim_config": name}) for name in ("galore", "apollo")],
}
TRIED = (
    "`llmtune chat` on a base in 8 bits",
    "continue on another number of ranks",
    "`llmtune chat`, `llmtune predict`, `llmtune export`",
)
"""Rows that no plan tells: the test at the end of this file trains with each method."""
BASES = {"16 or 32 bits": {}, "quantised": {"quant_config": BNB}}
SPREADS: dict[str, list[tuple[int, dict[str, Any]]]] = {
    "FSDP2, copies, offload": [(2, {}), (4, fsdp2(dp_replicate_size=2)), (2, fsdp2(offload_params=True))],
    "`tp_size`": ROWS["`tp_size`"],
    "`ep_size`": ROWS["`ep_size` (not with `cp_size`)"],
    "`cp_size`": ROWS["`cp_size`"],
}
CONDITIONS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "embeddings and head": (WHOLE, {"modules_to_save": "up_proj"}, "does not say how it is split|leaves embed_tokens"),
    "layers other than experts": (
        {}, {"target_parameters": "experts.down_proj"}, "whole stacks of experts|no such DoRA",
    ),
    "with `modules_to_save`": (WHOLE, {}, "leaves embed_tokens,lm_head frozen"),
    "with `freeze_extra_modules`": (
        {"freeze_extra_modules": "embed_tokens,lm_head"}, {}, "leaves embed_tokens,lm_head frozen",
    ),
}  # fmt: skip
"""Keys of `peft_config` with which a cell is possible, those with which it is not, and the refusal."""


def table(heading: str) -> dict[str, dict[str, str]]:
    """The table below a heading of the page, by row and by column."""
    section = PAGE[PAGE.index(f"## {heading}\n") :].split("\n## ")[0]
    first = next(re.finditer(r"(?:^\|.*\|\n)+", section, re.M))[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in first.splitlines()]
    return {cells[0]: dict(zip(lines[0][1:], cells[1:], strict=True)) for cells in lines[2:]}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, str]:
    """Tiny models, by whether they are mixtures of experts."""
    root = tmp_path_factory.mktemp("models")
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True}
    return {False: str(tiny_model_folder(root)), True: str(tiny_model_folder(root, "qwen3_moe", **sizes))}


def keys_for(models: dict[bool, str], data: str, output: Path, peft: Any, changes: dict[str, Any]) -> dict[str, Any]:
    changes = {"kernel_config": None, "activation_checkpointing": "none", **changes}
    model = models[changes.pop("moe", False)]
    return {
        "model": model, "dataset": data, "output_dir": str(output), "device": "cpu", "peft_config": peft,
        "cutoff_len": 128, "max_steps": 4, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3, "logging_steps": 1, "save_steps": None, **changes,
    }  # fmt: skip


def require(recipe: dict[str, Any], ranks: int, refusal: str | None) -> None:
    """That planning takes the recipe, or refuses it in a sentence that matches `refusal`."""
    if refusal is None:
        assert llmtune.plan(recipe, nproc=ranks).steps > 0
        return
    with pytest.raises(llmtune.LlmtuneError, match=refusal):
        llmtune.plan(recipe, nproc=ranks)


CELLS = [(row, column, cell) for row, cells in table("Methods").items() for column, cell in cells.items()]
ep = pytest.mark.skipif(expert_parallel.too_old() is not None, reason=f"needs transformers {expert_parallel.SINCE}")


def marked(row: str, *rest: Any) -> Any:
    return pytest.param(row, *rest, marks=ep if "ep_size" in row else ())


@pytest.mark.parametrize(
    ("row", "column", "cell"), [marked(*each) for each in CELLS if each[0] not in TRIED and each[2] != ""]
)
def test_a_method_goes_with_what_the_page_says(
    row: str, column: str, cell: str, models: dict[bool, str], chats: str, tmp_path: Path
) -> None:
    for peft in METHODS[column]:
        for ranks, changes in ROWS[row]:
            if cell in ("yes", "refused"):
                require(keys_for(models, chats, tmp_path, peft, changes), ranks, None if cell == "yes" else REFUSALS)
                continue
            possible, impossible, refusal = CONDITIONS[cell]
            assert peft is not None
            require(keys_for(models, chats, tmp_path, {**peft, **possible}, changes), ranks, None)
            require(keys_for(models, chats, tmp_path, {**peft, **impossible}, changes), ranks, refusal)


@pytest.mark.parametrize(
    ("row", "column", "cell"),
    [marked(row, *each) for row, cells in table("Bases and splitting").items() for each in cells.items()],
)
def test_a_base_is_split_as_the_page_says(
    row: str, column: str, cell: str, models: dict[bool, str], chats: str, tmp_path: Path
) -> None:
    for ranks, changes in SPREADS[row]:
        recipe = keys_for(models, chats, tmp_path, LORA, {**changes, **BASES[column]})
        require(recipe, ranks, {"yes": None, "refused": "cannot be split; .*remove quant_config"}[cell])


def test_what_the_page_says_in_brackets(models: dict[bool, str], chats: str, tmp_path: Path) -> None:
    selective = {"torch_compile": True, "activation_checkpointing": "selective"}
    require(keys_for(models, chats, tmp_path, LORA, selective), 1, "torch_compile: found true beside")
    both = {**fsdp2(ep_size=2, cp_size=2), **MOE, "kernel_config": "auto"}
    require(keys_for(models, chats, tmp_path, LORA, both), 4, "ep_size is 2 beside cp_size 2")


def test_every_installed_stage_is_on_the_page_with_what_it_learns_from(models: dict[bool, str]) -> None:
    nouns = {
        "conversation": "conversations",
        "text": "texts",
        "tokens": "tokens",
        "preference": "preferences",
        "labelled": "labelled answers",
        "prompt": "prompts",
    }
    rows = {row.partition("`")[2].partition("`")[0]: cells for row, cells in table("Stages").items()}
    assert sorted(rows) == sorted(row.name for row in Registry().listing() if row.point == "stage_config")
    for name, cells in rows.items():
        recipe = load_recipe({"model": models[False], "stage_config": name})
        stage = find_parts(recipe, Registry(), [], ("stage_config",)).one("stage_config").built
        assert cells["learns from"] == ", ".join(nouns[kind] for kind in learns_of(stage))
    absent = load_recipe({"model": models[False]})
    default = find_parts(absent, Registry(), [], ("stage_config",)).one("stage_config").plugin.name
    assert f"`{default}` (the default)" in table("Stages")


PAIRS: tuple[tuple[int, dict[str, Any]], ...] = (
    (1, {"packing": True}),
    *((1, {"init_config": f"init_on_{way}"}) for way in ("meta", "rank0", "default")),
    (1, {"kernel_config": "auto"}),
    (2, {}),
    (4, fsdp2(dp_replicate_size=2)),
    (2, fsdp2(offload_params=True)),
)


@pytest.mark.parametrize("stage", ["dpo", "rm"])
@pytest.mark.parametrize("column", METHODS)
def test_preferences_go_with_what_the_page_says(
    stage: str, column: str, models: dict[bool, str], tmp_path: Path
) -> None:
    pair = {"prompt": "Two and two?", "chosen": "Four.", "rejected": "Five, I think."}
    (tmp_path / "pairs.jsonl").write_text(f"{json.dumps(pair)}\n" * 16, encoding="utf-8")
    for peft in METHODS[column]:
        if stage == "rm" and peft and "modules_to_save" in peft:
            peft = {**peft, "modules_to_save": "embed_tokens"}  # its head is another

        def keys(changes: dict[str, Any], peft: Any = peft) -> dict[str, Any]:
            return keys_for(
                models, str(tmp_path / "pairs.jsonl"), tmp_path / "run", peft, {"stage_config": stage, **changes}
            )

        for ranks, changes in PAIRS:
            require(keys(changes), ranks, None)
        if column not in ("full", "freeze", "`llama_pro`"):
            require(keys(BASES["quantised"]), 1, None)
        require(keys({"packing": True, "neat_packing": False}), 1, "neat_packing: found false")
        require(keys(CP), 2, "cp_size is 2, but the loss of preferences needs whole answers")


TRAINED = [
    (method, spread)
    for method, spreads in {
        "full": ("offload",),
        "LoRA, rsLoRA": ("offload",),
        "DoRA": ("offload", "experts", "streaming"),
        "`modules_to_save`": ("offload", "experts", "rows", "streaming"),
        "freeze": ("offload", "experts"),
        "QLoRA": ("offload", "experts", "copies"),
    }.items()
    for spread in spreads
]
"""Pairs of the page that the tests of each way to spread a model leave out."""
SPREAD: dict[str, dict[str, Any]] = {
    "offload": fsdp2(offload_params=True),
    "experts": {**fsdp2(ep_size=2), **MOE},
    "rows": {**CP, "gradient_accumulation_steps": 2},
    "copies": fsdp2(dp_replicate_size=2),
    "streaming": {"streaming": True},
}


def recipes(models: dict[bool, str], data: str, root: Path, ranks: int) -> Iterator[dict[str, Any]]:
    for method, spread in TRAINED:
        peft, base = (LORA, BASES["quantised"]) if method == "QLoRA" else (METHODS[method][-1], {})
        changes = {"gradient_accumulation_steps": 2 // ranks, **SPREAD[spread], **base}
        if ranks == 1 and spread != "streaming":
            changes = {"moe": changes.get("moe", False), "gradient_accumulation_steps": 2, **base}
        yield keys_for(models, data, root / f"{ranks}-{method}-{spread}", peft, changes)


def train_each(several: list[dict[str, Any]]) -> None:
    for keys in several:
        llmtune.train(keys)


@pytest.fixture(scope="module")
def runs(models: dict[bool, str], chats: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    train_each(list(recipes(models, chats, root, 1)))
    in_ranks(2, root / "ranks", train_each, list(recipes(models, chats, root, 2)))
    return root


@ep
@pytest.mark.parametrize(("method", "spread"), TRAINED)
def test_two_ranks_learn_what_one_learns(method: str, spread: str, runs: Path) -> None:
    one, two = (numbers(llmtune.load(runs / f"{ranks}-{method}-{spread}")) for ranks in (1, 2))
    assert_same(two, one)


@pytest.mark.parametrize("method", METHODS)
def test_what_was_trained_on_two_ranks_continues_on_one_answers_and_is_exported(
    method: str, models: dict[bool, str], chats: str, tmp_path: Path
) -> None:
    assert all(table("Methods")[row][method] == "yes" for row in TRIED)
    peft = METHODS[method][-1]
    straight = llmtune.train(keys_for(models, chats, tmp_path / "straight", peft, {}))
    keys = keys_for(models, chats, tmp_path / "run", peft, {"save_steps": 2})
    in_ranks(2, tmp_path / "ranks", train_each, [{**keys, "gradient_accumulation_steps": 1}])
    forget_after(tmp_path / "run", 2)
    run = llmtune.train({**keys, "resume_from_checkpoint": True})
    assert_same(numbers(run), numbers(straight))
    assert isinstance(run.chat("Who are you?", max_new_tokens=2), str)
    assert (run.export(tmp_path / "merged") / "model.safetensors").exists()
    eight = {"quant_config": {**BNB, "quantization_bit": 8}}
    assert open_plan(run.output_dir, device="cpu", **eight).context.capabilities >= {"quantized_base"}
