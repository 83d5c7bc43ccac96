"""The number type of a run that names none: what the CPU multiplies fastest, measured once, said, and sound."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import llmtune
from llmtune.contract.errors import PlanError
from llmtune.model import cpu_speed
from llmtune.model.precision import CPU_TYPE
from llmtune.model.sizes import sizes_of
from llmtune.planning.checkpointing import SAFE
from llmtune.planning.devices import GIB
from llmtune.planning.memory_formulas import estimate_memory
from llmtune.planning.micro_batch import largest
from llmtune.recipe.recipe import load_recipe
from llmtune.testing import running
from llmtune.training import resume
from tests.by_hand import adapt_by_hand, base_by_hand, train_by_hand
from tests.runs import recipe
from tests.spawn import in_ranks
from tests.test_resume import assert_equal_runs, stop_after
from tests.tiny import tiny_config

LORA = {"name": "lora", "r": 4, "lora_alpha": 8, "lora_dropout": 0.0}


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets what this machine's CPU was found to do, in its own cache."""
    monkeypatch.delenv(CPU_TYPE)
    monkeypatch.setenv("LLMTUNE_CACHE", str(tmp_path / "cache"))

    def remember(float32: float, bfloat16: float) -> None:
        sizes = sizes_of(tiny_config())
        found = {cpu_speed.machine_key(sizes): {"float32": float32, "bfloat16": bfloat16}}
        (tmp_path / "cache").mkdir(exist_ok=True)
        (tmp_path / "cache" / "cpu_speed.json").write_text(json.dumps(found))

    return remember


@pytest.mark.parametrize(
    ("float32", "bfloat16", "chosen"),
    [(100e9, 220e9, "bfloat16 mixed with float32"), (150e9, 80e9, "float32"), (100e9, 110e9, "float32")],
)
def test_the_faster_type_is_chosen_and_both_figures_are_said(
    float32: float, bfloat16: float, chosen: str, measured: Any, tiny_llama: str, chats: str, tmp_path: Path
) -> None:
    measured(float32, bfloat16)
    plan = llmtune.plan(recipe(tiny_llama, chats, tmp_path / "run"))
    assert plan.model.precision.name == chosen
    assert f"{float32 / 1e9:.0f} GFLOP/s in float32 and {bfloat16 / 1e9:.0f} in bfloat16" in str(plan)


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        ({"bf16": False}, "float32"),
        ({"bf16": True}, "bfloat16 mixed with float32"),
        ({"fp16": True}, "float16 mixed with float32"),
        ({"pure_bf16": True}, "bfloat16"),
    ],
)
def test_a_type_that_the_recipe_names_is_used_and_nothing_measured(
    keys: dict[str, bool], name: str, measured: Any, tiny_llama: str, chats: str, tmp_path: Path
) -> None:
    plan = llmtune.plan(recipe(tiny_llama, chats, tmp_path / "run", **keys))
    assert plan.model.precision.name == name
    assert not (tmp_path / "cache" / "cpu_speed.json").exists()
    assert {key for key, value in plan.model.precision.keys.items() if value} == {k for k, v in keys.items() if v}


def test_measuring_is_quick_and_happens_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMTUNE_CACHE", str(tmp_path))
    sizes, threads = sizes_of(tiny_config(hidden_size=576, intermediate_size=1536)), torch.get_num_threads()
    started = time.thread_time()
    first = cpu_speed.cpu_speed(sizes)
    middle = time.thread_time()
    assert cpu_speed.cpu_speed(sizes) == first and first.float32 > 0 and first.bfloat16 > 0
    assert middle - started < 0.4  # 0.2 s on a machine with nothing else to do
    assert time.thread_time() - middle < 0.05
    assert torch.get_num_threads() == threads


def test_a_cache_that_cannot_be_used_costs_a_measurement_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMTUNE_CACHE", str(tmp_path))
    (tmp_path / "cpu_speed.json").write_text('{"half a fi')
    assert cpu_speed.cpu_speed(sizes_of(tiny_config())).float32 > 0
    (tmp_path / "file").touch()
    monkeypatch.setenv("LLMTUNE_CACHE", str(tmp_path / "file"))
    assert cpu_speed.cpu_speed(sizes_of(tiny_config())).float32 > 0


