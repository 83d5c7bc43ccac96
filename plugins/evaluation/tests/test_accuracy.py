"""Token accuracy is that of a loop over whole logits, however rows are laid and on however many ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import llmtune
from llmtune import PlanError
from llmtune.testing import in_ranks, tiny_recipe


def keys(folder: Path, **changes: Any) -> dict[str, Any]:
    # A step that moves nothing, so that the accuracy is that of the model as it is.
    chosen = {
        "eval_config": "accuracy", "eval_strategy": "steps", "eval_steps": 1, "val_size": 9, "max_steps": 1,
        "learning_rate": 1e-12,
    }  # fmt: skip
    return tiny_recipe(folder, sizes={"initializer_range": 0.5}, **{**chosen, **changes})


def accuracy(given: dict[str, Any]) -> float:
    (row,) = (row for row in llmtune.train(given).metrics if "eval_loss" in row)
    return float(row["eval_accuracy"])


def by_hand(given: dict[str, Any]) -> float:
    """Of the same rows, one by one, from whole logits."""
    plan = llmtune.plan(given)
    model, _ = llmtune.build(given)
    model.eval()
    held, right, count = plan.data.prepared.evaluation, 0, 0
    for index in range(len(held)):
        ids, mask = (torch.tensor(array) for array in held.sample(index))
        with torch.no_grad():
            said = model(ids[None].long()).logits[0, :-1].argmax(-1)
        right, count = right + int((said == ids[1:])[mask[1:]].sum()), count + int(mask[1:].sum())
    return right / count


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_accuracy_is_that_of_whole_logits(family: str, tmp_path: Path) -> None:
    given = keys(tmp_path, family=family, learning_rate=0.05, max_steps=6, eval_steps=6, train_on_prompt=True)
    run = llmtune.train(given)
    (row,) = (row for row in run.metrics if "eval_loss" in row)
    expected = by_hand({**given, "model": str(tmp_path / "run" / "model"), "output_dir": str(tmp_path / "other")})
    assert 0.02 < expected < 0.98
    assert row["eval_accuracy"] == pytest.approx(expected, abs=1e-6)


def test_batches_packing_and_ranks_do_not_change_it(tmp_path: Path) -> None:
    given = keys(tmp_path, train_on_prompt=True)
    model = llmtune.train({**given, "learning_rate": 0.05, "max_steps": 6, "eval_steps": 6}).output_dir / "model"
    given = {**given, "model": str(model), "output_dir": str(tmp_path / "again"), "overwrite_output_dir": True}
    expected = accuracy(given)
    assert 0.02 < expected < 0.98
    assert accuracy({**given, "per_device_eval_batch_size": 4}) == pytest.approx(expected, abs=1e-7)
    assert accuracy({**given, "packing": True, "kernel_config": "auto"}) == pytest.approx(expected, abs=1e-7)
    halved = {**given, "gradient_accumulation_steps": 1}
    assert in_ranks(2, tmp_path / "two", accuracy, halved) == [pytest.approx(expected, abs=1e-7)] * 2


def test_each_data_set_has_its_own(tmp_path: Path) -> None:
    given = keys(tmp_path, val_size=0)
    rows = (tmp_path / "chats.jsonl").read_text().splitlines(keepends=True)
    for name, part in (("first", rows[:5]), ("second", rows[5:12])):
        (tmp_path / f"{name}.jsonl").write_text("".join(part))
    sets = [str(tmp_path / "first.jsonl"), str(tmp_path / "second.jsonl")]
    (row,) = (
        row
        for row in llmtune.train({**given, "eval_dataset": sets, "eval_on_each_dataset": True}).metrics
        if "eval_loss" in row
    )
    assert {name for name in row if name.endswith("accuracy")} == {
        "eval_accuracy", "eval_first_accuracy", "eval_second_accuracy",
    }  # fmt: skip


def test_models_without_words_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="eval_config: accuracy compares tokens, and .* has no head"):
        llmtune.plan(tiny_recipe(tmp_path, kind="preference", stage_config="rm", val_size=2, eval_config="accuracy"))


def test_a_metric_that_is_compared_has_to_be_reported(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match='found "eval_acuracy".*Did you mean "eval_accuracy"'):
        llmtune.plan(keys(tmp_path, metric_for_best_model="eval_acuracy"))
