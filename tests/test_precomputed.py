"""What a stage asks its further models before training: the same run without those models, and what is kept of it."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import llmtune
from llmtune.contract.errors import LlmtuneError
from llmtune.folders import cache_root
from llmtune.testing import running
from llmtune.testing.tiny import tiny_model_folder
from llmtune.training import building
from tests.spawn import in_ranks
from tests.test_further_models import CASES, LORA, found

NAMES = ("eval_loss", "eval_rewards/margins")


def keys(folder: Path, ahead: bool = True, **more: Any) -> dict[str, Any]:
    stage = {"name": "dpo", "precompute_reference": ahead, **more.pop("stage", {})}
    return running.tiny_recipe(
        folder, kind="preference", **{"stage_config": stage, "learning_rate": 0.01, "val_size": 6, **more}
    )


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMTUNE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def times_asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One number for each time that further models were built: how many numbers were kept then."""
    times: list[int] = []
    real = building.make_context

    def counting(plan: Any, ops: Any) -> Any:
        times.append(len(list((cache_root() / "data").glob("*.precomputed.safetensors"))))
        return real(plan, ops)

    monkeypatch.setattr(building, "make_context", counting)
    return times


@pytest.mark.parametrize("case", CASES)
def test_a_run_is_the_one_that_asks_in_every_step(case: str, tmp_path: Path, times_asked: list[int]) -> None:
    more = dict(CASES[case])
    if "stage" in more:
        other = tiny_model_folder(tmp_path / "other", seed=5, initializer_range=0.2)
        more["stage"] = {**more["stage"], "ref_model": str(other), "ld_alpha": 0.4}
    expected = found(keys(tmp_path, ahead=False, output_dir=str(tmp_path / "each"), **more))
    assert len(expected) == 4 and len(times_asked) == 1
    padded = found(keys(tmp_path, output_dir=str(tmp_path / "ahead"), **more))
    assert padded == pytest.approx(expected, rel=2e-6, abs=2e-6)
    evaluated = [
        [row[name] for row in llmtune.load(tmp_path / name_of).metrics for name in NAMES if name in row]
        for name_of in ("each", "ahead")
    ]
    assert len(evaluated[0]) >= 2 and evaluated[1] == pytest.approx(evaluated[0], rel=2e-6, abs=2e-6)
    assert len(times_asked) == 2
    # Kept: another layout, other steps and other ranks find the numbers of the same answers.
    packed = keys(tmp_path, output_dir=str(tmp_path / "flat"), kernel_config="auto", packing=True, **more)
    llmtune.train({**packed, "per_device_train_batch_size": 1})
    flat = found(keys(tmp_path, output_dir=str(tmp_path / "auto"), kernel_config="auto", **more))
    assert flat == pytest.approx(expected, rel=2e-4, abs=1e-5)
    assert len(times_asked) == 2
    given = keys(tmp_path, output_dir=str(tmp_path / "two"), gradient_accumulation_steps=1, **more)
    assert in_ranks(2, tmp_path / "ranks", found, {**given, "overwrite_cache": True})[0] == pytest.approx(
        expected, rel=2e-4, abs=1e-5
    )


def test_numbers_are_made_again_where_anything_they_depend_on_has_changed(
    tmp_path: Path, times_asked: list[int]
) -> None:
    def asks(**more: Any) -> bool:
        before = len(times_asked)
        llmtune.train(keys(tmp_path, overwrite_output_dir=True, max_steps=1, peft_config=LORA, **more))
        return len(times_asked) > before

    assert asks()
    assert not asks() and not asks(learning_rate=0.1, stage={"pref_beta": 0.5, "pref_loss": "ipo"})
    assert asks(stage={"ld_alpha": 0.5})
    assert asks(max_samples=20)
    assert asks(quant_config={"name": "bnb", "quantization_bit": 4})
    other = tiny_model_folder(tmp_path / "other", seed=5, initializer_range=0.2)
    assert asks(stage={"ref_model": str(other)})
    assert not asks(model=str(other)) and not asks()  # the same reference of the same data, and the first one again
    assert asks(overwrite_cache=True)
    for file in (cache_root() / "data").glob("*.precomputed.safetensors"):
        file.write_bytes(file.read_bytes()[:-4])
    assert asks() and not asks()