def test_the_environment_can_say_the_type(
    tiny_llama: str, chats: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = recipe(tiny_llama, chats, tmp_path / "run")
    monkeypatch.setenv(CPU_TYPE, "bfloat16")
    plan = llmtune.plan(keys)
    assert plan.model.precision.name == "bfloat16 mixed with float32" and CPU_TYPE in str(plan)
    monkeypatch.setenv(CPU_TYPE, "float64")
    with pytest.raises(PlanError, match=f'{CPU_TYPE}: found "float64" in the environment'):
        llmtune.plan(keys)


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_what_is_chosen_learns_what_float32_learns(
    method: str, tiny_llama: str, chats: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty steps with bfloat16 chosen for the recipe, against a float32 loop written by hand: within the 8
    significant bits of bfloat16, and no drift."""
    monkeypatch.setenv(CPU_TYPE, "bfloat16")
    peft = {} if method == "full" else {"peft_config": LORA}
    quant = {"quant_config": {"name": "bnb", "double_quantization": False}} if method == "qlora" else {}
    keys = recipe(
        tiny_llama, chats, tmp_path / "run", learning_rate=1e-3, max_steps=20, warmup_steps=3, logging_steps=1,
        lr_scheduler_config="cosine", optim_config={"name": "adamw", "weight_decay": 0.1},
    )  # fmt: skip
    keys = {key: value for key, value in keys.items() if key != "peft_config"} | peft | quant
    model = base_by_hand(keys)
    if peft:
        model = adapt_by_hand(model, LORA, dict(llmtune.build({**keys})[0].named_parameters()))
    expected = [loss for loss, _ in train_by_hand(keys, model, llmtune.plan(keys))]
    found = [row["loss"] for row in llmtune.train(keys).metrics if "loss" in row]
    assert found == pytest.approx(expected, rel=2**-7)
    assert found != pytest.approx(expected, rel=1e-6)  # it was not float32 after all
    assert found[-1] < found[0]


def test_a_continued_run_keeps_its_type_on_a_machine_that_would_choose_another(
    tiny_llama: str, chats: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = recipe(tiny_llama, chats, tmp_path / "straight", max_steps=4)
    monkeypatch.setenv(CPU_TYPE, "bfloat16")
    straight = llmtune.train(keys)
    stopped = {**keys, "output_dir": str(tmp_path / "stopped")}
    stop_after(stopped, 2)
    monkeypatch.setenv(CPU_TYPE, "float32")
    assert llmtune.plan(stopped).model.precision.name == "bfloat16 mixed with float32"
    assert llmtune.plan(stopped, ranks=1, device="t4").model.precision.name == "float32"
    continued = llmtune.train({**stopped, "save_steps": 1})
    assert_equal_runs(straight.output_dir, continued.output_dir)
    other = llmtune.plan({**keys, "output_dir": str(tmp_path / "other")})
    assert other.model.precision.name == "float32"


def ranks_of_two_machines(keys: dict[str, Any]) -> None:
    os.environ[CPU_TYPE] = "bfloat16" if os.environ["RANK"] == "0" else "float32"
    llmtune.train(keys)


def test_the_first_rank_decides_for_all(tiny_llama: str, chats: str, tmp_path: Path) -> None:
    keys = recipe(tiny_llama, chats, tmp_path / "run", max_steps=2, gradient_accumulation_steps=1)
    in_ranks(2, tmp_path / "ranks", ranks_of_two_machines, keys)
    run = llmtune.load(tmp_path / "run")
    named = recipe(tiny_llama, chats, tmp_path / "named", max_steps=2, gradient_accumulation_steps=1, bf16=True)
    in_ranks(2, tmp_path / "more", train_quietly, named)
    expected = [row["loss"] for row in llmtune.load(tmp_path / "named").metrics]
    assert [row["loss"] for row in run.metrics] == expected


def train_quietly(keys: dict[str, Any]) -> None:
    llmtune.train(keys)


@pytest.mark.parametrize("level", ["none", "full"])
def test_activation_checkpointing_goes_as_far_as_memory_asks(
    level: str, tiny_llama: str, chats: str, tmp_path: Path
) -> None:
    keys = recipe(tiny_llama, chats, tmp_path / "run", kernel_config=None, per_device_train_batch_size=8)
    roomy = llmtune.plan(keys, ranks=1, device="80GB")
    assert roomy.model.checkpointing == "none"
    batch = largest(roomy)
    peaks = {name: estimate_memory(roomy, batch, name).at_peak.total for name in ("none", "selective", "full")}
    assert peaks["none"] > peaks["selective"] >= peaks["full"]
    usable = {"none": peaks["none"], "full": peaks["full"]}[level] / SAFE * 1.01
    device = f"{(usable / GIB + 1) / 0.96:.6f}GB"
    plan = llmtune.plan(keys, ranks=1, device=device)
    assert plan.model.checkpointing == level
    assert f"activation checkpointing {level}; a step takes about" in str(plan)
    named = llmtune.plan({**keys, "activation_checkpointing": "selective"}, ranks=1, device=device)
    assert named.model.checkpointing == "selective"


def test_what_a_run_decides_is_on_record(tiny_llama: str, chats: str, tmp_path: Path) -> None:
    run = llmtune.train(recipe(tiny_llama, chats, tmp_path / "run", max_steps=1))
    record = json.loads((run.output_dir / "run.json").read_text())
    types = {"bf16": False, "fp16": False, "pure_bf16": False}
    assert record["decided"] == {**types, "activation_checkpointing": "none"}


def test_a_checkpoint_out_of_its_run_keeps_the_number_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMTUNE_CPU_DTYPE", "bfloat16")
    keys = running.tiny_recipe(tmp_path, max_steps=2, save_steps=2, bf16=None)
    run = llmtune.train(keys)
    shutil.copytree(run.output_dir / "checkpoints" / "step-00000002", tmp_path / "taken" / "step-00000002")
    monkeypatch.setenv("LLMTUNE_CPU_DTYPE", "float32")
    taken = str(tmp_path / "taken" / "step-00000002")
    again = {**keys, "output_dir": str(tmp_path / "again"), "resume_from_checkpoint": taken}
    before = resume.decided_before(load_recipe(again))
    assert before["bf16"] is True and "activation_checkpointing" not in before