def test_a_run_goes_on_to_the_same_bytes_without_its_cache(tmp_path: Path) -> None:
    for case in ("full", "lora"):
        given = keys(tmp_path / case, save_steps=2, **CASES[case])
        straight = running.train({**given, "output_dir": str(tmp_path / case / "straight")})
        for file in (cache_root() / "data").glob("*.precomputed.safetensors"):
            file.unlink()
        checkpoint = tmp_path / case / "straight" / "checkpoints" / "step-00000002"
        again = {**given, "output_dir": str(tmp_path / case / "again"), "resume_from_checkpoint": str(checkpoint)}
        for name, tensor in running.train(again).tensors.items():
            assert torch.equal(tensor, straight.tensors[name]), name


def test_training_holds_no_reference(tmp_path: Path) -> None:
    each, ahead = (llmtune.plan(keys(tmp_path, ahead=ahead)) for ahead in (False, True))
    weights = 4 * ahead.model.parameters()[1]
    assert each.cost.memory.most.weights - ahead.cost.memory.most.weights == pytest.approx(weights, rel=0.01)
    assert "asked once, before training" in str(ahead) and "asked once" not in str(each)
    plan, objective = running.start(keys(tmp_path))
    (batch,) = plan.data.batches.step(0, plan.device)[:1]
    assert batch.extra["reference_logps"].shape == (batch.sequences,)
    assert np.isfinite(objective(batch).total.item())
    with pytest.raises(KeyError):
        objective.context.with_model("reference", lambda model, context: context.token_logps(model, batch))


def test_what_does_not_go_with_it_is_said_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(LlmtuneError, match="streaming: found true, but stage_config dpo asks its further models about"):
        llmtune.plan(keys(tmp_path, streaming=True))
    with pytest.raises(LlmtuneError, match="precompute_reference: pref_loss orpo asks no reference; leave it out"):
        llmtune.plan(keys(tmp_path, stage={"pref_loss": "orpo"}))


def test_rows_that_are_drawn_twice_have_the_numbers_of_their_answers(tmp_path: Path) -> None:
    rows = (Path(keys(tmp_path)["dataset"])).read_text().splitlines()
    for name, some in (("one", rows[:4]), ("two", rows[4:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(some))
    more: dict[str, Any] = {
        "dataset": [str(tmp_path / "one.jsonl"), str(tmp_path / "two.jsonl")], "mix_strategy": "interleave_over",
        "val_size": 0,
    }  # fmt: skip
    each = found(keys(tmp_path, ahead=False, output_dir=str(tmp_path / "each"), **more))
    ahead = found(keys(tmp_path, output_dir=str(tmp_path / "ahead"), **more))
    assert ahead == pytest.approx(each, rel=2e-6, abs=2e-6)


def test_numbers_are_those_of_the_adapters_that_are_merged(tmp_path: Path) -> None:
    """A lower adapter of the same name is another model: its first loss is that of no preference, too."""
    folder = tmp_path / "lower"
    for seed in (1, 2):
        run = running.tiny_recipe(
            tmp_path, peft_config=LORA, max_steps=2, seed=seed, output_dir=str(tmp_path / f"{seed}")
        )
        llmtune.train(run)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / f"{seed}" / "model", folder)
        peft = {**LORA, "adapter_name_or_path": str(folder), "create_new_adapter": True}
        rows = found(keys(tmp_path, peft_config=peft, max_steps=1, output_dir=str(tmp_path / f"dpo{seed}")))
        assert rows[0][0] == pytest.approx(math.log(2), abs=1e-5)
    with pytest.raises(LlmtuneError, match="the files in .*, or .*lower, are not those that .*dpo1 was trained on"):
        llmtune.load(tmp_path / "dpo1").model()  # the adapter beneath is another one by now
    llmtune.load(tmp_path / "dpo2").model()
